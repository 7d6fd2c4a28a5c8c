"""A mask that is given as a prompt, as the graphs take it; upstream's ``_use_mask_as_output``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...contracts.sam2 import Sam2Constants
from ...contracts.sam2_video import Sam2VideoConstants
from ..sam2.preprocess import antialias_taps

Float32 = npt.NDArray[np.float32]

_SCALE, _BIAS = np.float32(20), np.float32(-10)


@dataclass(frozen=True, eq=False)
class GivenMask:
    """What a mask of the frame's size becomes.

    Attributes:
        full: (S, S) float32 logits, for the memory encoder.
        low: (m, m) float32 logits, as an answer has them.
        shrunk: (m, m) float32, for the decoder's mask input.
        score: Object score logit; negative for an empty mask.
    """

    full: Float32
    low: Float32
    shrunk: Float32
    score: float


def given_mask(mask: npt.NDArray[np.bool_], constants: Sam2Constants, video: Sam2VideoConstants) -> GivenMask:
    """Prepares a (H, W) bool mask."""
    side, low = constants.image_size, constants.mask_size
    square = (_resized(mask.astype(np.float32), side) >= 0.5).astype(np.float32)
    full = square * _SCALE + _BIAS
    kernel = np.array(video.mask_kernel[:16], np.float32).reshape(4, 4)
    shrunk = np.einsum("iajb,ab->ij", square.reshape(low, 4, low, 4), kernel) + np.float32(video.mask_kernel[16])
    score = float(_SCALE * bool(square.any()) + _BIAS)
    return GivenMask(full, _resized(full, low), shrunk.astype(np.float32), score)


def _resized(image: Float32, side: int) -> Float32:
    """(H, W) to (side, side), antialiased bilinear as torch's ``interpolate(antialias=True)``."""
    rows, columns = (_weights(size, side) for size in image.shape)
    return np.ascontiguousarray(rows @ (image @ columns.T))


def _weights(size: int, side: int) -> Float32:
    weights = np.zeros((side, size), np.float32)
    for row, (start, taps) in enumerate(antialias_taps(size, side)):
        weights[row, start : start + len(taps)] = taps
    return weights
