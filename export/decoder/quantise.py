"""Weights in 4 or 8 bits, block by block, as ONNX Runtime's `MatMulNBits` takes them.

Round to nearest, symmetric: a block of `BLOCK` weights that are multiplied with consecutive channels has one scale,
its largest magnitude over the largest code. No calibration data are needed, so the accuracy is that of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 32
ACCURACY_LEVEL = 4
"""Of `MatMulNBits`: the activations are quantised to int8 for the product."""


@dataclass(frozen=True)
class Quantised:
    """A (K, N) matrix in few bits.

    Attributes:
        codes: (N, K / BLOCK, BLOCK * bits / 8) uint8; two 4-bit codes per byte, the first one low.
        scales: (N * K / BLOCK,) float32.
        bits: 4 or 8.
        shape: K and N.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    bits: int
    shape: tuple[int, int]

    def dequantised(self) -> npt.NDArray[np.float32]:
        """The (K, N) matrix that the codes stand for."""
        rows, columns = self.shape
        codes: npt.NDArray[Any] = self.codes
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
        centred = codes.astype(np.float32) - (1 << (self.bits - 1))
        blocks = centred * self.scales.reshape(columns, -1, 1)
        return np.ascontiguousarray(blocks.reshape(columns, -1)[:, :rows].T)


def quantise(weight: npt.NDArray[np.float32], bits: int) -> Quantised:
    """Quantises a (K, N) matrix; K is filled up with zeros to whole blocks."""
    rows, columns = weight.shape
    filled = np.zeros((columns, -(-rows // BLOCK) * BLOCK), np.float32)
    filled[:, :rows] = weight.T
    blocks = filled.reshape(columns, -1, BLOCK)
    zero = 1 << (bits - 1)
    # The codes reach one further below zero than above it, so the largest magnitude is put there, whatever its sign.
    at = np.abs(blocks).argmax(axis=-1)[..., None]
    scales = np.take_along_axis(blocks, at, axis=-1) / -zero
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(scales == 0, 0, np.rint(blocks / scales))
    return pack(codes, scales[..., 0], bits, (rows, columns))


def pack(codes: npt.NDArray[Any], scales: npt.NDArray[Any], bits: int, shape: tuple[int, int]) -> Quantised:
    """Codes and scales as `MatMulNBits` takes them.

    Args:
        codes: (N, K / BLOCK, BLOCK) whole numbers around 0; clipped to what the bits hold.
        scales: (N, K / BLOCK) floats.
        bits: 4 or 8.
        shape: K and N.
    """
    zero = 1 << (bits - 1)
    shifted = np.clip(codes + zero, 0, 2 * zero - 1).astype(np.uint8)
    if bits == 4:
        shifted = shifted[..., 0::2] | (shifted[..., 1::2] << 4)
    return Quantised(np.ascontiguousarray(shifted), scales.reshape(-1).astype(np.float32), bits, shape)
