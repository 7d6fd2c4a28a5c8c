"""Tracking against PyTorch's own video predictor on the same weights, and controls that must not pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.models.sam2_video.bank import ObjectBank, Selection
from pixano_edge.engine.models.sam2_video.steps import Stepper

from .conftest import Tiny
from .parity import TOLERANCE, Click, Comparison, Painted, Recorder, check, final, play

FRAMES = 44


@pytest.fixture
def photos(bedroom: Path) -> list[np.ndarray]:
    files = sorted(bedroom.glob("*.jpg"))[:FRAMES]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def passes(
    tiny: Tiny, frames: list[np.ndarray], recorder: Recorder, length: int, **options: Any
) -> Iterator[Comparison]:
    """A click, a box, forward; a correction in the middle, forward; a late mask, forward; backward."""
    middle, late = length // 2, 3 * length // 4
    mask = np.zeros(frames[0].shape[:2], bool)
    mask[100:300, 500:800] = True
    script = [
        Click(1, 0, [(300, 200)], [1]),
        Click(2, 0, box=(400, 150, 700, 450)),
        (0, length - 1),
        Click(1, middle, [(620, 320), (100, 60)], [1, 0], correction=True),
        (middle, length - 1),
        Painted(3, late, mask),
        (late, length - 1),
        (late, 0),
    ]
    return play(tiny, frames, recorder, script, **options)


def test_forty_four_frames_three_objects(
    tiny_video: Tiny, photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = final(passes(tiny_video, photos, Recorder(monkeypatch), FRAMES))
    assert seen.masks > 3 * FRAMES
    check(seen)


def test_without_far_memories_on_disk(
    tiny_video: Tiny, photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass needs none of them."""
    script = [Click(1, 0, [(300, 200)], [1]), (0, FRAMES - 1)]
    check(final(play(tiny_video, photos, Recorder(monkeypatch), script, history=False)))


def test_corrections_as_transformers(
    tiny_video: Tiny, photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = [Click(1, 0, [(300, 200)], [1]), (0, 11), Click(1, 6, [(620, 320), (100, 60)], [1, 0]), (7, 11)]
    check(final(play(tiny_video, photos[:12], Recorder(monkeypatch), script, corrections="tracked")))


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
    for seen in passes(tiny_video, photos[:10], recorder, 10):
        if seen.masks > 10:  # after the first pass
            break
    assert seen.error > 10 * TOLERANCE, seen.error
