"""Tracking jobs: what is kept of them, and for how long.

`JobStore` is what a job needs kept: plain records and rows that a database can hold, no live object. `MemoryJobStore`
keeps them in the process, `jobs_sqlite.SqliteJobStore` on disk. The live part of a job is its `Run`, which writes
through `JobLog`. After a restart a store on disk holds records without one: it marks them failed, and
`VideoService.resume` makes a new run of them.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, Protocol

from .errors import InvalidRequestError, JobNotFoundError, ModelBusyError
from .media import MediaPolicy
from .video_types import (
    COMPLETED,
    FAILED,
    RUNNING,
    EdgeVideoMaskGenerationOutput,
    TrackedFrame,
    VideoMaskGenerationJobStatus,
)

JOB_TTL = 3600.0
"""Seconds that a job is kept in memory after its end. Not from its start: a longer job would be gone when done."""
JOB_CAP = 500
"""Jobs that are kept; the oldest ended one goes when another comes."""


@dataclass(frozen=True)
class JobRecord:
    """What is known of a job.

    Attributes:
        job_id: ``job-`` and hexadecimal digits.
        model: Name of the model as the request had it.
        submitted: UTC.
        state: See `video_types.RUNNING`.
        detail: Why it failed or that it was canceled.
        model_class: Empty until the model is loaded.
        device: Likewise.
        done: Frames done.
        total: Frames in all; None until the clip is open.
        ended: UTC; None while it runs.
        resumable: Whether the request is kept, so that the job can go on from its last frame after a failure.
        replayed: Frames computed again, without a new row, since it was resumed; see `Run`.
    """

    job_id: str
    model: str
    submitted: datetime
    state: str = RUNNING
    detail: str | None = None
    model_class: str = ""
    device: str = ""
    done: int = 0
    total: int | None = None
    ended: datetime | None = None
    resumable: bool = False
    replayed: int = 0

    def metadata(self) -> dict[str, Any]:
        """JSON-ready facts for a status."""
        return {
            "model_name": self.model,
            "model_class": self.model_class,
            "device": self.device,
            "frames_done": self.done,
            "frames_total": self.total,
            "progress": None if not self.total else self.done / self.total,
            **({"frames_replayed": self.replayed} if self.replayed else {}),
            **({"resumable": True} if self.resumable and self.state == FAILED else {}),
        }


class JobStore(Protocol):
    """Keeps jobs. Every method may be called from any thread.

    `append`, `get`, `frames` and `records` return at once; `add`, `update` of an end, `resume` and `close` may wait for
    a disk, so they are not for an event loop.
    """

    @property
    def warnings(self) -> list[str]:
        """Faults that the administrator should know of."""

    def add(self, record: JobRecord, request: Any = None, media: MediaPolicy | None = None) -> None:
        """A new job.

        Args:
            record: What is known of it.
            request: What was asked for, for stores that can resume; read by attribute.
            media: Which files the request may name.

        Raises:
            ModelBusyError: It holds as many running jobs as it may.
            JobStoreError: It cannot be kept.
        """

    def update(self, job_id: str, **changes: Any) -> None:
        """Sets fields of a record. Of a job that is not there nothing happens.

        Raises:
            JobStoreError: The job was to end as completed, and not all of its frames could be kept; it has failed.
        """

    def append(self, job_id: str, frame: TrackedFrame) -> None:
        """One frame more, which counts as done; raises JobStoreError when frames of this job cannot be kept."""

    def get(self, job_id: str) -> JobRecord | None:
        """The record, None where there is none (any more)."""

    def frames(self, job_id: str, start: int = 0, count: int | None = None) -> list[TrackedFrame]:
        """Frames from position `start` on, at most `count`, in the order in which they were appended."""

    def records(self) -> list[JobRecord]:
        """All of them, oldest first."""

    def resume(self, job_id: str) -> tuple[Any, MediaPolicy]:
        """Makes an ended job run again, its frames kept: the request it was added with, and what may read its clip.

        Raises:
            InvalidRequestError: It cannot be resumed; says why.
        """

    def close(self) -> None:
        """Writes what is left. Nothing is kept afterwards."""


class MemoryJobStore:
    """`JobStore` in this process: masks stay run lengths, and all is gone with the process.

    Args:
        ttl: Seconds that a job is kept after its end.
        cap: Jobs that are kept; running ones never go.
        clock: Seconds, for tests.
    """

    def __init__(self, ttl: float = JOB_TTL, cap: int = JOB_CAP, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl = ttl
        self._cap = cap
        self._clock = clock
        self._lock = threading.Lock()
        self._jobs: dict[str, JobRecord] = {}
        self._frames: dict[str, list[TrackedFrame]] = {}
        self._ended: dict[str, float] = {}

    @property
    def warnings(self) -> list[str]:
        """None: there is nothing that can be damaged."""
        return []

    def add(self, record: JobRecord, request: Any = None, media: MediaPolicy | None = None) -> None:
        with self._lock:
            self._expire()
            if len(self._jobs) >= self._cap:
                oldest = next((job_id for job_id in self._jobs if job_id in self._ended), None)
                if oldest is None:
                    raise ModelBusyError(
                        f"{len(self._jobs)} tracking jobs run already.", "Wait for one to end, or cancel one."
                    )
                self._forget(oldest)
            self._jobs[record.job_id] = record
            self._frames[record.job_id] = []

    def update(self, job_id: str, **changes: Any) -> None:
        with self._lock:
            record = self._jobs.get(job_id)
            if record is not None:
                self._jobs[job_id] = replace(record, **changes)
                if self._jobs[job_id].ended is not None:
                    self._ended.setdefault(job_id, self._clock())

    def append(self, job_id: str, frame: TrackedFrame) -> None:
        with self._lock:
            record = self._jobs.get(job_id)
            if record is not None:
                self._frames[job_id].append(frame)
                self._jobs[job_id] = replace(record, done=record.done + 1)

    def get(self, job_id: str) -> JobRecord | None:
        with self._lock:
            self._expire()
            return self._jobs.get(job_id)

    def frames(self, job_id: str, start: int = 0, count: int | None = None) -> list[TrackedFrame]:
        with self._lock:
            return self._frames.get(job_id, [])[start : None if count is None else start + count]

    def records(self) -> list[JobRecord]:
        with self._lock:
            self._expire()
            return list(self._jobs.values())

    def resume(self, job_id: str) -> tuple[Any, MediaPolicy]:
        raise InvalidRequestError(
            f"Job '{job_id}' cannot be resumed: jobs are kept in memory here, without their clips.",
            "Submit it again, or give the provider a file for jobs.",
        )

    def close(self) -> None:
        """Nothing to do."""

    def _expire(self) -> None:
        now = self._clock()
        for job_id in [j for j, ended in self._ended.items() if now - ended >= self._ttl]:
            self._forget(job_id)

    def _forget(self, job_id: str) -> None:
        del self._jobs[job_id], self._frames[job_id], self._ended[job_id]


class JobLog:
    """Writes one run into a store; see `runs.Log`."""

    def __init__(self, store: JobStore, job_id: str) -> None:
        self._store = store
        self._job_id = job_id

    def opened(self, total: int, model_class: str, device: str) -> None:
        self._store.update(self._job_id, total=total, model_class=model_class, device=device)

    def append(self, frame: TrackedFrame) -> None:
        self._store.append(self._job_id, frame)

    def read(self, start: int, count: int | None = None) -> list[TrackedFrame]:
        return self._store.frames(self._job_id, start, count)

    def replayed(self, count: int) -> None:
        self._store.update(self._job_id, replayed=count)

    def close(self, state: str, detail: str | None) -> None:
        record = self._store.get(self._job_id)
        if state == FAILED and record is not None and record.resumable:
            detail = f"{detail} {can_be_resumed(record)}"
        self._store.update(self._job_id, state=state, detail=detail, ended=_now())


def new_record(model: str) -> JobRecord:
    """A job that begins now."""
    return JobRecord(f"job-{uuid.uuid4().hex}", model, _now())


def found(store: JobStore, job_id: Any) -> JobRecord:
    """The record of a job.

    Raises:
        JobNotFoundError: There is none.
    """
    record = store.get(job_id) if isinstance(job_id, str) else None
    if record is None:
        raise JobNotFoundError(
            f"There is no job {job_id!r:.100}.", "It never was, or it ended long ago: submit the request again."
        )
    return record


def status_of(store: JobStore, job_id: Any, rows: bool = True) -> VideoMaskGenerationJobStatus:
    """The state of a job, with the answer once it is complete, unless `rows` is False.

    Raises:
        JobNotFoundError: There is none.
    """
    record = found(store, job_id)
    data = None
    if record.state == COMPLETED and rows:
        data = EdgeVideoMaskGenerationOutput.of(store.frames(record.job_id))
    return VideoMaskGenerationJobStatus(
        job_id=record.job_id,
        status=record.state,
        detail=record.detail,
        data=data,
        metadata=record.metadata(),
        timestamp=record.submitted,
        processing_time=((record.ended or _now()) - record.submitted).total_seconds(),
    )


def can_be_resumed(record: JobRecord) -> str:
    """What the reason of a failed job ends with where its request is kept."""
    total = "" if record.total is None else f" of {record.total}"
    return (
        f"{record.done}{total} frames are kept: resume it with POST /v1/jobs/{record.job_id}/resume, or "
        f"resume_video_mask_generation_job('{record.job_id}')."
    )


def _now() -> datetime:
    return datetime.now(timezone.utc)
