"""Jobs on disk: what is kept, for how long, how much, and what happens to files that are damaged, newer or in use."""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.provider import (
    CompressedRLEData,
    EdgeVideoMaskGenerationInput,
    InvalidRequestError,
    JobStoreError,
    ModelBusyError,
    TrackedFrame,
    TrackedObject,
)
from pixano_edge.engine.provider.jobs import JobLog, new_record, status_of
from pixano_edge.engine.provider.jobs_sqlite import PROBLEM_TOLD, SqliteJobStore
from pixano_edge.engine.provider.media import MediaPolicy

from .fakes import data_uri, png, until

ANY = MediaPolicy(None)
NONE = MediaPolicy([])


class _Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "jobs.sqlite"


@pytest.fixture
def opened(path: Path) -> Iterator[Any]:
    """Opens stores on one file, each after the one before."""
    stores: list[SqliteJobStore] = []

    def again(**settings: Any) -> SqliteJobStore:
        for store in stores:
            store.close()
        stores.append(SqliteJobStore(path, **settings))
        return stores[-1]

    yield again
    for store in stores:
        store.close()


def _frame(index: int, size: int = 2) -> TrackedFrame:
    return TrackedFrame(
        index,
        [
            TrackedObject(5, CompressedRLEData([2, 3], b"0" * size), 0.1 + 0.2, [0.0, 1.0, 2.0, 1 / 3]),
            TrackedObject(-1, CompressedRLEData([2, 3], b"06")),
        ],
    )


def _request(video: Any, **fields: Any) -> EdgeVideoMaskGenerationInput:
    values: dict[str, Any] = {"model": "m", "objects_ids": [1], "frame_indexes": [0], "points": [[[3, 4]]]}
    return EdgeVideoMaskGenerationInput(video=video, **{**values, **fields})


def _add(store: SqliteJobStore, request: Any = None, media: MediaPolicy | None = None) -> str:
    record = new_record("m")
    store.add(record, request, media)
    return record.job_id


def _ended(store: SqliteJobStore, clock: _Clock | None = None, state: str = "completed") -> str:
    job_id = _add(store)
    ended = datetime.now(timezone.utc) if clock is None else datetime.fromtimestamp(clock.now, timezone.utc)
    store.update(job_id, state=state, ended=ended)
    return job_id


# --- the course of a job ---------------------------------------------------------------------------------------------


def test_results_outlive_the_store(opened: Any, path: Path) -> None:
    store = opened()
    job_id = _add(store)
    log = JobLog(store, job_id)
    log.opened(3, "Sam2VideoModel", "cpu")
    for index in (2, 1, 0):
        log.append(_frame(index))
    assert [f.frame_index for f in log.read(1)] == [1, 0]  # committed or not
    assert log.read(1, 1) == [_frame(1)]
    log.close("completed", None)
    before = status_of(store, job_id)
    assert before.status == "completed"
    assert before.data is not None
    store = opened()
    after = status_of(store, job_id)
    assert after == before  # every field: times, metadata, rows with all their floats
    assert store.frames(job_id, 2) == [_frame(0)]
    assert store.frames(job_id, 1, 1) == [_frame(1)]
    assert store.frames(job_id, 9) == []
    assert store.warnings == []
    assert path.stat().st_mode & 0o077 == 0  # others have no business with an annotator's images


def test_a_running_job_of_a_stopped_server_has_failed(opened: Any) -> None:
    store = opened()
    kept, lost = _add(store, _request([b"one", b"two"]), NONE), _add(store)
    JobLog(store, kept).opened(9, "Sam2VideoModel", "cpu")
    for index in range(4):
        store.append(kept, _frame(index))
    store = opened()
    status = status_of(store, kept)
    assert (status.status, status.data) == ("failed", None)
    assert status.detail is not None
    assert status.detail.startswith("The server stopped while this job ran; 4 of 9 frames are kept: resume it with ")
    assert kept in status.detail
    assert status.metadata["resumable"] is True
    assert store.frames(kept) == [_frame(i) for i in range(4)]
    other = status_of(store, lost)
    assert other.status == "failed"
    assert "submit it again" in str(other.detail)
    assert "resumable" not in other.metadata
    with pytest.raises(InvalidRequestError, match="cannot be resumed"):
        store.resume(lost)


def test_jobs_without_a_place_are_no_news(opened: Any) -> None:
    store = opened()
    store.append("job-1", _frame(0))
    store.update("job-1", state="failed")
    assert store.frames("job-1") == []
    assert store.get("job-1") is None


def test_a_failed_job_says_how_to_go_on_and_one_that_ended_does_not(opened: Any, path: Path) -> None:
    store = opened()
    clips = path.with_name("jobs.sqlite.clips")
    for state, left in (("failed", True), ("completed", False), ("canceled", False)):
        job_id = _add(store, _request([b"one"]), NONE)
        assert (clips / job_id).is_dir()
        JobLog(store, job_id).close(state, "why")
        assert (clips / job_id).exists() is left
        assert ("resume" in str(status_of(store, job_id).detail)) is left
        if not left:
            with pytest.raises(InvalidRequestError, match=f"it is {state}"):
                store.resume(job_id)


# --- the request -----------------------------------------------------------------------------------------------------


def test_the_request_comes_back_as_it_was(opened: Any, tmp_path: Path) -> None:
    picture, named = png(), tmp_path / "named.png"
    named.write_bytes(png(color=(9, 9, 9)))
    video = [picture, data_uri(picture), str(named), named, "data:image/png;base64,!!", "no file", memoryview(picture)]
    fields = {
        "points": [np.array([[3.25, 4]], np.float32)], "labels": [[1]], "boxes": None, "propagate": None,
        "interval": {"start_frame": 3, "end_frame": 1},
        "keyframes": [{"frame_index": np.int64(2), "mask": {"size": (2, 3), "counts": b"06"}}],
    }  # fmt: skip
    store = opened()
    job_id = _add(store, _request(video, **fields), ANY)
    files = list((store.path.with_name("jobs.sqlite.clips") / job_id).iterdir())
    assert len(files) == 1  # equal frames once
    store = opened()
    request, media = store.resume(job_id)
    assert status_of(store, job_id).status == "running"
    assert (request.model, request.points, request.labels, request.interval) == (
        "m", [[[3.25, 4.0]]], [[1]], {"start_frame": 3, "end_frame": 1},
    )  # fmt: skip
    assert request.keyframes == [{"frame_index": 2, "mask": {"size": [2, 3], "counts": "06"}}]
    assert [media.read(request.video[i], 1 << 20) for i in (0, 1, 6)] == [picture] * 3
    # After a restart nothing may be read by path but what the new policy allows: it is not known here.
    with pytest.raises(InvalidRequestError, match="gone or was changed"):
        media.read(request.video[2], 1 << 20)
    with pytest.raises(Exception, match="base64"):
        media.read(request.video[4], 1 << 20)
    files[0].write_bytes(b"x" + files[0].read_bytes()[1:])
    with pytest.raises(InvalidRequestError, match="damaged on disk"):
        media.read(request.video[0], 1 << 20)
    files[0].unlink()
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        media.read(request.video[0], 1 << 20)


def test_a_whole_video_and_a_named_file_that_changes(opened: Any, tmp_path: Path) -> None:
    store = opened()
    job_id = _add(store, _request(b"a video"), ANY)
    store.update(job_id, state="failed", ended=datetime.now(timezone.utc))
    request, media = store.resume(job_id)
    kept = media.video(request.video, 1 << 20)
    assert isinstance(kept, Path)
    assert kept.read_bytes() == b"a video"
    named = tmp_path / "clip.mp4"
    named.write_bytes(b"first")
    job_id = _add(store, _request(str(named)), ANY)
    store.update(job_id, state="failed", ended=datetime.now(timezone.utc))
    request, media = store.resume(job_id)
    assert media.video(request.video, 1 << 20) == named
    named.write_bytes(b"second")
    with pytest.raises(InvalidRequestError, match="changed since the job was submitted"):
        media.video(request.video, 1 << 20)


def test_a_clip_that_is_too_large_is_not_kept(opened: Any, path: Path) -> None:
    store = opened(max_bytes=4000)
    job_id = _add(store, _request([os.urandom(900), os.urandom(1200)]), ANY)
    assert not (path.with_name("jobs.sqlite.clips") / job_id).exists()
    assert store.nbytes == 0
    store.append(job_id, _frame(0))
    JobLog(store, job_id).close("failed", "why")
    with pytest.raises(InvalidRequestError, match="too large to be kept"):
        store.resume(job_id)


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_jobs_are_forgotten_after_their_time_also_across_restarts(opened: Any) -> None:
    clock = _Clock()
    store = opened(ttl=100.0, clock=clock)
    old, running = _ended(store, clock), _add(store)
    store.append(old, _frame(0))
    clock.now += 99
    store = opened(ttl=100.0, clock=clock)
    assert store.get(old) is not None
    assert store.get(running).state == "failed"  # since this restart
    clock.now += 1
    assert store.get(old) is None
    assert store.frames(old) == []
    assert [r.job_id for r in store.records()] == [running]
    store = opened(ttl=100.0, clock=clock)
    assert [r.job_id for r in store.records()] == [running]
    assert sqlite3.connect(store.path).execute("SELECT count(*) FROM frames").fetchone() == (0,)


def test_the_cap_drops_the_oldest_ended_one_and_never_a_running_one(opened: Any) -> None:
    store = opened(cap=3)
    first, second, third = (_add(store) for _ in range(3))
    with pytest.raises(ModelBusyError, match="3 tracking jobs run"):
        _add(store)
    for job_id in (third, second):
        store.update(job_id, state="completed", ended=datetime.now(timezone.utc))
    fourth = _add(store)
    assert [r.job_id for r in store.records()] == [first, third, fourth]


def test_the_byte_budget_drops_ended_jobs_and_then_fails_the_job_that_wants_more(opened: Any) -> None:
    store = opened(max_bytes=3000)
    ended, running = _add(store), _add(store)
    store.append(ended, _frame(0, 1000))
    store.update(ended, state="completed", ended=datetime.now(timezone.utc))
    store.append(running, _frame(0, 1000))
    assert store.get(ended) is not None
    store.append(running, _frame(1, 1000))
    assert store.get(ended) is None
    with pytest.raises(JobStoreError, match="of the 3000 allowed") as caught:
        store.append(running, _frame(2, 1000))
    assert caught.value.action
    with pytest.raises(JobStoreError):  # and no gap afterwards
        store.append(running, _frame(3))
    assert [f.frame_index for f in store.frames(running)] == [0, 1]
    with pytest.raises(JobStoreError):
        store.update(running, state="completed", ended=datetime.now(timezone.utc))
    assert store.get(running).state == "failed"
    store = opened(max_bytes=3000)
    assert store.get(running).state == "failed"
    assert store.nbytes < 3000


def test_the_file_does_not_grow_for_ever(opened: Any) -> None:
    store = opened(max_bytes=200_000)
    sizes = []
    for _ in range(12):
        job_id = _add(store, _request([os.urandom(20_000)]), ANY)
        for index in range(20):
            store.append(job_id, _frame(index, 4000))
        JobLog(store, job_id).close("completed", None)
        sizes.append(store.path.stat().st_size + sum(p.stat().st_size for p in store.path.parent.rglob("*-wal")))
    assert store.nbytes <= 200_000
    assert max(sizes) < 2_000_000


# --- the disk --------------------------------------------------------------------------------------------------------


def test_a_full_disk_fails_the_job_and_nothing_else(opened: Any) -> None:
    """SQLite's own limit of pages stands for the disk: the error is the same."""
    clock = _Clock()
    store = opened(clock=clock)
    good, bad = _ended(store), _add(store, _request([b"one"]), NONE)
    store.append(bad, _frame(0))
    until(lambda: not store._jobs[bad].waiting)
    pages = store._file.execute("PRAGMA page_count").fetchone()[0]
    store._file.execute(f"PRAGMA max_page_count = {pages + 2}")

    def fill() -> None:
        for index in range(1, 200):
            store.append(bad, _frame(index, 3000))
            time.sleep(0.001)

    with pytest.raises(JobStoreError, match="full") as caught:
        fill()
    assert "Free space" in str(caught.value)
    with pytest.raises(JobStoreError, match="full"):
        JobLog(store, bad).close("completed", None)  # must not count as complete
    failed = status_of(store, bad)
    assert failed.status == "failed"
    assert "full" in str(failed.detail)
    assert len(store.frames(bad)) == failed.metadata["frames_done"] < 199
    assert store.get(good).state == "completed"

    def add() -> None:
        for _ in range(200):
            _add(store, _request([b"one"] * 100), NONE)

    with pytest.raises(JobStoreError, match="full"):
        add()
    store._file.execute("PRAGMA max_page_count = 1000000")
    until(lambda: "at the moment" not in str(store.warnings))
    (told,) = store.warnings  # it would be gone before anybody looked
    assert "2001-09-09T01:46:40+00:00" in told
    assert "full" in told
    clock.now += PROBLEM_TOLD
    assert not store.warnings
    request, _ = store.resume(bad)
    assert request.model == "m"
    store.append(bad, _frame(len(store.frames(bad))))
    JobLog(store, bad).close("completed", None)
    store = opened()
    assert status_of(store, bad).status == "completed"
    assert [f.frame_index for f in store.frames(bad)] == list(range(len(store.frames(bad))))


def test_a_clip_that_does_not_fit_the_disk_is_refused(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened()

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(JobStoreError, match="No space left"):
        _add(store, _request([b"one"]), NONE)
    assert store.records() == []
    assert list(store.path.with_name("jobs.sqlite.clips").iterdir()) == []


def test_appending_does_not_wait_for_the_disk(opened: Any) -> None:
    """A frame at 1000 frames per second would have 1 ms; and no file handle is left behind."""
    store = opened()
    job_id = _add(store)
    frame = _frame(0, 4000)
    began = time.perf_counter()
    with store._reading:
        for _ in range(500):
            store.append(job_id, frame)
    assert (time.perf_counter() - began) / 500 < 1e-3
    JobLog(store, job_id).close("completed", None)
    assert len(store.frames(job_id)) == 500
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0


def test_many_threads(opened: Any) -> None:
    store = opened()
    jobs = [_add(store) for _ in range(4)]
    errors: list[Exception] = []

    def write(job_id: str) -> None:
        try:
            for index in range(60):
                store.append(job_id, _frame(index, 500))
                got = store.frames(job_id)
                assert [f.frame_index for f in got] == list(range(index + 1))
                store.records()
            JobLog(store, job_id).close("completed", None)
        except Exception as error:  # noqa: BLE001 (shown below)
            errors.append(error)

    threads = [threading.Thread(target=write, args=(job_id,)) for job_id in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    store = opened()
    assert [len(store.frames(job_id)) for job_id in jobs] == [60] * 4


def test_a_closed_store_refuses(opened: Any) -> None:
    store = opened()
    job_id = _add(store)
    store.close()
    store.close()
    for call in (lambda: _add(store), lambda: store.append(job_id, _frame(0)), lambda: store.resume(job_id)):
        with pytest.raises(JobStoreError, match="closed"):
            call()
    store.update(job_id, state="failed")
    assert store.frames(job_id) == []


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused(opened: Any, path: Path) -> None:
    opened()
    with pytest.raises(JobStoreError, match=f"runs already \\(process {os.getpid()}\\)"):
        SqliteJobStore(path)
    code = (
        "import sys\nfrom pixano_edge.engine.provider.jobs_sqlite import PROBLEM_TOLD, SqliteJobStore\n"
        "try:\n    SqliteJobStore(sys.argv[1])\nexcept Exception as error:\n    print(error)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert f"process {os.getpid()}" in shown
    assert "Stop that one first" in shown
    opened()  # after closing the first


@pytest.mark.parametrize("where", [0, 40, 4096, 8192])
def test_a_damaged_file_is_moved_aside_and_the_server_goes_on(opened: Any, path: Path, where: int) -> None:
    store = opened()
    job_id = _add(store, _request([b"one"]), NONE)
    for index in range(20):
        store.append(job_id, _frame(index, 900))
    store.close()
    content = bytearray(path.read_bytes())
    content[where : where + 200] = b"\xa5" * 200
    path.write_bytes(content)
    store = opened()
    assert store.records() == []
    (warning,) = store.warnings
    (aside,) = [p for p in path.parent.glob("jobs.sqlite.damaged-*") if p.is_file()]
    assert aside.name in warning
    assert aside.read_bytes() == content
    (clips,) = [p for p in path.parent.glob("jobs.sqlite.damaged-*.clips") if p.is_dir()]
    assert (clips / job_id).is_dir()
    assert _ended(store) in {r.job_id for r in store.records()}


def test_a_newer_schema_is_refused_and_left_alone(opened: Any, path: Path) -> None:
    store = opened()
    _ended(store)
    store.close()
    with sqlite3.connect(path) as file:
        file.execute("PRAGMA user_version = 2")
    before = path.read_bytes()
    with pytest.raises(JobStoreError, match=r"newer version \(schema 2, this one knows 1\).*Update"):
        opened()
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"my notes", None])
def test_another_programs_file_is_left_alone(path: Path, content: bytes | None) -> None:
    path.parent.mkdir()
    if content is None:
        with sqlite3.connect(path) as file:
            file.execute("CREATE TABLE notes (text TEXT)")
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(JobStoreError, match=r"no file of jobs|another program"):
        SqliteJobStore(path)
    assert path.read_bytes() == before


def test_a_folder_and_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    store = SqliteJobStore(tmp_path)
    assert store.path == tmp_path / "jobs.sqlite"
    store.close()
    (tmp_path / "file").write_text("x")
    with pytest.raises(JobStoreError, match="Give a folder"):
        SqliteJobStore(tmp_path / "file" / "jobs.sqlite")


def test_orphaned_clips_go(opened: Any, path: Path) -> None:
    store = opened()
    keep = _add(store, _request([b"one"]), NONE)
    orphan = path.with_name("jobs.sqlite.clips") / "job-0"
    orphan.mkdir()
    opened()
    assert not orphan.exists()
    assert (orphan.parent / keep).is_dir()


def test_records_are_values_that_the_file_takes(opened: Any) -> None:
    store = opened()
    record = replace(new_record("m"), device="cuda:0", model_class="Sam2VideoModel", total=7)
    store.add(record)
    store = opened()
    found = store.get(record.job_id)
    assert replace(found, state="running", detail=None, ended=None) == record


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    for given, expected in (
        (f"{tmp_path}/new/", "new/jobs.sqlite"),
        (f"{tmp_path}/deep/er", "deep/er"),
        (tmp_path, "jobs.sqlite"),
    ):
        store = SqliteJobStore(given)
        store.close()
        assert store.path == tmp_path / expected
        assert store.path.is_file()
