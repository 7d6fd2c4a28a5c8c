"""`Chain` on the recording device: staging that is not overwritten, one wait, recordings and when they are made."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.errors import ContractError, DeviceError
from pixano_edge.engine.models.chain import CAPTURE_AFTER, Chain
from pixano_edge.engine.runtime import Array, StubDevice, StubSession
from tests.engine.models.sam2.test_cache import run_all
from tests.engine.runtime.graphs import spec

ONES = np.ones((2, 4), np.float32)


def double(inputs: dict[str, Array]) -> Mapping[str, Array]:
    return {"y": inputs["x"] * 2}


def gpu(**kwargs: Any) -> StubDevice:
    """Like a GPU with memory of its own."""
    return StubDevice("cuda:0", deferred=True, discrete=True, **kwargs)


def run(chain: Chain, session: StubSession, value: float, rows: int = 2) -> Array:
    with chain.lock:
        binding = session.prepare({"P": rows})
    chain.stage(binding, "x")[...] = value
    chain.send(binding, "x")
    chain.launch(binding)
    return chain.fetch(binding, ["y"])["y"]


def test_one_upload_one_launch_one_download_one_wait() -> None:
    device = gpu()
    chain, session = Chain(device), StubSession(spec(), device, double)
    assert (run(chain, session, 3) == 6).all()
    device.calls.clear()
    assert (run(chain, session, 4) == 8).all()
    # No allocation and no wait for staging memory after the first time.
    assert device.ops == ["copy", "record", "launch", "copy", "synchronize"]
    assert chain.waits == 2


def test_staging_memory_is_not_overwritten_before_it_was_read() -> None:
    device = gpu()
    chain, session = Chain(device), StubSession(spec(), device, double)
    binding = session.prepare({"P": 2})
    seen: list[float] = []
    session._function = lambda i: (seen.append(float(i["x"][0, 0])), double(i))[1]
    for value in (1, 2, 3):
        chain.stage(binding, "x")[...] = value
        chain.send(binding, "x")
        chain.launch(binding)
    chain.wait()
    assert seen == [1, 2, 3]
    assert device.ops.count("wait_on_host") == 2
    assert device.ops.count("synchronize") == 1, "only the copy is waited for, not the launch behind it"


def test_memory_that_the_host_can_write_needs_no_copies() -> None:
    """Integrated GPUs: buffers are host memory, but a queued run may still read them."""
    device = StubDevice("cuda:0", deferred=True)
    chain, session = Chain(device), StubSession(spec(), device, double)
    binding = session.prepare({"P": 2})
    seen: list[float] = []
    session._function = lambda i: (seen.append(float(i["x"][0, 0])), double(i))[1]
    for value in (1, 2):
        chain.stage(binding, "x")[...] = value
        chain.send(binding, "x")
        chain.launch(binding)
    chain.write(binding, "x", ONES * 3)
    chain.launch(binding)
    assert (chain.fetch(binding, ["y"])["y"] == 6).all()
    assert seen == [1, 2, 3]
    assert "copy" not in device.ops
    assert device.ops.count("synchronize") == 1
    with pytest.raises(ContractError):
        chain.write(binding, "x", ONES.astype(np.float64))
    with pytest.raises(ContractError):
        chain.write(binding, "x", ONES[:1])
    with pytest.raises(ContractError):
        chain.write(binding, "z", ONES)


def test_recorded_after_a_few_runs_and_equal_to_them() -> None:
    device = gpu(captures=True)
    chain, session = Chain(device), StubSession(spec(), device, double, capturable=True)
    answers = [run(chain, session, value).copy() for value in range(CAPTURE_AFTER + 3)]
    assert [float(a[0, 0]) for a in answers] == [2.0 * v for v in range(CAPTURE_AFTER + 3)]
    steps = [op for op in device.ops if op in ("launch", "capture", "replay")]
    assert steps == ["launch"] * CAPTURE_AFTER + ["capture"] + ["replay"] * 3
    assert session.runs == CAPTURE_AFTER + 3
    assert chain.info() | {"waits": 0} == {
        "capture": "on",
        "recorded": 1,
        "replays": 3,
        "runs": CAPTURE_AFTER,
        "waits": 0,
    }


def test_a_new_shape_gets_a_recording_of_its_own() -> None:
    device = gpu(captures=True)
    chain, session = Chain(device), StubSession(spec(), device, double, capturable=True)
    for rows in (2, 3, 2):
        for value in range(CAPTURE_AFTER + 1):
            assert (run(chain, session, value, rows) == 2 * value).all()
    assert [c[1] for c in device.calls if c[0] == "replay"] == [1, 2] + [1] * (CAPTURE_AFTER + 1)


def test_a_moved_buffer_is_recorded_again() -> None:
    device = gpu(captures=True)
    chain, session = Chain(device), StubSession(spec(), device, double, capturable=True)
    for value in range(CAPTURE_AFTER + 1):
        run(chain, session, value)
    binding = session.prepare({"P": 2})
    other = device.empty((2, 4), "float32")
    binding.bind("y", other)
    for value in range(CAPTURE_AFTER + 1):
        assert (run(chain, session, value) == 2 * value).all()
    assert ("close graph", 1) in device.calls
    assert [c[1] for c in device.calls if c[0] == "replay"] == [1, 2]


def test_recordings_go_with_their_bindings() -> None:
    device = gpu(captures=True)
    chain, session = Chain(device), StubSession(spec(), device, double, capturable=True)
    session.max_bindings = 1
    for value in range(CAPTURE_AFTER + 1):
        run(chain, session, value)
    run(chain, session, 1, rows=3)
    gc.collect()
    assert ("close graph", 1) in device.calls
    assert len(chain._lanes) == 1


@pytest.mark.parametrize("why", ["switched off", "no graphs", "the session cannot", "the session does"])
def test_nothing_is_recorded_where_it_should_not_be(why: str) -> None:
    device = gpu(captures=why != "no graphs")
    chain = Chain(device, capture=why != "switched off")
    session = StubSession(spec(), device, double, capturable=why != "the session cannot")
    session.self_recording = why == "the session does"
    assert chain.captures(session) == (why == "the session does")
    for value in range(CAPTURE_AFTER + 2):
        run(chain, session, value)
    assert "capture" not in device.ops
    assert device.ops.count("launch") == CAPTURE_AFTER + 2
    assert chain.info()["capture"].startswith({"switched off": "switched", "no graphs": "the device"}.get(why, "on"))


def test_a_failed_recording_is_told_and_not_repeated() -> None:
    device = gpu(captures=True)
    chain, session = Chain(device), StubSession(spec(), device, double, capturable=True)
    tries = []

    def fail(work: Callable[[], None], **_: bool) -> Any:
        tries.append(1)
        raise DeviceError("cudaErrorStreamCaptureInvalidated.", "")

    device.capture = fail  # type: ignore[method-assign,assignment]
    for value in range(CAPTURE_AFTER + 4):
        assert (run(chain, session, value) == 2 * value).all()
    assert len(tries) == 1
    assert "cudaErrorStreamCaptureInvalidated" in chain.warnings["twice"]
    assert session.runs == CAPTURE_AFTER + 4


def test_recording_keeps_other_threads_away() -> None:
    """The stub refuses, as CUDA does, whatever another thread asks of the stream while it is recorded."""
    device = gpu(captures=True)
    chain = Chain(device)
    sessions = [StubSession(spec(), device, double, capturable=True) for _ in range(2)]
    plain = device.capture

    def slow(work: Callable[[], None], *, host_copies: bool) -> Any:
        assert not host_copies, "memory of the back end, which a replay must not read"

        def slowed() -> None:
            threading.Event().wait(0.02)
            work()
            threading.Event().wait(0.02)

        return plain(slowed)

    device.capture = slow  # type: ignore[method-assign,assignment]
    wrong: list[int] = []

    def work(index: int) -> None:
        for value in range(12):
            with sessions[index].lock:
                # New shapes all the time, so that both threads record while the other one runs.
                if not (run(chain, sessions[index], value, rows=1 + value // 4) == 2 * value).all():
                    wrong.append(value)

    run_all([lambda: work(0), lambda: work(1)])
    assert not wrong
    assert not chain.warnings
    assert chain.info()["recorded"] == 6


def test_close_frees_recordings() -> None:
    device = gpu(captures=True)
    chain, session = Chain(device), StubSession(spec(), device, double, capturable=True)
    for value in range(CAPTURE_AFTER + 1):
        run(chain, session, value)
    chain.close()
    assert device.calls[-1] == ("close graph", 1)
