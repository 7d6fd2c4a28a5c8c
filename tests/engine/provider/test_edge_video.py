"""Tracking through the provider, on fakes: answers, streams, jobs, turns, cancelling and unloading."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.errors import DeviceError
from pixano_edge.engine.models.rle import decode_rle, encode_rle
from pixano_edge.engine.provider import (
    EdgeProvider,
    EdgeVideoMaskGenerationInput,
    ImageMaskGenerationInput,
    InferenceError,
    InferenceTimeoutError,
    InvalidRequestError,
    JobNotFoundError,
    ModelBusyError,
    ModelNotFoundError,
    TrackedFrame,
    VideoMaskGenerationInput,
)

from .fakes import FakeOpener, FakeVideoModel, add_bundle, data_uri, make_provider, png, until

WIDTH, HEIGHT = 40, 30
FRAME = data_uri(png(WIDTH, HEIGHT))
POINT = {"points": [{"x": 5, "y": 7, "label": 1}]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    add_bundle(tmp_path, "clip", tracks=True)
    return tmp_path


@pytest.fixture
async def provider(root: Path, opener: FakeOpener) -> AsyncIterator[EdgeProvider]:
    edge = make_provider(root, opener)
    yield edge
    for held in (*opener.opened, *opener.videos):
        held.gate.set()
    opener.gate.set()
    await edge.close()
    assert all(t.closed for v in opener.videos for t in v.trackers), "a tracker was left open"


def _request(count: int = 6, *keyframes: dict[str, Any], ids: list[int] | None = None, **fields: Any) -> Any:
    keys = list(keyframes) or [{"frame_index": 0, **POINT}]
    values: dict[str, Any] = {
        "video": [FRAME] * count, "model": "clip-video", "objects_ids": ids or list(range(1, len(keys) + 1)),
        "frame_indexes": [], "keyframes": keys,
    }  # fmt: skip
    return EdgeVideoMaskGenerationInput(**{**values, **fields})


def _mask(rle: Any) -> np.ndarray:
    return decode_rle({"size": rle.size, "counts": rle.counts})


def _at(rle: Any) -> tuple[int, int] | None:
    """The one pixel (x, y) of a mask; None for an empty one."""
    mask = _mask(rle)
    assert mask.shape == (HEIGHT, WIDTH)
    rows, columns = np.nonzero(mask)
    return (int(columns[0]), int(rows[0])) if len(rows) == 1 else None


async def _video(provider: EdgeProvider, opener: FakeOpener) -> FakeVideoModel:
    """The model, loaded."""
    await provider.video_mask_generation(_request(1))
    (video,) = opener.videos
    video.steps.clear()
    video.entered.clear()
    return video


async def _in_thread(condition: Any) -> None:
    await asyncio.to_thread(until, condition)


# --- answers ---------------------------------------------------------------------------------------------------------


async def test_an_answer_has_both_forms(provider: EdgeProvider) -> None:
    result = await provider.video_mask_generation(input_data=_request(3))
    assert result.status == "SUCCESS"
    assert result.timestamp.tzinfo is not None
    assert result.processing_time > 0
    assert result.id
    assert result.metadata == {
        "model_name": "clip-video",
        "model_class": "Sam2VideoModel",
        "device": "cpu",
        "frames": 3,
    }
    data = result.data
    assert (data.objects_ids, data.frame_indexes) == ([1, 1, 1], [0, 1, 2])
    assert [m.size for m in data.masks] == [[HEIGHT, WIDTH]] * 3
    assert [_at(m) for m in data.masks] == [(5, 7), (6, 7), (7, 7)]
    assert [f.frame_index for f in data.frames] == [0, 1, 2]  # type: ignore[attr-defined]
    tracked = data.frames[1].objects[0]  # type: ignore[attr-defined]
    assert (tracked.track_id, tracked.mask, tracked.box) == (1, data.masks[1], [6.0, 7.0, 7.0, 8.0])
    assert tracked.score == pytest.approx(1 / (1 + np.exp(-5.0)))
    assert tracked.to_dict()["mask"]["size"] == [HEIGHT, WIDTH]


async def test_the_seeds_request(provider: EdgeProvider) -> None:
    """Its dataclass, its helper's surplus of ids, a box in xyxy, no labels."""
    request = VideoMaskGenerationInput(
        [FRAME] * 3, "clip-video", [0, 1, 2], [0, 1, 2], points=[[[5, 7]]], boxes=[[5, 7, 6, 8]]
    )
    data = (await provider.video_mask_generation(request)).data
    assert (data.objects_ids, data.frame_indexes) == ([0, 0, 0], [0, 1, 2])
    assert _at(data.masks[2]) == (7, 7)
    foreign = SimpleNamespace(video=[FRAME], model="clip", objects_ids=[4], frame_indexes=[0], points=[[[5, 7]]])
    assert (await provider.video_mask_generation(foreign)).data.objects_ids == [4]  # type: ignore[arg-type]


async def test_several_objects_and_keyframes(provider: EdgeProvider, opener: FakeOpener) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.bool_)
    mask[20, 30] = True
    rle = encode_rle(mask)
    request = _request(
        5,
        {"frame_index": 1, **POINT},
        {"frame_index": 3, "points": [], "box": None, "mask": {"size": rle["size"], "counts": rle["counts"].decode()}},
        {"frame_index": 4, "box": {"x": 8, "y": 9, "width": 1, "height": 1}},
        ids=[7, 2, 7],
    )
    data = (await provider.video_mask_generation(request)).data
    rows = list(zip(data.frame_indexes, data.objects_ids, [_at(m) for m in data.masks]))
    assert rows == [
        (1, 7, (5, 7)), (1, 2, (32, 20)), (2, 7, (6, 7)), (2, 2, (31, 20)), (3, 7, (9, 9)), (3, 2, (30, 20)),
        (4, 7, (8, 9)), (4, 2, (31, 20)),
    ]  # fmt: skip
    assert [(i, f) for i, f, _ in opener.videos[0].given] == [(7, 1), (7, 4)]
    assert np.asarray(opener.videos[0].given[1][2].box).tolist() == [8, 9, 9, 10]  # from xywh


async def test_an_absent_object_has_an_empty_mask_of_full_size(provider: EdgeProvider) -> None:
    right = {"frame_index": 0, "points": [{"x": WIDTH - 1, "y": 3}]}
    data = (await provider.video_mask_generation(_request(2, right))).data
    assert [_mask(m).sum() for m in data.masks] == [1, 0]
    assert data.masks[1].size == [HEIGHT, WIDTH]
    gone = data.frames[1].objects[0]  # type: ignore[attr-defined]
    assert gone.box is None
    assert gone.score < 0.01


@pytest.mark.parametrize(
    ("fields", "frames"),
    [
        ({}, [2, 3, 4, 5]),
        ({"propagate": None}, [2, 3, 4, 5]),
        ({"propagate": False}, [2, 4]),
        ({"interval": {"start_frame": 1, "end_frame": 3}}, [1, 2, 3]),
        ({"interval": {"start_frame": 4, "end_frame": 2}}, [4, 3, 2]),
        ({"interval": {"start_frame": 5, "end_frame": 5, "direction": "forward"}}, [5]),
        ({"interval": {"start_frame": 1, "end_frame": 3}, "propagate": False}, [2, 4]),
    ],
)
async def test_propagate_and_interval(provider: EdgeProvider, fields: dict[str, Any], frames: list[int]) -> None:
    request = _request(6, {"frame_index": 4, **POINT}, {"frame_index": 2, **POINT}, ids=[1, 1], **fields)
    data = (await provider.video_mask_generation(request)).data
    assert data.frame_indexes == frames
    assert data.objects_ids == [1] * len(frames)


async def test_without_propagating_each_prompt_has_its_row(provider: EdgeProvider) -> None:
    request = _request(6, {"frame_index": 4, **POINT}, {"frame_index": 2, **POINT}, ids=[1, 9], propagate=False)
    data = (await provider.video_mask_generation(request)).data
    assert list(zip(data.frame_indexes, data.objects_ids)) == [(2, 9), (4, 1)]


async def test_a_clip_of_one_frame(provider: EdgeProvider) -> None:
    data = (await provider.video_mask_generation(_request(1))).data
    assert (data.frame_indexes, [_at(m) for m in data.masks]) == ([0], [(5, 7)])


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"video": []}, "no frames"),
        ({"video": None}, "video must be a list"),
        ({"video": ["data:image/png;base64,AAAA"]}, "Frame 0: .*not an image"),
        ({"keyframes": [{"frame_index": 6, **POINT}], "objects_ids": [1]}, "Frame 6 is asked for, the clip has 6"),
        ({"interval": {"start_frame": 0, "end_frame": 6}}, "Frame 6 is asked for"),
        ({"keyframes": [{"frame_index": 0}]}, "marks nothing"),
        ({"video": [FRAME, data_uri(png(20, 20)), FRAME]}, "Frame 1: it is 20x20"),
        ({"video": [FRAME, FRAME, "data:image/png;base64,AAAA"]}, "Frame 2: .*not an image"),
    ],
)
async def test_bad_requests_say_what_to_do(
    provider: EdgeProvider, opener: FakeOpener, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        await provider.video_mask_generation(_request(**fields))
    assert caught.value.action
    await provider.video_mask_generation(_request())  # the service lives on


async def test_a_back_end_that_fails_names_the_frame(provider: EdgeProvider, opener: FakeOpener) -> None:
    video = await _video(provider, opener)
    video.error, video.error_at = DeviceError("the GPU fell off", "restart"), 3
    with pytest.raises(InferenceError, match="Frame 3: the GPU fell off"):
        await provider.video_mask_generation(_request())
    video.error = None
    await provider.video_mask_generation(_request())


async def test_a_fault_of_ours_ends_the_run_and_frees_it(provider: EdgeProvider, opener: FakeOpener) -> None:
    video = await _video(provider, opener)
    video.error, video.error_at = ZeroDivisionError("a bug"), 2
    with pytest.raises(ZeroDivisionError):
        await provider.video_mask_generation(_request())
    assert all(t.closed for t in video.trackers)
    job = await provider.submit_video_mask_generation_job(_request())
    await _in_thread(lambda: provider._video.status(job.job_id).status == "failed")
    assert provider._video.running() == []


# --- streams ---------------------------------------------------------------------------------------------------------


async def test_frames_come_while_the_rest_is_computed(provider: EdgeProvider, opener: FakeOpener) -> None:
    video = await _video(provider, opener)
    video.seconds = 0.05
    stream = provider.stream_video_mask_generation(_request())
    first = await stream.__anext__()
    assert isinstance(first, TrackedFrame)
    video.gate.clear()
    rest = asyncio.create_task(_all(stream))
    await asyncio.sleep(0.05)
    assert not rest.done()
    video.gate.set()
    assert [f.frame_index for f in [first, *await rest]] == [0, 1, 2, 3, 4, 5]


async def _all(frames: Any) -> list[TrackedFrame]:
    return [frame async for frame in frames]


async def _note(frames: Any, seen: list[int]) -> None:
    """For iterators that raise in the end."""
    async for frame in frames:
        seen.append(frame.frame_index)  # noqa: PERF401 (what came before the error counts)


async def test_leaving_a_stream_stops_the_work(provider: EdgeProvider, opener: FakeOpener) -> None:
    video = await _video(provider, opener)
    video.seconds = 0.03
    stream = provider.stream_video_mask_generation(_request(200))
    async for frame in stream:
        if frame.frame_index == 2:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    await _in_thread(lambda: video.trackers[-1].closed)
    assert len(video.steps) < 150


async def test_a_stream_tells_why_it_ends_after_the_frames_that_were_done(
    provider: EdgeProvider, opener: FakeOpener
) -> None:
    video = await _video(provider, opener)
    video.error, video.error_at = DeviceError("the GPU fell off", "restart"), 2
    seen: list[int] = []
    with pytest.raises(InferenceError, match="Frame 2"):
        await _note(provider.stream_video_mask_generation(_request()), seen)
    assert seen == [0, 1]


# --- jobs ------------------------------------------------------------------------------------------------------------


async def test_a_job_from_start_to_end(provider: EdgeProvider, opener: FakeOpener) -> None:
    opener.gate.clear()
    started = time.perf_counter()
    job = await provider.submit_video_mask_generation_job(_request(), timeout=30)
    assert time.perf_counter() - started < 5  # not after loading, which waits for the gate
    assert (job.status, job.data, job.detail) == ("running", None, None)
    assert job.metadata["frames_total"] is None
    opener.gate.set()
    await _in_thread(lambda: opener.videos and opener.videos[0].entered.is_set())
    await _in_thread(lambda: provider._video.status(job.job_id).status == "completed")
    done = await provider.get_video_mask_generation_job(job.job_id)
    assert done.data is not None
    assert done.data.frame_indexes == [0, 1, 2, 3, 4, 5]
    assert done.metadata == {
        "model_name": "clip-video", "model_class": "Sam2VideoModel", "device": "cpu", "frames_done": 6,
        "frames_total": 6, "progress": 1.0,
    }  # fmt: skip
    assert (await provider.cancel_video_mask_generation_job(job.job_id)) == done  # unchanged
    expected = (await provider.video_mask_generation(_request())).data
    assert done.data == expected


async def test_progress_and_watching(provider: EdgeProvider, opener: FakeOpener) -> None:
    video = await _video(provider, opener)
    job = await provider.submit_video_mask_generation_job(_request())
    watch = provider.watch_job(job.job_id)
    seen = [(await watch.__anext__()).frame_index for _ in range(2)]
    video.gate.clear()
    status = await provider.get_video_mask_generation_job(job.job_id)
    assert status.status in ("running", "completed")
    video.gate.set()
    seen += [f.frame_index for f in await _all(watch)]
    assert seen == [0, 1, 2, 3, 4, 5]
    later = provider.watch_job(job.job_id, from_frame=4)
    assert [f.frame_index for f in await _all(later)] == [4, 5]
    for wrong in (-1, "2"):
        with pytest.raises(InvalidRequestError, match="from_frame"):
            await _all(provider.watch_job(job.job_id, wrong))  # type: ignore[arg-type]


async def test_server_info_shows_what_runs(provider: EdgeProvider, opener: FakeOpener) -> None:
    video = await _video(provider, opener)
    video.gate.clear()
    job = await provider.submit_video_mask_generation_job(_request(8))
    waiting = asyncio.create_task(provider.video_mask_generation(_request(5)))
    await _in_thread(lambda: [r["frames_total"] for r in provider._video.running()] == [8, 5])
    info = await provider.get_server_info()
    assert [(j["job_id"], j["model"], j["frames_done"], j["frames_total"]) for j in info.jobs] == [
        (job.job_id, "clip", 0, 8),
        (None, "clip", 0, 5),
    ]
    assert info.jobs[0]["progress"] == 0
    assert info.jobs[0]["seconds"] >= 0
    video.gate.set()
    await waiting
    await _in_thread(lambda: provider._video.running() == [])
    assert (await provider.get_server_info()).jobs == []


@pytest.mark.parametrize("stage", ["loading", "opening", "prompting", "tracking"])
async def test_cancelling_at_every_stage(
    provider: EdgeProvider, opener: FakeOpener, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stage == "loading":
        opener.gate.clear()
        job = await provider.submit_video_mask_generation_job(_request())
        await _in_thread(opener.entered.is_set)
        canceled = await provider.cancel_video_mask_generation_job(job.job_id)
        opener.gate.set()
    else:
        video = await _video(provider, opener)
        if stage == "opening":
            from pixano_edge.engine.provider import clips

            decode, inside = clips.decode_image, []

            def slow(*args: Any) -> Any:
                inside.append(1)
                time.sleep(0.2)
                return decode(*args)

            monkeypatch.setattr(clips, "decode_image", slow)
            job = await provider.submit_video_mask_generation_job(_request())
            await _in_thread(lambda: inside)
        else:
            video.hold_at = ("frame", 2) if stage == "tracking" else ("prompt", 1, 0)
            video.reached.clear()
            video.gate.clear()
            job = await provider.submit_video_mask_generation_job(_request())
            await _in_thread(video.reached.is_set)
        canceled = await provider.cancel_video_mask_generation_job(job.job_id)
        video.gate.set()
    assert (canceled.status, canceled.detail, canceled.data) == ("canceled", "Job canceled.", None)
    await _in_thread(lambda: not provider._video._runs)
    assert all(t.closed for v in opener.videos for t in v.trackers)
    # The step under way ends, its result is dropped, and no other one begins.
    assert len(opener.videos[0].steps) == {"loading": 0, "opening": 0, "prompting": 1, "tracking": 4}[stage]
    again = await provider.get_video_mask_generation_job(job.job_id)
    assert again == canceled
    assert again.metadata["frames_done"] == (2 if stage == "tracking" else 0)
    with pytest.raises(InferenceError, match="Job canceled"):
        await _all(provider.watch_job(job.job_id))
    assert (await provider.video_mask_generation(_request())).status == "SUCCESS"


async def test_a_job_that_fails_says_why_and_keeps_its_frames(provider: EdgeProvider) -> None:
    job = await provider.submit_video_mask_generation_job(_request(video=[FRAME, FRAME, b"broken", FRAME]))
    seen: list[int] = []
    with pytest.raises(InferenceError, match="Frame 2"):
        await _note(provider.watch_job(job.job_id), seen)
    assert seen == [0, 1]
    await _in_thread(lambda: not provider._video._runs)
    status = await provider.get_video_mask_generation_job(job.job_id)
    assert (status.status, status.data) == ("failed", None)
    assert "Frame 2" in str(status.detail)
    with pytest.raises(InferenceError, match="Frame 2"):  # also once it is over
        await _all(provider.watch_job(job.job_id))


async def test_submitting_refuses_what_it_can_tell_at_once(provider: EdgeProvider) -> None:
    with pytest.raises(InvalidRequestError, match="marks nothing"):
        await provider.submit_video_mask_generation_job(_request(3, {"frame_index": 0}))
    with pytest.raises(ModelNotFoundError, match="no model 'other'"):
        await provider.submit_video_mask_generation_job(_request(model="other"))
    for call in (provider.get_video_mask_generation_job, provider.cancel_video_mask_generation_job):
        with pytest.raises(JobNotFoundError, match="job-nothing"):
            await call("job-nothing")
    with pytest.raises(JobNotFoundError):
        await _all(provider.watch_job("job-nothing"))


async def test_jobs_outlive_the_loop_that_submitted_them(root: Path, opener: FakeOpener) -> None:
    provider = make_provider(root, opener)
    job = await asyncio.to_thread(lambda: asyncio.run(provider.submit_video_mask_generation_job(_request())))
    await _in_thread(lambda: provider._video.status(job.job_id).status == "completed")
    await provider.close()


async def test_the_cap_counts_running_jobs(root: Path, opener: FakeOpener) -> None:
    provider = make_provider(root, opener, job_cap=1)
    video = await _video(provider, opener)
    video.gate.clear()
    job = await provider.submit_video_mask_generation_job(_request())
    with pytest.raises(ModelBusyError, match="1 tracking jobs run"):
        await provider.submit_video_mask_generation_job(_request())
    # The refused one lets go on the thread that writes jobs down.
    await _in_thread(lambda: provider._table.get("clip-video").users == 1)  # type: ignore[union-attr]
    video.gate.set()
    await _in_thread(lambda: provider._video.status(job.job_id).status == "completed")
    await provider.submit_video_mask_generation_job(_request())
    await provider.close()


async def test_a_model_tracks_in_so_many_clips_at_once(root: Path, opener: FakeOpener) -> None:
    provider = make_provider(root, opener, queue_depth=2)
    video = await _video(provider, opener)
    video.gate.clear()
    jobs = [await provider.submit_video_mask_generation_job(_request()) for _ in range(2)]
    for ask in (provider.submit_video_mask_generation_job, provider.video_mask_generation):
        with pytest.raises(ModelBusyError, match="tracks in 2 clips"):
            await ask(_request())
    assert len(provider._video._store.records()) == 2  # the refused one left no job behind
    click = asyncio.create_task(
        provider.image_mask_generation(ImageMaskGenerationInput(FRAME, "clip", points=[[[3, 4]]]))
    )
    video.gate.set()
    await click
    for job in jobs:
        await _all(provider.watch_job(job.job_id))
    assert provider._table.get("clip-video").users == 0  # type: ignore[union-attr]
    await provider.video_mask_generation(_request())
    await provider.close()


# --- turns, timeouts, unloading --------------------------------------------------------------------------------------


async def test_two_jobs_take_turns_frame_by_frame(provider: EdgeProvider, opener: FakeOpener) -> None:
    video = await _video(provider, opener)
    video.gate.clear()
    one = await provider.submit_video_mask_generation_job(_request(10))
    two = await provider.submit_video_mask_generation_job(
        _request(10, {"frame_index": 0, **POINT}, interval={"start_frame": 9, "end_frame": 0})
    )
    await _in_thread(lambda: [r["frames_total"] for r in provider._video.running()] == [10, 10])
    video.gate.set()
    for job in (one, two):
        await _in_thread(lambda job=job: provider._video.status(job.job_id).status == "completed")
    turns = video.turns[-22:]  # a prompt and ten frames each
    assert sorted(turns) == [1] * 11 + [2] * 11
    both = turns[1:-1]  # one may begin a step before the other, and end one before it
    assert all(a != b for a, b in pairwise(both)), turns
    assert video.threads == {"pixano-edge-clip-video_0"}


async def test_a_click_waits_for_one_frame_at_most(provider: EdgeProvider, opener: FakeOpener) -> None:
    video = await _video(provider, opener)
    video.gate.clear()
    jobs = [await provider.submit_video_mask_generation_job(_request(30)) for _ in range(3)]
    await _in_thread(lambda: len([r for r in provider._video.running() if r["frames_total"] == 30]) == 3)
    click = asyncio.create_task(
        provider.image_mask_generation(ImageMaskGenerationInput(FRAME, "clip", points=[[[3, 4]]]))
    )
    await _in_thread(lambda: provider._table.get("clip-video").worker._pending == 1)  # type: ignore[union-attr]
    began: list[int] = []
    opener.opened[0].on_predict = lambda: began.append(len(video.steps))
    before = len(video.steps)
    video.gate.set()
    assert (await click).data.masks
    assert began == [before + 1]  # right after the one under way, before the two others that waited
    assert opener.tasks == ["video_mask_generation"]  # one loaded bundle did both
    for job in jobs:
        await provider.cancel_video_mask_generation_job(job.job_id)


async def test_a_timeout_stops_the_work_within_a_frame(provider: EdgeProvider, opener: FakeOpener) -> None:
    video = await _video(provider, opener)
    video.seconds = 0.03
    with pytest.raises(InferenceTimeoutError, match="Tracking with model 'clip-video' took longer"):
        await provider.video_mask_generation(_request(500), timeout=0.15)
    before = len(video.steps)
    await _in_thread(lambda: video.trackers[-1].closed)
    assert len(video.steps) <= before + 1
    with pytest.raises(InferenceTimeoutError):
        await _all(provider.stream_video_mask_generation(_request(500), timeout=0.15))
    task = asyncio.create_task(provider.video_mask_generation(_request(500)))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _in_thread(lambda: not provider._video._runs)
    assert len(video.steps) < 40
    with pytest.raises(InvalidRequestError, match="timeout"):
        await provider.video_mask_generation(_request(), timeout=-1)


@pytest.mark.parametrize("how", ["delete", "close"])
async def test_unloading_fails_the_job_with_the_reason(provider: EdgeProvider, opener: FakeOpener, how: str) -> None:
    video = await _video(provider, opener)
    video.seconds = 0.02
    job = await provider.submit_video_mask_generation_job(_request(500))
    waiting = asyncio.create_task(provider.video_mask_generation(_request(500)))
    await _in_thread(lambda: len([s for s in video.steps if s == ("frame", 2)]) == 2)
    await (provider.delete_model("clip-video") if how == "delete" else provider.close())
    with pytest.raises(ModelNotFoundError, match="'clip-video' was unloaded"):
        await waiting
    assert video.predictor.closed
    assert all(t.closed for t in video.trackers)  # before the model: FakeTracker.close checks it
    await _in_thread(lambda: not provider._video._runs)
    status = provider._video.status(job.job_id)
    assert status.status == "failed"
    assert "'clip-video' was unloaded" in str(status.detail)
    assert status.metadata["frames_done"] >= 2
    with pytest.raises(InferenceError):
        await provider.submit_video_mask_generation_job(_request())


async def test_closing_while_the_model_loads(root: Path, opener: FakeOpener) -> None:
    provider = make_provider(root, opener)
    opener.gate.clear()
    job = await provider.submit_video_mask_generation_job(_request())
    await _in_thread(opener.entered.is_set)
    closing = asyncio.create_task(provider.close())
    await asyncio.sleep(0.02)
    opener.gate.set()
    await closing
    status = provider._video.status(job.job_id)
    assert status.status == "failed"
    assert "unloaded" in str(status.detail)
    assert not provider._video._runs


async def test_a_load_that_fails_fails_the_job(provider: EdgeProvider, opener: FakeOpener) -> None:
    opener.error = DeviceError("no such device", "plug it in")
    job = await provider.submit_video_mask_generation_job(_request())
    await _in_thread(lambda: provider._video.status(job.job_id).status == "failed")
    assert "no such device" in str((await provider.get_video_mask_generation_job(job.job_id)).detail)


async def test_the_event_loop_is_never_held(provider: EdgeProvider, opener: FakeOpener) -> None:
    video = await _video(provider, opener)
    video.seconds = 0.03
    gaps: list[float] = []

    async def beat() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.005)
            gaps.append(time.perf_counter() - start)

    async def job() -> None:
        await _all(provider.watch_job((await provider.submit_video_mask_generation_job(_request(20))).job_id))

    heart = asyncio.create_task(beat())
    for work in (
        job(),
        provider.video_mask_generation(_request(20)),
        _all(provider.stream_video_mask_generation(_request(20))),
    ):
        gaps.clear()
        start = time.perf_counter()
        await work
        assert max(gaps) < (time.perf_counter() - start) / 2
        assert len(gaps) > 5
    heart.cancel()


async def test_memory_of_a_run_is_let_go(provider: EdgeProvider, opener: FakeOpener) -> None:
    request = _request(4)
    request.video = _Watched(request.video)
    watched = weakref.ref(request.video)
    job = await provider.submit_video_mask_generation_job(request)
    await _in_thread(lambda: provider._video.status(job.job_id).status == "completed")
    await _in_thread(lambda: not provider._video._runs)
    del request
    gc.collect()
    assert watched() is None, "the finished job still holds the frames of its request"


class _Watched(list[Any]):
    """A list that can be watched."""
