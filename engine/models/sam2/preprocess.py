"""Image to model input: antialiased bilinear resize to a square, then mean and standard deviation.

Upstream (``sam2/utils/transforms.py``) resizes the float RGB tensor with torchvision, which is
``torch.nn.functional.interpolate(mode="bilinear", antialias=True, align_corners=False)``: a triangle filter whose
support grows with the downscaling factor, separable, renormalised at the borders. The same weights are built here
in float64 and applied by `resampling`. OpenCV's ``INTER_LINEAR`` does not antialias and Pillow's RGB resize rounds to
8 bits between its passes; neither gives the tensor the model was trained on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...contracts.sam2 import Sam2Constants
from ...errors import ContractError, ImageError
from ..resampling import Float32, Scratch, Taps, resample

__all__ = ["Scratch", "antialias_taps", "check_image", "preprocess"]


def antialias_taps(in_size: int, out_size: int) -> Taps:
    """First input index and normalised weights of every output position, as torch computes them.

    Source: ``_compute_indices_weights_aa`` in PyTorch's ``aten/src/ATen/native/cpu/UpSampleKernel.cpp``.
    """
    scale = in_size / out_size
    # Upscaling keeps the plain two-tap filter; downscaling widens it by the factor.
    support = max(scale, 1.0)
    center = scale * (np.arange(out_size) + 0.5)
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    last = np.minimum((center + support + 0.5).astype(np.int64), in_size)
    index = first[:, None] + np.arange(int((last - first).max()))
    weights = np.maximum(1.0 - np.abs((index - center[:, None] + 0.5) / support), 0.0)
    # Each divided by the sum of its own, not of a longer row with zeros, which numpy would add up in another order.
    rows = zip(first.tolist(), (last - first).tolist(), weights)
    return [(start, row[:count] / row[:count].sum()) for start, count, row in rows]


def preprocess(
    image: npt.NDArray[np.uint8], constants: Sam2Constants, out: Float32, scratch: Scratch | None = None
) -> None:
    """Writes the model input for one image.

    Args:
        image: (H, W, 3) uint8 RGB, any strides; read only.
        constants: Image size S, mean and standard deviation of the checkpoint.
        out: (1, 3, S, S) float32, C-contiguous, written in full; normally the encoder's bound input buffer.
        scratch: Reused work memory; with it, repeated calls allocate nothing of image or tensor size.

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
    resample(image, antialias_taps, antialias_taps, constants.mean, constants.std, out, scratch or Scratch())


def check_image(image: npt.NDArray[Any]) -> None:
    """Refuses anything but a non-empty (H, W, 3) uint8 array; raises ImageError."""
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        given = f"{image.dtype}{list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(
            f"An image must be a uint8 array of shape (height, width, 3) in RGB order, got {given}.",
            "Decode files with pixano_edge.engine.models.images.decode_image.",
        )
    if image.shape[0] == 0 or image.shape[1] == 0:
        raise ImageError(f"The image is empty: {image.shape[1]}x{image.shape[0]} pixels.", "Pass a real image.")
