"""One thread and one bounded queue per model, and the bridge from there to coroutines.

A model's sessions run one call at a time, so one thread is all it can use. Abandoned work (its owner timed out or was
cancelled) is dropped from the queue, or stops at its next `Job.check` if it runs already; its result goes nowhere.

Long work comes as many steps, each queued in the background when the one before it is done: steps of several such
works take turns, and a request waits for one step at most.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from ..errors import CancelledError
from .callers import caller
from .errors import InferenceTimeoutError, InvalidRequestError, ModelBusyError, ModelNotFoundError

T = TypeVar("T")

QUEUE_DEPTH = 32
MOST_CALLERS = 4
"""Times the depth: what all callers together may have waiting for one model."""

MOST_IN_A_ROW = 8
"""Requests that may pass a waiting background step one after the other, so that many annotators do not stop a job."""


class Cancellable(Protocol):
    """Work that its owner can give up."""

    def cancel(self) -> None: ...


class Job:
    """One piece of work, as its owner and its thread see it."""

    def __init__(self) -> None:
        self._left = threading.Event()
        self.stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Called by the work: counts the time of the block as that of a stage, in seconds in `stages`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - begun

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


class _Item:
    """Accepted work."""

    def __init__(self, work: Callable[[], Any], then: Callable[[Future[Any]], None] | None = None) -> None:
        self.work = work
        self.then = then
        self.future: Future[Any] = Future()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.work()
        except BaseException as error:  # noqa: BLE001 (raised where somebody waits for it)
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class ModelWorker:
    """Runs the work of one model on its own thread: requests first, then background steps in order.

    Callers take turns, each one's requests in order, so that one who sends many at once does not keep the others
    waiting. Who asks is `callers.caller()` where `submit` is called.

    Args:
        name: Model name, for thread names and messages.
        depth: Requests of one caller that may run or wait; one more is refused at once, as is one beyond
            `MOST_CALLERS` times as many of all callers. Background steps do not count: whoever queues them has one at
            a time.
    """

    def __init__(self, name: str, depth: int = QUEUE_DEPTH) -> None:
        self.name = name
        self.depth = depth
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"pixano-edge-{name}")
        self._lock = threading.Lock()
        self._requests: OrderedDict[str, deque[_Item]] = OrderedDict()
        self._steps: deque[_Item] = deque()
        self._last: _Item | None = None
        self._in_a_row = 0
        self._pending = 0
        self._of_caller: Counter[str] = Counter()
        self._pending_steps = 0
        self._closed = False

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        with self._lock:
            return self._pending == 0 and self._pending_steps == 0

    @property
    def pending(self) -> tuple[int, int]:
        """Requests and background steps that run or wait."""
        with self._lock:
            return self._pending, self._pending_steps

    def submit(
        self,
        work: Callable[[Job], T],
        job: Job | None = None,
        *,
        background: bool = False,
        then: Callable[[Future[T]], None] | None = None,
    ) -> tuple[Job, Future[T]]:
        """Queues `work`; it is called with its `Job`.

        Args:
            work: What to run.
            job: Its owner's handle; None makes one.
            background: Let requests go first, and never refuse it for a full queue.
            then: Called with the future of `work` on the same thread, before anything else runs there, when `work` is
                no longer counted; must not raise.

        Raises:
            ModelNotFoundError: The worker was finished.
            ModelBusyError: The queue is full.
        """
        job = job or Job()
        who = caller()
        with self._lock:
            if self._closed:
                raise ModelNotFoundError(f"Model '{self.name}' was unloaded.", "Load it again with instantiate_model.")
            if not background and (self._of_caller[who] >= self.depth or self._pending >= MOST_CALLERS * self.depth):
                raise ModelBusyError(
                    f"{self._pending} requests wait for model '{self.name}' already.", "Try again in a moment."
                )
            item = _Item(lambda: self._run(work, job), then)
            self._pool.submit(self._turn)  # one turn for each item; which one it takes is decided when it comes
            if background:
                self._steps.append(item)
                self._pending_steps += 1
            else:
                self._requests.setdefault(who, deque()).append(item)
                self._pending += 1
                self._of_caller[who] += 1
        item.future.add_done_callback(lambda _: self._done(background, who))
        return job, item.future

    def finish(self, last: Callable[[], None]) -> Future[None]:
        """Refuses new work at once; `last` runs on the same thread after all accepted work, then the thread ends.

        To be called once; returns the future of `last`.
        """
        with self._lock:
            self._closed = True
            self._last = _Item(last)
            self._pool.submit(self._turn)
        self._pool.shutdown(wait=False)
        return self._last.future

    def _turn(self) -> None:
        with self._lock:
            item = self._next()
        item.run()
        if item.then is not None:
            item.then(item.future)

    def _next(self) -> _Item:
        """Under the lock: there are as many turns as items."""
        passed = bool(self._steps) and self._in_a_row >= MOST_IN_A_ROW
        if self._requests and not passed:
            self._in_a_row = self._in_a_row + 1 if self._steps else 0
            who, items = self._requests.popitem(last=False)
            item = items.popleft()
            if items:
                self._requests[who] = items  # at the end: the others first
            return item
        if self._steps:
            self._in_a_row = 0
            return self._steps.popleft()
        assert self._last is not None
        return self._last

    @staticmethod
    def _run(work: Callable[[Job], T], job: Job) -> T:
        job.check()
        return work(job)

    def _done(self, background: bool, who: str) -> None:
        with self._lock:
            if background:
                self._pending_steps -= 1
            else:
                self._pending -= 1
                self._of_caller[who] -= 1
                if not self._of_caller[who]:
                    del self._of_caller[who]


def settled() -> Future[T]:
    """A future that its owner sets and that waiters cannot cancel, so that many may wait for it."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    return future


async def wait_for(future: Future[T], deadline: Deadline, what: str, job: Cancellable | None = None) -> T:
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


def _leave(wrapped: asyncio.Future[T], future: Future[T], job: Cancellable | None) -> None:
    if job is not None:
        job.cancel()
    # Directly too: asyncio passes a cancellation on one loop turn later, which a closing loop does not have.
    future.cancel()
    wrapped.cancel()
