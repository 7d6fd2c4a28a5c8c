"""TensorRT sessions against a recording TensorRT: order of calls, profiles, contracts, errors, clean-up."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.engine.errors import BundleError, ContractError, DeviceError, DeviceMemoryError
from pixano_edge.engine.runtime import CpuDevice, open_session
from pixano_edge.engine.runtime.base import Buffer
from pixano_edge.engine.runtime.tensorrt import TrtSession
from pixano_edge.engine.runtime.tensorrt_api import TensorRt
from pixano_edge.engine.runtime.tensorrt_binding import TrtBinding
from tests.engine.runtime import trt
from tests.engine.runtime.trt import DYNAMIC, DYNAMIC_SPEC, FIXED, FIXED_SPEC, OPEN
from tests.support.gpu_stub import GpuStub

ONES = np.ones((2, 4), np.float32)


def binding_of(session: TrtSession, sizes: dict[str, int] | None = None, **borrowed: Any) -> TrtBinding:
    binding = session.prepare(sizes, **borrowed)
    assert isinstance(binding, TrtBinding)
    return binding


def test_everything_is_told_once_and_a_run_is_one_launch() -> None:
    device = GpuStub(captures=False)
    fake = trt.fake(device)
    binding = binding_of(trt.session(device, fake))
    assert fake.ops == ["load", "context"]
    fake.calls.clear()
    for value in (1, 2, 3):
        binding.write("x", ONES * value)
        binding.run()
        assert (binding.read("y") == 2 * value).all()
    x, y = binding.inputs["x"].pointer, binding.outputs["y"].pointer
    pool = next(call for call in fake.calls if call[0] == "scratch")
    assert fake.calls == [
        ("profile", 1, 0),
        pool,
        ("shape", 1, "x", (2, 4)),
        ("address", 1, "x", x),
        ("address", 1, "y", y),
        ("enqueue", 1),
        ("enqueue", 1),
        ("enqueue", 1),
    ]
    assert device.ops.count("empty") == 3, "scratch, x and y: nothing is allocated in a run"


def test_a_borrowed_buffer_tells_its_address_alone() -> None:
    device = GpuStub(captures=False)
    fake = trt.fake(device)
    binding = binding_of(trt.session(device, fake), borrowed=["x"])
    first, second = (device.empty((2, 4), np.float32) for _ in range(2))
    for buffer, value in ((first, 1), (second, 2), (second, 2), (first, 1)):
        device.memory(buffer)[:] = value
        binding.bind("x", buffer)
        binding.run()
        assert (binding.read("y") == 2 * value).all()
        binding.release("x")
    assert [call[3] for call in fake.calls if call[0] == "address" and call[2] == "x"] == [
        first.pointer,
        second.pointer,
        first.pointer,
    ]
    with pytest.raises(ContractError, match=r"no memory.*x"):
        binding.run()


def test_two_engines_chain_on_the_device_and_share_scratch_memory() -> None:
    device = GpuStub(captures=False, deferred=True)
    fake = trt.fake(device, fixed=trt.fixed(scratch=[3000]))
    first, second = trt.session(device, fake), trt.session(device, fake, DYNAMIC)
    a, b = binding_of(first), binding_of(second, {"P": 2}, borrowed=["x"])
    b.bind("x", a.outputs["y"])
    device.calls.clear()
    a.write("x", ONES)
    a.run()
    b.run()
    assert device.ops == ["copy", "launch", "launch"]
    assert (b.read("y") == 4).all()
    told = [call[2:] for call in fake.calls if call[0] == "scratch"]
    assert len(set(told)) == 1
    assert told[0][1] >= 16384


def test_the_tightest_profile_that_fits() -> None:
    device = GpuStub(captures=False)
    fake = trt.fake(device)
    session = trt.session(device, fake, DYNAMIC)
    for size, index in ((1, 1), (4, 1), (5, 2), (16, 2), (17, 0), (64, 0)):
        binding = binding_of(session, {"P": size})
        assert binding.profile.index == index, size
        binding.write("x", np.full((size, 4), size, np.float32))
        binding.run()
        assert (binding.read("y") == 2 * size).all()
    chosen = [call[2] for call in fake.calls if call[0] == "profile"]
    assert chosen == [1, 1, 2, 2, 0, 0], "one context per binding, each told its profile once"
    assert session.info()["contexts"] == 6


def test_of_equal_profiles_the_one_tuned_closest() -> None:
    device = GpuStub()
    profiles = [trt.profile(1, 16, 16), trt.profile(1, 2, 16)]
    plan = trt.dynamic(profiles=profiles, scratch=[1, 1])
    session = trt.session(device, trt.fake(device, dynamic=plan), DYNAMIC)
    assert [binding_of(session, {"P": size}).profile.index for size in (1, 16)] == [1, 0]


def test_no_profile_takes_the_sizes() -> None:
    device = GpuStub()
    plan = trt.dynamic(profiles=[trt.profile(1, 2, 8)], scratch=[1024])
    session = trt.session(device, trt.fake(device, dynamic=plan), DYNAMIC)
    assert "built for less than the contract" in session.info()["warnings"][0]
    with pytest.raises(DeviceError, match=r"No profile.*\(9, 4\).*pixano-edge build"):
        session.prepare({"P": 9})
    other = trt.dynamic(profiles=[trt.profile(3, 3, 3)], scratch=[1])
    with pytest.raises(ContractError, match="typical"):
        trt.session(device, trt.fake(device, dynamic=other), DYNAMIC)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": {"z": ("FLOAT", (2, 4))}}, "input 'x' is missing.*'z' is not in the contract"),
        ({"inputs": {"x": ("HALF", (2, 4))}}, "'x' is float16 instead of float32"),
        ({"inputs": {"x": ("BF16", (2, 4))}}, "'x' is BF16 instead of float32"),
        ({"outputs": {"y": ("FLOAT", (2, 5))}}, "'y' has 5 instead of 4 in dimension 1"),
        ({"outputs": {"y": ("FLOAT", (8,))}}, "'y' has rank 1"),
    ],
)
def test_an_engine_that_is_not_the_contract(changes: dict[str, Any], message: str) -> None:
    device = GpuStub()
    fake = trt.fake(device, fixed=trt.fixed(**changes))
    with pytest.raises(ContractError, match=message):
        trt.session(device, fake)
    gc.collect()
    assert {"free engine", "free runtime"} <= set(fake.ops)
    assert device.used == 0


def test_an_engine_whose_tensor_is_on_the_host() -> None:
    device = GpuStub()
    with pytest.raises(DeviceError, match="'x' is read on the host"):
        trt.session(device, trt.fake(device, fixed=trt.fixed(location="HOST")))


def test_output_shapes_are_checked_before_the_first_run() -> None:
    device = GpuStub()
    spec = GraphSpec("dynamic", DYNAMIC_SPEC.inputs, (TensorSpec("y", "float32", (2, 4)),), DYNAMIC_SPEC.ranges)
    fake = trt.fake(device, dynamic=trt.dynamic(outputs={"y": ("FLOAT", (-1, 4))}))
    session = TrtSession(DYNAMIC, spec, device, api=TensorRt(fake, "tensorrt"))
    with pytest.raises(ContractError, match=r"'y' is \[3, 4\] instead of \[2, 4\]"):
        session.prepare({"P": 3}).run()
    binding = session.prepare({"P": 2})
    binding.write("x", ONES)
    binding.run()
    assert (binding.read("y") == 2).all(), "the session lives on"


def test_data_dependent_output() -> None:
    device = GpuStub()
    fake = trt.fake(device)
    session = trt.session(device, fake, OPEN)
    binding = binding_of(session)
    assert binding.outputs["found"].shape == (4, 1), "the contract's maximum"
    with pytest.raises(ContractError, match="no size before"):
        binding.result("found")
    for hits in ([1, 5], [], [0, 2, 3, 4, 5, 7], [6]):
        x = np.zeros(8, np.float32)
        x[hits] = 1
        binding.write("x", x)
        binding.run()
        found = binding.read("found")
        assert found.dtype == np.int64
        assert found.tolist() == [[hit] for hit in hits]
        result = binding.result("found")
        assert result.shape == (len(hits), 1)
        assert device.at(result.pointer, result.nbytes).view(np.int64).tolist() == hits
    assert device.ops.count("empty") == 4, "scratch, x, found and once more for the six"
    assert "capture" not in device.ops
    assert session.info()["graphs"] == "off"
    with pytest.raises(DeviceError, match="depends on data"):
        trt.session(device, fake, OPEN, graphs=True)


def test_no_memory_for_a_data_dependent_output() -> None:
    device = GpuStub()
    session = trt.session(device, trt.fake(device), OPEN)
    binding = binding_of(session)
    binding.write("x", np.ones(8, np.float32))
    device.limit = device.used
    with pytest.raises(DeviceMemoryError, match="64 bytes do not fit"):
        binding.run()
    binding.write("x", np.eye(1, 8, dtype=np.float32)[0])
    binding.run()
    assert binding.read("found").tolist() == [[0]]


def test_an_open_size_needs_a_range() -> None:
    device = GpuStub()
    spec = GraphSpec("open", trt.OPEN_SPEC.inputs, trt.OPEN_SPEC.outputs)
    with pytest.raises(ContractError, match=r"\['K'\].*range"):
        TrtSession(OPEN, spec, device, api=TensorRt(trt.fake(device), "tensorrt"))


@pytest.mark.parametrize("step", ["load", "context"])
def test_tensorrt_says_why_and_nothing_is_left(step: str) -> None:
    device = GpuStub()
    fake = trt.fake(device, fixed=trt.fixed(fail={step: "Cuda Runtime (invalid resource handle)"}))
    with pytest.raises(DeviceError, match=r"'fixed': UNSPECIFIED_ERROR: Cuda Runtime \(invalid resource handle\)"):
        trt.session(device, fake)
    gc.collect()
    assert device.used == 0
    assert [call for call in fake.calls if call[0] == "free engine"] == ([] if step == "load" else [("free engine", 0)])
    assert fake.ops[-1] == "free runtime"


def test_a_failed_run_leaves_the_session_usable() -> None:
    device = GpuStub()
    plan = trt.fixed()
    session = trt.session(device, trt.fake(device, fixed=plan))
    binding = session.prepare()
    binding.write("x", ONES)
    plan.fail["enqueue"] = "Error Code 2: OutOfMemory (out of memory)"
    with pytest.raises(DeviceMemoryError, match="OutOfMemory"):
        binding.run()
    plan.fail.clear()
    binding.run()
    assert (binding.read("y") == 2).all()


def test_close_frees_graph_contexts_engine_in_this_order() -> None:
    device = GpuStub()
    fake = trt.fake(device)
    session = trt.session(device, fake)
    binding = session.prepare()
    binding.write("x", ONES)
    for _ in range(5):
        binding.run()
    device.calls.clear()
    fake.calls.clear()
    session.close()
    assert device.ops == ["synchronize", "close graph"]
    assert fake.calls == [("free context", 1), ("free engine", 0), ("free runtime",)]
    session.close()
    with pytest.raises(DeviceError, match="closed"):
        binding.run()
    with pytest.raises(DeviceError, match="closed"):
        session.prepare()
    del binding
    gc.collect()
    assert device.used == 0


def test_dropped_bindings_free_their_contexts_even_when_somebody_holds_them() -> None:
    device = GpuStub(deferred=True)
    fake = trt.fake(device)
    session = trt.session(device, fake, DYNAMIC)
    session.max_bindings = 2
    held = []
    for size in (1, 2, 3, 4):
        held.append(session.prepare({"P": size}))
        assert device.pending == (1 if size == 2 else 0), "queued work is waited for before its context goes"
        held[-1].write("x", np.ones((size, 4), np.float32))
        device.finish()
        held[-1].run()
    assert fake.ops.count("context") == 4
    assert fake.ops.count("free context") == 2
    assert session.info()["contexts"] == 2
    assert (held[0].read("y") == 2).all()
    held[0].run()
    assert (held[0].read("y") == 2).all(), "it gets another context"
    assert fake.ops.count("context") == 5
    session.close()
    assert fake.ops.count("free context") == 5, "dropped ones too"


def test_an_owner_who_is_done_takes_its_bindings_and_their_contexts_along() -> None:
    device = GpuStub(deferred=True)
    fake = trt.fake(device)
    session = trt.session(device, fake, DYNAMIC)
    owners = object(), object()
    bindings = [session.prepare({"P": 1}, owner=owner) for owner in owners]
    for binding in bindings:
        binding.write("x", np.ones((1, 4), np.float32))
        binding.run()
    session.drop(owners[0])
    assert device.pending == 0, "queued work is waited for before its context goes"
    assert fake.ops.count("free context") == 1
    assert session.prepare({"P": 1}, owner=owners[1]) is bindings[1]
    assert session.prepare({"P": 1}, owner=owners[0]) is not bindings[0]
    session.close()


def test_refusals_before_anything_is_loaded() -> None:
    fake = trt.fake(GpuStub())
    api = TensorRt(fake, "tensorrt")
    with pytest.raises(DeviceError, match="needs a CUDA device"):
        TrtSession(FIXED, FIXED_SPEC, CpuDevice(), api=api)
    with pytest.raises(DeviceError, match=r"no options \['precision'\]"):
        TrtSession(FIXED, FIXED_SPEC, fake.device, api=api, options={"precision": "fp16"})
    with pytest.raises(DeviceError, match=r"built with tensorrt 10\.3\.0, installed is 10\.16\.1\.2"):
        TrtSession(FIXED, FIXED_SPEC, fake.device, api=api, metadata={"version": "10.3.0"})
    assert fake.calls == []
    flags = {"version": "10.3.0", "flags": ["version_compatible"]}
    TrtSession(FIXED, FIXED_SPEC, fake.device, api=api, metadata=flags)
    assert fake.calls[0] == ("load", True)


def test_misaligned_memory_is_refused() -> None:
    device = GpuStub()
    binding = trt.session(device, trt.fake(device)).prepare(borrowed=["x"])
    held = device.empty((100,), np.float32)
    with pytest.raises(ContractError, match=r"256 bytes; 'x' starts 64"):
        binding.bind("x", Buffer(device, (2, 4), np.dtype(np.float32), held.pointer + 64, owner=held))


def test_runs_of_several_threads_follow_one_another() -> None:
    device = GpuStub()
    fake = trt.fake(device)
    session = trt.session(device, fake, DYNAMIC)
    wrong: list[int] = []

    def work(size: int) -> None:
        for value in range(20):
            with session.lock:
                binding = session.prepare({"P": size})
                binding.write("x", np.full((size, 4), value, np.float32))
                binding.run()
                if not (binding.read("y") == 2 * value).all():
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=(size,)) for size in (1, 2, 8, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert session.runs == 80


def test_info_is_json_and_tells_memory() -> None:
    device = GpuStub()
    session = trt.session(device, trt.fake(device), DYNAMIC)
    session.prepare({"P": 2}).run()
    info = json.loads(json.dumps(session.info()))
    assert info["backend"] == info["provider"] == "tensorrt"
    assert (info["weight_bytes"], info["scratch_bytes"]) == (4096, 16384)
    assert [p["scratch_bytes"] for p in info["profiles"]] == [16384, 1024, 4096]
    assert info["warnings"] == ["this plan was built elsewhere"]
    use = session.memory()
    assert (use.weights, use.shared, use.activations) == (4096, 16384, None)


def test_open_session_reads_engine_files_only(tmp_path: Path) -> None:
    device = GpuStub()
    with pytest.raises(BundleError, match="does not exist"):
        open_session(tmp_path / "a.engine", FIXED_SPEC, device, backend="tensorrt")
    (tmp_path / "b.engine").write_bytes(b"ftrt" * 40)
    with pytest.raises(BundleError, match="not an engine file"):
        open_session(tmp_path / "b.engine", FIXED_SPEC, device, backend="tensorrt")
