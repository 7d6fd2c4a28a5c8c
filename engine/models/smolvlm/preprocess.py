"""Pixels of SmolVLM's vision encoder, as transformers' ``SmolVLMImageProcessorPil`` and ``Idefics3ImageProcessorPil``.

An image is resized so that its longer side is `longest_edge`, then so that both sides are whole tiles, both times by
Pillow on bytes; then it is cut into tiles, row by row, and the whole image shrunk to one tile comes last. The released
checkpoints ask for Lanczos: Pillow's is what they were trained with and what transformers uses without torchvision
(with torchvision before 0.27, or on a GPU, transformers takes bicubic instead and says so). Every tile is a full
square, so there is no padding and no pixel mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Rgb = npt.NDArray[np.uint8]

MAX_SIDE = 4096
"""Upper bound of the first resize in transformers (``MAX_IMAGE_SIZE``)."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """A cut image.

    Attributes:
        rows: Tiles from top to bottom; 0 for an image that is one tile and was not cut.
        columns: Tiles from left to right; 0 likewise.
        squares: (S, S, 3) uint8 views or arrays: `rows` * `columns` row by row, then the whole image.
    """

    rows: int
    columns: int
    squares: tuple[Rgb, ...]

    def __len__(self) -> int:
        return len(self.squares)


def tile_grid(height: int, width: int, longest_edge: int, tile: int, split: bool = True) -> tuple[int, int]:
    """Rows and columns that an image of a size is cut into; (0, 0) where it is not cut."""
    if not split:
        return 0, 0
    height, width = whole_tiles(*longest_edge_size(height, width, longest_edge), tile)
    return (0, 0) if height <= tile and width <= tile else (height // tile, width // tile)


def cut(
    image: Rgb, longest_edge: int, tile: int, *, split: bool = True, resample: int = Image.Resampling.LANCZOS
) -> Tiles:
    """Resizes and cuts an image.

    Args:
        image: (H, W, 3) uint8 RGB; not kept, not changed.
        longest_edge: Longer side after the first resize.
        tile: Side of a tile.
        split: Cut it; otherwise the whole image becomes one tile.
        resample: Pillow's number of the filter.
    """
    size = longest_edge_size(image.shape[0], image.shape[1], longest_edge)
    resized = _resize(image, size, resample)
    if not split:
        return Tiles(0, 0, (_resize(resized, (tile, tile), resample),))
    height, width = whole_tiles(*size, tile)
    resized = _resize(resized, (height, width), resample)
    if height <= tile and width <= tile:
        return Tiles(0, 0, (resized,))
    rows, columns = height // tile, width // tile
    squares = [
        resized[r * tile : (r + 1) * tile, c * tile : (c + 1) * tile] for r in range(rows) for c in range(columns)
    ]
    return Tiles(rows, columns, (*squares, _resize(resized, (tile, tile), resample)))


def longest_edge_size(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """(height, width) whose longer side is `longest_edge` and whose shorter one is even, then at most `MAX_SIDE`."""
    ratio = width / height
    if width >= height:
        width = longest_edge
        height = int(width / ratio)
        height += height % 2
    else:
        height = longest_edge
        width = int(height * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > MAX_SIDE:
        height, width = int(MAX_SIDE / ratio), MAX_SIDE
    elif height > width and height > MAX_SIDE:
        height, width = MAX_SIDE, int(MAX_SIDE * ratio)
    return max(height, 1), max(width, 1)


def whole_tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    """(height, width) in whole tiles; the shorter side is computed from the longer one and then rounded up, too."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    return height, width


class Normaliser:
    """Bytes to normalised floats, through a table of all 256 values that holds transformers' very results.

    Args:
        mean: Per channel, of pixels scaled to 0..1.
        std: Per channel.
        scale: What bytes are multiplied by before.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], scale: float = 1 / 255) -> None:
        scaled = (np.arange(256).astype(np.float64) * scale).astype(np.float32)
        means, stds = np.array(mean, np.float32), np.array(std, np.float32)
        self._table: npt.NDArray[np.float32] = ((scaled[None] - means[:, None]) / stds[:, None]).astype(np.float32)

    def write(self, square: Rgb, out: npt.NDArray[np.float32]) -> None:
        """Fills `out` (3, S, S) float32 from (S, S, 3) bytes."""
        for channel in range(3):
            np.take(self._table[channel], square[:, :, channel], out=out[channel], mode="clip")


def _resize(image: Rgb, size: tuple[int, int], resample: int) -> Rgb:
    if image.shape[:2] == size:  # Pillow returns a copy then, too
        return image
    picture = Image.fromarray(np.ascontiguousarray(image)).resize((size[1], size[0]), Image.Resampling(resample))
    return np.asarray(picture)
