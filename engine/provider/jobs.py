"""Tracking jobs: what is kept of them, and for how long.

`JobStore` is what a job needs kept: plain records and rows that a database can hold, no live object. `MemoryJobStore`
keeps them in the process. The live part of a job is its `Run`, which writes through `JobLog`; after a restart a store
on disk would hold records without one, whose state its owner then has to settle.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, Protocol

from .errors import JobNotFoundError, ModelBusyError
from .video_types import (
    COMPLETED,
    RUNNING,
    EdgeVideoMaskGenerationOutput,
    TrackedFrame,
    VideoMaskGenerationJobStatus,
)

JOB_TTL = 3600.0
"""Seconds that a job is kept after its end. Not from its start: a longer job would be gone when it is done."""
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

    def metadata(self) -> dict[str, Any]:
        """JSON-ready facts for a status."""
        return {
            "model_name": self.model,
            "model_class": self.model_class,
            "device": self.device,
            "frames_done": self.done,
            "frames_total": self.total,
            "progress": None if not self.total else self.done / self.total,
        }


class JobStore(Protocol):
    """Keeps jobs. Every method may be called from any thread and returns at once."""

    def add(self, record: JobRecord) -> None:
        """A new job; raises ModelBusyError when it holds as many running ones as it may."""

    def update(self, job_id: str, **changes: Any) -> None:
        """Sets fields of a record. Of a job that is not there nothing happens."""

    def append(self, job_id: str, frame: TrackedFrame) -> None:
        """One frame more, which counts as done."""

    def get(self, job_id: str) -> JobRecord | None:
        """The record, None where there is none (any more)."""

    def frames(self, job_id: str, start: int = 0) -> list[TrackedFrame]:
        """Frames from position `start` on, in the order in which they were appended."""

    def records(self) -> list[JobRecord]:
        """All of them, oldest first."""


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

    def add(self, record: JobRecord) -> None:
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

    def frames(self, job_id: str, start: int = 0) -> list[TrackedFrame]:
        with self._lock:
            return self._frames.get(job_id, [])[start:]

    def records(self) -> list[JobRecord]:
        with self._lock:
            self._expire()
            return list(self._jobs.values())

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

    def read(self, start: int) -> list[TrackedFrame]:
        return self._store.frames(self._job_id, start)

    def close(self, state: str, detail: str | None) -> None:
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


def status_of(store: JobStore, job_id: Any) -> VideoMaskGenerationJobStatus:
    """The state of a job, with the answer once it is complete.

    Raises:
        JobNotFoundError: There is none.
    """
    record = found(store, job_id)
    data = None
    if record.state == COMPLETED:
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


def _now() -> datetime:
    return datetime.now(timezone.utc)
