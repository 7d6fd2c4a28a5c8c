"""Clips, prompts and callers that do not behave: clear errors or defined results, and a tracker that works on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pixano_edge.engine.errors import DeviceError, ImageError, PromptError
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.frames import FrameError
from pixano_edge.engine.models.sam2_video.model import Sam2VideoModel
from pixano_edge.engine.models.sam2_video.tracker import FrameResult, VideoTracker
from pixano_edge.engine.runtime import StubDevice
from tests.engine.models.sam2_video.fake import clip, fake_model
from tests.support.tracking import moving_squares

CLICK = Prompt(points=[[20, 18]])
BOX = Prompt(box=[5, 8, 25, 30])


def whole(frames: Any, model: Any = None, objects: int = 2, **options: Any) -> list[FrameResult]:
    with (model or fake_model()).track(frames, **options) as tracker:
        prompt(tracker, objects)
        return list(tracker.propagate())


def prompt(tracker: VideoTracker, objects: int = 2) -> None:
    for number in range(objects):
        tracker.add_prompt(number + 1, 0, BOX if number % 2 else CLICK)


def same(a: list[FrameResult], b: list[FrameResult]) -> bool:
    return [r.frame for r in a] == [r.frame for r in b] and all(
        x.object_id == y.object_id and x.score == y.score and np.array_equal(x.mask, y.mask)
        for r, s in zip(a, b, strict=True)
        for x, y in zip(r.objects, s.objects, strict=True)
    )


@pytest.mark.parametrize("bad", [b"not a picture", np.zeros((41, 60, 3), np.uint8), np.zeros((40, 60), np.uint8)])
def test_a_bad_frame_in_the_middle_names_itself_and_the_rest_can_be_tracked(bad: Any) -> None:
    good = clip(10)
    frames: list[Any] = [*good[:4], bad, *good[5:]]
    with fake_model().track(frames) as tracker:
        prompt(tracker)
        seen: list[FrameResult] = []
        with pytest.raises(FrameError, match="Frame 4") as caught:
            seen.extend(tracker.propagate())
        assert caught.value.index == 4
        assert caught.value.action
        assert [r.frame for r in seen] == [0, 1, 2, 3]
        assert same(seen, whole(good)[:4])
        rest = list(tracker.propagate(5))
        assert [r.frame for r in rest] == [5, 6, 7, 8, 9]
        with pytest.raises(FrameError, match="Frame 4"):
            tracker.add_prompt(1, 4, CLICK)
        assert tracker.object_ids == [1, 2]


def test_a_bad_first_frame() -> None:
    with pytest.raises(FrameError, match="Frame 0"):
        fake_model().track([b"nothing", *clip(3)])
    with pytest.raises(ImageError, match="no frames"):
        fake_model().track([])


def test_a_video_that_ends_early(tmp_path: Path) -> None:
    """A file that was cut off has the frames that can be decoded."""
    path = tmp_path / "cut.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (60, 40))
    for frame in clip(30):
        writer.write(frame)
    writer.release()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    results = whole(path)
    assert 0 < len(results) < 30


def test_one_frame() -> None:
    with fake_model().track(clip(1)) as tracker:
        first = tracker.add_prompt(1, 0, CLICK)
        for asked in ((None, None), (0, 0)):
            (only,) = tracker.propagate(*asked)
            assert np.array_equal(only.objects[0].mask, first.mask)


@pytest.mark.parametrize("frame", [-1, 5, 99])
def test_prompts_beyond_the_clip(frame: int) -> None:
    with fake_model().track(clip(5)) as tracker:
        with pytest.raises(FrameError, match=f"Frame {frame}: the clip has 5 frames"):
            tracker.add_prompt(1, frame, CLICK)
        with pytest.raises(FrameError, match="the clip has 5"):
            tracker.add_mask(1, frame, np.ones((40, 60), bool))
        assert tracker.object_ids == []
        with pytest.raises(PromptError, match="nothing to track"):
            next(tracker.propagate())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Prompt(), "is empty"),
        (Prompt(points=[]), "is empty"),
        (Prompt(box=[]), "is empty"),
        (Prompt(points=[[1, 2], [3]]), "points"),
        (Prompt(points=[[1, 2]], labels=[2]), "labels"),
        (Prompt(box=[9, 9, 5, 5]), "no area"),
    ],
)
def test_a_refused_prompt_decodes_no_frame(bad: Prompt, message: str) -> None:
    frames: list[Any] = [*clip(2), b"not a picture"]
    with fake_model().track(frames) as tracker:
        with pytest.raises(PromptError, match=message):
            tracker.add_prompt(1, 2, bad)
        assert tracker.object_ids == []


@pytest.mark.parametrize("span", [(0, 5), (-1, 3), (7, 0), (0, -2)])
def test_passes_beyond_the_clip(span: tuple[int, int]) -> None:
    with fake_model().track(clip(5)) as tracker:
        prompt(tracker)
        with pytest.raises(PromptError, match="the clip has 5"):
            next(tracker.propagate(*span))


def test_an_id_given_twice_is_the_same_object() -> None:
    with fake_model().track(clip(8)) as tracker:
        tracker.add_prompt(1, 0, BOX)
        tracker.add_prompt(1, 0, CLICK)  # the same frame: replaces
        tracker.add_prompt(2, 0, BOX)
        assert tracker.object_ids == [1, 2]
        assert same(list(tracker.propagate()), whole(clip(8)))
        assert len(tracker._objects[1].bank.conditioning) == 1


def test_an_id_that_comes_again_after_its_removal_starts_anew() -> None:
    with fake_model().track(clip(30)) as tracker:
        tracker.add_prompt(1, 0, BOX)
        list(tracker.propagate())
        tracker.remove_object(1)
        assert tracker.maps == 0, "its memories are freed"
        prompt(tracker)
        assert same(list(tracker.propagate()), whole(clip(30)))
        with pytest.raises(PromptError, match=r"no object 9.*\[1, 2\]"):
            tracker.remove_object(9)


def test_an_empty_mask_says_that_the_object_is_not_there() -> None:
    with fake_model().track(clip(6)) as tracker:
        answer = tracker.add_mask(1, 0, np.zeros((40, 60), bool))
        assert not answer.mask.any()
        assert answer.score < 0
        results = list(tracker.propagate())
        assert [r.frame for r in results] == list(range(6))
        assert not results[0].objects[0].mask.any()


@pytest.mark.parametrize(
    "mask", [np.ones((40, 61), bool), np.ones((40, 60), np.uint8), np.ones((1, 40, 60), bool), [[True]]]
)
def test_masks_that_do_not_fit(mask: Any) -> None:
    with fake_model().track(clip(3)) as tracker, pytest.raises(PromptError, match="The mask of object 1"):
        tracker.add_mask(1, 0, mask)


@pytest.mark.parametrize(
    "bad",
    [
        Prompt(),
        Prompt(points=[]),
        Prompt(points=[[1, 2]], labels=[3]),
        Prompt(points=[[float("nan"), 2]]),
        Prompt(points=[[9000, 2]]),
        Prompt(box=[5, 5, 5, 9]),
        Prompt(points=[[1, 2, 3]]),
    ],
)
def test_prompts_that_say_nothing_leave_no_object(bad: Prompt) -> None:
    with fake_model().track(clip(3)) as tracker:
        with pytest.raises(PromptError):
            tracker.add_prompt(1, 0, bad)
        assert tracker.object_ids == []
        assert tracker._pool.free == tracker.maps
        prompt(tracker)
        assert same(list(tracker.propagate()), whole(clip(3)))


def test_cancelling_at_every_frame() -> None:
    """Nothing more is done than was yielded, and going on gives what an uncut pass gives."""
    frames, want = clip(9), whole(clip(9))
    for stop in range(10):
        model = fake_model()
        with model.track(frames) as tracker:
            prompt(tracker)
            asked = [0]

            def cancelled(asked: list[int] = asked, stop: int = stop) -> bool:
                asked[0] += 1
                return asked[0] > stop

            got = list(tracker.propagate(cancelled=cancelled))
            assert len(got) == stop if stop < 10 else 9
            done = dict(model.runs)
            assert done["memory_attention"] == max(stop - 1, 0)
            if stop < 9:
                got += tracker.propagate(stop)
            assert same(got, want)


def test_a_pass_that_nobody_finishes() -> None:
    with fake_model().track(clip(9)) as tracker:
        prompt(tracker)
        results = tracker.propagate()
        got = [next(results), next(results), next(results)]
        results.close()  # type: ignore[attr-defined]
        got += tracker.propagate(3)
        assert same(got, whole(clip(9)))


def test_objects_come_and_go_during_a_pass() -> None:
    with fake_model().track(clip(9)) as tracker:
        prompt(tracker)
        seen = []
        for result in tracker.propagate():
            seen.append([o.object_id for o in result.objects])
            if result.frame == 2:
                tracker.remove_object(1)
            if result.frame == 4:
                tracker.add_prompt(7, 5, CLICK)
            if result.frame == 6:
                for number in tracker.object_ids:
                    tracker.remove_object(number)
        assert seen == [[1, 2]] * 3 + [[2]] * 2 + [[2, 7]] * 2 + [[]] * 2


def test_closing_during_a_pass() -> None:
    tracker = fake_model().track(clip(9))
    prompt(tracker)
    results = tracker.propagate()
    next(results)
    tracker.close()
    tracker.close()
    with pytest.raises(DeviceError, match="tracker is closed"):
        next(results)
    for call in (
        lambda: tracker.add_prompt(1, 0, CLICK),
        lambda: tracker.add_mask(1, 0, np.ones((40, 60), bool)),
        lambda: tracker.remove_object(1),
        lambda: next(tracker.propagate()),
    ):
        with pytest.raises(DeviceError, match="tracker is closed"):
            call()


def test_a_tracker_that_cannot_be_made_closes_its_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    from pixano_edge.engine.models.sam2_video.frames import ImageFrames

    closed = []
    monkeypatch.setattr(ImageFrames, "close", lambda self: closed.append(self))
    with pytest.raises(PromptError):
        fake_model().track(clip(3), max_cond_frames=0)
    assert len(closed) == 1


def test_two_trackers_in_turns() -> None:
    one, other = clip(12), [frame[::-1].copy() for frame in clip(12)]
    model = fake_model()
    with model.track(one) as a, model.track(other) as b:
        prompt(a)
        prompt(b, 3)
        both = list(zip(a.propagate(), b.propagate(), strict=True))
    assert same([x for x, _ in both], whole(one))
    assert same([y for _, y in both], whole(other, objects=3))


@pytest.mark.parametrize("kind", ["cpu", "gpu", "recorded"])
def test_trackers_and_clicks_in_threads(kind: str) -> None:
    device = StubDevice() if kind == "cpu" else StubDevice("cuda:0", True, discrete=True, captures=kind == "recorded")
    model = fake_model(device)
    clips = [[np.roll(frame, 3 * i, axis=1) for frame in clip(12)] for i in range(3)]
    want = [whole(frames, objects=i + 1) for i, frames in enumerate(clips)]
    clicked = fake_model().predictor.predict(clips[0][5], [CLICK]).masks
    wrong: list[str] = []

    def track(i: int) -> None:
        if not same(whole(clips[i], model, i + 1), want[i]):
            wrong.append(f"tracker {i}")

    def click() -> None:
        wrong.extend(
            "click"
            for _ in range(20)
            if not np.array_equal(model.predictor.predict(clips[0][5], [CLICK]).masks, clicked)
        )

    threads = [threading.Thread(target=track, args=(i,)) for i in range(3)] + [threading.Thread(target=click)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []


def test_real_sessions_in_threads(tracking_bundle: Path) -> None:
    frames = moving_squares(10)
    click = Prompt(points=[[25, 35]])
    with Sam2VideoModel.open(tracking_bundle, "cpu", threads=1) as model:

        def run() -> list[FrameResult]:
            with model.track(frames) as tracker:
                tracker.add_prompt(1, 0, click)
                return list(tracker.propagate())

        want, found = run(), []
        threads = [threading.Thread(target=lambda: found.append(run())) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(found) == 3
        assert all(same(one, want) for one in found)


def test_more_prompted_frames_than_a_graph_takes() -> None:
    """The closest ones are attended to; without a limit in the model the graph would be asked for more than it has."""
    from pixano_edge.engine.contracts.sam2_video import MAX_MEMORIES, MAX_POINTERS

    with fake_model().track(clip(140)) as tracker:
        for frame in range(0, 130):
            tracker.add_prompt(1, frame, CLICK)
        obj = tracker._objects[1]
        selection = obj.bank.select(135, False, 140)
        assert len(selection.memories) == MAX_MEMORIES - 6
        assert {m.frame for m in selection.memories} == set(range(72, 130))
        assert len(selection.pointers) <= MAX_POINTERS
        results = list(tracker.propagate(130))
        assert [r.frame for r in results] == list(range(130, 140))
