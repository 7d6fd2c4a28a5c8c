"""Requests that are under way already: one computation for a caller who asks for the same thing again.

Pixano's clients ask again when an answer takes longer than their patience: up to three attempts, after 0.5 and 1 s, for
POST too. What they ask for again is still being computed then, or has just been. So:

- A request that equals one of the same caller that is under way joins it.
- When the last waiter leaves, the work is cancelled: at once when it has run for less than `patience` seconds (a user
  who changed his mind), else after `window` seconds (a client that will most likely ask again).
- A result that nobody was left to take is kept for `window` seconds.

Requests are equal when their bodies are, byte for byte (SHA-256), and their callers.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, TypeVar

from ..provider.errors import InferenceTimeoutError

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds after which a caller who leaves is taken for one whose patience ended."""
WINDOW = 5.0
"""Seconds that such a one has to come back; the clients' longest pause is 1 s, and a large body has to arrive again."""
KEPT = 8
"""Results that are kept for them at most."""


class _Flight:
    def __init__(self, task: asyncio.Task[Any], began: float) -> None:
        self.task = task
        self.began = began
        self.waiters = 0
        self.keep = self.patience = 0.0
        self.timer: asyncio.TimerHandle | None = None


class Flights:
    """Of one application, on its event loop.

    Args:
        patience, window: Seconds; see the module's text.
        kept: Results without a waiter that are kept at most.
    """

    def __init__(self, patience: float = PATIENCE, window: float = WINDOW, kept: int = KEPT) -> None:
        self._patience = patience
        self._window = window
        self._kept = kept
        self._flights: OrderedDict[Hashable, _Flight] = OrderedDict()
        self.joined = 0
        """Requests that were answered by another one's work."""

    def __len__(self) -> int:
        return len(self._flights)

    async def join(
        self,
        key: Hashable,
        start: Callable[[], Coroutine[Any, Any, T]],
        timeout: float | None = None,
        *,
        patience: float | None = None,
        keep: float = 0.0,
        good: Callable[[T], bool] = lambda _: True,
    ) -> T:
        """The result of `start()`, or of an equal request's.

        Args:
            key: Caller, route and digest of the body; None computes in any case.
            start: Computes, without a timeout of its own; its task inherits this one's context.
            timeout: Seconds that this caller waits.
            patience: As of the constructor, for this one; 0 for what must not be cut off half-way.
            keep: Seconds that a result is kept although somebody took it, for answers that must not be made twice.
            good: Whether a kept result is still an answer.

        Raises:
            InferenceTimeoutError: The time is over; whoever asks again joins what goes on.
        """
        loop = asyncio.get_running_loop()
        flight = None if key is None else self._flights.get(key)
        if flight is not None and flight.task.done() and not _succeeded(flight.task, good):
            self._drop(key, flight)
            flight = None
        if flight is None:
            flight = _Flight(asyncio.ensure_future(start()), loop.time())
            flight.patience = self._patience if patience is None else patience
            if key is not None:
                self._flights[key] = flight
        else:
            self.joined += 1
        flight.keep = max(flight.keep, keep)
        if flight.timer is not None:
            flight.timer.cancel()
            flight.timer = None
        flight.waiters += 1
        try:
            done, _ = await asyncio.wait({flight.task}, timeout=timeout)
            if not done:
                raise InferenceTimeoutError(
                    f"The answer took longer than {timeout:g} s.", "Ask again: the work goes on for a few seconds."
                )
            return flight.task.result()  # type: ignore[no-any-return]
        finally:
            flight.waiters -= 1
            if not flight.waiters:
                self._left(key, flight)

    def close(self) -> None:
        """Cancels what nobody waits for."""
        for key, flight in list(self._flights.items()):
            if not flight.waiters:
                self._drop(key, flight)

    def _left(self, key: Hashable, flight: _Flight) -> None:
        """The last waiter has gone, with the result or without."""
        loop = asyncio.get_running_loop()
        if flight.task.done():
            seconds = flight.keep if _succeeded(flight.task, lambda _: True) else 0.0
        else:
            seconds = self._window if loop.time() - flight.began >= flight.patience else 0.0
        if key is None or not seconds:
            self._drop(key, flight)
            return
        flight.timer = loop.call_later(seconds, self._drop, key, flight)
        flight.task.add_done_callback(_retrieved)
        waiting = [item for item in self._flights.items() if not item[1].waiters]
        for old_key, old in waiting[: max(0, len(waiting) - self._kept)]:
            self._drop(old_key, old)

    def _drop(self, key: Hashable, flight: _Flight) -> None:
        if flight.timer is not None:
            flight.timer.cancel()
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.task.done():
            flight.task.add_done_callback(_retrieved)
            flight.task.cancel()
        else:
            _retrieved(flight.task)


def _succeeded(task: asyncio.Task[Any], good: Callable[[Any], bool]) -> bool:
    return not task.cancelled() and task.exception() is None and good(task.result())


def _retrieved(task: asyncio.Task[Any]) -> None:
    """Looks at the error of work that nobody waits for, so that asyncio does not report it."""
    if not task.cancelled():
        task.exception()
