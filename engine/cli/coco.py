"""COCO JSON of masks: run-length encoded segmentations that pycocotools and Pixano read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..models.masks import box_xywh, mask_box
from ..models.rle import encode_rle
from .output import replacing, to_json

if TYPE_CHECKING:
    from ..models.sam2.automatic import AutomaticMask

CATEGORY = {"id": 1, "name": "object", "supercategory": "object"}
AUTOMATIC_KEYS = ("predicted_iou", "stability_score", "point_coords", "crop_box")
"""What an automatic mask's annotation has besides COCO's keys, as in SA-1B."""


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
        return self._add(
            image_id,
            {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")},
            mask_bbox(mask),
            int(np.count_nonzero(mask)),
            score,
        )

    def add_automatic(self, image_id: int, mask: AutomaticMask) -> dict[str, Any]:
        """Adds a mask of automatic segmentation; its annotation also has the keys of `AUTOMATIC_KEYS`."""
        record = mask.record()
        annotation = self._add(image_id, record["segmentation"], record["bbox"], mask.area, mask.score)
        annotation.update({key: record[key] for key in AUTOMATIC_KEYS})
        return annotation

    def _add(
        self, image_id: int, segmentation: dict[str, Any], bbox: list[int], area: int, score: float
    ) -> dict[str, Any]:
        annotation = {
            "id": len(self.annotations) + 1,
            "image_id": image_id,
            "category_id": CATEGORY["id"],
            "segmentation": segmentation,
            "bbox": bbox,
            "area": area,
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


def mask_bbox(mask: npt.NDArray[np.bool_]) -> list[int]:
    """``[x, y, width, height]`` in whole pixels; four zeros for an empty mask."""
    return box_xywh(mask_box(mask))
