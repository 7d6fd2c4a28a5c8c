"""TensorRT sessions on a real GPU, with engines built there. Not run on a GPU yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.engine.errors import MissingDependencyError
from pixano_edge.engine.runtime.cuda import CudaDevice
from pixano_edge.engine.runtime.tensorrt import CAPTURE_AFTER, TrtSession
from pixano_edge.engine.runtime.tensorrt_api import TensorRt, load_tensorrt
from tests.engine.runtime.real_engines import build_double, build_positive, build_project
from tests.engine.runtime.test_tensorrt import ONES, binding_of
from tests.engine.runtime.trt import FIXED_SPEC, OPEN_SPEC

pytestmark = pytest.mark.gpu

WEIGHTS = np.random.default_rng(0).standard_normal((96, 80)).astype(np.float32)
PROJECT_SPEC = GraphSpec(
    "project",
    (TensorSpec("x", "float32", ("P", 96)),),
    (TensorSpec("y", "float32", ("P", 80)),),
    {"P": (1, 2, 64)},
)


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    opened = CudaDevice(0)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def api() -> TensorRt:
    try:
        loaded = load_tensorrt()
    except MissingDependencyError as error:
        pytest.skip(f"TensorRT is not installed: {error.action}")
    probe = CudaDevice(0)
    capability = "SM" + (probe.info().compute_capability or "").replace(".", "")
    probe.close()
    if loaded.rtx and capability not in loaded.module.ComputeCapability.__members__:
        pytest.skip(f"TensorRT for RTX {loaded.version} does not know {capability}; full TensorRT is not installed")
    return loaded


@pytest.fixture(scope="module")
def project(api: TensorRt) -> bytes:
    device = CudaDevice(0)
    with device.current():
        engine = build_project(api, WEIGHTS)
    device.close()
    return engine


def open_double(api: TensorRt, device: CudaDevice, **options: Any) -> TrtSession:
    with device.current():
        engine = build_double(api)
    return TrtSession(engine, FIXED_SPEC, device, api=api, options=options)


def test_numbers_and_graphs_equal_numpy(api: TensorRt, device: CudaDevice) -> None:
    session = open_double(api, device)
    binding = binding_of(session)
    for value in range(1, 8):
        binding.write("x", ONES * value)
        binding.run()
        assert (binding.read("y") == 2 * value).all()
    assert session.info()["warnings"] == []
    assert session.replays == 7 - CAPTURE_AFTER
    session.close()


def test_graph_equals_eager_bit_for_bit(api: TensorRt, device: CudaDevice, project: bytes) -> None:
    options = {"specialization": "eager"}
    graphs = TrtSession(project, PROJECT_SPEC, device, api=api, options=options | {"graphs": True})
    eager = TrtSession(project, PROJECT_SPEC, device, api=api, options=options | {"graphs": False})
    x = np.random.default_rng(1).standard_normal((8, 96)).astype(np.float32)
    results = []
    for session in (graphs, eager):
        binding = binding_of(session, {"P": 8})
        for _ in range(4):
            binding.write("x", x)
            binding.run()
        results.append(binding.read("y").copy())
    assert graphs.replays == 4 - CAPTURE_AFTER
    assert eager.replays == 0
    np.testing.assert_array_equal(*results)
    graphs.close()
    eager.close()


def test_profiles_and_sizes_against_numpy(api: TensorRt, device: CudaDevice, project: bytes) -> None:
    session = TrtSession(project, PROJECT_SPEC, device, api=api)
    random = np.random.default_rng(2)
    for size, profile in ((1, 0), (4, 0), (5, 1), (64, 1), (2, 0), (33, 1)):
        binding = binding_of(session, {"P": size})
        assert binding.profile.index == profile
        x = random.standard_normal((size, 96)).astype(np.float32)
        for _ in range(4):
            binding.write("x", x)
            binding.run()
            np.testing.assert_allclose(binding.read("y"), x @ WEIGHTS, rtol=1e-3, atol=1e-3)
    session.close()


def test_two_sessions_chain_with_one_scratch_block(api: TensorRt, device: CudaDevice) -> None:
    first, second = open_double(api, device), open_double(api, device)
    a, b = binding_of(first), binding_of(second, borrowed=["x"])
    b.bind("x", a.outputs["y"])
    for value in range(6):
        a.write("x", ONES * value)
        a.run()
        b.run()
        assert (b.read("y") == 4 * value).all()
    first.close()
    assert (b.read("y") == 20).all()
    second.close()


def test_other_buffers_are_never_served_by_a_stale_graph(api: TensorRt, device: CudaDevice) -> None:
    session = open_double(api, device)
    binding = binding_of(session, borrowed=["x"])
    buffers = [device.empty((2, 4), np.float32) for _ in range(2)]
    for value, buffer in enumerate(buffers, 1):
        device.upload(buffer, ONES * value)
    for which in (0, 0, 0, 1, 0, 1, 1, 1, 1, 0):
        binding.bind("x", buffers[which])
        binding.run()
        assert (binding.read("y") == 2 * (which + 1)).all()
    session.close()


def test_size_that_depends_on_data(api: TensorRt, device: CudaDevice) -> None:
    if api.rtx:
        pytest.skip("TensorRT for RTX 1.7 has no layer whose output size depends on data")
    with device.current():
        engine = build_positive(api)
    session = TrtSession(engine, OPEN_SPEC, device, api=api)
    binding = binding_of(session)
    for hits in ([1, 5], [], [0, 2, 3, 4, 5, 7], [6]):
        x = np.zeros(8, np.float32)
        x[hits] = 1
        binding.write("x", x)
        binding.run()
        assert binding.read("found").tolist() == [[hit] for hit in hits]
    session.close()


def test_a_thousand_runs_do_not_grow(api: TensorRt, device: CudaDevice, project: bytes) -> None:
    session = TrtSession(project, PROJECT_SPEC, device, api=api)
    free = []
    for count in range(1000):
        binding = session.prepare({"P": (1, 8, 64)[count % 3]})
        binding.run()
        if count in (100, 999):
            device.synchronize()
            free.append(device.info().memory_free)
    if free[0] is not None and free[1] is not None:
        assert free[0] - free[1] <= 4 << 20, "other processes may take a little"
    assert session.info()["contexts"] == 3
    session.close()
