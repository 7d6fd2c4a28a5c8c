"""Tracking for `EdgeProvider`: requests that somebody waits for, frames as they come, and jobs.

All three are a `Run`, and differ in who reads it. A run that a coroutine waits for is cancelled when that leaves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import EdgeError
from .errors import InferenceError, JobEndedError, ModelBusyError
from .families import LoadedModel
from .jobs import JobLog, JobRecord, JobStore, can_be_resumed, found, new_record, status_of
from .media import MediaPolicy
from .models import ModelTable, Slot
from .runs import CANCELED_TEXT, Log, MemoryLog, Run
from .video_prompts import TrackingRequest, read_request
from .video_types import (
    CANCELED,
    COMPLETED,
    FAILED,
    RUNNING,
    EdgeVideoMaskGenerationOutput,
    TrackedFrame,
    VideoMaskGenerationJobStatus,
)
from .worker import Deadline, wait_for

if TYPE_CHECKING:
    from ..models.sam2_video.frames import Frames

T = TypeVar("T")

Hold = Callable[[Any, Deadline], Awaitable[Slot]]
"""Finds the model that tracks under a name and holds it."""


class VideoService:
    """One per provider.

    Args:
        table: The models.
        hold: Finds and holds the model of a request.
        media: Which files requests may name.
        store: Keeps jobs.
        depth: Runs that one model may have at once; one more is refused. Each has memories of its own.
    """

    def __init__(self, table: ModelTable, hold: Hold, media: MediaPolicy, store: JobStore, depth: int) -> None:
        self._table = table
        self._depth = depth
        self._hold = hold
        self._media = media
        self._store = store
        self._clips = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pixano-edge-clips")
        self._files = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pixano-edge-job-files")
        self._lock = threading.Lock()
        self._runs: dict[Run, None] = {}
        self._closed = False

    async def answer(self, input_data: Any, deadline: Deadline) -> tuple[EdgeVideoMaskGenerationOutput, Run]:
        """Tracks and returns all frames; see `EdgeProvider.video_mask_generation`."""
        run = await self._begin(input_data, deadline, MemoryLog())
        await wait_for(run.ended, deadline, f"Tracking with model '{run.slot.name}'", run)
        return EdgeVideoMaskGenerationOutput.of(run.read(0)), run

    async def stream(self, input_data: Any, deadline: Deadline) -> AsyncIterator[TrackedFrame]:
        """Tracks and yields frames as they come; leaving the iterator cancels the rest."""
        run = await self._begin(input_data, deadline, MemoryLog())
        try:
            async for frame in self._follow(run, 0, deadline):
                yield frame
        finally:
            run.cancel()  # of a run that has ended this is no news

    async def submit(self, input_data: Any, deadline: Deadline) -> VideoMaskGenerationJobStatus:
        """Starts a job and answers at once, before model and clip are loaded."""
        record = new_record(str(getattr(input_data, "model", "")))

        def keep() -> None:
            self._store.add(record, input_data, self._media)

        await self._begin(input_data, deadline, JobLog(self._store, record.job_id), record, keep)
        return status_of(self._store, record.job_id)

    async def resume(self, job_id: Any, deadline: Deadline) -> VideoMaskGenerationJobStatus:
        """Lets a failed job go on; see `EdgeProvider.resume_video_mask_generation_job`."""
        record = found(self._store, job_id)
        if record.state != RUNNING:
            reopened = False  # set on the thread for files: a caller may leave while the store still writes

            def reopen() -> tuple[Any, MediaPolicy]:
                nonlocal reopened
                kept = self._store.resume(job_id)
                reopened = True
                return kept

            detail = ""

            def give_up() -> None:
                if reopened:
                    self._store.update(job_id, state=FAILED, detail=detail, ended=datetime.now(timezone.utc))

            started = False
            try:
                request, media = await self._in_files(reopen, deadline)
                await self._begin(request, deadline, JobLog(self._store, job_id), record, None, media)
                started = True
            except EdgeError as error:
                detail = f"It could not be resumed: {error} {can_be_resumed(record)}"
                raise
            except BaseException:
                detail = f"It was not resumed. {can_be_resumed(record)}"
                raise
            finally:
                if not started:
                    self._afterwards(give_up)
        return status_of(self._store, job_id)

    def jobs(self) -> list[VideoMaskGenerationJobStatus]:
        """Every job that is kept, oldest first, without its rows."""
        known = (record.job_id for record in self._store.records())
        return [status_of(self._store, job_id, False) for job_id in known if self._store.get(job_id) is not None]

    @property
    def warnings(self) -> list[str]:
        """Faults of the store."""
        return self._store.warnings

    def state(self, job_id: str) -> str | None:
        """State of a job; None where there is none."""
        record = self._store.get(job_id)
        return None if record is None else record.state

    def status(self, job_id: Any) -> VideoMaskGenerationJobStatus:
        """The state of a job; raises JobNotFoundError."""
        return status_of(self._store, job_id)

    def cancel(self, job_id: Any) -> VideoMaskGenerationJobStatus:
        """Ends a job if it runs; its state in any case. Raises JobNotFoundError."""
        found(self._store, job_id)
        run = self._run(job_id)
        if run is not None:
            run.cancel()
        return status_of(self._store, job_id)

    async def watch(self, job_id: Any, start: int, deadline: Deadline) -> AsyncIterator[TrackedFrame]:
        """Frames of a job as they come, from position `start` on; leaving the iterator does not touch the job."""
        found(self._store, job_id)
        run = self._run(job_id)
        if run is not None:
            async for frame in self._follow(run, start, deadline):
                yield frame
            return
        for frame in self._store.frames(job_id, start):
            yield frame
        record = found(self._store, job_id)
        if record.state in (FAILED, CANCELED):
            raise JobEndedError(record.detail or CANCELED_TEXT, "Frames that were done are in the watched results.")

    def counts(self) -> dict[str, int]:
        """Jobs that are kept, by state."""
        found = dict.fromkeys((RUNNING, COMPLETED, FAILED, CANCELED), 0)
        for record in self._store.records():
            found[record.state] += 1
        return found

    def running(self) -> list[dict[str, Any]]:
        """Runs under way, JSON-ready; see `ServerInfo.jobs`."""
        now = time.monotonic()
        with self._lock:
            runs = [run for run in self._runs if not run.ended.done()]
        return [
            {
                "job_id": run.job_id,
                "model": run.slot.base or run.slot.name,
                "frames_done": run.done,
                "frames_total": run.total,
                **({"frames_replayed": run.replayed} if run.replayed else {}),
                "progress": run.done / run.total if run.total else None,
                "seconds": now - run.started,
            }
            for run in runs
        ]

    async def close(self) -> None:
        """Waits for runs to be gone, whose models were retired by the caller; takes no new ones."""
        with self._lock:
            closed, self._closed = self._closed, True
            runs = list(self._runs)
        self._clips.shutdown(wait=False)
        for run in runs:
            await wait_for(run.freed, Deadline(None), "Ending a tracking")
        if not closed:
            await self._in_files(self._store.close, Deadline(None))
            self._files.shutdown(wait=False)

    async def _in_files(self, work: Callable[[], T], deadline: Deadline) -> T:
        """Runs what waits for a disk on a thread of its own."""
        try:
            future = self._files.submit(work)
        except RuntimeError as error:  # it was shut down
            raise InferenceError("This provider is closed.", "Make a new one.") from error
        return await wait_for(future, deadline, "Writing the job")

    async def _begin(
        self,
        input_data: Any,
        deadline: Deadline,
        log: Log,
        record: JobRecord | None = None,
        keep: Callable[[], None] | None = None,
        media: MediaPolicy | None = None,
    ) -> Run:
        """Starts a run.

        Args:
            input_data: The request.
            deadline: For finding the model, and for `keep`.
            log: Gets the frames.
            record: Of the job that this is; with frames done, it goes on.
            keep: Writes the job down, before it starts.
            media: Reads the clip; None for what requests may name.
        """
        request: TrackingRequest = read_request(input_data)
        video = getattr(input_data, "video", None)

        def clip(model: LoadedModel) -> Frames:
            from .clips import open_clip

            return open_clip(video, media or self._media, model.options)

        slot = await self._hold(getattr(input_data, "model", None), deadline)
        started = False
        try:
            run = Run(
                self._table,
                slot,
                request,
                clip,
                self._clips,
                log,
                None if record is None else record.job_id,
                0 if record is None else record.done,
            )
            with self._lock:
                if self._closed:
                    raise InferenceError("This provider is closed.", "Make a new one.")
                others = sum(other.slot is slot and not other.released for other in self._runs)
                if others >= self._depth:
                    raise ModelBusyError(
                        f"Model '{slot.name}' tracks in {others} clips already.", "Try again later, or cancel a job."
                    )
                self._runs[run] = None
            started = True
        finally:
            if not started:
                self._table.let_go(slot)
        run.freed.add_done_callback(lambda _: self._gone(run))
        if keep is not None:
            kept = False
            try:
                await self._in_files(keep, deadline)
                kept = True
            finally:
                if not kept:
                    self._drop(run)
        run.start()
        return run

    def _drop(self, run: Run) -> None:
        """Ends a run that was not started; where its job is just being written, after that."""
        error = InferenceError("The caller left while the job was submitted.", "Submit it again.")
        self._afterwards(lambda: run.drop(error))

    def _afterwards(self, work: Callable[[], None]) -> None:
        """Runs `work` after what is just being written."""
        try:
            self._files.submit(work)
        except RuntimeError:  # the thread was shut down: nothing is being written
            work()

    def _gone(self, run: Run) -> None:
        with self._lock:
            self._runs.pop(run, None)

    def _run(self, job_id: str) -> Run | None:
        with self._lock:
            # The last one: of a job that was resumed, the run before may be about to go.
            return next((run for run in reversed(self._runs) if run.job_id == job_id), None)

    @staticmethod
    async def _follow(run: Run, start: int, deadline: Deadline) -> AsyncIterator[TrackedFrame]:
        position = start
        while True:
            over = run.ended.done()  # asked first: frames come before the end
            for frame in run.read(position):
                yield frame
                position += 1
            if over:
                break
            await wait_for(run.changed(position), deadline, f"Tracking with model '{run.slot.name}'")
        await wait_for(run.ended, Deadline(None), "Tracking")  # raises why it failed
