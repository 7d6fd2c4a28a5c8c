"""Figures of binary masks: overlap of two, and the box around one. numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

Item = TypeVar("Item")

Mask = npt.NDArray[np.bool_]


def mask_iou(a: Mask, b: Mask) -> float:
    """Intersection over union of two masks of equal shape; two empty masks agree: 1.

    Raises:
        ValueError: Other shapes, or not bool.
    """
    if a.shape != b.shape or a.dtype != np.bool_ or b.dtype != np.bool_:
        raise ValueError(f"mask_iou compares bool masks of one shape, got {a.dtype}{a.shape} and {b.dtype}{b.shape}")
    union = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / union if union else 1.0


def mask_box(mask: Mask) -> tuple[int, int, int, int] | None:
    """x1, y1, x2, y2 of the outermost foreground pixels (inclusive), or None for an empty mask."""
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0:
        return None
    columns = np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def box_xywh(box: tuple[int, int, int, int] | None) -> list[int]:
    """COCO's ``[x, y, width, height]`` in whole pixels for what `mask_box` returned; four zeros for an empty mask."""
    if box is None:
        return [0, 0, 0, 0]
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1 + 1, y2 - y1 + 1]


class LazyMasks(Sequence[npt.NDArray[np.bool_]], Generic[Item]):
    """Masks (H, W) bool, decoded at each access: those of a hundred objects on a large photo would not fit in memory.

    Args:
        items: What they are decoded from.
        decode: Makes the mask of an item.
    """

    def __init__(self, items: Sequence[Item], decode: Callable[[Item], npt.NDArray[np.bool_]]) -> None:
        self._items, self._decode = items, decode

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> npt.NDArray[np.bool_]: ...
    @overload
    def __getitem__(self, index: slice) -> LazyMasks[Item]: ...
    def __getitem__(self, index: int | slice) -> npt.NDArray[np.bool_] | LazyMasks[Item]:
        if isinstance(index, slice):
            return LazyMasks(self._items[index], self._decode)
        return self._decode(self._items[index])
