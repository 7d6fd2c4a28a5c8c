"""Tracking against PyTorch's own video predictor on the same weights, and controls that must not pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.models.masks import mask_iou
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.bank import ObjectBank, Selection
from pixano_edge.engine.models.sam2_video.steps import Step, Stepper
from pixano_edge.engine.models.sam2_video.tracker import VideoTracker

from .conftest import Tiny

FRAMES = 44
TOLERANCE = 2e-4
"""Of the largest logit. Seen: 7e-6; a memory value that rounds to the other bfloat16 neighbour may add to that."""
CLICK = (np.array([[300.0, 200.0]], np.float32), np.array([1], np.int32))
BOX = np.array([400, 150, 700, 450], np.float32)
FIX = (np.array([[620.0, 320.0], [100.0, 60.0]], np.float32), np.array([1, 0], np.int32))
LATE = (np.array([[800.0, 420.0]], np.float32), np.array([1], np.int32))


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


@pytest.fixture
def photos(bedroom: Path) -> list[np.ndarray]:
    files = sorted(bedroom.glob("*.jpg"))[:FRAMES]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def passes(tiny: Tiny, frames: list[np.ndarray], recorder: Recorder, length: int) -> Iterator[Comparison]:
    """A click, a box, forward; a correction in the middle, forward; a late mask, forward; backward."""
    from pixano_edge.export.sam2.video_reference import VideoReference

    reference = VideoReference(tiny.model, frames, tiny.constants)
    tracker = tiny.tracker(frames)
    middle, late = length // 2, 3 * length // 4
    seen = Comparison()

    def follow(start: int, end: int) -> None:
        for (frame, wanted), result in zip(reference.propagate(start, end), tracker.propagate(start, end), strict=True):
            assert result.frame == frame
            for number, want in wanted.items():
                seen.add(want, recorder.last[number])

    want = reference.prompt(1, 0, *CLICK)
    tracker.add_prompt(1, 0, Prompt(points=CLICK[0], labels=CLICK[1]))
    seen.add(want, recorder.last[1])
    want = reference.prompt(2, 0, box=BOX)
    tracker.add_prompt(2, 0, Prompt(box=BOX))
    seen.add(want, recorder.last[2])
    follow(0, length - 1)
    yield seen
    want = reference.correct(1, middle, *FIX)
    tracker.add_prompt(1, middle, Prompt(points=FIX[0], labels=FIX[1]))
    seen.add(want, recorder.last[1])
    follow(middle, length - 1)
    yield seen
    mask = np.zeros(frames[0].shape[:2], bool)
    mask[100:300, 500:800] = True
    want = reference.mask(3, late, mask)
    tracker.add_mask(3, late, mask)
    seen.add(want, recorder.last[3])
    follow(late, length - 1)
    yield seen
    follow(late, 0)
    yield seen


def test_forty_four_frames_three_objects(
    tiny_video: Tiny, photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, seen = passes(tiny_video, photos, Recorder(monkeypatch), FRAMES)
    assert seen.masks > 3 * FRAMES
    assert seen.error < TOLERANCE
    assert seen.iou >= 0.999


def test_corrections_as_transformers(
    tiny_video: Tiny, photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixano_edge.export.sam2.video_reference import VideoReference

    recorder, frames = Recorder(monkeypatch), photos[:12]
    reference = VideoReference(tiny_video.model, frames, tiny_video.constants)
    tracker = tiny_video.tracker(frames, corrections="tracked")
    reference.prompt(1, 0, *CLICK)
    tracker.add_prompt(1, 0, Prompt(points=CLICK[0], labels=CLICK[1]))
    for _ in zip(reference.propagate(0, 11), tracker.propagate(0, 11)):
        pass
    seen = Comparison()
    seen.add(reference.prompt(1, 6, *FIX), (tracker.add_prompt(1, 6, Prompt(*FIX)), recorder.last[1])[1])
    for (_, wanted), _ in zip(reference.propagate(7, 11), tracker.propagate(7, 11)):
        seen.add(wanted[1], recorder.last[1])
    assert seen.error < TOLERANCE


def _remembering(change: Callable[..., None]) -> Callable[[Stepper, pytest.MonkeyPatch], None]:
    """Another `Stepper._remember`: gets the original and its arguments."""

    def install(stepper: Stepper, monkeypatch: pytest.MonkeyPatch) -> None:
        original = Stepper._remember
        monkeypatch.setattr(Stepper, "_remember", lambda self, *args: change(original, self, *args))

    return install


def _zeroed(original: Any, self: Stepper, embedding: Any, decoder: Any, picks: Any, slots: Any, *rest: Any) -> None:
    original(self, embedding, decoder, picks, slots, *rest)
    for slot in slots:
        slot.features.host()[:] = 0


def _pointers_lost(
    original: Any, self: Stepper, embedding: Any, decoder: Any, picks: Any, slots: Any, *rest: Any
) -> None:
    original(self, embedding, decoder, picks, slots, *rest)
    for slot in slots:
        slot.pointer.host()[:] = 0


def _not_binarised(
    original: Any, self: Stepper, embedding: Any, decoder: Any, picks: Any, slots: Any, prompted: bool, *rest: Any
) -> None:
    original(self, embedding, decoder, picks, slots, not prompted, *rest)


def _wrong_scale(original: Any, self: Stepper, embedding: Any, decoder: Any, *rest: Any) -> None:
    masks = decoder.outputs[sam2.MASKS].host()
    masks *= np.float32(0.5)
    original(self, embedding, decoder, *rest)


def _changed(change: Callable[[Selection[Any]], Selection[Any]]) -> Callable[[Stepper, pytest.MonkeyPatch], None]:
    def install(stepper: Stepper, monkeypatch: pytest.MonkeyPatch) -> None:
        original = ObjectBank.select
        monkeypatch.setattr(ObjectBank, "select", lambda self, *args: change(original(self, *args)))

    return install


def _bank_off_by_one(stepper: Stepper, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ObjectBank.select
    monkeypatch.setattr(
        ObjectBank, "select", lambda self, frame, reverse, frames: original(self, frame - 1, reverse, frames)
    )


MISTAKES: dict[str, Callable[[Stepper, pytest.MonkeyPatch], None]] = {
    "zeroed memory": _remembering(_zeroed),
    "wrong temporal row": _changed(lambda s: Selection(s.memories, [(r + 1) % 7 for r in s.rows], s.pointers, s.times)),
    "wrong pointer times": _changed(lambda s: Selection(s.memories, s.rows, s.pointers, [t + 1 / 15 for t in s.times])),
    "dropped pointers": _changed(lambda s: Selection(s.memories, s.rows, s.pointers[:1], s.times[:1])),
    "bank off by one frame": _bank_off_by_one,
    "zeroed pointers": _remembering(_pointers_lost),
    "memory not binarised": _remembering(_not_binarised),
    "wrong scale before the memory encoder": _remembering(_wrong_scale),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_control_mistakes_are_caught(
    tiny_video: Tiny, photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    recorder = Recorder(monkeypatch)
    MISTAKES[mistake](tiny_video.stepper, monkeypatch)
    seen = next(passes(tiny_video, photos[:10], recorder, 10))
    assert seen.error > 10 * TOLERANCE, seen.error
