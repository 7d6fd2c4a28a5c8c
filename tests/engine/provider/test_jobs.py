"""What is kept of tracking jobs, and for how long."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from pixano_edge.engine.provider import CompressedRLEData, JobNotFoundError, ModelBusyError, TrackedFrame, TrackedObject
from pixano_edge.engine.provider.jobs import JobLog, JobRecord, MemoryJobStore, found, new_record, status_of


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _frame(index: int) -> TrackedFrame:
    return TrackedFrame(index, [TrackedObject(5, CompressedRLEData([2, 3], b"06"))])


def _add(store: MemoryJobStore) -> JobRecord:
    record = new_record("m")
    store.add(record)
    return record


def test_the_course_of_a_job() -> None:
    store = MemoryJobStore()
    record = _add(store)
    job_id = record.job_id
    assert job_id.startswith("job-")
    assert set(job_id[4:]) <= set("0123456789abcdef")
    log = JobLog(store, job_id)
    status = status_of(store, job_id)
    assert (status.status, status.detail, status.data, status.timestamp) == ("running", None, None, record.submitted)
    assert status.metadata["progress"] is None
    log.opened(4, "Sam2VideoModel", "cpu")
    log.append(_frame(3))
    log.append(_frame(2))
    status = status_of(store, job_id)
    assert status.data is None  # only when completed
    assert status.metadata == {
        "model_name": "m", "model_class": "Sam2VideoModel", "device": "cpu", "frames_done": 2, "frames_total": 4,
        "progress": 0.5,
    }  # fmt: skip
    assert [f.frame_index for f in log.read(1)] == [2]
    log.close("completed", None)
    status = status_of(store, job_id)
    assert status.status == "completed"
    assert status.data is not None
    assert (status.data.objects_ids, status.data.frame_indexes) == ([5, 5], [3, 2])
    assert [m.counts for m in status.data.masks] == [b"06", b"06"]
    assert [f.frame_index for f in status.data.frames] == [3, 2]
    assert status.processing_time == status_of(store, job_id).processing_time  # stands still


@pytest.mark.parametrize("state", ["failed", "canceled"])
def test_other_ends_give_no_data_but_keep_the_frames(state: str) -> None:
    store = MemoryJobStore()
    job_id = _add(store).job_id
    log = JobLog(store, job_id)
    log.append(_frame(0))
    log.close(state, "why")
    status = status_of(store, job_id)
    assert (status.status, status.detail, status.data) == (state, "why", None)
    assert len(store.frames(job_id)) == 1


def test_unknown_jobs() -> None:
    store = MemoryJobStore()
    for job_id in ("job-1", None, 3, ["x"]):
        with pytest.raises(JobNotFoundError, match="no job") as caught:
            found(store, job_id)
        assert caught.value.action
    store.append("job-1", _frame(0))  # a late frame of a forgotten job
    store.update("job-1", state="failed")
    assert store.frames("job-1") == []


def test_jobs_are_forgotten_an_hour_after_their_end() -> None:
    clock = _Clock()
    store = MemoryJobStore(clock=clock)
    long, short = _add(store), _add(store)
    JobLog(store, short.job_id).close("completed", None)
    clock.now = 3599
    assert status_of(store, short.job_id).status == "completed"
    clock.now = 3600
    with pytest.raises(JobNotFoundError):
        status_of(store, short.job_id)
    assert store.frames(short.job_id) == []
    clock.now = 1e6
    assert status_of(store, long.job_id).status == "running"  # not while it runs
    JobLog(store, long.job_id).close("completed", None)
    clock.now += 3599
    assert status_of(store, long.job_id).status == "completed"


def test_the_cap_drops_the_oldest_ended_one_and_never_a_running_one() -> None:
    store = MemoryJobStore(cap=3)
    first, second, third = (_add(store).job_id for _ in range(3))
    with pytest.raises(ModelBusyError, match="3 tracking jobs run"):
        _add(store)
    for job_id in (third, second):
        JobLog(store, job_id).close("completed", None)
    fourth = _add(store).job_id
    assert [r.job_id for r in store.records()] == [first, third, fourth]  # in order of their coming
    assert MemoryJobStore()._cap == 500


def test_records_are_plain_values() -> None:
    """So that a database can take them."""
    record = JobRecord("job-1", "m", datetime(2026, 1, 1, tzinfo=timezone.utc))
    assert all(
        v is None or isinstance(v, str | int | float | datetime)
        for v in (getattr(record, f) for f in record.__dataclass_fields__)
    )
