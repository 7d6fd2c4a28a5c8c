"""Decoder logits to the masks a caller asked for: which of the four, and at the size of the original image.

Rules as in upstream's mask decoder (``sam2/modeling/sam/mask_decoder.py``) and image predictor: with multimask the
three masks 1..3 in model order, not sorted by score; without it mask 0, unless that one is unstable, in which case
the mask 1..3 with the highest predicted IoU. Upscaling is bilinear on logits, thresholding comes after it.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ...contracts.sam2 import NUM_MASKS, Sam2Constants
from ..masks import mask_box
from .preprocess import Scratch

Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

LOGIT_CLAMP = 32.0
"""Low-resolution logits are handed out within this range, as upstream's image predictor does."""


def mask_count(multimask: bool) -> int:
    """Masks per prompt in an answer."""
    return NUM_MASKS - 1 if multimask else 1


def stability_score(logits: Float32, threshold: float, offset: float, scratch: Scratch) -> float:
    """IoU of the mask at ``threshold + offset`` with the one at ``threshold - offset``; 1 when both are empty.

    Args:
        logits: Any shape and strides.
        threshold: Logit of the mask's border.
        offset: Margin on both sides.
        scratch: Work memory.
    """
    above = scratch_mask(scratch, "above", logits.shape)
    inner = int(np.count_nonzero(np.greater(logits, np.float32(threshold + offset), out=above)))
    outer = int(np.count_nonzero(np.greater(logits, np.float32(threshold - offset), out=above)))
    return inner / outer if outer else 1.0


def scratch_mask(scratch: Scratch, name: str, shape: tuple[int, ...]) -> Mask:
    """Uninitialised C-contiguous bool array, valid until the next request of the same name."""
    size = math.prod(shape)
    return scratch.take(name, ((size + 3) // 4,)).view(np.bool_)[:size].reshape(shape)


def choose_masks(
    logits: Float32, scores: Float32, multimask: bool, constants: Sam2Constants, scratch: Scratch
) -> list[int]:
    """Indices of the masks to return for one prompt.

    Args:
        logits: (4, m, m) of one prompt.
        scores: (4,) predicted IoU.
        multimask: Whether three masks were asked for.
        constants: Stability rule of the checkpoint.
        scratch: Work memory.
    """
    if multimask:
        return list(range(1, NUM_MASKS))
    if constants.dynamic_multimask_via_stability:
        # Upstream centres the margin on logit 0 whatever the mask threshold, and compares in float32.
        stability = stability_score(logits[0], 0.0, constants.stability_delta, scratch)
        if np.float32(stability) < np.float32(constants.stability_threshold):
            return [1 + int(np.argmax(scores[1:]))]
    return [0]


def resize_logits(logits: Float32, size: tuple[int, int], scratch: Scratch) -> Float32:
    """One mask's logits at the original size; ``interpolate(mode="bilinear", align_corners=False)``.

    Args:
        logits: (m, m) C-contiguous.
        size: (height, width).
        scratch: Holds the result, which is valid until its next use.
    """
    large = scratch.take("large", size)
    # Neither torch's call nor OpenCV's linear resize antialiases, so images smaller than the mask agree too.
    result: Any = cv2.resize(logits, (size[1], size[0]), dst=large, interpolation=cv2.INTER_LINEAR)
    return result if result is large else np.asarray(result, np.float32)


def foreground_part(logits: Float32, level: float, size: tuple[int, int]) -> tuple[slice, slice] | None:
    """Rows and columns of `resize_logits` outside which nothing exceeds `level`; None where nothing does at all.

    Every pixel mixes the two by two cells around it, so it lies between their logits.

    Args:
        logits: (m, m) of one mask.
        level: Logit.
        size: (height, width) after resizing.
    """
    box = mask_box(logits > np.float32(level))
    if box is None:
        return None
    x1, y1, x2, y2 = box
    return _pixels_of(y1, y2, logits.shape[0], size[0]), _pixels_of(x1, x2, logits.shape[1], size[1])


def _pixels_of(first: int, last: int, cells: int, pixels: int) -> slice:
    """The pixels that mix cells `first` to `last`: pixel p lies at cell (p + 0.5) * cells / pixels - 0.5."""
    start = math.floor((first - 0.5) * pixels / cells - 0.5)
    stop = math.ceil((last + 1.5) * pixels / cells - 0.5) + 1
    return slice(max(start, 0), min(stop, pixels))


def write_mask(logits: Float32, threshold: float, out: Mask, scratch: Scratch) -> None:
    """Upscales one mask's logits (m, m) to `out` (H, W) bool and thresholds them."""
    np.greater(resize_logits(logits, (out.shape[0], out.shape[1]), scratch), np.float32(threshold), out=out)
