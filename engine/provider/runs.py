"""One tracking on its way: from the request to its last frame, on the threads where each part belongs.

A run waits for its model, opens its clip on a thread for clips, and then queues one step after the other in the
background of the model's thread, so that runs on one model take turns and requests go between. Whatever happens, it
ends once (`Run.ended`) and frees what it holds (`Run.freed`), which after a cancellation comes within one frame.

A run that goes on with a job computes the frames that are there again, without writing them: the memories that the next
frame attends to depend on every frame before it. What it computes is compared with what is there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Protocol

from ..errors import EdgeError
from ..models.rle import decode_rle
from .errors import InferenceError, JobEndedError, ModelNotFoundError, provider_errors
from .families import LoadedModel
from .models import ModelTable, Slot
from .video_prompts import TrackingRequest
from .video_types import CANCELED, COMPLETED, FAILED, RUNNING, TrackedFrame
from .worker import Job, settled

if TYPE_CHECKING:
    from ..models.sam2_video.frames import Frames

CANCELED_TEXT = "Job canceled."

REPLAY_IOU = 0.95
"""Least agreement of a frame that is computed again with the kept one. On one device it is 1; another GPU or precision
comes close to it, other weights do not."""

_LAST = object()


class Log(Protocol):
    """Where a run writes; called from several threads, one at a time."""

    def opened(self, total: int, model_class: str, device: str) -> None:
        """The clip is open and `total` frames will be answered."""

    def append(self, frame: TrackedFrame) -> None:
        """One frame is done."""

    def read(self, start: int, count: int | None = None) -> list[TrackedFrame]:
        """Frames from position `start` on, at most `count`, in the order of processing."""

    def replayed(self, count: int) -> None:
        """So many of the frames that were there already were computed again."""

    def close(self, state: str, detail: str | None) -> None:
        """The run ended; nothing is written afterwards. Raises InferenceError when not all of a completed one could be
        written."""


class MemoryLog:
    """For somebody who waits: kept as long as the run."""

    def __init__(self) -> None:
        self._frames: list[TrackedFrame] = []

    def opened(self, total: int, model_class: str, device: str) -> None:
        """Nothing to note."""

    def append(self, frame: TrackedFrame) -> None:
        self._frames.append(frame)

    def read(self, start: int, count: int | None = None) -> list[TrackedFrame]:
        return self._frames[start : None if count is None else start + count]

    def replayed(self, count: int) -> None:
        """Nothing to note."""

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
        kept: Frames that `log` has already.

    Attributes:
        ended: Set when the run is over: completed, or with the error. Cannot be cancelled by those who wait for it.
        freed: Set when, after that, clip, memories and model were let go.
        done: Frames done, those that were kept included.
        replayed: Frames computed again that were there.
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
        kept: int = 0,
    ) -> None:
        self.slot = slot
        self.log = log
        self.job_id = job_id
        self.started = time.monotonic()
        self.ended: Future[None] = settled()
        self.freed: Future[None] = settled()
        self.done = kept
        self.replayed = 0
        self.total: int | None = None
        self.model: LoadedModel | None = None
        self.state = RUNNING
        self.released = False
        self._table = table
        self._request = request
        self._clip: Callable[[LoadedModel], Frames] | None = clip
        self._pool = pool
        self._kept = kept
        self._lock = threading.Lock()
        self._ending = threading.Lock()
        self._waiting: list[Future[None]] = []
        self._frames: Frames | None = None
        self._steps: Iterator[TrackedFrame | None] | None = None

    def start(self) -> None:
        """Begins; to be called once."""
        self.slot.ready.add_done_callback(self._ready)

    def drop(self, error: BaseException) -> None:
        """Ends a run that was not started."""
        self._finish(error)

    def cancel(self) -> None:
        """Ends the run now; what it is just computing is dropped. Of a run that ended this is no news."""
        self._end(CANCELED, JobEndedError(CANCELED_TEXT))

    def read(self, start: int) -> list[TrackedFrame]:
        """Frames from position `start` on, in the order of processing."""
        return self.log.read(start)

    def changed(self, done: int) -> Future[None]:
        """A future that is set when more than `done` frames are there, or the run ended."""
        future: Future[None] = settled()
        with self._lock:
            if self.done <= done and not self.ended.done():
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
            if self.replayed < self._kept:
                self._compare(found)
            else:
                self._append(found)
        elif found is _LAST and self.replayed < self._kept:
            raise _changed(self._kept - 1, "the clip ends before it")
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

    def _compare(self, frame: TrackedFrame) -> None:
        """Takes note of a frame that is there already."""
        rows = self.log.read(self.replayed, 1)
        if not rows or rows[0].frame_index != frame.frame_index:
            raise _changed(frame.frame_index, "another frame was there")
        iou = agreement(rows[0], frame)
        if iou < REPLAY_IOU:
            raise _changed(frame.frame_index, f"IoU {iou:.3f}")
        self.replayed += 1
        self.log.replayed(self.replayed)

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
        # Writing the end may wait for a disk: whoever only asks for frames must not.
        with self._ending:
            with self._lock:
                if self.state != RUNNING:
                    return
                self.state = state
            try:
                self.log.close(state, None if shown is None else str(shown))
            except InferenceError as problem:
                self.state, shown = FAILED, problem
            with self._lock:
                waiting, self._waiting = self._waiting, []
                if shown is None:
                    self.ended.set_result(None)
                else:
                    self.ended.set_exception(shown)
        for future in waiting:
            future.set_result(None)


def agreement(one: TrackedFrame, other: TrackedFrame) -> float:
    """Smallest IoU of the masks of two answers for a frame; 0 when they have other objects, 1 for two empty masks."""
    ids = [t.track_id for t in one.objects]
    if ids != [t.track_id for t in other.objects]:
        return 0.0
    found = 1.0
    for a, b in zip(one.objects, other.objects):
        if a.mask.size != b.mask.size:
            return 0.0
        if a.mask.counts != b.mask.counts:
            first, second = (decode_rle({"size": m.size, "counts": m.counts}) for m in (a.mask, b.mask))
            found = min(found, float((first & second).sum() / max(1, (first | second).sum())))
    return found


def _changed(frame: int, why: str) -> InferenceError:
    return JobEndedError(
        f"Frame {frame} comes out otherwise than before the job stopped ({why}): the model is another one.",
        "Submit the clip again as a new job.",
    )


def provider_error(error: BaseException) -> BaseException:
    """The error as the provider raises it."""
    try:
        with provider_errors():
            raise error
    except BaseException as found:  # noqa: BLE001 (handed on, not swallowed)
        return found
