"""ONNX Runtime on a GPU, without one: options, bindings by address, order of calls, CUDA graphs, clean-up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import ContractError, DeviceError, DeviceMemoryError
from pixano_edge.engine.runtime import OrtSession, open_session
from pixano_edge.engine.runtime.ort_graphs import EAGER, GraphNumbers
from tests.engine.runtime.graphs import spec
from tests.support.fake_ort import CUDA, FakeOrt, OrtGpu

ONES = np.ones((2, 4), np.float32)


class Box:
    """A GPU with ONNX Runtime whose one graph doubles its input."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, graph: GraphSpec, **device: Any) -> None:
        self.device = OrtGpu(**device)
        self.graph = graph
        source, target = graph.inputs[0].name, graph.outputs[0].name
        self.ort = FakeOrt(graph, self.device, lambda inputs: {target: inputs[source] * 2})
        self.path = folder / f"{graph.name}.onnx"
        self.path.write_bytes(b"graph")
        monkeypatch.setitem(sys.modules, "onnxruntime", self.ort)

    def open(self, **options: Any) -> OrtSession:
        session = open_session(self.path, self.graph, self.device, options=options)
        assert isinstance(session, OrtSession)
        return session

    @property
    def options(self) -> dict[str, str]:
        return self.ort.sessions[-1].asked[CUDA]

    @property
    def runs(self) -> list[int]:
        """Graph number of each run."""
        return [call[1] for call in self.device.calls if call[0] == "run"]


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    return Box(tmp_path, monkeypatch, spec())


# --- options ---------------------------------------------------------------------------------------------------


def test_options_of_the_cuda_provider(box: Box) -> None:
    box.open()
    assert box.options == {
        "device_id": "0",
        "has_user_compute_stream": "1",
        "user_compute_stream": str(box.device.stream),
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "do_copy_in_default_stream": "1",
        "use_tf32": "0",
        "enable_cuda_graph": "0",
    }
    session_options = box.ort.sessions[-1].options
    assert session_options.intra_op_num_threads == 1
    assert not session_options.enable_mem_pattern


def test_options_follow_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(tmp_path, monkeypatch, spec(), index=1)
    box.open(memory_limit=1 << 30, tf32=True, cuda_graph=True, provider_options={"cudnn_conv_algo_search": "DEFAULT"})
    assert box.options["device_id"] == "1"
    assert box.options["gpu_mem_limit"] == str(1 << 30)
    assert (box.options["use_tf32"], box.options["enable_cuda_graph"]) == ("1", "1")
    assert box.options["cudnn_conv_algo_search"] == "DEFAULT", "what the caller says wins"


def test_the_default_stream_is_refused(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OrtGpu, "stream", property(lambda self: 0))
    with pytest.raises(DeviceError, match="no stream of its own"):
        box.open()
    assert not box.ort.sessions


@pytest.mark.parametrize("options", [{"memory_limit": 0}, {"max_graphs": 0}, {"precision": "int7"}])
def test_bad_values(box: Box, options: dict[str, Any]) -> None:
    with pytest.raises(DeviceError, match=r"Option '|Unknown precision"):
        box.open(**options)


# --- bindings --------------------------------------------------------------------------------------------------


def test_bound_once_by_address_on_the_right_device(box: Box) -> None:
    session = box.open()
    binding = session.prepare({"P": 2})
    for value in (1, 2, 3):
        binding.write("x", ONES * value)
        binding.run()
        assert (binding.read("y") == 2 * value).all()
    bound = [call for call in box.device.calls if call[0].startswith("bind")]
    assert bound == [
        ("bind_input", "x", "cuda", 0, "float32", (2, 4), binding.inputs["x"].pointer),
        ("bind_output", "y", "cuda", 0, "float32", (2, 4), binding.outputs["y"].pointer),
    ]


def test_the_second_gpu_is_named_in_bindings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(tmp_path, monkeypatch, spec(), index=1)
    box.open().prepare({"P": 1})
    assert {call[3] for call in box.device.calls if call[0].startswith("bind")} == {1}


def test_a_run_only_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(tmp_path, monkeypatch, spec(), deferred=True)
    binding = box.open().prepare({"P": 2})
    box.device.calls.clear()
    binding.write("x", ONES)
    binding.run()
    binding.run()
    # No wait of ours; ONNX Runtime waits by itself, and so frees what its kernels read on the host.
    assert [c[0] for c in box.device.calls] == ["copy", "run", "launch", "run", "launch"]
    assert [c[2] for c in box.device.calls if c[0] == "run"] == [None, None]
    box.device.calls.clear()
    box.device.capture(binding.run)  # a wait would end the recording
    assert [c[2] for c in box.device.calls if c[0] == "run"] == ["1"]
    assert (binding.read("y") == 2).all()


def test_an_output_is_the_next_graphs_input_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(tmp_path, monkeypatch, spec("chained", dims=(2, 4)))
    first, second = box.open().prepare(), box.open().prepare(borrowed=("x",))
    second.bind("x", first.outputs["y"])
    box.device.calls.clear()
    first.write("x", ONES)
    first.run()
    second.run()
    assert (second.read("y") == 4).all()
    assert box.device.ops.count("copy") == 1, "the upload alone"


def test_released_and_refused_buffers(box: Box) -> None:
    session = box.open()
    binding = session.prepare({"P": 2}, borrowed=("x",))
    binding.bind("x", box.device.empty((2, 4), np.float32))
    binding.run()
    binding.release("x")
    with pytest.raises(ContractError, match="no memory"):
        binding.run()
    with pytest.raises(ContractError, match="lives on cuda:1"):
        binding.bind("x", OrtGpu(1).empty((2, 4), np.float32))


def test_an_input_read_on_the_cpu_is_refused(box: Box) -> None:
    """ONNX Runtime copies it when it is bound, and never again."""
    box.ort.places["x"] = "Cpu"
    with pytest.raises(DeviceError, match=r"reads \['x'\] on the CPU"):
        box.open()
    box.ort.places = {"y": "Cpu"}
    session = box.open()
    assert any("outputs ['y'] come from the CPU" in w for w in session.info()["warnings"])
    assert not session.capturable


# --- CUDA graphs -----------------------------------------------------------------------------------------------


def test_own_buffers_are_captured_at_the_second_run(box: Box) -> None:
    session = box.open(cuda_graph=True)
    assert session.self_recording
    assert not session.capturable
    two, three = session.prepare({"P": 2}), session.prepare({"P": 3})
    for _ in range(3):
        two.run()
        three.run()
    assert box.runs == [EAGER, EAGER, 1, 2, 1, 2], "a shape is a binding, and has a graph of its own"
    assert session.info()["graphs"] == 2


def test_another_address_never_replays_a_stale_graph(box: Box) -> None:
    session = box.open(cuda_graph=True)
    binding = session.prepare({"P": 2}, borrowed=("x",))
    buffers = {value: box.device.empty((2, 4), np.float32) for value in (1, 5, 7)}
    for value, buffer in buffers.items():
        box.device.memory(buffer)[:] = value
    for value in (1, 1, 1, 5, 1, 5, 5, 7, 1):
        binding.bind("x", buffers[value])
        binding.run()
        assert (binding.read("y") == 2 * value).all()
        binding.release("x")
    assert box.runs == [EAGER, 1, 1, EAGER, 1, 2, 2, EAGER, 1]


def test_control_the_fake_replays_old_addresses(box: Box) -> None:
    """So the test above would fail if a number were used for other addresses."""
    session = box.open(cuda_graph=True)
    session._graphs = type("One", (), {"number": lambda self, state: 1, "refused": 0})()  # type: ignore[assignment]
    binding = session.prepare({"P": 2}, borrowed=("x",))
    for value in (1, 5):
        buffer = box.device.empty((2, 4), np.float32)
        box.device.memory(buffer)[:] = value
        binding.bind("x", buffer)
        binding.run()
    assert (binding.read("y") == 2).all()


def test_graphs_are_limited_and_said_so(box: Box) -> None:
    session = box.open(cuda_graph=True, max_graphs=1)
    for size in (1, 2):
        binding = session.prepare({"P": size})
        for _ in range(3):
            binding.run()
    assert box.runs == [EAGER, 1, 1, EAGER, EAGER, EAGER]
    assert any("2 runs without a CUDA graph" in w for w in session.info()["warnings"])


def test_no_graph_of_its_own_inside_a_recording(box: Box) -> None:
    session = box.open(cuda_graph=True)
    binding = session.prepare({"P": 2})
    binding.run()
    box.device.capture(binding.run)
    assert box.runs == [EAGER, EAGER]


def test_without_the_option_models_record_the_session(box: Box) -> None:
    session = box.open()
    assert session.capturable
    assert not session.self_recording
    binding = session.prepare({"P": 2})
    binding.write("x", ONES)
    binding.run()
    graph = box.device.capture(binding.run)
    binding.write("x", ONES * 4)
    graph.replay()
    assert (binding.read("y") == 8).all()


def test_nodes_on_the_cpu_forbid_recording(box: Box) -> None:
    """A recording would hold what they computed when it was made."""
    box.ort.placement = [(CUDA, ["Shape", "MatMul"]), ("CPUExecutionProvider", ["Gather", "Concat"])]
    assert not box.open().capturable


def test_graph_numbers_are_never_reused() -> None:
    numbers = GraphNumbers(2)
    assert [numbers.number(s) for s in "aabbccaabb"] == [EAGER, 1, EAGER, 2, EAGER, EAGER, 1, 1, 2, 2]
    for state in range(200):
        assert numbers.number(state) == EAGER
    assert len(numbers._seen) <= 64
    assert len(numbers) == 2
    assert numbers.number("a") == 1


# --- errors ----------------------------------------------------------------------------------------------------


def test_failing_runs_and_memory(box: Box) -> None:
    binding = box.open().prepare({"P": 1})
    box.ort.run_error = box.ort.capi.onnxruntime_pybind11_state.RuntimeException("CUDA failure 700")
    with pytest.raises(DeviceError, match="'twice' failed in CUDAExecutionProvider: CUDA failure 700"):
        binding.run()
    box.ort.run_error = RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 99")
    with pytest.raises(DeviceMemoryError, match="requested buffer"):
        binding.run()
    box.ort.run_error = None
    binding.run()
    box.ort.load_error = RuntimeError("CUDA failure 2: out of memory")
    with pytest.raises(DeviceMemoryError):
        box.open()


def test_closing_waits_for_queued_work(box: Box) -> None:
    session = box.open()
    binding = session.prepare({"P": 1})
    binding.run()
    box.device.calls.clear()
    session.close()
    session.close()
    assert box.device.ops == ["synchronize"]
    with pytest.raises(DeviceError, match="closed"):
        binding.run()


def test_memory_counts_weights_beside_the_graph(box: Box) -> None:
    (box.path.parent / "twice.data").write_bytes(b"w" * 100)
    assert box.open().memory().weights == 105


def test_profile(box: Box, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="not being profiled"):
        box.open().end_profile()
    session = box.open(profile=str(tmp_path / "p"))
    assert box.ort.sessions[-1].options.enable_profiling
    assert session.end_profile() == tmp_path / "p.json"
