"""Classical baselines for the demo scenes: flood fill and GrabCut with the same click or box as the model.

They are given their best chance: the flood fill's tolerance and smoothing and GrabCut's start were swept on 60
training scenes (`sweep_baselines`) and the best values kept (see ``FLOOD_*`` and ``DISK``), the click and the box by
themselves.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from pixano_edge.export.demo.scenes import Mask

Picture = NDArray[np.uint8]
Click = tuple[int, int]
Box = tuple[int, int, int, int]

FLOOD_TOLERANCE = {"click": 38, "box": 38}  # largest difference to the seed's colour, for each channel
FLOOD_BLUR = {"click": 17, "box": 17}  # side of the median filter that comes first, 0 for none
DISK = 0.1  # GrabCut from a click: radius of the probable foreground, in sides of the image
GRABCUT_ROUNDS = 5


def _flood(image: Picture, seed: Click, tolerance: int) -> Mask:
    """The connected region around a seed whose colours stay within a tolerance of the seed's own colour."""
    height, width = image.shape[:2]
    mask = np.zeros((height + 2, width + 2), np.uint8)
    flags = 4 | cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE | (1 << 8)
    cv2.floodFill(image.copy(), mask, seed, 0, (tolerance,) * 3, (tolerance,) * 3, flags)
    return mask[1:-1, 1:-1].astype(bool)


def _fill_holes(mask: Mask) -> Mask:
    contours, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(mask.shape, np.uint8)
    cv2.drawContours(filled, contours, -1, 1, cv2.FILLED)
    return filled.astype(bool)


def flood_fill(
    image: Picture,
    *,
    click: Click | None = None,
    box: Box | None = None,
    tolerance: int | None = None,
    blur: int | None = None,
) -> Mask:
    """Flood fill from a click, or from the centre of a box and kept inside it.

    Args:
        image: (H, W, 3) uint8 RGB.
        click: (x, y) pixel inside the object; exactly one of ``click`` and ``box``.
        box: (x0, y0, x1, y1), one past the last pixel. Five seeds: its centre and the points halfway to its sides.
        tolerance: overrides the swept value.
        blur: overrides the swept size of the median filter.

    Returns:
        (H, W) bool, owned by the caller.
    """
    if (click is None) == (box is None):
        raise ValueError("give exactly one of click and box")
    kind = "click" if box is None else "box"
    size = FLOOD_BLUR[kind] if blur is None else blur
    smooth = np.asarray(cv2.medianBlur(image, size), np.uint8) if size else image
    limit = FLOOD_TOLERANCE[kind] if tolerance is None else tolerance
    if click is not None:
        return _fill_holes(_flood(smooth, click, limit))
    assert box is not None
    x0, y0, x1, y1 = box
    cx, cy, w, h = (x0 + x1) // 2, (y0 + y1) // 2, (x1 - x0) // 4, (y1 - y0) // 4
    mask = np.zeros(image.shape[:2], bool)
    for seed in ((cx, cy), (cx - w, cy), (cx + w, cy), (cx, cy - h), (cx, cy + h)):
        region = _flood(smooth, (min(seed[0], image.shape[1] - 1), min(seed[1], image.shape[0] - 1)), limit)
        region[:y0], region[y1:], region[:, :x0], region[:, x1:] = False, False, False, False
        mask |= region
    return _fill_holes(mask)


def grabcut(
    image: Picture,
    *,
    click: Click | None = None,
    box: Box | None = None,
    disk: float = DISK,
    rounds: int = GRABCUT_ROUNDS,
) -> Mask:
    """OpenCV's GrabCut from a click or a box.

    From a click, a disk around it is probable foreground, its core certain, and the rest probable background; the
    connected part under the click is kept. From a box, the usual start: background outside, probably foreground
    inside.

    Args:
        image: (H, W, 3) uint8 RGB.
        click: (x, y) pixel inside the object; exactly one of ``click`` and ``box``.
        box: (x0, y0, x1, y1), one past the last pixel.
        disk: radius of the probable foreground of a click, in sides of the image.
        rounds: iterations of GrabCut.

    Returns:
        (H, W) bool, owned by the caller.
    """
    if (click is None) == (box is None):
        raise ValueError("give exactly one of click and box")
    labels = np.full(image.shape[:2], cv2.GC_BGD, np.uint8)
    if box is not None:
        x0, y0, x1, y1 = box
        labels[y0:y1, x0:x1] = cv2.GC_PR_FGD
        if (labels != cv2.GC_BGD).all():  # no background to learn from
            return np.ones(image.shape[:2], bool)
    elif click is not None:
        labels[:] = cv2.GC_PR_BGD
        radius = max(2, round(disk * image.shape[0]))
        cv2.circle(labels, click, 3 * radius, cv2.GC_PR_BGD, -1)
        outside = np.full(labels.shape, 1, np.uint8)
        cv2.circle(outside, click, round(0.4 * image.shape[0]), 0, -1)
        labels[outside == 1] = cv2.GC_BGD
        cv2.circle(labels, click, radius, cv2.GC_PR_FGD, -1)
        cv2.circle(labels, click, max(1, radius // 4), cv2.GC_FGD, -1)
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    cv2.grabCut(image, labels, (0, 0, 0, 0), background, foreground, rounds, cv2.GC_INIT_WITH_MASK)
    mask = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    if box is not None:
        inside = np.zeros(mask.shape, bool)
        inside[box[1] : box[3], box[0] : box[2]] = True
        # GrabCut sometimes gives the whole box away; the box itself is then the better guess.
        return mask if mask.sum() >= 0.05 * inside.sum() else inside
    assert click is not None
    _, parts = cv2.connectedComponents(mask.view(np.uint8), connectivity=4)
    return (parts == parts[click[1], click[0]]) & mask
