"""Comparing a tracker with PyTorch's, frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.models.masks import mask_iou
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.steps import Step
from pixano_edge.engine.models.sam2_video.tracker import VideoTracker

from .conftest import Tiny

TOLERANCE = 2e-4
"""Of the largest logit. Seen: 7e-6; a memory value that rounds to the other bfloat16 neighbour may add to that."""


class Recorder:
    """The low-resolution logits behind each result of a tracker."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.last: dict[int, Step] = {}
        original = VideoTracker._result

        def spy(tracker: VideoTracker, object_id: int, step: Step) -> Any:
            self.last[object_id] = step
            return original(tracker, object_id, step)

        monkeypatch.setattr(VideoTracker, "_result", spy)


class Comparison:
    """Worst relative error and worst mask IoU so far."""

    def __init__(self) -> None:
        self.error = 0.0
        self.iou = 1.0
        self.masks = 0

    def add(self, want: tuple[np.ndarray, float], got: Step) -> None:
        logits, score = want
        self.error = max(
            self.error,
            float(np.abs(logits - got.logits).max() / np.abs(logits).max()),
            abs(score - got.score) / max(abs(score), 1.0),
        )
        # Pixels nearer to the border than the tolerance may fall on either side.
        clear = np.abs(logits) > TOLERANCE * np.abs(logits).max()
        self.iou = min(self.iou, mask_iou((logits > 0) & clear, (got.logits > 0) & clear))
        self.masks += 1


@dataclass(frozen=True, eq=False)
class Click:
    """Points or a box for an object on a frame, as a correction where the object was tracked there already."""

    object_id: int
    frame: int
    points: Sequence[tuple[float, float]] = ()
    labels: Sequence[int] = ()
    box: tuple[float, float, float, float] | None = None
    correction: bool = False


@dataclass(frozen=True, eq=False)
class Painted:
    """A mask for an object on a frame."""

    object_id: int
    frame: int
    mask: np.ndarray


Track = tuple[int, int]
"""First and last frame of a pass."""


def play(
    tiny: Tiny, frames: list[np.ndarray], recorder: Recorder, script: Sequence[Click | Painted | Track], **options: Any
) -> Iterator[Comparison]:
    """Does the same with PyTorch and with the engine; yields the comparison so far after each step."""
    from pixano_edge.export.sam2.video_reference import VideoReference

    reference = VideoReference(tiny.model, frames, tiny.constants)
    tracker = tiny.tracker(frames, **options)
    seen = Comparison()
    for step in script:
        if isinstance(step, Click):
            points, labels = np.array(step.points, np.float32).reshape(-1, 2), np.array(step.labels, np.int32)
            box = None if step.box is None else np.array(step.box, np.float32)
            ask: Callable[..., Any] = reference.correct if step.correction else reference.prompt
            want = ask(step.object_id, step.frame, points, labels, box)
            tracker.add_prompt(step.object_id, step.frame, Prompt(points, labels, box))
            seen.add(want, recorder.last[step.object_id])
        elif isinstance(step, Painted):
            want = reference.mask(step.object_id, step.frame, step.mask)
            tracker.add_mask(step.object_id, step.frame, step.mask)
            seen.add(want, recorder.last[step.object_id])
        else:
            both = zip(reference.propagate(*step), tracker.propagate(*step), strict=True)
            for (frame, wanted), result in both:
                assert result.frame == frame
                for number, want in wanted.items():
                    seen.add(want, recorder.last[number])
        yield seen
    tracker.close()


def final(steps: Iterator[Comparison]) -> Comparison:
    """The comparison after the last step."""
    *_, seen = steps
    return seen


def check(seen: Comparison, tolerance: float = TOLERANCE) -> None:
    """The bar of this project for fp32."""
    assert seen.error < tolerance, seen.error
    assert seen.iou >= 0.999, seen.iou
