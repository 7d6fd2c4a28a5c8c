"""One tracking on its way: from the request to its last frame, on the threads where each part belongs.

A run waits for its model, opens its clip on a thread for clips, and then queues one step after the other in the
background of the model's thread, so that runs on one model take turns and requests go between. Whatever happens, it
ends once (`Run.ended`) and frees what it holds (`Run.freed`), which after a cancellation comes within one frame.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Protocol

from ..errors import EdgeError
from .errors import InferenceError, ModelNotFoundError, provider_errors
from .families import LoadedModel
from .models import ModelTable, Slot
from .video_prompts import TrackingRequest
from .video_types import CANCELED, COMPLETED, FAILED, RUNNING, TrackedFrame
from .worker import Job, settled

if TYPE_CHECKING:
    from ..models.sam2_video.frames import Frames

CANCELED_TEXT = "Job canceled."

_LAST = object()


class Log(Protocol):
    """Where a run writes; called from several threads, one at a time."""

    def opened(self, total: int, model_class: str, device: str) -> None:
        """The clip is open and `total` frames will be answered."""

    def append(self, frame: TrackedFrame) -> None:
        """One frame is done."""

    def read(self, start: int) -> list[TrackedFrame]:
        """Frames from position `start` on, in the order of processing."""

    def close(self, state: str, detail: str | None) -> None:
        """The run ended; nothing is written afterwards."""


class MemoryLog:
    """For somebody who waits: kept as long as the run."""

    def __init__(self) -> None:
        self._frames: list[TrackedFrame] = []

    def opened(self, total: int, model_class: str, device: str) -> None:
        """Nothing to note."""

    def append(self, frame: TrackedFrame) -> None:
        self._frames.append(frame)

    def read(self, start: int) -> list[TrackedFrame]:
        return self._frames[start:]

    def close(self, state: str, detail: str | None) -> None:
        """Nothing to note."""


class Run:
    """One tracking. Safe to use from any thread.

    Args:
        table: The models.
        slot: The model, loading or loaded, held for this run (`ModelTable.hold`); let go at the end.
        request: What to do.
        clip: Opens the frames; runs on `pool`.
        pool: Threads for opening clips.
        log: Gets the results.
        job_id: Of the job that this is, if any.

    Attributes:
        ended: Set when the run is over: completed, or with the error. Cannot be cancelled by those who wait for it.
        freed: Set when, after that, clip, memories and model were let go.
        done: Frames done.
        total: Frames in all; None until the clip is open.
        model: The loaded model; None until then.
        released: Whether clip, memories and model were let go, which comes before `ended` where nobody cancels.
    """

    def __init__(
        self,
        table: ModelTable,
        slot: Slot,
        request: TrackingRequest,
        clip: Callable[[LoadedModel], Frames],
        pool: Executor,
        log: Log,
        job_id: str | None = None,
    ) -> None:
        self.slot = slot
        self.log = log
        self.job_id = job_id
        self.started = time.monotonic()
        self.ended: Future[None] = settled()
        self.freed: Future[None] = settled()
        self.done = 0
        self.total: int | None = None
        self.model: LoadedModel | None = None
        self.state = RUNNING
        self.released = False
        self._table = table
        self._request = request
        self._clip: Callable[[LoadedModel], Frames] | None = clip
        self._pool = pool
        self._lock = threading.Lock()
        self._waiting: list[Future[None]] = []
        self._frames: Frames | None = None
        self._steps: Iterator[TrackedFrame | None] | None = None

    def start(self) -> None:
        """Begins; to be called once."""
        self.slot.ready.add_done_callback(self._ready)

    def cancel(self) -> None:
        """Ends the run now; what it is just computing is dropped. Of a run that ended this is no news."""
        self._end(CANCELED, InferenceError(CANCELED_TEXT))

    def read(self, start: int) -> list[TrackedFrame]:
        """Frames from position `start` on, in the order of processing."""
        return self.log.read(start)

    def changed(self, done: int) -> Future[None]:
        """A future that is set when more than `done` frames are there, or the run ended."""
        future: Future[None] = settled()
        with self._lock:
            if self.done <= done and self.state == RUNNING:
                self._waiting.append(future)
                return future
        future.set_result(None)
        return future

    def _ready(self, loading: Future[LoadedModel]) -> None:
        error = loading.exception()
        if error is not None:
            self._finish(error)
            return
        self.model = loading.result()
        try:
            self._pool.submit(self._open).add_done_callback(self._opened)
        except RuntimeError:  # the pool was shut down
            self._finish(InferenceError("This provider is closed.", "Make a new one."))

    def _open(self) -> None:
        """On a thread for clips."""
        assert self.model is not None
        assert self.model.predictor is not None
        clip, self._clip = self._clip, None
        if clip is None or self.state != RUNNING:
            return
        self._frames = clip(self.model)
        count = len(self._frames)
        self._request.check(count, self._frames.size, self.model.predictor.constants)
        with self._lock:
            if self.state == RUNNING:
                self.total = self._request.total(count)
                self.log.opened(self.total, self.model.model_class, self.model.device)

    def _opened(self, opening: Future[None]) -> None:
        error = opening.exception()
        if error is not None or self.state != RUNNING:
            self._finish(error)
        else:
            self._queue()

    def _queue(self) -> None:
        try:
            self._table.submit_step(self.slot, self._step, self._stepped)
        except (ModelNotFoundError, RuntimeError) as error:  # RuntimeError: the interpreter shuts down
            self._finish(error)

    def _step(self, model: LoadedModel, job: Job) -> object:
        """On the model's thread: the next prompt or frame."""
        if self.state != RUNNING:
            return _LAST
        if self._steps is None:
            from .tracking import track

            assert self._frames is not None
            self._steps = track(model, self._request, self._frames)
        with job.stage("track"):
            found = next(self._steps, _LAST)
        if isinstance(found, TrackedFrame):
            self._append(found)
        return found

    def _stepped(self, step: Future[object]) -> None:
        """On the model's thread, after each step."""
        error = step.exception()
        if error is not None or step.result() is _LAST:
            self._finish(error)
        else:
            self._queue()

    def _append(self, frame: TrackedFrame) -> None:
        with self._lock:
            if self.state != RUNNING:
                return
            self.log.append(frame)
            self.done += 1
            waiting, self._waiting = self._waiting, []
        for future in waiting:
            future.set_result(None)

    def _finish(self, error: BaseException | None) -> None:
        """Frees everything, on the thread that has the last word about this run: the model's, once it stepped."""
        try:
            if self._steps is not None:
                self._steps.close()  # type: ignore[attr-defined]
            if self._frames is not None:
                self._frames.close()
        except EdgeError as problem:
            error = error or problem
        finally:
            self._steps = self._frames = self._clip = None
            # The model first: whoever hears that this ended may need its room.
            self._table.let_go(self.slot)
            self.released = True
            self._end(COMPLETED if error is None else FAILED, error)
            self.freed.set_result(None)

    def _end(self, state: str, error: BaseException | None) -> None:
        shown = None if error is None else provider_error(error)
        with self._lock:
            if self.state != RUNNING:
                return
            self.state = state
            self.log.close(state, None if shown is None else str(shown))
            waiting, self._waiting = self._waiting, []
        if shown is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(shown)
        for future in waiting:
            future.set_result(None)


def provider_error(error: BaseException) -> BaseException:
    """The error as the provider raises it."""
    try:
        with provider_errors():
            raise error
    except BaseException as found:  # noqa: BLE001 (handed on, not swallowed)
        return found
