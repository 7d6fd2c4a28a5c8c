"""Segment everything: a grid of single clicks, filtered by predicted IoU, stability and overlapping boxes.

Follows upstream's ``SAM2AutomaticMaskGenerator`` (``sam2/automatic_mask_generator.py`` and ``utils/amg.py``) with its
default thresholds, for the whole image as one crop: the stability score is taken on the logits at the original size.
Empty masks, which upstream keeps with a NaN stability, are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import CancelledError, PromptError
from ..masks import mask_box
from ..rle import decode_rle, encode_rle
from .postprocess import resize_logits, stability_score
from .predictor import Embedding, Sam2ImagePredictor
from .preprocess import Scratch
from .prompts import DEFAULT_BATCH, Prompt, PromptBatch, build_prompts

MAX_POINTS_PER_SIDE = 256


@dataclass(frozen=True, eq=False)
class AutomaticMask:
    """One mask of an image.

    Attributes:
        rle: COCO run-length encoding at the size of the original image.
        area: Foreground pixels.
        box: x1, y1, x2, y2 of the outermost foreground pixels, inclusive.
        predicted_iou: The model's own estimate.
        stability_score: IoU between the mask at a higher and at a lower threshold.
        point: x, y of the click that gave it, in original pixels.
    """

    rle: dict[str, Any]
    area: int
    box: tuple[int, int, int, int]
    predicted_iou: float
    stability_score: float
    point: tuple[float, float]

    @property
    def score(self) -> float:
        """Same as `predicted_iou`."""
        return self.predicted_iou

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """(H, W) bool, decoded at each access; the caller owns it."""
        return decode_rle(self.rle)


@dataclass(frozen=True)
class Filters:
    """Thresholds of `generate_masks`; upstream's defaults."""

    pred_iou_thresh: float = 0.8
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    min_area: int = 0


def generate_masks(
    predictor: Sam2ImagePredictor,
    image: npt.NDArray[np.uint8] | Embedding,
    points_per_side: int = 32,
    *,
    points_per_batch: int = DEFAULT_BATCH,
    filters: Filters | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[AutomaticMask]:
    """Masks of everything on an image, best predicted IoU first.

    Args:
        predictor: Any SAM 2 predictor.
        image: (H, W, 3) uint8 RGB, or its embedding.
        points_per_side: The grid has its square of clicks.
        points_per_batch: Clicks per decoder call.
        filters: Thresholds; None takes upstream's.
        progress: Called with (clicks done, clicks in all) after each batch.
        cancelled: Asked before each batch; True stops the work.

    Raises:
        CancelledError: `cancelled` returned True.
        PromptError: `points_per_side` is out of range.
        ImageError, DeviceError: See `Sam2ImagePredictor.encode`.
    """
    filters = filters or Filters()
    if not 1 <= points_per_side <= MAX_POINTS_PER_SIDE:
        raise PromptError(
            f"points_per_side must be 1 to {MAX_POINTS_PER_SIDE}, got {points_per_side}.", "Choose another grid."
        )
    embedding = image if isinstance(image, Embedding) else predictor.encode(image)
    points = point_grid(points_per_side, embedding.original_size)
    prompts = [Prompt(points=[point]) for point in points]
    scratch = Scratch()
    found: list[AutomaticMask] = []
    done = 0
    for batch in build_prompts(prompts, embedding.original_size, predictor.constants, points_per_batch):
        if cancelled is not None and cancelled():
            raise CancelledError(f"Automatic segmentation was stopped after {done} of {len(points)} clicks.")
        found += _batch_masks(predictor, embedding, batch, points, filters, scratch)
        done += len(batch.indices)
        if progress is not None:
            progress(done, len(points))
    boxes = np.array([m.box for m in found], np.float64).reshape(-1, 4)
    scores = np.array([m.predicted_iou for m in found])
    return [found[i] for i in non_maximum_suppression(boxes, scores, filters.box_nms_thresh)]


def point_grid(points_per_side: int, size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """(n * n, 2) x, y in pixels: centres of an even grid, row by row."""
    steps = (np.arange(points_per_side) + 0.5) / points_per_side
    x, y = np.meshgrid(steps * size[1], steps * size[0])
    return np.stack([x.ravel(), y.ravel()], axis=1)


def non_maximum_suppression(
    boxes: npt.NDArray[np.float64], scores: npt.NDArray[np.float64], threshold: float
) -> list[int]:
    """Indices of the boxes kept, best score first: a box goes when its IoU with a better one exceeds `threshold`.

    Boxes are x1, y1, x2, y2 with area (x2 - x1) * (y2 - y1), as in torchvision's ``nms``; boxes without area
    overlap nothing.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(int(best))
        corner = np.minimum(boxes[rest, 2:], boxes[best, 2:]) - np.maximum(boxes[rest, :2], boxes[best, :2])
        shared = np.prod(np.maximum(corner, 0.0), axis=1)
        union = areas[rest] + areas[best] - shared
        order = rest[shared <= threshold * union]
    return kept


def _batch_masks(
    predictor: Sam2ImagePredictor,
    embedding: Embedding,
    batch: PromptBatch,
    points: npt.NDArray[np.float64],
    filters: Filters,
    scratch: Scratch,
) -> list[AutomaticMask]:
    """The masks 1..3 of every click that pass the filters."""
    found = []
    threshold = predictor.constants.mask_threshold
    # As upstream, a threshold of 0 means no filter.
    least = filters.pred_iou_thresh if filters.pred_iou_thresh > 0 else -np.inf
    with predictor.decode(embedding, batch) as raw:
        for row, pick in zip(*np.nonzero(raw.scores[:, 1:] > least)):
            logits = resize_logits(raw.masks[row, pick + 1], embedding.original_size, scratch)
            stability = stability_score(logits, threshold, filters.stability_score_offset, scratch)
            if stability < filters.stability_score_thresh:
                continue
            mask = logits > np.float32(threshold)
            box = mask_box(mask)
            area = int(np.count_nonzero(mask))
            if box is None or area < filters.min_area:
                continue
            x, y = points[batch.indices[row]]
            found.append(
                AutomaticMask(
                    encode_rle(mask), area, box, float(raw.scores[row, pick + 1]), stability, (float(x), float(y))
                )
            )
    return found
