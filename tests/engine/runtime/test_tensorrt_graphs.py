"""CUDA graphs and scratch memory of TensorRT sessions: capture, replay, re-capture, sharing, running out of memory."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from pixano_edge.engine.errors import DeviceError, DeviceMemoryError
from pixano_edge.engine.models.chain import Chain
from pixano_edge.engine.runtime.tensorrt import CAPTURE_AFTER
from pixano_edge.engine.runtime.tensorrt_memory import ScratchPool, scratch_pool
from tests.engine.runtime import trt
from tests.engine.runtime.test_tensorrt import ONES, binding_of
from tests.engine.runtime.trt import DYNAMIC, OPEN
from tests.support.gpu_stub import GpuStub


def test_captured_after_steady_runs_then_replayed() -> None:
    device = GpuStub()
    fake = trt.fake(device)
    session = trt.session(device, fake)
    binding = binding_of(session)
    for value in range(1, 8):
        binding.write("x", ONES * value)
        binding.run()
        assert (binding.read("y") == 2 * value).all()
    launches = [op for op in device.ops if op in ("launch", "capture", "replay")]
    assert launches == ["launch"] * CAPTURE_AFTER + ["capture"] + ["replay"] * 5
    assert fake.ops.count("enqueue") == CAPTURE_AFTER + 1
    assert fake.ops.count("address") == 2
    assert (session.replays, session.runs) == (5, 7)
    assert session.info()["graphs"] == 1


def test_other_buffers_run_without_the_graph_and_are_captured_once_they_stay() -> None:
    device = GpuStub()
    session = trt.session(device, trt.fake(device))
    binding = binding_of(session, borrowed=["x"])
    first, second = (device.empty((2, 4), np.float32) for _ in range(2))
    device.memory(first)[:], device.memory(second)[:] = 1, 10

    def run(buffer, times: int) -> list[str]:  # type: ignore[no-untyped-def]
        before = len(device.calls)
        for _ in range(times):
            binding.bind("x", buffer)
            binding.run()
            assert (binding.read("y") == 2 * device.memory(buffer)).all(), "a stale graph"
            binding.release("x")
        return [op for op in device.ops[before:] if op in ("launch", "capture", "replay", "close graph")]

    assert run(first, 4) == ["launch"] * 2 + ["capture", "replay", "replay"]
    assert run(second, 1) == ["launch"]
    assert run(first, 2) == ["replay"] * 2, "the old graph fits again"
    assert run(second, 4) == ["launch"] * 2 + ["close graph", "capture", "replay", "replay"]
    assert run(first, 1) == ["launch"]


def test_each_shape_has_context_and_graph_of_its_own() -> None:
    device = GpuStub()
    fake = trt.fake(device)
    session = trt.session(device, fake, DYNAMIC)
    for value in range(8):
        for size in (1, 2, 20):
            binding = binding_of(session, {"P": size})
            binding.write("x", np.full((size, 4), value, np.float32))
            binding.run()
            assert (binding.read("y") == 2 * value).all()
    assert device.ops.count("capture") == 3
    assert fake.ops.count("context") == 3
    assert fake.ops.count("shape") == 3
    assert session.info()["graphs"] == 3


def test_growing_scratch_memory_makes_graphs_stale() -> None:
    device = GpuStub()
    fake = trt.fake(device)
    first = trt.session(device, fake)
    binding = binding_of(first)
    binding.write("x", ONES)
    for _ in range(4):
        binding.run()
    second = trt.session(device, fake, DYNAMIC)
    before = len(device.calls)
    for _ in range(5):
        binding.run()
        assert (binding.read("y") == 2).all()  # the fake notices work on freed memory
    launches = [op for op in device.ops[before:] if op in ("launch", "capture", "replay", "close graph")]
    assert launches == ["launch"] * 2 + ["close graph", "capture"] + ["replay"] * 3
    assert [call[3] for call in fake.calls if call[0] == "scratch"] == [1024, 16384]
    second.close()
    binding.run()
    assert device.ops[-1] == "replay", "the block stays while anybody needs it"


def test_a_capture_that_fails_leaves_plain_runs() -> None:
    device = GpuStub()
    session = trt.session(device, trt.fake(device))

    def refuse(work):  # type: ignore[no-untyped-def]
        raise DeviceError("operation not permitted when stream is capturing", "")

    device.capture = refuse  # type: ignore[method-assign]
    binding = session.prepare()
    binding.write("x", ONES)
    for _ in range(6):
        binding.run()
        assert (binding.read("y") == 2).all()
    info = session.info()
    assert info["graphs"] == "off"
    assert "runs without CUDA graphs: operation not permitted when stream is capturing" in info["warnings"]
    plain = GpuStub(captures=False)
    with pytest.raises(DeviceError, match="has no graphs"):
        trt.session(plain, trt.fake(plain), graphs=True)


def test_graphs_can_be_switched_off_or_demanded() -> None:
    device = GpuStub()
    binding = trt.session(device, trt.fake(device), graphs=False).prepare()
    for _ in range(6):
        binding.run()
    assert "capture" not in device.ops
    other = GpuStub()
    fake = trt.fake(other, rtx=True)
    fake.capturable = False
    binding = trt.session(other, fake, graphs=True).prepare()
    for _ in range(CAPTURE_AFTER - 1):
        binding.run()
    with pytest.raises(DeviceError, match="REQUIRE_USER_ALLOCATION"):
        binding.run()


def test_a_model_may_capture_several_launches_in_a_graph_of_its_own() -> None:
    device = GpuStub()
    fake = trt.fake(device)
    first, second = trt.session(device, fake), trt.session(device, fake, DYNAMIC)
    a, b = binding_of(first), binding_of(second, {"P": 2}, borrowed=["x"])
    b.bind("x", a.outputs["y"])

    def both() -> None:
        a.run()
        b.run()

    with pytest.raises(DeviceError, match="Run it once"):
        device.capture(both)
    both()
    graph = device.capture(both)
    third = trt.session(device, trt.fake(device, dynamic=trt.dynamic(scratch=[1 << 20] * 3)), DYNAMIC)
    for value in (3, 4):
        a.write("x", ONES * value)
        graph.replay()  # its scratch memory is kept, though the pool has moved on
        assert (b.read("y") == 4 * value).all()
    assert scratch_pool(device).nbytes == 1 << 20
    third.close()


def test_a_chain_leaves_recording_to_the_session() -> None:
    device = GpuStub()
    session = trt.session(device, trt.fake(device))
    chain, binding = Chain(device), binding_of(session)
    assert chain.captures(session)
    for count in range(8):
        binding.write("x", ONES * count)
        with session.lock:
            chain.launch(binding)
        assert (binding.read("y") == 2 * count).all()
        assert session.replays == max(0, count + 1 - chain.warm_runs(session) + 1)
    assert device.ops.count("capture") == 1
    device = GpuStub()
    session = trt.session(device, trt.fake(device), graphs=False)
    chain, binding = Chain(device), binding_of(session)
    for count in range(8):
        binding.write("x", ONES * count)
        with session.lock:
            chain.launch(binding)
        assert (binding.read("y") == 2 * count).all()
    assert (device.ops.count("capture"), session.replays) == (1, 0), "without its own graphs the chain records it"
    assert binding.pinned is not None


def test_rtx_engines_with_open_shapes_are_not_captured_while_kernels_may_change() -> None:
    device = GpuStub()
    lazy = trt.session(device, trt.fake(device, rtx=True), DYNAMIC)
    assert not lazy.capturable
    assert lazy.info()["graphs"] == "off"
    fake = trt.fake(device, rtx=True)
    eager = trt.session(device, fake, DYNAMIC, specialization="eager")
    assert eager.capturable
    assert ("specialization", "EAGER") in fake.calls
    assert trt.session(device, trt.fake(device, rtx=True)).capturable, "with fixed shapes kernels stay"
    with pytest.raises(DeviceError, match="lazy, eager, none"):
        trt.session(device, fake, DYNAMIC, specialization="sometimes")


def test_rtx_kernels_are_kept_for_the_next_process(tmp_path: Path) -> None:
    device = GpuStub()
    file = tmp_path / "cache" / "kernels.bin"
    trt.session(device, trt.fake(device, rtx=True), runtime_cache=file).close()
    assert file.read_bytes() == b"kernels"
    fake = trt.fake(device, rtx=True)
    session = trt.session(device, fake, runtime_cache=file)
    assert ("kernels", b"kernels") in fake.calls
    assert not any("stored kernels" in text for text in session.info()["warnings"])
    file.write_bytes(b"of another driver")
    session = trt.session(device, trt.fake(device, rtx=True), runtime_cache=file)
    assert any("stored kernels" in text for text in session.info()["warnings"])
    session.close()
    assert file.read_bytes() == b"kernels"
    assert [p.name for p in file.parent.iterdir()] == ["kernels.bin"]


def test_out_of_memory_at_opening_leaves_the_smaller_profiles() -> None:
    device = GpuStub(limit=8192)
    session = trt.session(device, trt.fake(device), DYNAMIC)
    info = session.info()
    assert [p["index"] for p in info["profiles"]] == [1, 2]
    assert any("profiles [0] are off, they need 16384 bytes" in text for text in info["warnings"])
    binding = session.prepare({"P": 16})
    binding.write("x", np.ones((16, 4), np.float32))
    binding.run()
    assert (binding.read("y") == 2).all()
    with pytest.raises(DeviceMemoryError, match=r"needs 16384 bytes.*Split the call"):
        session.prepare({"P": 17})
    assert session.prepare({"P": 16}) is binding


def test_out_of_memory_for_all_profiles_is_refused_and_others_live() -> None:
    device = GpuStub(limit=3000)
    first = trt.session(device, trt.fake(device))
    binding = first.prepare()
    binding.write("x", ONES)
    for _ in range(4):
        binding.run()
    fake = trt.fake(device, dynamic=trt.dynamic(scratch=[9000, 8000, 7000]))
    with pytest.raises(DeviceMemoryError, match="no 7000 bytes"):
        trt.session(device, fake, DYNAMIC)
    gc.collect()
    assert fake.ops[-2:] == ["free engine", "free runtime"]
    for _ in range(5):
        binding.run()
        assert (binding.read("y") == 2).all()


def test_out_of_memory_for_buffers_drops_the_ones_that_are_only_kept() -> None:
    device = GpuStub()
    session = trt.session(device, trt.fake(device), DYNAMIC)
    session.prepare({"P": 64}).run()
    session.prepare({"P": 1}).run()
    device.limit = device.used + 100
    contexts = session.info()["contexts"]
    binding = session.prepare({"P": 60})
    assert (contexts, session.info()["contexts"]) == (2, 0)
    binding.write("x", np.ones((60, 4), np.float32))
    binding.run()
    assert (binding.read("y") == 2).all()
    assert any("kept bindings were dropped" in text for text in session.info()["warnings"])
    device.limit = device.used
    with pytest.raises(DeviceMemoryError):
        session.prepare({"P": 64})


def test_a_thousand_runs_do_not_grow() -> None:
    device = GpuStub()
    fake = trt.fake(device)
    session = trt.session(device, fake, DYNAMIC)
    session.max_bindings = 3
    used = set()
    for count in range(1000):
        binding = session.prepare({"P": 1 + count % 3})
        binding.run()
        device.calls.clear()
        if count > 20:
            used.add(device.used)
    assert len(used) == 1
    assert fake.ops.count("context") == 3


class Owner:
    """Anything that needs scratch memory."""


def test_the_pool_is_as_large_as_the_hungriest() -> None:
    device = GpuStub()
    pool = scratch_pool(device)
    assert scratch_pool(device) is pool
    assert scratch_pool(GpuStub()) is not pool
    small, large = Owner(), Owner()
    pool.reserve(small, 100)
    pool.reserve(large, 5000)
    assert (pool.nbytes, pool.users) == (5000, 2)
    assert pool.pointer % 256 == 0
    generation = pool.generation
    pool.reserve(small, 4000)
    pool.release(small)
    assert pool.generation == generation
    del large
    gc.collect()
    assert pool.users == 0, "an owner that is gone counts no more"
    pool.release(small)
    assert (pool.nbytes, pool.pointer, device.used) == (0, 0, 0)


def test_growing_waits_for_the_device_and_never_happens_in_a_capture() -> None:
    device = GpuStub()
    pool, owner = ScratchPool(device), Owner()
    pool.reserve(owner, 100)
    device.calls.clear()
    pool.reserve(owner, 9000)
    assert device.ops == ["synchronize", "empty"]
    with pytest.raises(DeviceError, match="being recorded"):
        device.capture(lambda: pool.reserve(owner, 20000))
    assert pool.nbytes == 9000


def test_growing_on_a_nearly_full_device() -> None:
    device = GpuStub(limit=6000)
    pool, owner = ScratchPool(device), Owner()
    pool.reserve(owner, 3000)
    pool.reserve(owner, 5000)  # both blocks at once would be too much
    assert pool.nbytes == 5000
    with pytest.raises(DeviceMemoryError, match="no 7000 bytes"):
        pool.reserve(owner, 7000)
    assert pool.nbytes == 5000, "as before"
    del device, pool


def test_sessions_and_pools_do_not_keep_a_device_alive() -> None:
    device = GpuStub()
    session = trt.session(device, trt.fake(device), OPEN)
    session.prepare().run()
    session.close()
    assert device.used <= 8 * 4 + 4 * 8 + 64, "at most the buffers of a binding somebody still holds"
    del session
    gc.collect()
    assert device.used == 0
