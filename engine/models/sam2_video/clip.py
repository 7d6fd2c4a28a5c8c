"""A short clip cut out of one picture, with what is to be done on it: for comparing a tracker with PyTorch.

The frames are windows of one size that move over the picture, so a clip costs a bundle no more than its windows. The
exporter measures parity on such a clip, and a smaller one is a bundle's golden clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..masks import mask_iou
from ..sam2.prompts import Prompt
from .tracker import FrameResult, VideoTracker

Image = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

TOLERANCE = 2e-4
"""Of a mask's largest logit: pixels nearer to the threshold may fall on either side of it. Twice a graph's own
tolerance, since a memory value that lies between two bfloat16 numbers may be rounded to the other one."""


@dataclass(frozen=True, eq=False)
class ClipPrompt:
    """A prompt on one frame, in its pixels.

    Attributes:
        object_id: Whom it marks.
        frame: Where.
        points: (N, 2) float32 x, y; N may be 0.
        labels: (N,) int32, 1 inside and 0 outside.
        box: (4,) float32 x0, y0, x1, y1, or None.
    """

    object_id: int
    frame: int
    points: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]
    box: npt.NDArray[np.float32] | None = None

    def prompt(self) -> Prompt:
        """As the tracker takes it."""
        if self.box is None:
            return Prompt(points=self.points, labels=self.labels)
        return Prompt(points=self.points, labels=self.labels, box=self.box)


@dataclass(frozen=True, eq=False)
class ClipPass:
    """Prompts, and then tracking from frame `start` to frame `end`, included."""

    prompts: tuple[ClipPrompt, ...]
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Clip:
    """Windows of a picture and passes over them.

    Attributes:
        windows: (T, 4) int32 left, top, width, height; all of one size.
        passes: In order.
    """

    windows: npt.NDArray[np.int32]
    passes: tuple[ClipPass, ...]

    def frames(self, picture: Image) -> list[Image]:
        """The frames, (h, w, 3) uint8 each.

        Raises:
            ValueError: A window reaches beyond the picture, or the sizes differ.
        """
        height, width = picture.shape[:2]
        left, top, wide, high = self.windows.T
        if (
            min(left.min(), top.min(), wide.min() - 1, high.min() - 1) < 0
            or (left + wide).max() > width
            or (top + high).max() > height
            or len({(int(w), int(h)) for w, h in zip(wide, high)}) != 1
        ):
            raise ValueError(f"windows {self.windows.tolist()} do not fit a picture of {width}x{height}")
        return [np.ascontiguousarray(picture[y : y + h, x : x + w]) for x, y, w, h in self.windows.tolist()]

    @property
    def objects(self) -> list[int]:
        """The objects, in the order in which they are marked."""
        return list(dict.fromkeys(p.object_id for one in self.passes for p in one.prompts))

    @property
    def order(self) -> list[tuple[int, int]]:
        """Pass and frame of every answer, in the order of `follow`."""
        found = []
        for index, one in enumerate(self.passes):
            step = -1 if one.end < one.start else 1
            found += [(index, frame) for frame in range(one.start, one.end + step, step)]
        return found


def moving_clip(
    size: tuple[int, int],
    frames: int,
    click: tuple[float, float] = (0.5, 0.5),
    box: tuple[float, float, float, float] = (0.25, 0.2, 0.85, 0.75),
) -> Clip:
    """A clip of a picture of `size` (height, width): two objects, a correction of the first, tracking goes on from it.

    The window has three quarters of the picture's sides and moves to the right and down, so the objects move to the
    left and up.

    Args:
        size: Of the picture.
        frames: At least 2.
        click: Of the first object on frame 0, as fractions of the frame's width and height. The correction clicks
            where that place has moved to, and says that the lower right corner does not belong to it.
        box: Of the second object on frame 0, likewise.
    """
    height, width = size
    h, w = 3 * height // 4, 3 * width // 4
    along = np.arange(frames) / (frames - 1)
    left, top = np.rint(along * (width - w)), np.rint(along * (height - h))
    windows = np.stack([left, top, np.full(frames, w), np.full(frames, h)], axis=1).astype(np.int32)
    middle = frames // 2

    def at(*fractions: float) -> npt.NDArray[np.float32]:
        return (np.array(fractions, np.float32).reshape(-1, 2) * np.array([w, h], np.float32)).astype(np.float32)

    moved = np.maximum(at(*click) - windows[middle, :2], 1).astype(np.float32)
    first = ClipPrompt(1, 0, at(*click), np.array([1], np.int32))
    second = ClipPrompt(2, 0, at(), np.zeros(0, np.int32), box=at(*box).reshape(4))
    fix = ClipPrompt(1, middle, np.concatenate([moved, at(0.95, 0.95)]), np.array([1, 0], np.int32))
    return Clip(windows, (ClipPass((first, second), 0, frames - 1), ClipPass((fix,), middle, frames - 1)))


def follow(tracker: VideoTracker, clip: Clip) -> Iterator[FrameResult]:
    """Does what a clip says on a fresh tracker of its frames; yields the results in `Clip.order`."""
    for one in clip.passes:
        for prompt in one.prompts:
            tracker.add_prompt(prompt.object_id, prompt.frame, prompt.prompt())
        yield from tracker.propagate(one.start, one.end)


def clip_iou(got: Mask, want: Mask, undecided: Mask) -> float:
    """IoU of two masks of one size; `undecided` pixels count as equal."""
    return mask_iou(np.where(undecided, want, got), want)


def bfloat16_distance(got: npt.NDArray[np.float32], exact: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """How far `exact` is from what rounds to `got`, per value; 0 where rounding `exact` to bfloat16 gives `got`.

    Memory maps are rounded, and two values that differ by next to nothing may be rounded to neighbours, 1/256 apart.
    The distance of the reference before its rounding says by how much the graph was off at least.

    Args:
        got: Values that bfloat16 can hold; others are a step off, NaN and infinity are infinitely far.
        exact: Reference values before rounding, of the same shape.
    """
    bits = np.ascontiguousarray(got, np.float32).view(np.uint32)
    # The numbers halfway to the neighbours away from 0 and towards 0; the latter does not exist for 0 itself.
    outer = (bits + np.uint32(0x8000)).view(np.float32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    inner = np.where(magnitude == 0, np.uint32(0), bits - np.uint32(0x8000)).view(np.float32)
    with np.errstate(invalid="ignore"):
        outer = np.where(magnitude == 0, np.float32(0), outer)
        low, high = np.minimum(inner, outer), np.maximum(inner, outer)
        distance = np.maximum(np.maximum(low - exact, exact - high), np.float32(0))
        # A value that bfloat16 cannot hold was not rounded: that counts as a whole step.
        off_grid = (bits & np.uint32(0xFFFF)) != 0
        step = np.abs(got) * np.float32(2**-7)
        distance = np.where(off_grid, np.maximum(np.abs(got - exact), step), distance)
    found: npt.NDArray[np.float32] = np.where(np.isfinite(got), distance, np.float32(np.inf)).astype(np.float32)
    return found
