"""What tracking is compared with: keeping the first mask, and warping it along dense optical flow. OpenCV only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pixano_edge.export.demo.scenes import Mask

Image = NDArray[np.uint8]


def copies(mask: Mask, count: int) -> list[Mask]:
    """The first mask on each of ``count`` frames."""
    return [mask] * count


def flow_maps(frames: Sequence[Image]) -> list[NDArray[np.float32]]:
    """Where each pixel of each frame lay on the first one: T times (H, W, 2) float32 x and y.

    Dense inverse search (Kroeger et al. 2016; OpenCV's medium preset) from each frame back to the one before. The
    displacements are chained, so that a mask is resampled once, however long the clip; points that leave the picture
    stay outside.
    """
    search: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    height, width = frames[0].shape[:2]
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)
    maps = [grid]
    before = cv2.cvtColor(frames[0], cv2.COLOR_RGB2GRAY)
    for frame in frames[1:]:
        gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        flow: NDArray[np.float32] = search.calc(gray, before, None)
        there = grid + flow
        maps.append(_resample(maps[-1], there, (-2.0 * width, -2.0 * height, 0.0, 0.0)))
        before = gray
    return maps


def warped(mask: Mask, maps: Sequence[NDArray[np.float32]]) -> list[Mask]:
    """The first mask carried along :func:`flow_maps`, on each frame."""
    soft = mask.astype(np.float32)
    return [_resample(soft, place, (0.0, 0.0, 0.0, 0.0)) > 0.5 for place in maps]


def _resample(
    values: NDArray[np.float32], places: NDArray[np.float32], outside: tuple[float, float, float, float]
) -> NDArray[np.float32]:
    """``values`` (H, W) or (H, W, 2) at ``places`` (H, W, 2), bilinear; ``outside`` where those leave the picture."""
    x, y = (np.ascontiguousarray(places[..., axis]) for axis in (0, 1))
    sampled = cv2.remap(values, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=outside)
    return np.asarray(sampled, np.float32)
