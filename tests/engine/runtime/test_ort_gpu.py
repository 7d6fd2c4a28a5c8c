"""ONNX Runtime on a real GPU: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import DeviceError, MissingDependencyError
from pixano_edge.engine.runtime import CpuDevice, Device, OrtSession, open_device, open_session
from pixano_edge.engine.runtime.ort_placement import read_profile
from tests.support.fake_ort import CUDA, TRT

helper = pytest.importorskip("onnx.helper", reason="making test graphs needs onnx: pip install onnx")

from tests.engine.runtime.graphs import quantised_convolution, save, spec  # noqa: E402 (imports onnx)

pytestmark = pytest.mark.gpu

SIDE = 64
RNG = np.random.default_rng(5)
SOURCES = [RNG.normal(size=(1, SIDE, SIDE)).astype(np.float32) for _ in range(3)]


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip(f"onnxruntime {onnxruntime.__version__} has no {CUDA}: pip install 'pixano-edge[cuda]'")
    try:
        opened = open_device("cuda:0")
    except (DeviceError, MissingDependencyError) as error:
        pytest.skip(f"no CUDA device: {error}")
    yield opened
    opened.close()


def network(folder: Path, name: str = "net", dims: tuple[int | str, ...] = (1, SIDE, SIDE)) -> tuple[Path, GraphSpec]:
    """Matrix product, softmax and a residual: several kernels and intermediate tensors."""
    graph = spec(name, dims=dims)
    weights = np.random.default_rng(7).normal(size=(SIDE, SIDE)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Softmax", ["a"], ["b"], axis=-1),
        helper.make_node("MatMul", ["b", "w"], ["c"]),
        helper.make_node("Add", ["c", "x"], ["y"]),
    ]
    return save(folder / f"{name}.onnx", nodes, graph, {"w": weights}), graph


def opened(made: tuple[Path, GraphSpec], device: Device, backend: str = "onnxruntime", **options: Any) -> OrtSession:
    session = open_session(*made, device, backend=backend, options=options)
    assert isinstance(session, OrtSession)
    return session


def expected(made: tuple[Path, GraphSpec], source: np.ndarray) -> np.ndarray:
    binding = open_session(*made, CpuDevice(), threads=1).prepare()
    binding.write("x", source)
    binding.run()
    return binding.read("y").copy()


def close(got: np.ndarray, want: np.ndarray, bar: float = 1e-5) -> bool:
    return float(np.abs(got - want).max()) <= bar * float(np.abs(want).max())


def test_quantised_convolutions_run_on_the_gpu(tmp_path: Path, device: Device) -> None:
    made = quantised_convolution(tmp_path)
    session = opened(made, device)
    assert set(session.info()["nodes"]) == {CUDA}
    source = RNG.normal(size=made[1].inputs[0].dims).astype(np.float32)
    binding = session.prepare()
    binding.write("x", source)
    binding.run()
    # A value on the border of two steps may fall on either side.
    assert float(np.abs(binding.read("y") - expected(made, source)).max()) <= 0.031


def test_equal_to_the_cpu_and_all_on_the_gpu(tmp_path: Path, device: Device) -> None:
    made = network(tmp_path)
    session = opened(made, device, profile=str(tmp_path / "p"))
    assert session.info()["nodes"] == {CUDA: 4}
    assert session.info()["warnings"] == []
    binding = session.prepare()
    for source in SOURCES:
        binding.write("x", source)
        binding.run()
        assert close(binding.read("y"), expected(made, source)), "TF32 is off, so this holds"
    assert set(read_profile(session.end_profile())) == {CUDA}, "no copies between host and device"


def test_two_sessions_chained_on_the_device(tmp_path: Path, device: Device) -> None:
    made = network(tmp_path)
    first, second = opened(made, device).prepare(), opened(made, device).prepare(borrowed=("x",))
    second.bind("x", first.outputs["y"])
    for source in SOURCES:
        first.write("x", source)
        first.run()
        second.run()
        assert close(second.read("y"), expected(made, expected(made, source)))


def test_own_graphs_equal_plain_runs(tmp_path: Path, device: Device) -> None:
    made = network(tmp_path)
    session = opened(made, device, cuda_graph=True)
    binding = session.prepare(borrowed=("x",))
    buffers = [device.empty(source.shape, source.dtype) for source in SOURCES]
    for buffer, source in zip(buffers, SOURCES):
        device.upload(buffer, source)
    for which in (0, 0, 0, 1, 0, 1, 1, 2, 0, 1):
        binding.bind("x", buffers[which])
        binding.run()
        assert close(binding.read("y"), expected(made, SOURCES[which])), "never a stale graph"
        binding.release("x")
    assert session.info()["graphs"] == 2
    device.upload(buffers[0], SOURCES[2])
    binding.bind("x", buffers[0])
    binding.run()
    assert close(binding.read("y"), expected(made, SOURCES[2])), "a replay reads new contents at the old address"


def test_a_run_can_be_recorded_so_it_neither_waits_nor_allocates(tmp_path: Path, device: Device) -> None:
    made = network(tmp_path)
    session = opened(made, device)
    assert session.capturable
    binding = session.prepare()
    binding.write("x", SOURCES[0])
    for _ in range(3):
        binding.run()
    graph = device.capture(binding.run)
    for source in SOURCES:
        binding.write("x", source)
        graph.replay()
        assert close(binding.read("y"), expected(made, source))
    graph.close()


def test_1000_runs_take_no_more_memory(tmp_path: Path, device: Device) -> None:
    session = opened(network(tmp_path, "open", ("P", SIDE, SIDE)), device)
    bindings = {size: session.prepare({"P": size}) for size in (1, 3)}

    def run(count: int) -> None:
        for index in range(count):
            bindings[(1, 3)[index % 2]].run()
        device.synchronize()

    run(20)
    before = device.info().memory_free
    run(1000)
    after = device.info().memory_free
    assert before is not None
    assert after is not None
    assert before - after < 4 << 20


def test_memory_is_given_back(tmp_path: Path, device: Device) -> None:
    made = network(tmp_path)
    opened(made, device).close()  # what CUDA and cuBLAS keep for the process
    before = device.info().memory_free
    for _ in range(5):
        session = opened(made, device)
        session.prepare().run()
        session.close()
        del session
    after = device.info().memory_free
    assert before is not None
    assert after is not None
    assert before - after < 16 << 20


def test_tensorrt_keeps_its_engine(tmp_path: Path, device: Device) -> None:
    import onnxruntime

    from pixano_edge.engine.runtime.ort_cache import tensorrt_version

    if TRT not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {TRT}")
    try:
        tensorrt_version()
    except DeviceError as error:
        pytest.skip(str(error))
    made = network(tmp_path, "open", ("P", SIDE, SIDE))
    files: list[set[str]] = []
    for _ in range(2):
        session = opened(made, device, "onnxruntime-tensorrt", cache_dir=tmp_path / "engines")
        assert session.info()["nodes"] == {TRT: 4}
        for size in (1, 8, 2):
            binding = session.prepare({"P": size})
            source = np.concatenate([SOURCES[0]] * size)
            binding.write("x", source)
            binding.run()
            assert close(binding.read("y")[:1], expected(network(tmp_path), SOURCES[0]), 5e-3), "TF32"
        session.close()
        files.append({p.name for p in (tmp_path / "engines").rglob("*.engine")})
    assert len(files[0]) == 1, "explicit profiles: one engine for all shapes"
    assert files[0] == files[1]
