"""One thread and one bounded queue per model, and the bridge from there to coroutines.

A model's sessions run one call at a time, so one thread is all it can use. Abandoned work (its owner timed out or was
cancelled) is dropped from the queue, or stops at its next `Job.check` if it runs already; its result goes nowhere.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ..errors import CancelledError
from .errors import InferenceTimeoutError, InvalidRequestError, ModelBusyError, ModelNotFoundError

T = TypeVar("T")

QUEUE_DEPTH = 32


class Job:
    """One piece of work, as its owner and its thread see it."""

    def __init__(self) -> None:
        self._left = threading.Event()

    def cancel(self) -> None:
        """Called by the owner who stops waiting."""
        self._left.set()

    @property
    def cancelled(self) -> bool:
        return self._left.is_set()

    def check(self) -> None:
        """Called by the work between its steps; raises `CancelledError` once the owner has left."""
        if self.cancelled:
            raise CancelledError("The request was abandoned.", "Nobody waits for this answer any more.")


class Deadline:
    """Turns one timeout in seconds into the time left for each of several steps.

    Raises:
        InvalidRequestError: The timeout is NaN, negative or no number.
    """

    def __init__(self, timeout: float | None) -> None:
        if timeout is not None and (not isinstance(timeout, int | float) or math.isnan(timeout) or timeout < 0):
            raise InvalidRequestError(
                f"timeout must be seconds >= 0 or None, got {timeout!r}.", "Pass 60, for example."
            )
        self.timeout = timeout
        self._end = None if timeout is None or math.isinf(timeout) else time.monotonic() + timeout

    def left(self) -> float | None:
        """Seconds left, not below 0; None without a limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


class ModelWorker:
    """Runs the work of one model in order on its own thread.

    Args:
        name: Model name, for thread names and messages.
        depth: Requests that may run or wait; one more is refused at once.
    """

    def __init__(self, name: str, depth: int = QUEUE_DEPTH) -> None:
        self.name = name
        self.depth = depth
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"pixano-edge-{name}")
        self._lock = threading.Lock()
        self._pending = 0
        self._closed = False

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        with self._lock:
            return self._pending == 0

    def submit(self, work: Callable[[Job], T], job: Job | None = None) -> tuple[Job, Future[T]]:
        """Queues `work`; it is called with its `Job`.

        Raises:
            ModelNotFoundError: The worker was finished.
            ModelBusyError: The queue is full.
        """
        job = job or Job()
        with self._lock:
            if self._closed:
                raise ModelNotFoundError(f"Model '{self.name}' was unloaded.", "Load it again with instantiate_model.")
            if self._pending >= self.depth:
                raise ModelBusyError(
                    f"{self._pending} requests wait for model '{self.name}' already.", "Try again in a moment."
                )
            future = self._pool.submit(self._run, work, job)
            self._pending += 1
        future.add_done_callback(self._done)
        return job, future

    def finish(self, last: Callable[[], None]) -> Future[None]:
        """Refuses new work at once; `last` runs on the same thread after all accepted work, then the thread ends.

        To be called once; returns the future of `last`.
        """
        with self._lock:
            self._closed = True
            future = self._pool.submit(last)
        self._pool.shutdown(wait=False)
        return future

    @staticmethod
    def _run(work: Callable[[Job], T], job: Job) -> T:
        job.check()
        return work(job)

    def _done(self, _: Future[T]) -> None:
        with self._lock:
            self._pending -= 1


def settled() -> Future[T]:
    """A future that its owner sets and that waiters cannot cancel, so that many may wait for it."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    return future


async def wait_for(future: Future[T], deadline: Deadline, what: str, job: Job | None = None) -> T:
    """Waits without blocking the event loop.

    Leaving early, by timeout or because the waiting task was cancelled, cancels `job` and, unless it runs already,
    `future`.

    Raises:
        InferenceTimeoutError: `what` did not end in time.
    """
    wrapped = asyncio.wrap_future(future)
    try:
        done, _ = await asyncio.wait({wrapped}, timeout=deadline.left())
    except asyncio.CancelledError:
        _leave(wrapped, future, job)
        raise
    if not done:
        _leave(wrapped, future, job)
        raise InferenceTimeoutError(
            f"{what} took longer than {deadline.timeout:g} s.",
            "Give a longer timeout, or use a smaller model or image.",
        )
    return wrapped.result()


def _leave(wrapped: asyncio.Future[T], future: Future[T], job: Job | None) -> None:
    if job is not None:
        job.cancel()
    # Directly too: asyncio passes a cancellation on one loop turn later, which a closing loop does not have.
    future.cancel()
    wrapped.cancel()
