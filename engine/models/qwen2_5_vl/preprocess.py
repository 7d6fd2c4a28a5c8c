"""Patches and windows of Qwen2.5-VL's vision encoder, and rotary positions of a prompt with images.

Reference: transformers' ``Qwen2VLImageProcessorPil`` (`resized_size`, `patches`) and
``Qwen2_5_VLModel.get_rope_index`` (`rope_positions`). What a window is: see `contracts.qwen2_5_vl`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...contracts.qwen2_5_vl import MAX_RATIO, QwenVlConstants, window_units
from ...errors import ImageError
from ..smolvlm.preprocess import Normaliser

Rgb = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Windows:
    """The vision encoder's inputs for one image, and where its features lie in the outputs.

    Attributes:
        pixels: (W, patches, channels) float32.
        positions: (W, patches, 2) int32 row and column of each patch.
        valid: (W, patches) float32.
        order: (rows * columns,) index of each unit, row by row of the image, in the flattened (W, units) outputs.
    """

    pixels: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int32]
    valid: npt.NDArray[np.float32]
    order: npt.NDArray[np.int64]


def resized_size(height: int, width: int, c: QwenVlConstants) -> tuple[int, int]:
    """(height, width) after the resize: multiples of `factor`, between the fewest and the most pixels.

    Raises:
        ImageError: The image is too long and thin for the model.
    """
    if max(height, width) / min(height, width) > MAX_RATIO:
        raise ImageError(
            f"An image of {width} x {height} pixels is too thin: this model takes sides of 1 to {MAX_RATIO}.",
            "Cut it into parts.",
        )
    factor = c.factor
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > c.max_pixels:
        shrink = math.sqrt(height * width / c.max_pixels)
        high = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif high * wide < c.min_pixels:
        grow = math.sqrt(c.min_pixels / (height * width))
        high = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return high, wide


def unit_grid(height: int, width: int, c: QwenVlConstants) -> tuple[int, int]:
    """Rows and columns of units of an image; their product is its number of image tokens. Raises as `resized_size`."""
    high, wide = resized_size(height, width, c)
    return high // c.factor, wide // c.factor


def patches(image: Rgb, c: QwenVlConstants, normaliser: Normaliser) -> npt.NDArray[np.float32]:
    """(units, merge_size ** 2, patch_channels) float32: patches of each unit, row by row both of them.

    Args:
        image: (H, W, 3) uint8 RGB; not kept.
        c: Of the checkpoint.
        normaliser: Of the checkpoint.
    """
    high, wide = resized_size(image.shape[0], image.shape[1], c)
    filter_ = Image.Resampling[c.resample.upper()]
    resized = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((wide, high), filter_))
    plane = np.empty((3, high, wide), np.float32)
    normaliser.write(resized, plane)
    m, p = c.merge_size, c.patch_size
    rows, columns = high // c.factor, wide // c.factor
    cut = plane.reshape(3, rows, m, p, columns, m, p).transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    shape = (*cut.shape[:5], c.temporal_patch_size, p, p)
    return np.broadcast_to(cut, shape).reshape(rows * columns, m * m, c.patch_channels)


def windows(image: Rgb, c: QwenVlConstants, normaliser: Normaliser) -> Windows:
    """The vision encoder's inputs for one image. Arguments as `patches`."""
    rows, columns = unit_grid(image.shape[0], image.shape[1], c)
    units = window_units(rows, columns, c.window_units)
    there = units >= 0
    m = c.merge_size
    inside = np.stack(np.divmod(np.arange(m * m), m), axis=1)
    corners = np.stack(np.divmod(np.where(there, units, 0), columns), axis=2) * m
    positions = corners[:, :, None] + inside[None, None]
    pixels = patches(image, c, normaliser)[np.where(there, units, 0)]
    pixels[~there] = 0
    positions[~there] = 0
    order = np.empty(rows * columns, np.int64)
    order[units[there]] = np.flatnonzero(there)
    count = c.patches_per_window
    return Windows(
        pixels.reshape(len(units), count, c.patch_channels),
        positions.reshape(len(units), count, 2).astype(np.int32),
        np.repeat(there, m * m, axis=1).astype(np.float32),
        order,
    )


def rope_positions(
    length: int, starts: Sequence[int], grids: Sequence[tuple[int, int]]
) -> tuple[npt.NDArray[np.int32], int]:
    """Rotary positions of a prompt.

    Args:
        length: Tokens.
        starts: Slot of the first token of each image, ascending.
        grids: Rows and columns of units of each image.

    Returns:
        (3, length) int32 temporal, height and width positions, and the position of the token after them.
    """
    found = np.empty((3, length), np.int32)
    slot = position = 0
    for start, (rows, columns) in zip(starts, grids):
        found[:, slot:start] = np.arange(start - slot) + position
        position += start - slot
        slot = start + rows * columns
        found[0, start:slot] = position
        row, column = np.divmod(np.arange(rows * columns), columns)
        found[1, start:slot] = position + row
        found[2, start:slot] = position + column
        position += max(rows, columns)
    found[:, slot:] = np.arange(length - slot) + position
    return found, position + length - slot
