"""Tracking jobs across the end of a process: a server that is killed, started again, and asked to go on."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.models.rle import decode_rle
from pixano_edge.engine.provider import (
    CompressedRLEData,
    EdgeProvider,
    EdgeVideoMaskGenerationInput,
    InferenceError,
    InvalidRequestError,
    JobNotFoundError,
    JobStoreError,
    TrackedFrame,
    TrackedObject,
)
from pixano_edge.engine.provider.jobs_sqlite import SqliteJobStore, _text
from pixano_edge.engine.provider.runs import agreement

from .fakes import FakeOpener, add_bundle, data_uri, make_provider, png, until

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "engine" / "assets" / "demo"
FRAMES = 14
FRAME = data_uri(png())

CHILD = """
import asyncio, json, sys
from pixano_edge.engine.provider import EdgeProvider, EdgeVideoMaskGenerationInput

async def main(jobs, clip, keyframes):
    edge = EdgeProvider(device="cpu", threads=1, jobs=jobs, store=sys.argv[4])
    def request(last):
        return EdgeVideoMaskGenerationInput(
            video=open(clip, "rb").read(), model="sam2-demo-video", objects_ids=[1, 2], frame_indexes=[],
            keyframes=json.loads(keyframes), interval={"start_frame": 0, "end_frame": last},
        )
    short = await edge.submit_video_mask_generation_job(request(3))
    async for _ in edge.watch_job(short.job_id):
        pass
    print(short.job_id, flush=True)
    job = await edge.submit_video_mask_generation_job(request(int(sys.argv[5])))
    print(job.job_id, flush=True)
    async for frame in edge.watch_job(job.job_id):
        print(frame.frame_index, flush=True)

asyncio.run(main(*sys.argv[1:4]))
"""


def _keyframes() -> list[dict[str, Any]]:
    """Clicks on two objects of the demo's clip, one of them again later."""
    first, second = json.loads((DEMO / "clip.json").read_text())["objects"][:2]

    def key(frame: int, click: list[float]) -> dict[str, Any]:
        return {"frame_index": frame, "points": [{"x": click[0], "y": click[1], "label": 1}]}

    return [key(0, first["click"]), key(0, second["click"])]


def _request(**fields: Any) -> EdgeVideoMaskGenerationInput:
    values: dict[str, Any] = {
        "video": (DEMO / "clip.mp4").read_bytes(), "model": "sam2-demo-video", "objects_ids": [1, 2],
        "frame_indexes": [], "keyframes": _keyframes(), "interval": {"start_frame": 0, "end_frame": FRAMES - 1},
    }  # fmt: skip
    return EdgeVideoMaskGenerationInput(**{**values, **fields})


def _edge(store: Path, **settings: Any) -> EdgeProvider:
    return EdgeProvider(device="cpu", threads=1, store=store, **settings)


def _least(rows: list[TrackedFrame], truth: list[TrackedFrame]) -> float:
    """Smallest IoU of all masks."""
    assert [f.frame_index for f in rows] == [f.frame_index for f in truth]
    return min(agreement(one, other) for one, other in zip(rows, truth, strict=True))


async def _all(frames: Any) -> list[TrackedFrame]:
    return [frame async for frame in frames]


async def test_a_killed_server_keeps_results_and_goes_on_as_if_nothing_had_been(
    demo_bundle: Path, tmp_path: Path
) -> None:
    jobs, store = tmp_path / "jobs.sqlite", tmp_path / "store"
    args = [str(jobs), str(DEMO / "clip.mp4"), json.dumps(_keyframes()), str(store), str(FRAMES - 1)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", CHILD, *args], stdout=subprocess.PIPE, text=True, env=env)
    try:
        short, job_id, seen = await asyncio.to_thread(_until_frame, child, 4)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(30)
        child.stdout.close()  # type: ignore[union-attr]

    plain = _edge(store)
    truth = await _all(plain.stream_video_mask_generation(_request()))
    # The control: going on from the last frame without what was seen before gives other masks.
    late = _request(interval={"start_frame": seen, "end_frame": FRAMES - 1})
    assert _least(await _all(plain.stream_video_mask_generation(late)), truth[seen:]) < 0.9
    await plain.close()

    edge = _edge(store, jobs=jobs)
    done = await edge.get_video_mask_generation_job(short)
    assert done.status == "completed"
    assert _least(done.data.frames, truth[:4]) == 1.0  # type: ignore[union-attr]
    failed = await edge.get_video_mask_generation_job(job_id)
    kept = failed.metadata["frames_done"]
    assert failed.status == "failed"
    assert f"{kept} of {FRAMES} frames are kept: resume it with" in str(failed.detail)
    assert seen <= kept < FRAMES  # what a client was shown is there
    assert [status.job_id for status in await edge.jobs()] == [short, job_id]
    with pytest.raises(InferenceError, match="The server stopped"):
        await _all(edge.watch_job(job_id))

    running = await edge.resume_video_mask_generation_job(job_id)
    assert (running.status, running.detail) == ("running", None)
    assert running.metadata["frames_done"] == kept
    assert (await edge.resume_video_mask_generation_job(job_id)).status == "running"  # once is enough
    watch = edge.watch_job(job_id)
    began = time.perf_counter()
    first = await watch.__anext__()  # kept frames come before the others are there
    assert time.perf_counter() - began < 1
    rows = [first, *await _all(watch)]
    assert _least(rows, truth) == 1.0
    result = await edge.get_video_mask_generation_job(job_id)
    assert result.status == "completed"
    assert _least(result.data.frames, truth) == 1.0  # type: ignore[union-attr]
    assert result.metadata["frames_replayed"] == kept
    assert not (tmp_path / "jobs.sqlite.clips" / job_id).exists()
    with pytest.raises(InvalidRequestError, match="it is completed"):
        await edge.resume_video_mask_generation_job(job_id)
    await edge.close()

    edge = _edge(store, jobs=jobs)
    again = await edge.get_video_mask_generation_job(job_id)
    assert _least(again.data.frames, truth) == 1.0  # type: ignore[union-attr]
    with pytest.raises(JobNotFoundError):
        await edge.resume_video_mask_generation_job("job-0")
    await edge.close()


def _until_frame(child: subprocess.Popen[str], frame: int) -> tuple[str, str, int]:
    """Ids of both jobs, and the last frame that was heard of, once that is `frame` or more."""
    assert child.stdout is not None
    lines: list[str] = []
    end = time.monotonic() + 60
    while len(lines) < 2 or int(lines[-1] if len(lines) > 2 else -1) < frame:
        assert select.select([child.stdout], [], [], end - time.monotonic())[0], f"nothing more than {lines}"
        line = child.stdout.readline().strip()
        assert line, f"the child ended after {lines}"
        lines.append(line)
    return lines[0], lines[1], int(lines[-1])


# --- on fakes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    add_bundle(tmp_path, "clip", tracks=True)
    return tmp_path


def _fake_request(count: int = 6) -> Any:
    keys = [{"frame_index": 0, "points": [{"x": 5, "y": 7, "label": 1}]}]
    return EdgeVideoMaskGenerationInput([FRAME] * count, "clip-video", [1], [], keyframes=keys)


async def _interrupted(root: Path, frames: int) -> str:
    """A job that the provider's end cut off after some frames."""
    opener = FakeOpener()
    edge = make_provider(root, opener, jobs=root / "jobs.sqlite")
    await edge.video_mask_generation(_fake_request(1))
    video = opener.videos[0]
    video.hold_at = ("frame", frames)
    video.gate.clear()
    video.reached.clear()
    job = await edge.submit_video_mask_generation_job(_fake_request())
    await asyncio.to_thread(video.reached.wait, 10)
    closing = asyncio.create_task(edge.close())
    await asyncio.sleep(0.05)
    video.gate.set()
    await closing
    return job.job_id


async def test_a_server_that_is_stopped_says_how_to_resume(root: Path, opener: FakeOpener) -> None:
    job_id = await _interrupted(root, 3)
    edge = make_provider(root, opener, jobs=root / "jobs.sqlite")
    status = await edge.get_video_mask_generation_job(job_id)
    assert status.status == "failed"
    assert "unloaded" in str(status.detail)
    assert f"{status.metadata['frames_done']} of 6 frames are kept: resume it with" in str(status.detail)
    await edge.resume_video_mask_generation_job(job_id)
    frames = await _all(edge.watch_job(job_id))
    assert [f.frame_index for f in frames] == list(range(6))
    assert (await edge.get_video_mask_generation_job(job_id)).metadata["frames_total"] == 6
    await edge.close()


async def test_a_model_that_answers_otherwise_now_is_noticed(root: Path, opener: FakeOpener) -> None:
    """No seam between two models in one result."""
    job_id = await _interrupted(root, 3)
    store = SqliteJobStore(root / "jobs.sqlite")
    row = store.frames(job_id)[1]
    other = TrackedFrame(1, [TrackedObject(1, CompressedRLEData(row.objects[0].mask.size, _rle(30, 40)))])
    store._file.execute("UPDATE frames SET frame = ? WHERE job_id = ? AND position = 1", (_text(other), job_id))
    store.close()
    edge = make_provider(root, opener, jobs=root / "jobs.sqlite")
    await edge.resume_video_mask_generation_job(job_id)
    with pytest.raises(InferenceError, match="Frame 1 comes out otherwise than before"):
        await _all(edge.watch_job(job_id))
    status = await edge.get_video_mask_generation_job(job_id)
    assert status.status == "failed"
    assert status.metadata["frames_done"] < 6
    await edge.close()


def _rle(height: int, width: int) -> bytes:
    from pixano_edge.engine.models.rle import encode_rle

    mask = np.zeros((height, width), np.bool_)
    mask[20:, 20:] = True
    return bytes(encode_rle(mask)["counts"])


async def test_resuming_without_its_model_leaves_the_job_as_it_was(root: Path, opener: FakeOpener) -> None:
    job_id = await _interrupted(root, 3)
    away = root / "away"
    bundles = [p for p in root.iterdir() if (p / "manifest.json").is_file()]
    bundles[0].rename(away)
    edge = make_provider(root / "empty", opener, jobs=root / "jobs.sqlite")
    with pytest.raises(InferenceError, match="clip-video"):
        await edge.resume_video_mask_generation_job(job_id)
    until(lambda: edge._video.status(job_id).status == "failed")
    assert "could not be resumed" in str((await edge.get_video_mask_generation_job(job_id)).detail)
    await edge.close()
    away.rename(bundles[0])
    edge = make_provider(root, opener, jobs=root / "jobs.sqlite")
    await edge.resume_video_mask_generation_job(job_id)
    assert len(await _all(edge.watch_job(job_id))) == 6
    await edge.close()


async def test_a_resumed_job_can_be_canceled_and_is_stopped_then(root: Path, opener: FakeOpener) -> None:
    job_id = await _interrupted(root, 3)
    edge = make_provider(root, opener, jobs=root / "jobs.sqlite")
    opener.gate.clear()
    await edge.resume_video_mask_generation_job(job_id)
    assert (await edge.cancel_video_mask_generation_job(job_id)).status == "canceled"
    opener.gate.set()
    with pytest.raises(InvalidRequestError, match="it is canceled"):
        await edge.resume_video_mask_generation_job(job_id)
    await edge.close()


async def test_a_job_that_cannot_be_kept_is_refused_and_frees_its_model(root: Path, opener: FakeOpener) -> None:
    edge = make_provider(root, opener, jobs=root / "jobs.sqlite")
    store = edge._video._store

    def full(*_: Any) -> None:
        raise JobStoreError("The job cannot be kept: database or disk is full.", "Free space.")

    store.add = full  # type: ignore[method-assign]
    for _ in range(40):  # more than a model may have at once
        with pytest.raises(JobStoreError, match="full"):
            await edge.submit_video_mask_generation_job(_fake_request())
        await asyncio.to_thread(until, lambda: edge._video._runs == {})
    assert edge._video.running() == []
    assert len((await edge.video_mask_generation(_fake_request())).data.masks) == 6
    await edge.close()


async def test_a_caller_who_leaves_while_the_job_is_written_leaves_no_running_job(
    root: Path, opener: FakeOpener
) -> None:
    edge = make_provider(root, opener, jobs=root / "jobs.sqlite")
    store = edge._video._store
    real, entered, gate = store.add, threading.Event(), threading.Event()

    def slow(*values: Any) -> None:
        entered.set()
        assert gate.wait(20)
        real(*values)

    store.add = slow  # type: ignore[method-assign]
    task = asyncio.create_task(edge.submit_video_mask_generation_job(_fake_request()))
    await asyncio.to_thread(entered.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    await asyncio.to_thread(until, lambda: edge._video._runs == {})
    (status,) = await edge.jobs()
    assert status.status == "failed"
    assert "caller left" in str(status.detail)
    await edge.resume_video_mask_generation_job(status.job_id)
    assert len(await _all(edge.watch_job(status.job_id))) == 6
    await edge.close()


async def test_a_caller_who_leaves_while_a_job_is_reopened_leaves_no_running_job(
    root: Path, opener: FakeOpener
) -> None:
    job_id = await _interrupted(root, 3)
    edge = make_provider(root, opener, jobs=root / "jobs.sqlite")
    store = edge._video._store
    real, entered, gate = store.resume, threading.Event(), threading.Event()

    def slow(job_id: str) -> Any:
        entered.set()
        assert gate.wait(20)
        return real(job_id)

    store.resume = slow  # type: ignore[method-assign]
    task = asyncio.create_task(edge.resume_video_mask_generation_job(job_id))
    await asyncio.to_thread(entered.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    await asyncio.to_thread(until, lambda: "was not resumed" in str(edge._video.status(job_id).detail))
    assert (await edge.get_video_mask_generation_job(job_id)).status == "failed"
    store.resume = real  # type: ignore[method-assign]
    await edge.resume_video_mask_generation_job(job_id)
    assert len(await _all(edge.watch_job(job_id))) == 6
    with pytest.raises(InvalidRequestError, match="it is completed"):
        await edge.resume_video_mask_generation_job(job_id)
    assert (await edge.get_video_mask_generation_job(job_id)).status == "completed", "a refusal changes nothing"
    await edge.close()


async def test_a_disk_that_fills_up_fails_the_job_with_the_reason(root: Path, opener: FakeOpener) -> None:
    edge = make_provider(root, opener, jobs=root / "jobs.sqlite")
    store = edge._video._store
    real = store.append

    def append(job_id: str, frame: TrackedFrame) -> None:
        if frame.frame_index == 3:
            raise JobStoreError("Frames of this job cannot be kept: database or disk is full.", "Free space.")
        real(job_id, frame)

    store.append = append  # type: ignore[method-assign]
    job = await edge.submit_video_mask_generation_job(_fake_request())
    with pytest.raises(JobStoreError, match="disk is full"):
        await _all(edge.watch_job(job.job_id))
    status = await edge.get_video_mask_generation_job(job.job_id)
    assert status.status == "failed"
    assert "disk is full" in str(status.detail)
    assert status.metadata["frames_done"] == 3
    store.append = real  # type: ignore[method-assign]
    await edge.resume_video_mask_generation_job(job.job_id)
    assert len(await _all(edge.watch_job(job.job_id))) == 6
    await edge.close()


async def test_a_damaged_file_shows_in_the_servers_warnings(root: Path, opener: FakeOpener) -> None:
    SqliteJobStore(root / "jobs.sqlite").close()
    (root / "jobs.sqlite").write_bytes(b"\0" * 5000)
    edge = make_provider(root, opener, jobs=root / "jobs.sqlite")
    assert any("file of jobs was damaged" in text for text in (await edge.get_server_info()).warnings)
    await edge.close()


async def test_jobs_in_memory_cannot_be_resumed(root: Path, opener: FakeOpener) -> None:
    edge = make_provider(root, opener)
    job = await edge.submit_video_mask_generation_job(_fake_request())
    await _all(edge.watch_job(job.job_id))
    with pytest.raises(InvalidRequestError, match="kept in memory"):
        await edge.resume_video_mask_generation_job(job.job_id)
    assert [status.data for status in await edge.jobs()] == [None]
    await edge.close()


def test_agreement() -> None:
    def frame(*masks: tuple[int, np.ndarray]) -> TrackedFrame:
        from pixano_edge.engine.provider.convert import rle_of

        return TrackedFrame(0, [TrackedObject(i, rle_of(mask)) for i, mask in masks])

    one = np.zeros((4, 6), np.bool_)
    one[:2, :2] = True
    half = one.copy()
    half[0] = False
    assert agreement(frame((1, one)), frame((1, one))) == 1.0
    assert agreement(frame((1, one), (2, one)), frame((1, one), (2, half))) == 0.5
    assert agreement(frame((1, one)), frame((2, one))) == 0.0
    assert agreement(frame((1, one)), frame((1, one.T.copy()))) == 0.0
    assert agreement(frame((1, one)), frame((1, np.zeros_like(one)))) == 0.0
    assert decode_rle({"size": [4, 6], "counts": frame((1, one)).objects[0].mask.counts}).sum() == 4
