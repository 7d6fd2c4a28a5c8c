"""Threads, queues, timeouts and cancellation."""

from __future__ import annotations

import asyncio
import math
import threading
import time

import pytest

from pixano_edge.engine.errors import CancelledError
from pixano_edge.engine.provider.callers import asking, caller
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


class _Steps:
    """Long work in background steps, which it queues itself."""

    def __init__(self, worker: ModelWorker, name: str, count: int, seen: list[str]) -> None:
        self.worker, self.name, self.left, self.seen = worker, name, count, seen
        self.queue()

    def queue(self) -> None:
        self.worker.submit(self.step, background=True)

    def step(self, _: Job) -> None:
        self.seen.append(self.name)
        self.left -= 1
        if self.left:
            self.queue()


def _held(worker: ModelWorker) -> threading.Event:
    gate, entered = threading.Event(), threading.Event()

    def wait(_: Job) -> None:
        entered.set()
        assert gate.wait(20)

    worker.submit(wait, background=True)
    assert entered.wait(10)
    return gate


def test_background_works_take_turns_and_requests_go_between() -> None:
    worker = ModelWorker("m", depth=2)
    seen: list[str] = []
    gate = _held(worker)
    first, second = _Steps(worker, "a", 3, seen), _Steps(worker, "b", 3, seen)
    for name in ("x", "y"):
        worker.submit(lambda _, n=name: seen.append(n))  # type: ignore[misc]
    with pytest.raises(ModelBusyError, match="2 requests"):
        worker.submit(lambda _: None)
    worker.submit(lambda _: seen.append("late"), background=True)  # steps do not count
    gate.set()
    until(lambda: first.left == second.left == 0 and worker.idle)
    assert seen == ["x", "y", "a", "b", "late", "a", "b", "a", "b"]
    _finish(worker)


def test_many_requests_do_not_stop_background_work() -> None:
    worker = ModelWorker("m", depth=100)
    seen: list[str] = []
    gate = _held(worker)
    _Steps(worker, "step", 2, seen)
    for _ in range(20):
        worker.submit(lambda _: seen.append("click"))
    gate.set()
    until(lambda: worker.idle and len(seen) == 22)
    assert [i for i, what in enumerate(seen) if what == "step"] == [8, 17]
    _finish(worker)


def test_the_last_comes_after_every_accepted_step_and_no_step_after_it() -> None:
    worker = ModelWorker("m")
    seen: list[str] = []
    refused: list[str] = []
    gate = _held(worker)

    def step(_: Job) -> None:
        seen.append("step")
        try:
            worker.submit(step, background=True)
        except ModelNotFoundError as error:
            refused.append(error.message)

    worker.submit(step, background=True)
    last = worker.finish(lambda: seen.append("last"))
    assert not worker.idle
    gate.set()
    last.result(10)
    assert seen == ["step", "last"]
    assert refused == ["Model 'm' was unloaded."]


def test_a_request_cancelled_in_the_queue_leaves_its_turn_unused() -> None:
    worker = ModelWorker("m")
    seen: list[str] = []
    gate = _held(worker)
    _, dropped = worker.submit(lambda _: seen.append("dropped"))
    _, kept = worker.submit(lambda _: seen.append("kept"))
    assert dropped.cancel()
    gate.set()
    kept.result(10)
    assert seen == ["kept"]
    until(lambda: worker.idle)
    _finish(worker)


# --- many callers ----------------------------------------------------------------------------------------------------


def _queued(worker: ModelWorker, who: str, name: str, order: list[str]) -> None:
    with asking(who):
        worker.submit(lambda _: order.append(name))


def test_callers_take_turns_and_each_ones_requests_stay_in_order() -> None:
    worker = ModelWorker("m", depth=20)
    gate = threading.Event()
    order: list[str] = []
    worker.submit(lambda _: gate.wait(20))
    for i in range(6):
        _queued(worker, "flood", f"f{i}", order)
    for i in range(2):
        _queued(worker, "one", f"a{i}", order)
    _queued(worker, "two", "b0", order)
    gate.set()
    worker.finish(lambda: None).result(20)
    assert order == ["f0", "a0", "b0", "f1", "a1", "f2", "f3", "f4", "f5"]


def test_a_full_queue_is_one_callers_own_until_all_together_are_too_many() -> None:
    worker = ModelWorker("m", depth=3)
    gate = threading.Event()
    entered = threading.Event()
    order: list[str] = []
    with asking("flood"):
        worker.submit(lambda _: (entered.set(), gate.wait(20)))
    assert entered.wait(10)
    for i in range(2):
        _queued(worker, "flood", f"f{i}", order)
    with pytest.raises(ModelBusyError):
        _queued(worker, "flood", "f2", order)
    for i in range(9):
        _queued(worker, f"other {i}", f"o{i}", order)
    with pytest.raises(ModelBusyError, match="12 requests wait"):
        _queued(worker, "one more", "x", order)
    gate.set()
    worker.finish(lambda: None).result(20)
    assert order[:3] == ["f0", "o0", "o1"]
    assert len(order) == 11
    assert not worker._of_caller  # nothing is kept of callers that are gone


async def test_a_caller_is_inherited_by_tasks() -> None:
    async def who() -> str:
        await asyncio.sleep(0)
        return caller()

    with asking("key"):
        task = asyncio.create_task(who())
    assert await task == "key"
    assert caller() == ""
