"""COCO JSON of masks: run-length encoded segmentations that pycocotools and Pixano read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..models.masks import mask_box
from ..models.rle import encode_rle
from .output import replacing, to_json

CATEGORY = {"id": 1, "name": "object", "supercategory": "object"}


class CocoWriter:
    """Collects images and masks; `write` stores them as one COCO file."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add_image(self, file_name: str, height: int, width: int) -> int:
        """Registers an image; returns its id."""
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        return image_id

    def add_mask(self, image_id: int, mask: npt.NDArray[np.bool_], score: float) -> dict[str, Any]:
        """Adds one mask (H, W) bool of an image; returns its annotation (``bbox`` is x, y, width, height)."""
        rle = encode_rle(mask)
        annotation = {
            "id": len(self.annotations) + 1,
            "image_id": image_id,
            "category_id": CATEGORY["id"],
            "segmentation": {"size": [int(v) for v in rle["size"]], "counts": _text(rle["counts"])},
            "bbox": mask_bbox(mask),
            "area": int(np.count_nonzero(mask)),
            "score": round(float(score), 6),
            "iscrowd": 0,
        }
        self.annotations.append(annotation)
        return annotation

    def write(self, path: Path) -> None:
        """Writes the file; replaced in one step."""
        content = {
            "info": {"description": self.description},
            "images": self.images,
            "annotations": self.annotations,
            "categories": [CATEGORY],
        }
        with replacing(path) as partial:
            partial.write_text(to_json(content) + "\n", encoding="utf-8")


def _text(counts: bytes | str) -> str:
    # COCO's compressed counts are ASCII by construction.
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def mask_bbox(mask: npt.NDArray[np.bool_]) -> list[int]:
    """``[x, y, width, height]`` in whole pixels; four zeros for an empty mask."""
    box = mask_box(mask)
    if box is None:
        return [0, 0, 0, 0]
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1 + 1, y2 - y1 + 1]
