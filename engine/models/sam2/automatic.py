"""Segment everything: a grid of single clicks on the image and on crops of it, filtered and freed of duplicates.

Follows upstream's ``SAM2AutomaticMaskGenerator`` (``sam2/automatic_mask_generator.py`` and ``utils/amg.py``): predicted
IoU, stability and the mask itself are taken at the size of the crop, boxes that end at an inner edge of their crop go,
then duplicates go within each crop and between crops. Differences: `min_mask_region_area` works on the full masks at
the end, as upstream's ``postprocess_small_regions`` describes and SAM 1 does, not on low-resolution logits; empty
masks, which upstream keeps where the stability filter is off, go. No more than one mask is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import CancelledError, DeviceMemoryError, PromptError
from ..detection.nms import non_maximum_suppression
from ..masks import box_xywh, mask_box
from ..rle import decode_rle, encode_rle, encode_rle_at
from .automatic_options import AutomaticOptions
from .crops import Box, Crop, crop_image, touches_inner_edge
from .postprocess import LOGIT_CLAMP, choose_masks, foreground_part, resize_logits, scratch_mask, stability_score
from .predictor import Embedding, RawOutputs, Sam2ImagePredictor
from .preprocess import Scratch, check_image
from .prompts import Prompt, PromptBatch, build_prompts
from .regions import remove_small_regions

__all__ = ["AutomaticMask", "AutomaticOptions", "generate_masks"]

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class AutomaticMask:
    """One mask of an image. All coordinates are pixels of the whole image.

    Attributes:
        rle: COCO run-length encoding at the size of the image.
        area: Foreground pixels.
        box: x1, y1, x2, y2 of the outermost foreground pixels, inclusive.
        predicted_iou: The model's own estimate.
        stability_score: IoU between the mask at a higher and at a lower threshold.
        point: x, y of the click that gave it.
        crop_box: x1, y1, x2, y2 of the crop it was found in; x2 and y2 are the first pixels outside.
    """

    rle: dict[str, Any]
    area: int
    box: Box
    predicted_iou: float
    stability_score: float
    point: tuple[float, float]
    crop_box: Box

    @property
    def score(self) -> float:
        """Same as `predicted_iou`."""
        return self.predicted_iou

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """(H, W) bool, decoded at each access; the caller owns it."""
        height, width = self.rle["size"]
        return decode_rle(self.rle, max_pixels=height * width)

    def record(self) -> dict[str, Any]:
        """JSON-ready, with the keys of upstream and of SA-1B's files.

        ``bbox`` and ``crop_box`` are x, y, width, height; ``bbox`` counts whole pixels as COCO's tools do, so it is one
        wider and higher than upstream's.
        """
        x1, y1, x2, y2 = self.crop_box
        return {
            "segmentation": {"size": list(self.rle["size"]), "counts": self.rle["counts"].decode("ascii")},
            "area": self.area,
            "bbox": box_xywh(self.box),
            "predicted_iou": self.predicted_iou,
            "point_coords": [list(self.point)],
            "stability_score": self.stability_score,
            "crop_box": [x1, y1, x2 - x1, y2 - y1],
        }


def generate_masks(
    predictor: Sam2ImagePredictor,
    image: npt.NDArray[np.uint8] | Embedding,
    options: AutomaticOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[AutomaticMask]:
    """Masks of everything on an image.

    The features of the whole image go through the predictor's cache, since clicks on it usually follow; those of the
    crops do not, because one call would push out the images of every other user.

    Args:
        predictor: Any SAM 2 predictor.
        image: (H, W, 3) uint8 RGB; without crop layers its embedding is enough.
        options: None takes upstream's defaults.
        progress: Called with (clicks done, clicks on all crops) after each batch.
        cancelled: Asked before each encoding, each batch and each cleaned mask; True stops the work.

    Returns:
        In upstream's order: masks that `min_mask_region_area` left as they were before changed ones, then smaller
        crops before larger ones, then by predicted IoU, best first.

    Raises:
        CancelledError: `cancelled` returned True.
        PromptError: An option is out of range, or crops were asked of an embedding.
        ImageError, DeviceError: See `Sam2ImagePredictor.encode`.
    """
    options = options or AutomaticOptions()
    grids = options.check()
    if isinstance(image, Embedding):
        if options.crop_n_layers:
            raise PromptError("Crops are cut from the image, and an embedding has no pixels.", "Pass the image itself.")
        size = image.original_size
    else:
        check_image(image)
        size = (image.shape[0], image.shape[1])
    crops = crop_image(size, options.crop_n_layers, options.crop_overlap_ratio)
    clicks = _Clicks(predictor, options, size, sum(len(grids[c.layer]) for c in crops), progress, cancelled)
    found: list[AutomaticMask] = []
    preference: list[int] = []
    for crop in crops:
        masks = clicks.masks_of(image, crop, grids[crop.layer])
        found += masks
        preference += [-crop.area] * len(masks)
    if len(crops) > 1:
        found = _suppress(found, preference, options.crop_nms_thresh)
    return _clean(found, options, clicks.check) if options.min_mask_region_area else found


def _suppress(found: Sequence[AutomaticMask], scores: Sequence[float], threshold: float) -> list[AutomaticMask]:
    """The masks whose boxes survive, best score first."""
    boxes = np.array([m.box for m in found], np.float64).reshape(-1, 4)
    return [found[i] for i in non_maximum_suppression(boxes, np.asarray(scores, np.float64), threshold)]


def _clean(found: Sequence[AutomaticMask], options: AutomaticOptions, check: Callable[[], None]) -> list[AutomaticMask]:
    """Masks without small regions; where that made duplicates, the ones that were left as they are stay."""
    cleaned: list[AutomaticMask] = []
    untouched: list[float] = []
    for one in found:
        check()
        mask = one.mask
        changed = remove_small_regions(mask, one.box, options.min_mask_region_area)
        if changed:
            box = mask_box(mask)
            assert box is not None, "the largest region stays"
            one = replace(one, rle=encode_rle(mask), area=int(np.count_nonzero(mask)), box=box)
        if one.area >= options.min_area:
            cleaned.append(one)
            untouched.append(float(not changed))
    return _suppress(cleaned, untouched, max(options.box_nms_thresh, options.crop_nms_thresh))


class _Clicks:
    """Decodes the clicks of one call, crop by crop; owns the work memory and the count for `progress`."""

    def __init__(
        self,
        predictor: Sam2ImagePredictor,
        options: AutomaticOptions,
        size: tuple[int, int],
        total: int,
        progress: Callable[[int, int], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self._predictor = predictor
        self._options = options
        self._size = size
        self._total = total
        self._progress = progress
        self._cancelled = cancelled
        self._done = 0
        self._scratch = Scratch()
        constants = predictor.constants
        self._threshold = constants.mask_threshold if options.mask_threshold is None else options.mask_threshold
        # As upstream, in float32, and a threshold of 0 means no filter.
        self._least_iou = np.float32(options.pred_iou_thresh if options.pred_iou_thresh > 0 else -np.inf)

    def check(self) -> None:
        """Raises CancelledError when the caller wants no more."""
        if self._cancelled is not None and self._cancelled():
            raise CancelledError(f"Automatic segmentation was stopped after {self._done} of {self._total} clicks.")

    def masks_of(
        self, image: npt.NDArray[np.uint8] | Embedding, crop: Crop, grid: npt.NDArray[np.float64]
    ) -> list[AutomaticMask]:
        """The masks of one crop that pass the filters, best predicted IoU first, without duplicates."""
        self.check()
        if isinstance(image, Embedding):
            embedding = image
        else:
            x1, y1, x2, y2 = crop.box
            embedding = self._predictor.encode(image[y1:y2, x1:x2], cached=crop.layer == 0)
        height, width = crop.size
        points = grid * (width, height)
        found: list[AutomaticMask] = []
        for start in range(0, len(points), self._options.points_per_batch):
            clicked = points[start : start + self._options.points_per_batch]
            prompts = [Prompt(points=[point]) for point in clicked]
            several = self._options.multimask_output
            if self._options.use_m2m:
                prompts = self._with_masks(embedding, prompts, several)
                several = False
            found += self._masks(embedding, crop, prompts, several)
            self._done += len(clicked)
            if self._progress is not None:
                self._progress(self._done, self._total)
        return _suppress(found, [m.predicted_iou for m in found], self._options.box_nms_thresh)

    def _decode(
        self, embedding: Embedding, prompts: Sequence[Prompt], take: Callable[[PromptBatch, RawOutputs], None]
    ) -> None:
        """Calls `take` with every batch of answers in order; batches are halved where the device has no room."""
        constants, most = self._predictor.constants, self._options.points_per_batch
        pending = build_prompts(prompts, embedding.original_size, constants, most)[::-1]
        while pending:
            self.check()
            batch = pending.pop()
            try:
                with self._predictor.decode(embedding, batch) as raw:
                    take(batch, raw)
            except DeviceMemoryError as error:
                pending += self._predictor.halve(batch, error)[::-1]

    def _with_masks(self, embedding: Embedding, prompts: Sequence[Prompt], several: bool) -> list[Prompt]:
        """The same clicks, once per mask that they give, with the logits of that mask as mask input."""
        refined: list[Prompt] = []

        def take(batch: PromptBatch, raw: RawOutputs) -> None:
            for row, index in enumerate(batch.indices):
                for pick in self._picks(raw, row, several):
                    logits = np.clip(raw.masks[row, pick], -LOGIT_CLAMP, LOGIT_CLAMP)
                    refined.append(Prompt(points=prompts[index].points, mask_input=logits))

        self._decode(embedding, prompts, take)
        return refined

    def _picks(self, raw: RawOutputs, row: int, several: bool) -> list[int]:
        return choose_masks(raw.masks[row], raw.scores[row], several, self._predictor.constants, self._scratch)

    def _masks(self, embedding: Embedding, crop: Crop, prompts: Sequence[Prompt], several: bool) -> list[AutomaticMask]:
        """The masks of some clicks that pass the filters, in the order of the clicks."""
        found: list[AutomaticMask] = []

        def take(batch: PromptBatch, raw: RawOutputs) -> None:
            for row, index in enumerate(batch.indices):
                for pick in self._picks(raw, row, several):
                    score = raw.scores[row, pick]
                    if score > self._least_iou:
                        mask = self._mask(crop, prompts[index], raw.masks[row, pick], float(score))
                        if mask is not None:
                            found.append(mask)

        self._decode(embedding, prompts, take)
        return found

    def _mask(self, crop: Crop, prompt: Prompt, low: Float32, score: float) -> AutomaticMask | None:
        """One mask at its place in the image, None when a filter drops it."""
        options, scratch = self._options, self._scratch
        part = foreground_part(low, self._threshold - options.stability_score_offset, crop.size)
        if part is None:
            return None
        logits = resize_logits(low, crop.size, scratch)[part]
        stability = stability_score(logits, self._threshold, options.stability_score_offset, scratch)
        if np.float32(stability) < np.float32(options.stability_score_thresh):
            return None
        mask = np.greater(logits, np.float32(self._threshold), out=scratch_mask(scratch, "mask", logits.shape))
        inside = mask_box(mask)
        area = int(np.count_nonzero(mask))
        if inside is None or area < options.min_area:
            return None
        x1, y1, x2, y2 = inside
        left, top = crop.box[0] + part[1].start, crop.box[1] + part[0].start
        box = (left + x1, top + y1, left + x2, top + y2)
        if touches_inner_edge(box, crop, self._size):
            return None
        rle = encode_rle_at(mask[y1 : y2 + 1, x1 : x2 + 1], (box[0], box[1]), self._size)
        x, y = np.asarray(prompt.points, np.float64)[0]
        point = (float(crop.box[0] + x), float(crop.box[1] + y))
        return AutomaticMask(rle, area, box, score, stability, point, crop.box)
