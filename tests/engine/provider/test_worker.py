"""Threads, queues, timeouts and cancellation."""

from __future__ import annotations

import asyncio
import math
import threading
import time

import pytest

from pixano_edge.engine.errors import CancelledError
from pixano_edge.engine.provider.errors import (
    InferenceTimeoutError,
    InvalidRequestError,
    ModelBusyError,
    ModelNotFoundError,
)
from pixano_edge.engine.provider.worker import Deadline, Job, ModelWorker, settled, wait_for

from .fakes import until


def _long() -> Deadline:
    return Deadline(20)


def _finish(worker: ModelWorker) -> None:
    worker.finish(lambda: None).result(10)


@pytest.mark.parametrize("timeout", [math.nan, -1, "60", [60]])
def test_deadline_refuses(timeout: object) -> None:
    with pytest.raises(InvalidRequestError, match="timeout"):
        Deadline(timeout)  # type: ignore[arg-type]


def test_deadline_counts_down() -> None:
    assert Deadline(None).left() is None
    assert Deadline(math.inf).left() is None
    assert Deadline(0).left() == 0
    left = Deadline(5).left()
    assert left is not None
    assert 4 < left <= 5


async def test_work_runs_in_order_on_one_thread() -> None:
    worker = ModelWorker("m")
    seen: list[tuple[int, str]] = []
    futures = [
        worker.submit(lambda _, n=n: seen.append((n, threading.current_thread().name)))[1]  # type: ignore[misc]
        for n in range(5)
    ]
    for future in futures:
        await wait_for(future, _long(), "it")
    assert [n for n, _ in seen] == list(range(5))
    assert {name for _, name in seen} == {"pixano-edge-m_0"}
    _finish(worker)


async def test_timeout_stops_the_work_at_its_next_step() -> None:
    worker = ModelWorker("m")
    gate, steps = threading.Event(), []

    def work(job: Job) -> None:
        steps.append(1)
        gate.wait(10)
        job.check()
        steps.append(2)

    job, future = worker.submit(work)
    with pytest.raises(InferenceTimeoutError, match=r"It took longer than 0\.05 s"):
        await wait_for(future, Deadline(0.05), "It", job)
    gate.set()
    with pytest.raises(CancelledError):
        await asyncio.to_thread(future.result, 10)
    assert steps == [1]
    # The worker goes on.
    assert await wait_for(worker.submit(lambda _: 7)[1], _long(), "next") == 7
    _finish(worker)


async def test_abandoned_work_leaves_the_queue() -> None:
    worker = ModelWorker("m", depth=2)
    gate, ran = threading.Event(), []
    first = worker.submit(lambda _: gate.wait(10))[1]
    job, second = worker.submit(lambda _: ran.append(1))
    with pytest.raises(ModelBusyError, match="2 requests"):
        worker.submit(lambda _: None)
    with pytest.raises(InferenceTimeoutError):
        await wait_for(second, Deadline(0.02), "second", job)
    until(second.cancelled)
    third = worker.submit(lambda _: "third")[1]  # there is room again
    gate.set()
    assert await wait_for(third, _long(), "third") == "third"
    assert first.done()
    assert ran == []
    _finish(worker)


async def test_cancelling_the_waiting_task_cancels_the_work() -> None:
    worker = ModelWorker("m")
    gate, began = threading.Event(), threading.Event()

    def work(_: Job) -> None:
        began.set()
        gate.wait(10)

    job, future = worker.submit(work)
    task = asyncio.create_task(wait_for(future, _long(), "it", job))
    await asyncio.to_thread(began.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert job.cancelled
    gate.set()
    _finish(worker)


async def test_a_timeout_error_of_the_work_is_not_our_timeout() -> None:
    worker = ModelWorker("m")

    def work(_: Job) -> None:
        raise TimeoutError("disk")

    with pytest.raises(TimeoutError, match="disk"):
        await wait_for(worker.submit(work)[1], _long(), "it")
    _finish(worker)


async def test_waiters_cannot_cancel_a_settled_future() -> None:
    future = settled()
    with pytest.raises(InferenceTimeoutError):
        await wait_for(future, Deadline(0.01), "it")
    future.set_result(3)
    assert await wait_for(future, _long(), "it") == 3


def test_finish_lets_accepted_work_end_first() -> None:
    worker = ModelWorker("m")
    order: list[str] = []
    worker.submit(lambda _: (time.sleep(0.05), order.append("a")))
    worker.submit(lambda _: order.append("b"))
    last = worker.finish(lambda: order.append("last"))
    with pytest.raises(ModelNotFoundError, match="unloaded"):
        worker.submit(lambda _: order.append("late"))
    last.result(10)
    assert order == ["a", "b", "last"]
    until(lambda: not any(t.name.startswith("pixano-edge-m_") for t in threading.enumerate()))


def test_work_of_an_owner_who_left_does_not_start() -> None:
    worker = ModelWorker("m")
    ran: list[int] = []
    job = Job()
    job.cancel()
    with pytest.raises(CancelledError):
        worker.submit(lambda _: ran.append(1), job)[1].result(10)
    assert ran == []
    _finish(worker)
