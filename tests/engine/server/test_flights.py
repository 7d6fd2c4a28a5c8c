"""Equal requests share one computation; work that nobody waits for ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pixano_edge.engine.provider.errors import InferenceTimeoutError, InvalidRequestError
from pixano_edge.engine.server.flights import Flights

STEP = 0.1


class Work:
    """Counts how often it is begun, finished and cancelled."""

    def __init__(self, seconds: float = 0.0, error: Exception | None = None) -> None:
        self.seconds = seconds
        self.error = error
        self.begun = self.finished = self.cancelled = 0

    async def __call__(self) -> int:
        self.begun += 1
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        self.finished += 1
        return self.begun


async def _leave(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _soon(condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("did not happen")


async def test_equal_requests_are_computed_once_and_others_are_not() -> None:
    flights, work = Flights(), Work(STEP)
    found = await asyncio.gather(*(flights.join(("a", "r", b"1"), work) for _ in range(5)))
    assert (found, work.begun, flights.joined) == ([1] * 5, 1, 4)
    await asyncio.gather(
        *(flights.join((who, "r", body), work) for who, body in (("a", b"1"), ("b", b"1"), ("a", b"2")))
    )
    assert work.begun == 4  # another caller's, another body, and one that came after the answer
    await asyncio.gather(flights.join(None, work), flights.join(None, work))
    assert work.begun == 6
    assert len(flights) == 0


async def test_a_caller_who_leaves_soon_ends_the_work_at_once() -> None:
    flights, work = Flights(patience=60), Work(60)
    task = asyncio.create_task(flights.join("k", work))
    await asyncio.sleep(STEP)
    await _leave(task)
    await _soon(lambda: work.cancelled == 1)
    assert len(flights) == 0


async def test_work_goes_on_while_one_waits() -> None:
    flights, work = Flights(patience=60), Work(4 * STEP)
    first, second = (asyncio.create_task(flights.join("k", work)) for _ in range(2))
    await asyncio.sleep(STEP)
    await _leave(first)
    assert await second == 1
    assert (work.begun, work.cancelled) == (1, 0)


async def test_one_whose_patience_ended_finds_the_work_again() -> None:
    """Three attempts with pauses, as the clients make them: one computation."""
    flights, work = Flights(patience=STEP, window=60), Work(6 * STEP)
    for _ in range(2):
        task = asyncio.create_task(flights.join("k", work))
        await asyncio.sleep(2 * STEP)
        await _leave(task)
        await asyncio.sleep(STEP / 2)
    assert await flights.join("k", work) == 1
    assert (work.begun, work.finished, work.cancelled) == (1, 1, 0)


async def test_a_result_that_nobody_took_is_kept_for_a_while() -> None:
    flights, work = Flights(patience=0, window=60), Work(STEP)
    task = asyncio.create_task(flights.join("k", work))
    await asyncio.sleep(STEP / 2)
    await _leave(task)
    await asyncio.sleep(2 * STEP)
    assert work.finished == 1
    assert await flights.join("k", work) == 1
    assert work.begun == 1
    assert len(flights) == 0  # taken
    assert await flights.join("k", work) == 2


async def test_work_that_nobody_comes_back_for_is_cancelled() -> None:
    flights, work = Flights(patience=0, window=10 * STEP), Work(60)
    task = asyncio.create_task(flights.join("k", work))
    await asyncio.sleep(STEP)
    await _leave(task)
    assert len(flights) == 1
    await _soon(lambda: work.cancelled == 1)
    assert len(flights) == 0


async def test_a_timeout_is_one_waiters_own() -> None:
    flights, work = Flights(patience=0, window=60), Work(4 * STEP)
    with pytest.raises(InferenceTimeoutError, match="Ask again"):
        await flights.join("k", work, timeout=STEP)
    assert await flights.join("k", work, timeout=20) == 1
    assert work.begun == 1


async def test_errors_go_to_all_and_are_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    flights, work = Flights(patience=0), Work(STEP, InvalidRequestError("no", "yes"))
    found = await asyncio.gather(*(flights.join("k", work, keep=60) for _ in range(3)), return_exceptions=True)
    assert [type(one) for one in found] == [InvalidRequestError] * 3
    assert work.begun == 1
    with pytest.raises(InvalidRequestError):
        await flights.join("k", work)
    assert work.begun == 2
    task = asyncio.create_task(flights.join("k", work))
    await asyncio.sleep(STEP / 2)
    await _leave(task)
    await asyncio.sleep(2 * STEP)
    assert len(flights) <= 1
    flights.close()
    assert len(flights) == 0
    assert "never retrieved" not in caplog.text


async def test_answers_that_must_not_be_made_twice_are_kept_while_they_are_good() -> None:
    flights, work = Flights(), Work()
    good = [True]

    async def join() -> int:
        return await flights.join("k", work, keep=2.0, good=lambda _: good[0])

    assert [await join(), await join()] == [1, 1]
    good[0] = False
    assert await join() == 2
    good[0] = True
    assert await join() == 2
    for _ in range(6):
        await asyncio.sleep(0.5)
    assert len(flights) == 0
    assert await join() == 3


async def test_what_is_kept_is_bounded() -> None:
    flights = Flights(kept=3)
    for i in range(20):
        await flights.join(i, Work(), keep=60)
    assert len(flights) <= 4
    slow = [Work(60) for _ in range(10)]
    flights = Flights(patience=0, window=60, kept=3)
    for i, work in enumerate(slow):
        task = asyncio.create_task(flights.join(i, work))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await _leave(task)
    await _soon(lambda: sum(work.cancelled for work in slow) >= 6)
    flights.close()
    await _soon(lambda: sum(work.cancelled for work in slow) == 10)
