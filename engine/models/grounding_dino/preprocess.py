"""Image to model input: resized by its shorter side within a limit for the longer one, then mean and deviation.

Reference: transformers' ``image_processing_pil_grounding_dino.py``, which follows the original's PIL transforms:
Pillow's bilinear resize of 8-bit pixels (antialiased, rounded to 8 bits), then rescaling and normalising in float32.
With 256 values per channel the last two are a lookup table, so the tensor is equal to the reference bit by bit.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...contracts.grounding_dino import GroundingDinoConstants
from ...errors import ContractError, ImageError


def resized_size(height: int, width: int, constants: GroundingDinoConstants) -> tuple[int, int]:
    """(height, width) of the model's input; transformers' ``get_size_with_aspect_ratio``.

    Raises:
        ImageError: So long and narrow that its feature maps have fewer places than the model has queries; the original
            fails on those, too.
    """
    short, limit = min(height, width), constants.longest_edge
    long = max(height, width)
    exact, edge = None, constants.shortest_edge
    if long / short * edge > limit:
        exact = limit * short / long
        edge = round(exact)
    if short == edge:
        size = (height, width)
    else:
        # The longer side from the unrounded shorter one, cut down to a whole number, as in the reference.
        other = int((edge if exact is None else exact) * long / short)
        size = (other, edge) if width < height else (edge, other)
    if min(size) < constants.min_edge:
        raise ImageError(
            f"An image of {width}x{height} pixels is too narrow for this detector: it would be resized to "
            f"{size[1]}x{size[0]}, and {constants.min_edge} pixels are the least.",
            "Cut it into pieces that are less long.",
        )
    return size


def preprocess(image: npt.NDArray[np.uint8], constants: GroundingDinoConstants, out: npt.NDArray[np.float32]) -> None:
    """Writes the model input of an image.

    Args:
        image: (H, W, 3) uint8 RGB.
        constants: Mean and standard deviation of the checkpoint.
        out: (1, 3, h, w) float32, C-contiguous, of the size that `resized_size` gives; written in full.

    Raises:
        ContractError: `out` has another shape, dtype or layout.
    """
    height, width = resized_size(image.shape[0], image.shape[1], constants)
    if out.shape != (1, 3, height, width) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ContractError(
            f"Pre-processing writes a C-contiguous float32[1, 3, {height}, {width}], got {out.dtype}{list(out.shape)}.",
            "Pass the buffer that the session bound for 'pixel_values'.",
        )
    resized = image
    if image.shape[:2] != (height, width):
        picture = Image.fromarray(np.ascontiguousarray(image))
        resized = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    table = _table(constants)
    for channel in range(3):
        np.take(table[channel], resized[:, :, channel], out=out[0, channel], mode="clip")


@functools.lru_cache(maxsize=8)
def _table(constants: GroundingDinoConstants) -> npt.NDArray[np.float32]:
    """(3, 256): the normalised value of each 8-bit value."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None] for values in (constants.mean, constants.std))
    return (scaled[None] - mean) / std
