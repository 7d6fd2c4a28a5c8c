"""Fills small holes of a mask and removes its small islands.

Follows ``remove_small_regions`` of upstream's ``sam2/utils/amg.py``, first for holes, then for islands, with
8-connected regions. Only the part of the image around the mask is labelled: labels take four bytes per pixel.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


def remove_small_regions(mask: Mask, box: tuple[int, int, int, int], min_area: int) -> bool:
    """Changes `mask` in place: background regions, then foreground regions, below `min_area` pixels change sides.

    The largest foreground region stays when all are smaller. Background at the border of the image is a region like
    any other.

    Args:
        mask: (H, W) bool, C-contiguous, written.
        box: x1, y1, x2, y2 of its outermost foreground pixels, inclusive.
        min_area: In pixels; regions of this size stay.

    Returns:
        Whether anything changed.
    """
    rows, columns = _surroundings(mask.shape[0], mask.shape[1], box, min_area)
    part = mask[rows, columns]
    count, labels, areas = _label(~part)
    small = areas < min_area
    # These regions go on beyond the part, over at least `min_area` pixels.
    cuts = (rows.start > 0, rows.stop < mask.shape[0], columns.start > 0, columns.stop < mask.shape[1])
    for cut, edge in zip(cuts, (labels[0], labels[-1], labels[:, 0], labels[:, -1]), strict=True):
        if cut:
            small[edge] = False
    small[0] = False  # the mask itself
    changed = bool(small.any())
    if changed:
        part |= small[labels]
    count, labels, areas = _label(part)
    keep = areas >= min_area
    keep[0] = False  # the background
    if not keep[1:].all():
        if not keep.any() and count > 1:
            keep[1 + int(np.argmax(areas[1:]))] = True
        removed = bool((~keep[1:]).any())
        if removed:
            part &= keep[labels]
        changed |= removed
    return changed


def _label(part: Mask) -> tuple[int, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Number of labels, label of every pixel with 0 where `part` is False, and pixels of every label."""
    pixels = np.ascontiguousarray(part).view(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(pixels, connectivity=8)
    return count, np.asarray(labels, np.int32), np.asarray(stats[:, cv2.CC_STAT_AREA], np.int32)


def _surroundings(height: int, width: int, box: tuple[int, int, int, int], min_area: int) -> tuple[slice, slice]:
    """Rows and columns of `box` and a pixel around, up to the image's edge where less than `min_area` is beyond."""
    x1, y1, x2, y2 = box
    top, left, bottom, right = max(y1 - 1, 0), max(x1 - 1, 0), min(y2 + 2, height), min(x2 + 2, width)
    return (
        slice(top if top * width >= min_area else 0, bottom if (height - bottom) * width >= min_area else height),
        slice(left if left * height >= min_area else 0, right if (width - right) * height >= min_area else width),
    )
