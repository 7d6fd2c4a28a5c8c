"""Image to model input, as the published processors of OWLv2 and OWL-ViT do it.

OWLv2 (upstream ``scenic/projects/owl_vit``, transformers' ``image_processing_pil_owlv2.py``): black is added below or
on the right until the picture is square, then it is smoothed by a Gaussian (sigma ``(scale - 1) / 2``, as
scikit-image's ``resize``) and sampled bilinearly, both in float with pixels mirrored at the border. Smoothing and
sampling are linear and separable, so their product is one band of weights per axis, applied by `resampling`; rows and
columns of the black part need not exist. (transformers before 5 added gray; upstream's OWLv2 adds black, see
huggingface/transformers#41938.)

OWL-ViT: the picture is resized to a square with Pillow's bicubic filter, which rounds to 8 bits, whatever its shape.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...contracts.owlv2 import PADDED_SQUARE, OwlConstants
from ...errors import ContractError
from ..resampling import Float32, Scratch, Taps, resample
from ..sam2.preprocess import check_image

_TRUNCATE = 4.0
"""The Gaussian ends after so many sigmas; scipy's default."""


def preprocess(
    image: npt.NDArray[np.uint8], constants: OwlConstants, out: Float32, scratch: Scratch | None = None
) -> None:
    """Writes the model input for one image.

    Args:
        image: (H, W, 3) uint8 RGB, any strides; read only.
        constants: Of the checkpoint.
        out: (1, 3, S, S) float32, C-contiguous, written in full; normally the encoder's bound input buffer.
        scratch: Reused work memory. OWL-ViT takes none: Pillow allocates its (S, S, 3) bytes itself.

    Raises:
        ImageError: `image` is not (H, W, 3) uint8 or is empty.
        ContractError: `out` has another shape, dtype or layout.
    """
    check_image(image)
    size = constants.image_size
    if out.shape != (1, 3, size, size) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ContractError(
            f"Pre-processing writes a C-contiguous float32[1, 3, {size}, {size}], got {out.dtype}{list(out.shape)}.",
            "Pass the buffer that the session bound for 'pixel_values'.",
        )
    if constants.resize == PADDED_SQUARE:
        taps = SmoothedTaps(max(image.shape[:2]))
        resample(image, taps, taps, constants.mean, constants.std, out, scratch or Scratch())
        return
    picture = Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    table = _levels(constants.mean, constants.std)
    for channel in range(3):
        # 'clip' is what lets numpy write into `out` directly; every index is in range.
        np.take(table[channel], pixels[:, :, channel], out=out[0, channel], mode="clip")


@functools.lru_cache(maxsize=8)
def _levels(mean: tuple[float, ...], std: tuple[float, ...]) -> Float32:
    """(3, 256): what becomes of each level of each channel, in float32 as transformers computes it."""
    level = (np.arange(256) * (1 / 255)).astype(np.float32)
    return np.stack([(level - np.float32(m)) / np.float32(s) for m, s in zip(mean, std)])


@dataclass(frozen=True)
class SmoothedTaps:
    """Weights of a Gaussian followed by bilinear sampling, on an axis that was padded with black.

    Attributes:
        side: Length of the axis with its padding.
    """

    side: int

    def __call__(self, in_size: int, out_size: int) -> Taps:
        """Taps on the first `in_size` of `side` pixels; the rest is black and left out."""
        scale = self.side / out_size
        kernel = gaussian((scale - 1) / 2)
        reach = len(kernel) // 2
        around = np.arange(-reach, reach + 1)
        place = scale * (np.arange(out_size) + 0.5) - 0.5
        low = np.floor(place)
        part = (place - low)[:, None, None]
        # Two samples, each the centre of a smoothed neighbourhood, all of them mirrored at the border.
        centre = mirror(low.astype(np.int64)[:, None] + np.arange(2), self.side)
        index = mirror(centre[:, :, None] + around, self.side)  # (out_size, 2, taps)
        weight = np.concatenate([1 - part, part], 1) * kernel
        first = index.min((1, 2))
        offset = index - first[:, None, None]
        wide = int(offset.max()) + 1
        cell = offset + wide * np.arange(out_size)[:, None, None]
        flat: npt.NDArray[Any] = np.bincount(cell.ravel(), weight.ravel(), minlength=out_size * wide)
        counts = np.minimum(offset.max((1, 2)) + 1, in_size - first)
        rows = zip(first.tolist(), counts.tolist(), flat.reshape(out_size, wide))
        return [(start, row[:count]) if count > 0 else (in_size - 1, np.zeros(1)) for start, count, row in rows]


def gaussian(sigma: float) -> npt.NDArray[np.float64]:
    """Normalised Gaussian weights as ``scipy.ndimage.gaussian_filter1d`` takes them; one weight for no smoothing."""
    if sigma <= 1e-15:
        return np.ones(1)
    reach = int(_TRUNCATE * sigma + 0.5)
    weights: npt.NDArray[np.float64] = np.exp(-0.5 / (sigma * sigma) * np.arange(-reach, reach + 1) ** 2)
    weights /= weights.sum()
    return weights


def mirror(index: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Indices folded into 0..size - 1, the border pixel being the mirror (scipy's ``mirror``)."""
    if size == 1:
        return np.zeros_like(index)
    period = 2 * (size - 1)
    folded = index % period
    return np.minimum(folded, period - folded)
