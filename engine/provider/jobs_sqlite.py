"""Tracking jobs in a SQLite file, which outlive the process.

One thread writes; it commits whatever came since its last commit, so tracking never waits for the disk and a killed
process loses at most the frames of the last milliseconds. Ends of jobs are waited for and reach the disk itself
(``synchronous=FULL``), frames before that may be lost in a power cut, from the last ones on. Records are kept in
memory, too; rows are read from the file.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .errors import InvalidRequestError, JobStoreError, ModelBusyError
from .jobs import JOB_CAP, JobRecord, can_be_resumed
from .jobs_clips import KeptClip, KeptMedia, kept_request
from .jobs_file import FileLock, job_file, open_file
from .media import MediaPolicy
from .types import CompressedRLEData
from .video_types import CANCELED, COMPLETED, FAILED, RUNNING, TrackedFrame, TrackedObject

SAVED_JOB_TTL = 7 * 24 * 3600.0
"""Seconds that a job is kept on disk after its end."""
SAVED_JOB_BYTES = 2 << 30
"""Bytes of rows and clips that are kept; the oldest ended jobs go when more come."""

PROBLEM_TOLD = 24 * 3600.0
"""Seconds that `warnings` tell of a disk that was full, after it took jobs again."""

_UNSAVED = frozenset({"replayed"})
_WAIT = 30.0
_RETRY = 2.0
_FULL = "Free space on the disk, then resume the job or submit it again."
_COLUMNS = "job_id, number, model, submitted, state, detail, model_class, device, total, ended, request, clip_bytes"


@dataclass
class _Kept:
    """A job in memory.

    Attributes:
        record: What callers see.
        number: Its place in the order of submission.
        request: JSON; None where it is not kept.
        media: What its request may name; None after a restart.
        clip_bytes: In its folder.
        row_bytes: Of its rows.
        waiting: Rows that are not committed yet, the last ones, by position.
        error: Why its rows cannot be kept.
    """

    record: JobRecord
    number: int
    request: str | None = None
    media: MediaPolicy | None = None
    clip_bytes: int = 0
    row_bytes: int = 0
    waiting: dict[int, tuple[str, TrackedFrame]] = field(default_factory=dict)
    error: JobStoreError | None = None

    @property
    def nbytes(self) -> int:
        return self.clip_bytes + self.row_bytes


class SqliteJobStore:
    """`JobStore` on disk. One process at a time.

    At opening, jobs that were running are marked failed; those whose request is kept say how to resume them.

    Args:
        path: The file, or a folder that gets ``jobs.sqlite``; text that ends with a slash is one, and is made. Clips
            are kept beside it, readable by this user alone.
        ttl: Seconds that a job is kept after its end.
        cap: Jobs that are kept; running ones never go.
        max_bytes: Of rows and clips together. A clip of more than half of it is not kept: its job cannot be resumed.
        clock: Seconds since 1970, for tests.

    Raises:
        JobStoreError: Another process uses the file, it was written by a newer version or another program, or cannot
            be opened. A damaged one is moved aside instead, which `warnings` tells.
    """

    def __init__(
        self,
        path: Path | str,
        ttl: float = SAVED_JOB_TTL,
        cap: int = JOB_CAP,
        max_bytes: int = SAVED_JOB_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = job_file(path)
        self._clips = self.path.with_name(f"{self.path.name}.clips")
        self._ttl = ttl
        self._cap = cap
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._jobs: dict[str, _Kept] = {}
        self._number = 0
        self._dirty: dict[str, None] = {}
        self._gone: dict[str, None] = {}
        self._rows: deque[tuple[str, int, str]] = deque()
        self._asked = self._done = 0
        self._problem: str | None = None
        self._past: tuple[str, float] | None = None
        self._closing = self._closed = False
        self._aside: str | None = None
        self._open()
        self._writer = threading.Thread(target=self._write, name="pixano-edge-jobs", daemon=True)
        self._writer.start()

    @property
    def warnings(self) -> list[str]:
        with self._lock:
            found = [self._aside, self._trouble()]
        return [text for text in found if text]

    def _trouble(self) -> str | None:
        """Under the lock: what keeps or kept jobs from being saved."""
        if self._problem is not None:
            return f"Jobs are not saved at the moment: {self._problem}. {_FULL}"
        if self._past is None or self._clock() - self._past[1] >= PROBLEM_TOLD:
            return None
        moment = datetime.fromtimestamp(self._past[1], timezone.utc).isoformat(timespec="seconds")
        return f"Jobs could not be saved at {moment}: {self._past[0]}. They are saved again; resume those that failed."

    @property
    def nbytes(self) -> int:
        """Bytes of rows and clips."""
        with self._lock:
            return sum(kept.nbytes for kept in self._jobs.values())

    # --- JobStore --------------------------------------------------------------------------------------------------

    def add(self, record: JobRecord, request: Any = None, media: MediaPolicy | None = None) -> None:
        with self._lock:
            self._check_open()
            self._expire()
            if len(self._jobs) >= self._cap:
                oldest = self._oldest()
                if oldest is None:
                    raise ModelBusyError(
                        f"{len(self._jobs)} tracking jobs run already.", "Wait for one to end, or cancel one."
                    )
                self._forget(oldest)
        folder = self._clips / record.job_id
        added = False
        try:
            values, clip_bytes = None, 0
            if request is not None and media is not None:
                clip = KeptClip(folder, self._max_bytes // 2)
                values, clip_bytes = clip.keep(request, media), clip.nbytes
                if values is None:
                    clip_bytes = 0
                    shutil.rmtree(folder, ignore_errors=True)
            with self._lock:
                self._check_open()
                self._make_room(clip_bytes)
                self._number += 1
                record = replace(record, resumable=values is not None)
                text = None if values is None else json.dumps(values)
                kept = self._jobs[record.job_id] = _Kept(record, self._number, text, media, clip_bytes)
                self._save(record.job_id)
                if not self._flush():
                    del self._jobs[record.job_id]
                    self._forgotten(record.job_id)
                    kept.error = self._store_error()
                    raise kept.error
            added = True
        finally:
            if not added:
                shutil.rmtree(folder, ignore_errors=True)

    def update(self, job_id: str, **changes: Any) -> None:
        over = None
        with self._lock:
            kept = self._jobs.get(job_id)
            if kept is None:
                return
            kept.record = replace(kept.record, **changes)
            if changes.keys() <= _UNSAVED or self._closed:
                return
            if changes.get("state") == COMPLETED and not self._flush() and kept.waiting and kept.error is None:
                kept.error = self._store_error()  # the disk hangs
            if changes.get("state") == COMPLETED and kept.error is not None:
                kept.record = replace(kept.record, state=FAILED, detail=str(kept.error))
                over = kept.error
            if kept.record.state in (COMPLETED, CANCELED):
                kept.request, kept.clip_bytes = None, 0
                kept.record = replace(kept.record, resumable=False)
            self._save(job_id)
            if kept.record.ended is not None:
                kept.media = None if kept.request is None else kept.media
                self._flush()
        if kept.request is None:
            shutil.rmtree(self._clips / job_id, ignore_errors=True)
        if over is not None:
            raise over

    def append(self, job_id: str, frame: TrackedFrame) -> None:
        text = _text(frame)
        with self._lock:
            kept = self._jobs.get(job_id)
            if kept is None:
                return
            if kept.error is None:
                try:
                    self._check_open()
                    self._make_room(len(text))
                except JobStoreError as error:
                    kept.error = error
            if kept.error is not None:
                raise kept.error
            position = kept.record.done
            kept.record = replace(kept.record, done=position + 1)
            kept.row_bytes += len(text)
            kept.waiting[position] = (text, frame)
            self._rows.append((job_id, position, text))
            self._asked += 1
            self._changed.notify_all()

    def get(self, job_id: str) -> JobRecord | None:
        with self._lock:
            self._expire()
            kept = self._jobs.get(job_id)
            return None if kept is None else kept.record

    def frames(self, job_id: str, start: int = 0, count: int | None = None) -> list[TrackedFrame]:
        with self._lock:
            kept = self._jobs.get(job_id)
            if kept is None:
                return []
            end = kept.record.done if count is None else min(kept.record.done, start + count)
            # Rows leave `waiting` only when they are committed, the first ones first.
            first = min(kept.waiting, default=end)
            tail = [kept.waiting[i][1] for i in range(max(first, start), end)]
        if start >= min(first, end):
            return tail
        with self._reading:
            if self._closed:
                return []
            try:
                rows = self._reader.execute(
                    "SELECT frame FROM frames WHERE job_id = ? AND position >= ? AND position < ? ORDER BY position",
                    (job_id, start, min(first, end)),
                ).fetchall()
            except sqlite3.Error as error:
                raise JobStoreError(f"The job's frames cannot be read: {error}.", "Check the disk.") from error
        return [_frame(row[0]) for row in rows] + tail

    def records(self) -> list[JobRecord]:
        with self._lock:
            self._expire()
            return [kept.record for kept in self._jobs.values()]

    def resume(self, job_id: str) -> tuple[Any, MediaPolicy]:
        with self._lock:
            self._check_open()
            kept = self._jobs.get(job_id)
            if kept is None or kept.record.state != FAILED or kept.request is None:
                state = "gone" if kept is None else kept.record.state
                why = "its clip was too large to be kept" if state == FAILED else f"it is {state}"
                raise InvalidRequestError(f"Job '{job_id}' cannot be resumed: {why}.", "Submit it again.")
            request = kept_request(json.loads(kept.request), self._clips / job_id)
            kept.error = None
            kept.record = replace(kept.record, state=RUNNING, detail=None, ended=None, replayed=0)
            self._save(job_id)
            media = kept.media
            if not self._flush():
                kept.record = replace(kept.record, state=FAILED, detail=can_be_resumed(kept.record))
                raise self._store_error()
        return request, KeptMedia(media if media is not None else MediaPolicy([]))

    def close(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._writer.join()
        with self._reading, self._lock:
            self._closed = True
            self._changed.notify_all()
        self._reader.close()
        self._file.close()
        self._held.release()

    # --- opening ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        lock = self.path.with_name(f"{self.path.name}.lock")
        known = lock.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._held = FileLock(lock)
        except OSError as error:
            raise JobStoreError(
                f"Jobs cannot be kept in '{self.path.parent}': {error.strerror}.", "Give a folder that can be written."
            ) from error
        done = False
        try:
            self._file, self._aside = open_file(self.path, self._clips, known)
            self._reader = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=5.0)
            self._load()
            done = True
        except sqlite3.Error as error:
            raise JobStoreError(f"The jobs in '{self.path}' cannot be read: {error}.", "Move the file away.") from error
        finally:
            if not done:
                self._held.release()

    def _load(self) -> None:
        """Records of the file; what ran is marked as interrupted, and clips without a job go."""
        counts = {
            job_id: (count, nbytes or 0)
            for job_id, count, nbytes in self._file.execute(
                "SELECT job_id, count(*), sum(length(frame)) FROM frames GROUP BY job_id"
            )
        }
        now = datetime.fromtimestamp(self._clock(), timezone.utc)
        interrupted = []
        for row in self._file.execute(f"SELECT {_COLUMNS} FROM jobs ORDER BY number").fetchall():
            job_id, number, model, submitted, state, detail, kind, device, total, ended, request, clip_bytes = row
            done, row_bytes = counts.get(job_id, (0, 0))
            record = JobRecord(
                job_id, model, datetime.fromtimestamp(submitted, timezone.utc), state, detail, kind, device, done,
                total, None if ended is None else datetime.fromtimestamp(ended, timezone.utc), request is not None,
            )  # fmt: skip
            if state == RUNNING:
                why = "The server stopped while this job ran"
                tail = "its clip was too large to be kept: submit it again."
                tail = f"; {can_be_resumed(record)}" if request is not None else f", and {tail}"
                record = replace(record, state=FAILED, detail=why + tail, ended=now)
                interrupted.append(job_id)
            self._jobs[job_id] = _Kept(record, number, request, None, clip_bytes, row_bytes)
            self._number = number
        self._file.execute("BEGIN")
        self._write_records(interrupted)
        self._file.execute("DELETE FROM frames WHERE job_id NOT IN (SELECT job_id FROM jobs)")
        self._file.execute("COMMIT")
        if self._clips.is_dir():
            for folder in self._clips.iterdir():
                kept = self._jobs.get(folder.name)
                if kept is None or kept.request is None:
                    shutil.rmtree(folder, ignore_errors=True)

    # --- bounds; under the lock ------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closing:
            raise JobStoreError("The store of jobs is closed.", "Start the server again.")

    def _oldest(self) -> str | None:
        return next((job_id for job_id, kept in self._jobs.items() if kept.record.ended is not None), None)

    def _expire(self) -> None:
        now = self._clock()
        for job_id, kept in list(self._jobs.items()):
            if kept.record.ended is not None and now - kept.record.ended.timestamp() >= self._ttl:
                self._forget(job_id)

    def _make_room(self, nbytes: int) -> None:
        held = sum(kept.nbytes for kept in self._jobs.values())
        while held + nbytes > self._max_bytes:
            oldest = self._oldest()
            if oldest is None:
                raise JobStoreError(
                    f"Running jobs take {held} bytes of the {self._max_bytes} allowed for jobs.",
                    "Wait for one to end, cancel one, or raise the limit.",
                )
            held -= self._jobs[oldest].nbytes
            self._forget(oldest)

    def _forget(self, job_id: str) -> None:
        del self._jobs[job_id]
        self._forgotten(job_id)

    def _forgotten(self, job_id: str) -> None:
        self._dirty.pop(job_id, None)
        self._gone[job_id] = None
        self._asked += 1
        self._changed.notify_all()

    def _save(self, job_id: str) -> None:
        self._dirty[job_id] = None
        self._asked += 1
        self._changed.notify_all()

    def _flush(self) -> bool:
        """Waits for what was asked so far; whether it is committed."""
        asked = self._asked
        self._changed.wait_for(lambda: self._done >= asked or self._closed, _WAIT)
        return self._done >= asked and self._problem is None

    def _store_error(self) -> JobStoreError:
        return JobStoreError(f"The job cannot be kept: {self._problem or 'the disk does not answer'}.", _FULL)

    # --- the writer's thread ---------------------------------------------------------------------------------------

    def _write(self) -> None:
        while True:
            with self._lock:
                # What failed is tried again now and then.
                pending = self._problem is not None and (self._dirty or self._gone)
                self._changed.wait_for(lambda: self._asked > self._done or self._closing, _RETRY if pending else None)
                if self._closing and self._asked <= self._done:
                    return
                asked, rows = self._asked, list(self._rows)
                self._rows.clear()
                dirty, gone = list(self._dirty), list(self._gone)
                self._dirty.clear()
                self._gone.clear()
            problem = self._commit(rows, dirty, gone)
            failed = problem is not None
            if failed and (dirty or gone) and rows:
                failed = self._commit([], dirty, gone) is not None
            with self._lock:
                self._settle(rows, problem)
                if failed:
                    self._dirty = dict.fromkeys([job_id for job_id in dirty if job_id in self._jobs]) | self._dirty
                    self._gone = dict.fromkeys(gone) | self._gone
                self._problem = problem
                if problem is not None:
                    self._past = problem, self._clock()
                self._done = asked
                self._changed.notify_all()
            if not failed:
                for job_id in gone:
                    shutil.rmtree(self._clips / job_id, ignore_errors=True)

    def _settle(self, rows: Iterable[tuple[str, int, str]], problem: str | None) -> None:
        """Under the lock: rows are committed, or their jobs have failed from the first lost one on."""
        for job_id, position, _ in rows:
            kept = self._jobs.get(job_id)
            if kept is None:
                continue
            if problem is None:
                kept.waiting.pop(position, None)
            else:
                lost = [i for i in kept.waiting if i >= position]
                kept.row_bytes -= sum(len(kept.waiting.pop(i)[0]) for i in lost)
                kept.record = replace(kept.record, done=min(kept.record.done, position))
                kept.error = JobStoreError(f"Frames of this job cannot be kept: {problem}.", _FULL)
                # Rows that came meanwhile would leave a gap.
                self._rows = deque(row for row in self._rows if row[0] != job_id)

    def _commit(self, rows: Iterable[tuple[str, int, str]], dirty: list[str], gone: list[str]) -> str | None:
        """One transaction; why it failed."""
        file = self._file
        try:
            # An end reaches the disk itself.
            file.execute(f"PRAGMA synchronous = {'FULL' if dirty else 'NORMAL'}")
            file.execute("BEGIN IMMEDIATE")
            for job_id in gone:
                file.execute("DELETE FROM frames WHERE job_id = ?", (job_id,))
                file.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,))
            self._write_records(dirty)
            # A job may have been forgotten since its row was queued.
            known = self._jobs.keys()
            file.executemany("INSERT INTO frames VALUES (?, ?, ?)", [row for row in rows if row[0] in known])
            file.execute("COMMIT")
            if gone:
                file.execute("PRAGMA incremental_vacuum(2000)").fetchall()
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                file.execute("ROLLBACK")
            return str(error)
        return None

    def _write_records(self, job_ids: Iterable[str]) -> None:
        for job_id in job_ids:
            kept = self._jobs.get(job_id)
            if kept is None:
                continue
            r = kept.record
            self._file.execute(
                f"INSERT OR REPLACE INTO jobs ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    job_id, kept.number, r.model, r.submitted.timestamp(), r.state, r.detail, r.model_class, r.device,
                    r.total, None if r.ended is None else r.ended.timestamp(), kept.request, kept.clip_bytes,
                ),
            )  # fmt: skip


def _text(frame: TrackedFrame) -> str:
    rows = [
        [t.track_id, t.score, t.box, t.class_name, t.mask.size, t.mask.counts.decode("ascii")] for t in frame.objects
    ]
    return json.dumps([frame.frame_index, rows], separators=(",", ":"))


def _frame(text: str) -> TrackedFrame:
    index, rows = json.loads(text)
    return TrackedFrame(
        index,
        [
            TrackedObject(track_id, CompressedRLEData(size, counts.encode("ascii")), score, box, name)
            for track_id, score, box, name, size, counts in rows
        ],
    )
