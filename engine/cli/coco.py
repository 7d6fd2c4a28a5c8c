"""COCO JSON of masks and boxes: run-length encoded segmentations that pycocotools and Pixano read."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Collects images, masks and boxes; `write` stores them as one COCO file.

    Args:
        description: Who made it.
        categories: Their names; the first has id 1. None for the one category of masks, ``object``.
    """

    def __init__(self, description: str, categories: Sequence[str] | None = None) -> None:
        self.description = description
        self.categories = [CATEGORY]
        if categories is not None:
            self.categories = [{**CATEGORY, "id": i, "name": name} for i, name in enumerate(categories, 1)]
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add_image(self, file_name: str, height: int, width: int) -> int:
        """Registers an image; returns its id."""
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        return image_id

    def add_mask(self, image_id: int, mask: npt.NDArray[np.bool_], score: float) -> dict[str, Any]:
        """Adds one mask (H, W) bool of an image; returns its annotation (``bbox`` is x, y, width, height)."""
        return self._add(image_id, _segmentation(encode_rle(mask)), mask_bbox(mask), int(np.count_nonzero(mask)), score)

    def add_box(
        self,
        image_id: int,
        box: Sequence[float],
        score: float,
        label: int,
        rle: dict[str, Any] | None = None,
        area: int | None = None,
    ) -> dict[str, Any]:
        """Adds one found object of an image; returns its annotation.

        Args:
            image_id: From `add_image`.
            box: x1, y1, x2, y2 in pixels, kept to a hundredth.
            score: The detector's.
            label: Position of its category.
            rle: Its mask, as `encode_rle` gives it. Without, ``segmentation`` is an empty list.
            area: Pixels of that mask; without, that of the box.
        """
        x1, y1, x2, y2 = (round(float(v), 2) for v in box)
        bbox = [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]
        size = round(bbox[2] * bbox[3], 2) if area is None else area
        segmentation: dict[str, Any] | list[Any] = [] if rle is None else _segmentation(rle)
        return self._add(image_id, segmentation, bbox, size, score, label + 1)

    def add_automatic(self, image_id: int, mask: AutomaticMask) -> dict[str, Any]:
        """Adds a mask of automatic segmentation; its annotation also has the keys of `AUTOMATIC_KEYS`."""
        record = mask.record()
        annotation = self._add(image_id, record["segmentation"], record["bbox"], mask.area, mask.score)
        annotation.update({key: record[key] for key in AUTOMATIC_KEYS})
        return annotation

    def _add(
        self,
        image_id: int,
        segmentation: dict[str, Any] | list[Any],
        bbox: Sequence[float],
        area: float,
        score: float,
        category: int = 1,
    ) -> dict[str, Any]:
        annotation = {
            "id": len(self.annotations) + 1,
            "image_id": image_id,
            "category_id": category,
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
            "categories": self.categories,
        }
        with replacing(path) as partial:
            partial.write_text(to_json(content) + "\n", encoding="utf-8")


def _segmentation(rle: dict[str, Any]) -> dict[str, Any]:
    return {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}


def mask_bbox(mask: npt.NDArray[np.bool_]) -> list[int]:
    """``[x, y, width, height]`` in whole pixels; four zeros for an empty mask."""
    return box_xywh(mask_box(mask))
