"""What sessions take, how growth is measured, and how a lack of memory is recognised."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.engine.errors import ContractError, DeviceError, DeviceMemoryError
from pixano_edge.engine.runtime import StubDevice, StubSession
from pixano_edge.engine.runtime.memory import (
    GrowthMeter,
    MemoryUse,
    graph_bytes,
    is_host_memory,
    is_out_of_memory,
    model_memory,
    readable,
    resident_bytes,
    session_memory,
)

_SPEC = GraphSpec(
    "double",
    (TensorSpec("x", "float32", ("P", 4)),),
    (TensorSpec("y", "float32", ("P", 4)),),
    {"P": (1, 1, 8)},
)


class _Engine(StubSession):
    """A session whose back end tells what it took."""

    def memory(self) -> MemoryUse:
        return MemoryUse(weights=100, shared=30)


def _session(kind: type[StubSession] = StubSession) -> StubSession:
    return kind(_SPEC, StubDevice(), lambda inputs: {"y": inputs["x"] * 2})


def test_parts_add_up_and_shared_scratch_counts_once() -> None:
    one, two = MemoryUse(weights=10, shared=5, caches=2), MemoryUse(weights=1, activations=3, shared=7)
    both = one + two
    assert both == MemoryUse(weights=11, activations=3, shared=7, bindings=None, caches=2)
    assert (both.total, both.at_once) == (23, 21)
    assert MemoryUse().total == 0


def test_found_figures_replace_declared_ones_but_never_lower_what_grows() -> None:
    declared = MemoryUse(weights=100, activations=50, bindings=20, caches=40)
    found = MemoryUse(weights=80, bindings=5, caches=60)
    assert declared.corrected(found) == MemoryUse(weights=80, activations=50, bindings=20, caches=60)


def test_shared_scratch_takes_the_place_of_declared_activations() -> None:
    declared = MemoryUse(weights=100, activations=50)
    assert declared.corrected(MemoryUse(shared=8)) == MemoryUse(weights=100, shared=8)
    assert declared.corrected(MemoryUse(shared=8, activations=2)).total == 110


def test_a_stub_session_reports_its_bindings() -> None:
    session = _session()
    assert session_memory(session).total == 0
    session.prepare({"P": 2})
    assert session_memory(session) == MemoryUse(bindings=2 * 2 * 4 * 4)
    session.prepare({"P": 1}, borrowed=("x",))  # borrowed memory is its owner's
    assert session_memory(session).bindings == 64 + 16


def test_a_models_sessions_share_scratch() -> None:
    sessions = [_session(_Engine), _session(_Engine)]
    sessions[0].prepare({"P": 1})
    assert model_memory(sessions, caches=9) == MemoryUse(weights=200, shared=30, bindings=32, caches=9)


def test_graph_bytes_counts_external_weights_and_not_the_neighbours(tmp_path: Path) -> None:
    for name, size in {
        "enc.onnx": 10,
        "enc.onnx.data": 100,
        "enc.weights": 7,
        "enc.trt.onnx": 1000,
        "dec.onnx": 3,
    }.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert graph_bytes(tmp_path / "enc.onnx") == 117
    assert graph_bytes(tmp_path / "dec.onnx") == 3


def test_resident_memory_grows_by_what_is_touched() -> None:
    meter = GrowthMeter()
    with meter.measure() as growth:
        kept = np.ones(8 << 20, np.uint8)
    assert growth.nbytes is not None
    assert growth.nbytes >= 7 << 20
    assert kept.any()


def test_resident_memory_is_unknown_without_proc(tmp_path: Path) -> None:
    assert resident_bytes(tmp_path) is None
    with GrowthMeter(lambda: resident_bytes(tmp_path)).measure() as growth:
        pass
    assert growth.nbytes is None


def test_overlapping_work_is_not_measured() -> None:
    meter = GrowthMeter(lambda: 0)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with meter.measure() as growth:
            inside.set()
            leave.wait(10)
        seen.append(growth.nbytes)

    seen: list[int | None] = []
    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    with meter.measure() as short:  # starts and ends within the other
        pass
    leave.set()
    thread.join(10)
    assert (short.nbytes, seen) == (None, [None])
    with meter.measure() as alone:
        pass
    assert alone.nbytes == 0


def test_growth_is_there_after_an_error_too() -> None:
    values = iter((10, 35))
    meter = GrowthMeter(lambda: next(values))
    with pytest.raises(ValueError, match="bad"), meter.measure() as growth:
        raise ValueError("bad")
    assert growth.nbytes == 25


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (DeviceMemoryError("no room", ""), True),
        (DeviceError("Graph failed: BFCArena::AllocateRawInternal Failed to allocate memory for buffer", ""), True),
        (DeviceError("CUDA_ERROR_OUT_OF_MEMORY", ""), True),
        (DeviceError("std::bad_alloc", ""), True),
        (DeviceError("the device is gone", ""), False),
        (ContractError("file 'out of memory.png' is no tensor", ""), False),
    ],
)
def test_out_of_memory_is_recognised(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_cause_counts() -> None:
    error = DeviceError("Graph 'x' failed", "")
    error.__cause__ = RuntimeError("CUDA error: out of memory")
    assert is_out_of_memory(error)
    assert not is_host_memory(error)
    error.__cause__.__cause__ = MemoryError()
    assert is_host_memory(error)


def test_readable() -> None:
    values = (None, 0, 12 << 20, 3 << 29)
    assert [readable(v) for v in values] == ["unknown", "0 B", "12.0 MiB", "1.50 GiB"]
