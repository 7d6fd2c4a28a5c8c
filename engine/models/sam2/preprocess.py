"""Image to model input: antialiased bilinear resize to a square, then mean and standard deviation.

Upstream (``sam2/utils/transforms.py``) resizes the float RGB tensor with torchvision, which is
``torch.nn.functional.interpolate(mode="bilinear", antialias=True, align_corners=False)``: a triangle filter whose
support grows with the downscaling factor, separable, renormalised at the borders. The same weights are built here
in float64 and applied as banded matrix products on blocks of output rows and columns, so that the work runs in BLAS
on small scratch buffers. OpenCV's ``INTER_LINEAR`` does not antialias and Pillow's RGB resize rounds to 8 bits
between its passes; neither gives the tensor the model was trained on.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...contracts.sam2 import Sam2Constants
from ...errors import ContractError, ImageError

Float32 = npt.NDArray[np.float32]

# Output rows and columns handled by one matrix product. Small blocks waste fewer multiplications by zero
# ((block + 2) / 2 times the needed ones), large ones make better use of BLAS.
_BLOCK_ROWS = 32
_BLOCK_COLUMNS = 32
# OpenBLAS stays on the calling thread up to this many multiplications (interface/gemm.c). Its thread pool spins
# between thousands of short products, which was seen to slow this 100 times on busy cores, so products are cut.
_MAX_PRODUCT = 1 << 18


class Scratch:
    """Float32 work memory that grows to the largest request and is reused; not thread-safe."""

    def __init__(self) -> None:
        self._flat: dict[str, Float32] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Float32:
        """Uninitialised C-contiguous view of `shape`, valid until the next `take` of the same name."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.size < size:
            flat = self._flat[name] = np.empty(size, np.float32)
        return flat[:size].reshape(shape)

    def trim(self, max_bytes: int) -> None:
        """Frees what is larger than `max_bytes`, so that one huge image does not hold its memory for ever."""
        for name in [name for name, flat in self._flat.items() if flat.nbytes > max_bytes]:
            del self._flat[name]


@dataclass(frozen=True)
class _Block:
    """Output positions ``[out_start, out_stop)`` as weighted sums of input positions ``[in_start, in_stop)``."""

    out_start: int
    out_stop: int
    in_start: int
    in_stop: int
    weights: Float32
    """(out_stop - out_start, in_stop - in_start), C-contiguous."""


def antialias_taps(in_size: int, out_size: int) -> list[tuple[int, npt.NDArray[np.float64]]]:
    """First input index and normalised weights of every output position, as torch computes them.

    Source: ``_compute_indices_weights_aa`` in PyTorch's ``aten/src/ATen/native/cpu/UpSampleKernel.cpp``.
    """
    scale = in_size / out_size
    # Upscaling keeps the plain two-tap filter; downscaling widens it by the factor.
    support = max(scale, 1.0)
    taps = []
    for position in range(out_size):
        center = scale * (position + 0.5)
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), in_size)
        offsets = (np.arange(first, last) - center + 0.5) / support
        weights = np.maximum(1.0 - np.abs(offsets), 0.0)
        taps.append((first, weights / weights.sum()))
    return taps


@functools.lru_cache(maxsize=32)
def _axis_blocks(in_size: int, out_size: int, block: int) -> tuple[_Block, ...]:
    """The taps of one axis as dense bands; about ``4 * (block + 2) * in_size`` bytes."""
    taps = antialias_taps(in_size, out_size)
    blocks = []
    for start in range(0, out_size, block):
        part = taps[start : start + block]
        low = min(first for first, _ in part)
        high = max(first + len(weights) for first, weights in part)
        dense = np.zeros((len(part), high - low), np.float32)
        for row, (first, weights) in enumerate(part):
            dense[row, first - low : first - low + len(weights)] = weights
        dense.flags.writeable = False
        blocks.append(_Block(start, start + len(part), low, high, dense))
    return tuple(blocks)


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
    scratch = scratch or Scratch()
    height, width = image.shape[:2]
    std = np.asarray(constants.std, np.float64)
    gain = (1.0 / (255.0 * std)).astype(np.float32).reshape(3, 1, 1)
    shift = (np.asarray(constants.mean, np.float64) / std).astype(np.float32).reshape(3, 1, 1)

    columns = _axis_blocks(width, size, _BLOCK_COLUMNS)
    for rows in _axis_blocks(height, size, _BLOCK_ROWS):
        taken, made = rows.in_stop - rows.in_start, rows.out_stop - rows.out_start
        pixels = scratch.take("pixels", (taken, width * 3))
        np.copyto(pixels.reshape(taken, width, 3), image[rows.in_start : rows.in_stop])
        mixed = scratch.take("mixed", (made, width * 3))
        step = max(1, _MAX_PRODUCT // (made * taken))
        for at in range(0, width * 3, step):
            np.matmul(rows.weights, pixels[:, at : at + step], out=mixed[:, at : at + step])
        planes = scratch.take("planes", (3, made, width))
        np.copyto(planes, mixed.reshape(made, width, 3).transpose(2, 0, 1))
        lines = planes.reshape(3 * made, width)
        for cols in columns:
            wide = cols.out_stop - cols.out_start
            tile = scratch.take("tile", (3 * made, wide))
            step = max(1, _MAX_PRODUCT // cols.weights.size)
            for at in range(0, 3 * made, step):
                np.matmul(lines[at : at + step, cols.in_start : cols.in_stop], cols.weights.T, out=tile[at : at + step])
            target = out[0, :, rows.out_start : rows.out_stop, cols.out_start : cols.out_stop]
            np.multiply(tile.reshape(3, made, wide), gain, out=target)
            np.subtract(target, shift, out=target)


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
