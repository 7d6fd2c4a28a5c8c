"""Separable resampling of images: weighted sums of rows, then of columns, as banded matrix products.

A filter is given by its taps: first input index and weights of every output position. They are applied on blocks of
output rows and columns, so that the work runs in BLAS on small scratch buffers, in float32 without rounding between
the passes, and mean and standard deviation are taken care of on the way into the model's own input buffer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


Taps = list[tuple[int, npt.NDArray[np.float64]]]
"""First input index and weights of every output position."""


@dataclass(frozen=True)
class Block:
    """Output positions ``[out_start, out_stop)`` as weighted sums of input positions ``[in_start, in_stop)``."""

    out_start: int
    out_stop: int
    in_start: int
    in_stop: int
    weights: Float32
    """(out_stop - out_start, in_stop - in_start), C-contiguous."""


@functools.lru_cache(maxsize=32)
def axis_blocks(taps_of: Callable[[int, int], Taps], in_size: int, out_size: int, block: int) -> tuple[Block, ...]:
    """The taps of one axis as dense bands; ``4 * (block + 2) * in_size`` bytes for a filter as wide as the scale."""
    taps = taps_of(in_size, out_size)
    blocks = []
    for start in range(0, out_size, block):
        part = taps[start : start + block]
        low = min(first for first, _ in part)
        high = max(first + len(weights) for first, weights in part)
        dense = np.zeros((len(part), high - low), np.float32)
        for row, (first, weights) in enumerate(part):
            dense[row, first - low : first - low + len(weights)] = weights
        dense.flags.writeable = False
        blocks.append(Block(start, start + len(part), low, high, dense))
    return tuple(blocks)


def resample(
    image: npt.NDArray[np.uint8],
    down: Callable[[int, int], Taps],
    across: Callable[[int, int], Taps],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    out: Float32,
    scratch: Scratch,
) -> None:
    """Writes ``(image / 255 - mean) / std``, resampled to a square.

    Args:
        image: (H, W, 3) uint8, any strides; read only.
        down: Taps of the rows for an input and an output size; hashable, since what it gives is kept. Weights of 0
            alone stand for what lies outside the image, which is black.
        across: Taps of the columns.
        mean: Per channel, on pixels scaled to 0..1.
        std: Per channel.
        out: (1, 3, S, S) float32, C-contiguous, written in full.
        scratch: Reused work memory; with it, repeated calls allocate nothing of image or tensor size.
    """
    size = out.shape[-1]
    height, width = image.shape[:2]
    deviation = np.asarray(std, np.float64)
    gain = (1.0 / (255.0 * deviation)).astype(np.float32).reshape(3, 1, 1)
    shift = (np.asarray(mean, np.float64) / deviation).astype(np.float32).reshape(3, 1, 1)

    columns = axis_blocks(across, width, size, _BLOCK_COLUMNS)
    for rows in axis_blocks(down, height, size, _BLOCK_ROWS):
        if not rows.weights.any():
            out[0, :, rows.out_start : rows.out_stop] = -shift
            continue
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
