"""No allocation of tensor size per call once a shape is prepared, and proof that the meter would notice one.

Three meters over 500 calls (write, run, read) with tensors of 4 MiB:

- tracemalloc peak: numpy arrays made by Python code;
- growth of the resident set: leaks, wherever they are;
- minor page faults per call: memory that native code takes from the system and gives back within a call.
"""

from __future__ import annotations

import gc
import resource
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from pixano_edge.engine.runtime import Binding, CpuDevice, open_session
from tests.engine.runtime.graphs import spec, twice

SIDE = 1024
TENSOR_BYTES = SIDE * SIDE * 4
PAGES = TENSOR_BYTES // resource.getpagesize()
CALLS = 500


@dataclass(frozen=True)
class Cost:
    """What `CALLS` calls took: bytes, bytes, and page faults per call."""

    python_peak: int
    resident_growth: int
    faults: float

    @property
    def steady(self) -> bool:
        # The kernel may back a few half-used areas with huge pages meanwhile, 2 MiB each; a leak of one tensor per call
        # would be hundreds of times as much.
        return (
            self.python_peak < TENSOR_BYTES // 16
            and self.resident_growth < 4 * TENSOR_BYTES
            and self.faults < PAGES / 16
        )


def measure(call: Callable[[], object], calls: int = CALLS) -> Cost:
    """Runs `call` after a warm-up."""
    process = psutil.Process()
    for _ in range(5):
        call()
    gc.collect()
    tracemalloc.start()
    before = process.memory_info().rss
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        call()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    growth = process.memory_info().rss - before
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Cost(peak, growth, faults / calls)


@pytest.fixture(params=[(1, SIDE, SIDE), ("P", SIDE, SIDE)], ids=["static", "dynamic"])
def binding(request: pytest.FixtureRequest, tmp_path: Path) -> Binding:
    path, graph = twice(tmp_path, spec("steady", dims=request.param))
    return open_session(path, graph, CpuDevice(), threads=1).prepare({"P": 1} if "P" in request.param else {})


SOURCE = np.ones((1, SIDE, SIDE), np.float32)


def call(binding: Binding) -> np.ndarray:
    binding.write("x", SOURCE)
    binding.run()
    return binding.read("y")


def test_500_calls_allocate_nothing_of_tensor_size(binding: Binding) -> None:
    cost = measure(lambda: call(binding))
    assert cost.steady, cost
    assert (binding.read("y") == 2).all()


def test_500_chained_calls_with_prepare_allocate_nothing(tmp_path: Path) -> None:
    """As a model does: prepare (cached), bind the previous session's output, run."""
    device = CpuDevice()
    one = open_session(*twice(tmp_path, spec("one", dims=("P", SIDE, SIDE))), device, threads=1)
    two = open_session(*twice(tmp_path, spec("two", dims=("P", SIDE, SIDE))), device, threads=1)

    def chained() -> None:
        first, second = one.prepare({"P": 1}), two.prepare({"P": 1})
        second.bind("x", first.outputs["y"])
        first.write("x", SOURCE)
        first.run()
        second.run()
        second.read("y")

    assert measure(chained).steady


def test_changing_between_known_shapes_allocates_nothing(tmp_path: Path) -> None:
    session = open_session(*twice(tmp_path, spec("many", dims=("P", SIDE, SIDE))), CpuDevice(), threads=1)
    sources = {size: np.ones((size, SIDE, SIDE), np.float32) for size in (1, 2, 3)}

    def alternate() -> None:
        for size, source in sources.items():
            binding = session.prepare({"P": size})
            binding.write("x", source)
            binding.run()

    assert measure(alternate, calls=100).steady


def test_control_a_copy_per_call_is_noticed(binding: Binding) -> None:
    cost = measure(lambda: call(binding).copy(), calls=20)
    assert cost.python_peak >= TENSOR_BYTES
    assert not cost.steady


def test_control_a_leak_is_noticed(binding: Binding) -> None:
    kept: list[object] = []

    def leak() -> None:
        call(binding)
        # Native memory that Python does not see, as a leaking back end would take it.
        value = binding.session._ort.OrtValue.ortvalue_from_shape_and_type([1, SIDE, SIDE], np.float32)  # type: ignore[attr-defined]
        value.update_inplace(SOURCE)
        kept.append(value)

    # Many enough to use up the free memory that earlier tests left resident.
    cost = measure(leak, calls=40)
    assert cost.resident_growth > 10 * TENSOR_BYTES
    assert not cost.steady


def test_control_native_allocation_within_a_call_is_noticed(tmp_path: Path) -> None:
    """Without the arena, ONNX Runtime takes the intermediate tensor from the system at every run."""
    path, graph = twice(tmp_path, spec("steady", dims=(1, 8 * SIDE, SIDE)))
    session = open_session(path, graph, CpuDevice(), threads=1, options={"arena": False, "optimization": "none"})
    binding, source = session.prepare(), np.ones((1, 8 * SIDE, SIDE), np.float32)

    def run() -> None:
        binding.write("x", source)
        binding.run()

    cost = measure(run, calls=20)
    assert cost.faults > PAGES
    assert not cost.steady
