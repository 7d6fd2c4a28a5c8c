"""Tracking on a GPU's stream, seen by the recording device: order, waits, what stays on the device, recordings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.errors import DeviceError, DeviceMemoryError
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.model import Sam2VideoModel
from pixano_edge.engine.models.sam2_video.tracker import FrameResult, ObjectResult, VideoTracker
from pixano_edge.engine.runtime import StubDevice
from tests.engine.models.sam2_video.fake import CONSTANTS, clip, fake_model

CLICK = Prompt(points=[[20, 18]])
BOX = Prompt(box=[5, 8, 25, 30])
FULL = 34
"""Frames after which shapes stand still and a memory leaves with every frame: those of the first 15 frames stay near
the prompt, so the 16th is the first to go, 16 frames later."""

KINDS = ["eager", "recorded", "unified"]


def on_gpu(kind: str) -> tuple[Sam2VideoModel, StubDevice]:
    device = StubDevice("cuda:0", deferred=True, discrete=kind != "unified", captures=kind == "recorded")
    return fake_model(device), device


def session(model: Sam2VideoModel) -> list[ObjectResult]:
    """Everything that a user can do, in an order that mixes it."""
    seen: list[ObjectResult] = []

    def follow(tracker: VideoTracker, start: int | None = None, end: int | None = None) -> None:
        for result in tracker.propagate(start, end):
            seen.extend(result.objects)

    frames = clip(40)
    with model.track(frames) as tracker:
        seen.append(tracker.add_prompt(1, 2, CLICK))
        seen.append(tracker.add_prompt(2, 2, BOX))
        follow(tracker)
        seen.append(tracker.add_prompt(1, 20, Prompt(points=[[30, 20], [50, 5]], labels=[1, 0])))
        follow(tracker, 20, 39)
        mask = np.zeros((40, 60), bool)
        mask[12:30, 20:35] = True
        seen.append(tracker.add_mask(7, 30, mask))
        seen.append(tracker.add_mask(8, 30, np.zeros_like(mask)))
        follow(tracker, 30, 0)
        tracker.remove_object(2)
        follow(tracker, 5, 12)
    return seen


@pytest.fixture(scope="module")
def on_cpu() -> list[ObjectResult]:
    return session(fake_model())


@pytest.mark.parametrize("kind", KINDS)
def test_same_answers_as_on_a_cpu(kind: str, on_cpu: list[ObjectResult]) -> None:
    model, _ = on_gpu(kind)
    got = session(model)
    assert len(got) == len(on_cpu) > 150
    for a, b in zip(got, on_cpu):
        assert (a.object_id, a.score, a.iou) == (b.object_id, b.score, b.iou)
        assert np.array_equal(a.mask, b.mask)
    assert len({mask.tobytes() for mask in (r.mask for r in got)}) > 100, "masks that all agree would prove nothing"


def steady(
    kind: str, objects: int = 2, **options: Any
) -> tuple[StubDevice, Any, Sam2VideoModel, list[list[tuple[Any, ...]]]]:
    """The calls of each of four frames, after the bank is full."""
    model, device = on_gpu(kind)
    tracker = model.track(clip(FULL + 4), **options)
    for number in range(objects):
        tracker.add_prompt(number + 1, 0, CLICK if number % 2 else BOX)
    results = tracker.propagate()
    for _ in range(FULL):
        next(results)
    frames = []
    for _ in range(4):
        device.calls.clear()
        assert isinstance(next(results), FrameResult)
        frames.append(list(device.calls))
    return device, tracker, model, frames


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_wait_per_frame_and_no_allocation(kind: str, history: bool) -> None:
    _, _, _, frames = steady(kind, history=history)
    for calls in frames:
        ops = [c[0] for c in calls]
        assert ops.count("synchronize") == 1
        assert "wait_on_host" not in ops
        assert "wait" not in ops
        assert not {"empty", "host_empty", "wrap", "capture"} & set(ops)
        launches = ops.count("launch") + ops.count("replay")
        assert launches == 4, "encoder, attention, decoder, memory encoder"
    assert len({tuple(c[0] for c in calls) for calls in frames}) == 1, "the same work on every frame"


def test_order_on_the_stream() -> None:
    *_, frames = steady("eager", objects=1, history=False)
    ops = [c[0] if c[0] != "launch" else c[1] for c in frames[0]]
    encoder, attention = ops.index(sam2.IMAGE_ENCODER), ops.index(sam2_video.MEMORY_ATTENTION)
    decoder, memory = ops.index(sam2_video.TRACK_DECODER), ops.index(sam2_video.MEMORY_ENCODER)
    wait = ops.index("synchronize")
    assert encoder < attention < decoder < wait < memory
    # Seven maps, sixteen pointers, two tables of times; the embedding for the decoder comes behind.
    assert ops[encoder + 2 : attention].count("copy") == 7 + 16 + 2
    assert ops[decoder + 1 : wait] == ["copy"] * 3, "masks and scores, down"
    # The chosen mask and token go over on the device, the scores and the switch come up.
    assert ops[wait + 1 : memory].count("copy") == 2 + 3
    assert ops[memory + 1 :].count("copy") == 2
    assert ops[-1] == "copy", "the memory encoder is only queued"


def test_memories_stay_on_the_device() -> None:
    device, tracker, _, frames = steady("eager", history=False)
    held = {
        b.pointer for o in tracker._objects.values() for m in o.bank.all() for b in (m.slot.features, m.slot.pointer)
    }
    pinned = {b.pointer for lane in tracker._stepper._chain._lanes.values() for b in lane.staging.values()}
    assert held
    for calls in frames:
        for call in calls:
            if call[0] == "copy":
                assert not (call[1] in held and (call[2] in pinned or call[2] == 0))
                assert not (call[2] in held and call[1] in pinned)
    assert device.pending > 0, "the last frame's memory is still under way"


def test_far_memories_come_down_with_the_same_wait() -> None:
    _, tracker, _, frames = steady("eager", history=True)
    without = steady("eager", history=False)[3]
    assert len(frames[0]) == len(without[0]) + 2 * 2, "a map and a pointer for each object"
    assert len(tracker._history) > 0


def test_recordings_stand_still() -> None:
    model, device = on_gpu("recorded")
    tracker = model.track(clip(60), history=False)
    tracker.add_prompt(1, 0, CLICK)
    results = tracker.propagate()
    for _ in range(30):
        next(results)
    recorded = model.info()["stream"]["recorded"]
    device.calls.clear()
    for _ in range(25):
        next(results)
    assert model.info()["stream"]["recorded"] == recorded
    assert device.ops.count("replay") == 25 * 4
    assert "launch" not in device.ops


def test_warm_up_takes_no_part_in_answers() -> None:
    model, device = on_gpu("recorded")
    model._stepper.warm_up()
    assert device.pending == 0
    assert sorted(n for n, count in model.runs.items() if count) == sorted(set(model.runs) - {sam2.MASK_DECODER})
    want = [r.mask for r in session(fake_model())]
    assert all(np.array_equal(a, b.mask) for a, b in zip(want, session(model)))


@pytest.mark.parametrize("graph", [sam2_video.MEMORY_ATTENTION, sam2_video.TRACK_DECODER, sam2_video.MEMORY_ENCODER])
def test_a_failing_graph_gives_its_memory_back(graph: str) -> None:
    from tests.engine.models.sam2_video.fake import FUNCTIONS

    broken = [False]

    def run(inputs: dict[str, Any]) -> Any:
        if broken[0]:
            raise DeviceError("no such kernel.", "")
        return FUNCTIONS[graph](inputs)

    model = fake_model(**{graph: run})
    want = [r.objects[0].mask for r in _tracked(fake_model())]
    tracker = model.track(clip(12))
    tracker.add_prompt(1, 0, CLICK)
    got = []
    for frame in range(12):
        broken[0] = frame in (3, 7)
        if broken[0]:
            for _ in range(3):
                made = tracker.maps
                with pytest.raises(DeviceError, match="no such kernel"):
                    next(tracker.propagate(frame))
                assert tracker._pool.free == tracker.maps - len(list(tracker._objects[1].bank.all()))
            assert tracker.maps <= made + 1
            broken[0] = False
        got.append(next(tracker.propagate(frame)).objects[0].mask)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    if graph != sam2_video.MEMORY_ATTENTION:  # a new object attends to nothing
        broken[0] = True
        with pytest.raises(DeviceError):
            tracker.add_prompt(2, 5, CLICK)
        assert tracker.object_ids == [1], "a prompt that failed leaves no object behind"


def _tracked(model: Sam2VideoModel) -> list[FrameResult]:
    with model.track(clip(12)) as tracker:
        tracker.add_prompt(1, 0, CLICK)
        return list(tracker.propagate())


def test_out_of_memory_leaves_the_tracker_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    model, device = on_gpu("eager")
    tracker = model.track(clip(12))
    for number in (1, 2):
        tracker.add_prompt(number, 0, CLICK)
    results = [next(tracker.propagate(frame)) for frame in range(3)]
    plain, made = device.empty, tracker.maps

    def full(shape: Any, dtype: Any) -> Any:
        raise DeviceMemoryError("12 MiB asked, 3 free.", "")

    monkeypatch.setattr(device, "empty", full)
    with pytest.raises(DeviceMemoryError):
        next(tracker.propagate(3))
    assert (tracker.maps, tracker._pool.free) == (made, 0)
    monkeypatch.setattr(device, "empty", plain)
    results += tracker.propagate(3)
    model2 = fake_model()
    with model2.track(clip(12)) as other:
        for number in (1, 2):
            other.add_prompt(number, 0, CLICK)
        want = list(other.propagate())
    for a, b in zip(results, want, strict=True):
        assert all(np.array_equal(x.mask, y.mask) for x, y in zip(a.objects, b.objects))


def test_short_of_memory_fewer_objects_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, device = on_gpu("eager")
    plain = device.empty

    def scarce(shape: Any, dtype: Any) -> Any:
        if len(shape) > 3 and shape[0] > 2:
            raise DeviceMemoryError("12 MiB asked, 3 free.", "")
        return plain(shape, dtype)

    monkeypatch.setattr(device, "empty", scarce)

    def run(model: Sam2VideoModel) -> list[FrameResult]:
        with model.track(clip(5)) as tracker:
            for number in range(7):
                tracker.add_prompt(number + 1, 0, CLICK if number % 2 else BOX)
            return list(tracker.propagate())

    for a, b in zip(run(model), run(fake_model()), strict=True):
        assert all(np.array_equal(x.mask, y.mask) for x, y in zip(a.objects, b.objects, strict=True))
    assert model.info()["warnings"] == ["The device was short of memory: objects per call halved 2 time(s)."]


def test_twenty_objects_take_two_waits() -> None:
    *_, frames = steady("eager", objects=20, history=False)
    ops = [c[0] if c[0] != "launch" else c[1] for c in frames[0]]
    assert ops.count(sam2.IMAGE_ENCODER) == 1
    assert ops.count("synchronize") == ops.count(sam2_video.TRACK_DECODER) == 2


def test_slot_of_one_object_is_small() -> None:
    """Guards the sizes that the other tests rely on."""
    slot = fake_model()._stepper.new_slot()
    assert slot.features.shape == (4, CONSTANTS.embed_size, CONSTANTS.embed_size)
    assert slot.pointer.shape == (CONSTANTS.hidden_dim,)
    assert slot.logits.shape == (CONSTANTS.mask_size, CONSTANTS.mask_size)
