"""Which execution provider runs, what it is given, and when a session is refused because it does not."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.engine.errors import ContractError, DeviceError, MissingDependencyError
from pixano_edge.engine.runtime import CpuDevice, OrtSession, open_session
from pixano_edge.engine.runtime import ort_providers as module
from pixano_edge.engine.runtime.ort_cache import profile_shapes
from pixano_edge.engine.runtime.ort_options import INT32_BIASES
from pixano_edge.engine.runtime.ort_placement import Placement, check_placement, read_profile
from pixano_edge.engine.runtime.ort_providers import BACKENDS, PROVIDERS, find_provider
from tests.engine.runtime.graphs import quantised_convolution, save, spec, twice
from tests.support.fake_ort import CPU, CUDA, OPENVINO, RTX, TRT, FakeOrt, OrtGpu, ep_device

GRAPH = GraphSpec(
    "decoder",
    (TensorSpec("points", "float32", ("P", "N", 2)), TensorSpec("features", "float32", (1, 4))),
    (TensorSpec("masks", "float32", ("P", 4)),),
    {"P": (1, 2, 64), "N": (1, 3, 16)},
)


class Box:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, tells: bool = True) -> None:
        self.device = OrtGpu()
        self.ort = FakeOrt(GRAPH, self.device, lambda inputs: {}, tells)
        self.path = folder / "decoder.onnx"
        self.path.write_bytes(b"graph")
        self.cache = folder / "cache"
        monkeypatch.setitem(sys.modules, "onnxruntime", self.ort)
        monkeypatch.setattr(module, "tensorrt_version", lambda: "libnvinfer.so.10=101600")

    def open(self, backend: str = "onnxruntime", device: Any = None, **options: Any) -> OrtSession:
        session = open_session(
            self.path, GRAPH, device or self.device, backend=backend, options={"cache_dir": self.cache, **options}
        )
        assert isinstance(session, OrtSession)
        return session

    def plugin(self, monkeypatch: pytest.MonkeyPatch, ep: str, name: str, *devices: Any) -> None:
        wheel: Any = types.ModuleType(name)
        wheel.get_library_path, wheel.__version__ = lambda: f"/lib/{name}.so", "0.5.0"
        monkeypatch.setitem(sys.modules, name, wheel)
        self.ort.plugins[ep] = list(devices)


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    return Box(tmp_path, monkeypatch)


def test_names() -> None:
    cpu, gpu = CpuDevice(), OrtGpu()
    assert find_provider(None, cpu).ep == CPU
    assert find_provider(None, gpu).ep == CUDA
    assert find_provider("tensorrt", gpu).ep == find_provider(TRT, gpu).ep == TRT
    assert set(filter(None, BACKENDS.values())) <= {p.name for p in PROVIDERS}
    with pytest.raises(DeviceError, match="Provider 'tensorrt' runs on cuda, not on 'cpu'"):
        find_provider("tensorrt", cpu)
    with pytest.raises(DeviceError, match=r"Unknown provider 'trt'"):
        find_provider("trt", gpu)
    assert find_provider("MyExecutionProvider", cpu).kinds == ()


def test_a_back_end_name_is_a_provider(box: Box) -> None:
    assert box.open("onnxruntime-tensorrt").info()["provider"] == TRT
    with pytest.raises(DeviceError, match="is not provider 'cuda'"):
        box.open("onnxruntime-tensorrt", provider="cuda")


def test_options_of_other_providers_are_refused(box: Box) -> None:
    with pytest.raises(DeviceError, match="'cuda_graph' is for the provider cuda, not for tensorrt"):
        box.open(provider="tensorrt", cuda_graph=True)
    with pytest.raises(DeviceError, match="'precision' is for the provider openvino, not for cuda"):
        box.open(precision="fp16")


# --- does it run? ----------------------------------------------------------------------------------------------


def test_not_compiled_in_and_not_loaded(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.ort.loaded = [CPU]

    def preload(directory: str) -> None:
        sys.stdout.write("Failed to load libcublasLt.so.13: libcublasLt.so.13: cannot open shared object file\n")

    monkeypatch.setattr(box.ort, "preload_dlls", preload)
    with pytest.raises(DeviceError, match=r"fell back to CPUExec.* \(not found: libcublasLt.so.13\)"):
        box.open()
    box.ort.compiled = [CPU]
    with pytest.raises(DeviceError, match="no CUDAExecutionProvider, only"):
        box.open()


def test_libraries_from_wheels_are_loaded_before_the_session(box: Box) -> None:
    box.open()
    assert box.device.ops.index("preload_dlls") < box.device.ops.index("open")


def test_nodes_are_counted_per_provider(box: Box) -> None:
    box.ort.placement = [(CUDA, ["MatMul", "MatMul", "Softmax"]), (CPU, ["Gather", "Concat"]), (CUDA, ["Add"])]
    info = box.open().info()
    assert info["nodes"] == {CUDA: 4, CPU: 2}
    assert info["warnings"] == ["2 nodes that compute shapes run on the CPU, on a few integers each"]


def test_cpu_work_is_refused_unless_allowed(box: Box) -> None:
    box.ort.placement = [(CUDA, ["MatMul"]), (CPU, ["Gather", "NonMaxSuppression", "NonMaxSuppression"])]
    with pytest.raises(DeviceError, match=r"2 nodes .* on the CPU instead of CUDA.*\{'NonMaxSuppression': 2\}") as got:
        box.open()
    assert "allow_cpu_nodes" in got.value.action
    session = box.open(allow_cpu_nodes=True)
    assert "2 nodes run on the CPU and copy tensors" in session.info()["warnings"][0]
    assert not session.capturable


def test_copies_between_host_and_device_count_as_work(box: Box) -> None:
    box.ort.placement = [(CUDA, ["MatMul"]), (CPU, ["MemcpyToHost"])]
    with pytest.raises(DeviceError, match="MemcpyToHost"):
        box.open()


def test_a_provider_without_nodes_is_refused_even_then(box: Box) -> None:
    box.ort.placement = [(CPU, ["Shape", "Gather"])]
    with pytest.raises(DeviceError, match=r"CUDAExecutionProvider runs no node .*'CPUExecutionProvider': 2"):
        box.open(allow_cpu_nodes=True)


def test_an_onnxruntime_that_cannot_tell_is_told_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(tmp_path, monkeypatch, tells=False)
    session = box.open()
    assert box.ort.sessions[-1].options.entries["session.disable_cpu_ep_fallback"] == "1"
    assert session.info()["nodes"] is None
    assert not session.capturable
    session = box.open(allow_cpu_nodes=True)
    assert "session.disable_cpu_ep_fallback" not in box.ort.sessions[-1].options.entries
    assert "cannot tell" in session.info()["warnings"][0]


def test_placement_of_a_real_session(tmp_path: Path) -> None:
    """The real API, on the provider that is there: whatever is not the CPU would have no node."""
    import onnxruntime

    from pixano_edge.engine.runtime.ort_placement import RECORD, read_placement, tells_placement

    path, _ = twice(tmp_path)
    assert tells_placement(onnxruntime)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*RECORD)
    session = onnxruntime.InferenceSession(str(path), options, providers=[CPU])
    placement = read_placement(session)
    assert placement.nodes == {CPU: {"Add": 1, "Relu": 1}}
    assert (placement.cpu_work, placement.cpu_shapes) == ({"Relu": 1}, 1)
    with pytest.raises(DeviceError, match="CUDAExecutionProvider runs no node"):
        check_placement(placement, CUDA, "g", allow_cpu_nodes=True)


def test_a_gpu_leaves_an_optimiser_out_and_does_not_chat(box: Box) -> None:
    box.open()
    assert box.ort.sessions[-1].disabled == [INT32_BIASES]
    assert box.ort.severity == 4


def test_quantised_convolutions_keep_their_bias_in_float_on_a_gpu(tmp_path: Path) -> None:
    """The real optimiser makes it int32, which CUDA does not read."""
    import onnx
    import onnxruntime

    path, _ = quantised_convolution(tmp_path)
    read = {}
    for name, disabled in (("stock", []), ("gpu", [INT32_BIASES])):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(tmp_path / f"{name}.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=[CPU], disabled_optimizers=disabled)
        graph = onnx.load(tmp_path / f"{name}.onnx").graph
        kinds = {i.name: i.data_type for i in graph.initializer}
        read[name] = {kinds.get(n.input[0]) for n in graph.node if n.op_type == "DequantizeLinear"}
    assert onnx.TensorProto.INT32 in read["stock"]
    assert read["gpu"] == {None, onnx.TensorProto.INT8}


def test_strict_mode_of_a_real_session(tmp_path: Path) -> None:
    """The config entry that old versions get does what we say it does."""
    import onnxruntime

    from pixano_edge.engine.runtime.ort_placement import NO_CPU

    path, _ = twice(tmp_path)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*NO_CPU)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="fallback to CPU"):
        onnxruntime.InferenceSession(str(path), options, providers=["AzureExecutionProvider"])


def test_profile_of_a_real_session(tmp_path: Path) -> None:
    graph = spec("profiled", dims=(2, 4))
    nodes = [helper.make_node("Add", ["x", "x"], ["s"]), helper.make_node("Softmax", ["s"], ["y"])]
    path = save(tmp_path / "profiled.onnx", nodes, graph)
    session = open_session(path, graph, CpuDevice(), threads=1, options={"profile": str(tmp_path / "p")})
    assert isinstance(session, OrtSession)
    binding = session.prepare()
    binding.write("x", np.ones((2, 4), np.float32))
    binding.run()
    binding.run()
    assert read_profile(session.end_profile()) == {CPU: {"Add": 2, "Softmax": 2}}
    (tmp_path / "other.json").write_text('{"a": 1}')
    for name in ("none.json", "other.json"):
        with pytest.raises(DeviceError, match="no profile"):
            read_profile(tmp_path / name)


def test_placement_counts_fused_nodes() -> None:
    placement = Placement({TRT: {"MatMul": 30}, CUDA: {"NonZero": 2}, CPU: {"Cast": 1}})
    assert check_placement(placement, TRT, "g", allow_cpu_nodes=False) == [
        "1 nodes that compute shapes run on the CPU, on a few integers each",
        f"2 nodes run on {CUDA}",
    ]


def test_attention_that_cuda_has_in_half_precision_alone_is_named() -> None:
    """As an int8 or fp32 decoder is placed; an operator that is missing for another reason gets no such word."""
    placement = Placement({CUDA: {"MatMul": 30}, CPU: {"GroupQueryAttention": 4}})
    with pytest.raises(DeviceError, match="4 nodes of graph 'decoder' would run on the CPU") as caught:
        check_placement(placement, CUDA, "decoder", allow_cpu_nodes=False)
    assert "GroupQueryAttention in half precision alone" in caught.value.message
    assert "calibrate int8 again" in caught.value.message
    with pytest.raises(DeviceError) as caught:
        check_placement(Placement({CUDA: {"MatMul": 1}, CPU: {"Celu": 1}}), CUDA, "g", allow_cpu_nodes=False)
    assert "half precision" not in caught.value.message


# --- TensorRT --------------------------------------------------------------------------------------------------


def test_profile_shapes_come_from_the_contract() -> None:
    assert profile_shapes(GRAPH) == {"min": "points:1x1x2", "opt": "points:2x3x2", "max": "points:64x16x2"}
    assert profile_shapes(spec("fixed", dims=(2, 4))) == {}
    open_graph = GraphSpec("g", (TensorSpec("x", "float32", ("Q", 4)),), GRAPH.outputs, {})
    with pytest.raises(ContractError, match=r"no range for \['Q'\]"):
        profile_shapes(open_graph)


def test_tensorrt_options(box: Box) -> None:
    session = box.open("onnxruntime-tensorrt", memory_limit=1 << 30)
    asked = box.ort.sessions[-1].asked
    assert list(asked) == [TRT, CUDA], "what TensorRT leaves runs on CUDA"
    trt = asked[TRT]
    folder = Path(trt["trt_engine_cache_path"])
    assert folder.parent == box.cache
    assert trt == {
        "device_id": "0",
        "has_user_compute_stream": "1",
        "user_compute_stream": str(box.device.stream),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_profile_min_shapes": "points:1x1x2",
        "trt_profile_opt_shapes": "points:2x3x2",
        "trt_profile_max_shapes": "points:64x16x2",
        "trt_max_workspace_size": str(1 << 30),
    }
    assert asked[CUDA]["user_compute_stream"] == trt["user_compute_stream"], "one stream for both"
    key = json.loads((folder / "key.json").read_text())
    assert (key["gpu"], key["compute_capability"], key["driver"]) == ("Test GPU", "8.6", "570.1")
    assert "user_compute_stream" not in key["options"]
    assert any("TF32" in w for w in session.info()["warnings"])
    assert not session.capturable


def test_the_engine_folder_changes_with_everything_that_matters(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(device: Any = None, **options: Any) -> str:
        box.open("onnxruntime-tensorrt", device, **options)
        return box.ort.sessions[-1].asked[TRT]["trt_engine_cache_path"]

    first = folder()
    assert folder() == folder(OrtGpu(1)) == first, "not with the stream, nor with the index of an equal GPU"
    seen = {first, folder(OrtGpu(driver="580.2")), folder(provider_options={"trt_builder_optimization_level": "5"})}
    box.path.write_bytes(b"changed")
    seen.add(folder())
    (box.path.parent / "decoder.data").write_bytes(b"weights")
    seen.add(folder())
    monkeypatch.setattr(box.ort, "__version__", "1.33.0")
    seen.add(folder())
    monkeypatch.setattr(module, "tensorrt_version", lambda: "libnvinfer.so.10=101601")
    seen.add(folder())
    assert len(seen) == 7


def test_reduced_precision_is_visible(box: Box) -> None:
    session = box.open("onnxruntime-tensorrt", provider_options={"trt_fp16_enable": "1"})
    assert session.info()["precision"] == "changed by the provider options trt_fp16_enable"
    assert box.open("onnxruntime-tensorrt").info()["precision"] == "as stored in the graph"
    assert "TF32" in box.open(tf32=True).info()["precision"]


def test_without_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixano_edge.engine.runtime import ort_cache

    monkeypatch.setattr(ort_cache, "_library_version", lambda name: None)
    with pytest.raises(DeviceError, match="No TensorRT library"):
        ort_cache.tensorrt_version()
    monkeypatch.setattr(ort_cache, "_library_version", lambda name: f"{name}=1")
    assert ort_cache.tensorrt_version() == "libnvinfer.so.10=1;libnvinfer.so.11=1"


def test_an_unwritable_engine_folder(box: Box) -> None:
    box.cache.write_text("a file")
    with pytest.raises(DeviceError, match="cannot be written"):
        box.open("onnxruntime-tensorrt")


def test_the_default_engine_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pixano_edge.engine.runtime.ort_cache import default_root

    monkeypatch.setenv("PIXANO_EDGE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "engines" / "onnxruntime"
    monkeypatch.delenv("PIXANO_EDGE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert default_root() == tmp_path / "c" / "pixano-edge" / "engines" / "onnxruntime"


def test_tensorrt_rtx_plugin(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = ep_device(RTX)
    box.plugin(monkeypatch, RTX, "onnxruntime_ep_nv_tensorrt_rtx", gpu)
    info = box.open("onnxruntime-tensorrt-rtx").info()
    assert info["provider"] == RTX
    options = box.ort.sessions[-1].options
    assert options.devices == [gpu]
    cache = options.device_options.pop("nv_runtime_cache_path")
    assert options.device_options == {
        "has_user_compute_stream": "1",
        "user_compute_stream": str(box.device.stream),
        "nv_persistent_context_memory": "1",
        "nv_profile_min_shapes": "points:1x1x2",
        "nv_profile_opt_shapes": "points:2x3x2",
        "nv_profile_max_shapes": "points:64x16x2",
    }
    assert json.loads((Path(cache) / "key.json").read_text())["versions"]["onnxruntime_ep_nv_tensorrt_rtx"] == "0.5.0"
    box.open("onnxruntime-tensorrt-rtx")
    assert list(box.ort.registered) == [RTX], "registered once per process"


def test_the_right_gpu_of_several(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    named = [ep_device(RTX, device_id="0"), ep_device(RTX, device_id="1"), ep_device(RTX, "CPU")]
    box.plugin(monkeypatch, RTX, "onnxruntime_ep_nv_tensorrt_rtx", *named)
    box.device = OrtGpu(1)
    box.ort.device = box.device
    box.open("onnxruntime-tensorrt-rtx", box.device)
    assert box.ort.sessions[-1].options.devices == [named[1]]
    box.ort.plugins[RTX] = [ep_device(RTX), ep_device(RTX)]
    with pytest.raises(DeviceError, match="offers 2 GPUs and does not say which one is 'cuda:1'"):
        box.open("onnxruntime-tensorrt-rtx", box.device)


def test_plugins_that_are_not_there(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_openvino", None)
    with pytest.raises(MissingDependencyError, match="onnxruntime_ep_openvino"):
        box.open("onnxruntime-openvino", CpuDevice())
    box.plugin(monkeypatch, OPENVINO, "onnxruntime_ep_openvino")  # loads, and knows no device of this machine
    for _ in range(2):
        with pytest.raises(DeviceError, match="offers no CPU here; it takes Intel processors only"):
            box.open("onnxruntime-openvino", CpuDevice())

    def broken(name: str, path: str) -> None:
        raise RuntimeError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(box.ort, "register_execution_provider_library", broken)
    with pytest.raises(DeviceError, match=r"does not load: libcuda.so.1"):
        box.open("onnxruntime-openvino", CpuDevice())


def test_an_onnxruntime_without_plugins(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.plugin(monkeypatch, RTX, "onnxruntime_ep_nv_tensorrt_rtx", ep_device(RTX))
    monkeypatch.delattr(FakeOrt, "register_execution_provider_library")
    with pytest.raises(DeviceError, match="takes no plug-in providers"):
        box.open("onnxruntime-tensorrt-rtx")


@pytest.mark.parametrize(
    ("asked", "hint", "said"),
    [
        (None, "f32", "fp32 where the graph has fp32"),
        ("bf16", "bf16", "bf16 where the graph has fp32"),
        ("auto", None, "chosen by OpenVINO, on many CPUs bf16"),
    ],
)
def test_openvino_never_chooses_a_precision_silently(
    box: Box, monkeypatch: pytest.MonkeyPatch, asked: str | None, hint: str | None, said: str
) -> None:
    cpu, gpu = ep_device(OPENVINO, "CPU", ov_device="CPU"), ep_device(OPENVINO, "GPU", ov_device="GPU")
    box.plugin(monkeypatch, OPENVINO, "onnxruntime_ep_openvino", gpu, cpu)
    options = {} if asked is None else {"precision": asked}
    path = box.path
    session = open_session(path, GRAPH, CpuDevice(), backend="onnxruntime-openvino", threads=2, options=options)
    assert session.info()["precision"] == said
    assert session.backend == "onnxruntime-openvino"
    opened = box.ort.sessions[-1].options
    assert opened.devices == [cpu]
    wanted = {"INFERENCE_NUM_THREADS": "2", **({"INFERENCE_PRECISION_HINT": hint} if hint else {})}
    assert json.loads(opened.device_options["load_config"]) == {"CPU": wanted}
    own = {"provider_options": {"load_config": "{}"}}
    session = open_session(path, GRAPH, CpuDevice(), backend="onnxruntime-openvino", options=own)
    assert session.info()["precision"] == "as the provider option load_config says"


def test_inputs_in_memory_of_a_providers_own_are_bound_again_at_every_run(tmp_path: Path) -> None:
    """ONNX Runtime copies such an input when it is bound, and only then; here without the plug-in that does so."""
    path, graph = twice(tmp_path)
    session = open_session(path, graph, CpuDevice(), threads=1)
    assert isinstance(session, OrtSession)
    binding: Any = session.prepare({"P": 2})
    real, bound = binding.io, []

    class Copying:
        """Sees what was bound as it was at that time."""

        def bind_ortvalue_input(self, name: str, value: Any) -> None:
            bound.append((name, value.numpy().copy()))
            real.bind_ortvalue_input(name, value)

    session._session = types.SimpleNamespace(run_with_iobinding=lambda io, options: None)
    binding.io = Copying()
    for copied, count in (([], 0), (["x"], 1), (["x"], 2)):
        session._copied = copied
        binding.write("x", np.full((2, 4), count, np.float32))
        binding.run()
        assert [name for name, _ in bound] == ["x"] * count
    assert [float(value[0, 0]) for _, value in bound] == [1.0, 2.0]


def test_the_real_openvino_plugin(tmp_path: Path) -> None:
    """Where its wheel and an Intel CPU are: fp32 unless asked otherwise."""
    pytest.importorskip("onnxruntime_ep_openvino", reason="onnxruntime-ep-openvino is not installed")
    graph = spec("product", dims=(64, 64))
    rng = np.random.default_rng(0)
    weights, source = (rng.normal(size=(64, 64)).astype(np.float32) for _ in range(2))
    path = save(tmp_path / "product.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], graph, {"w": weights})
    try:
        session = open_session(path, graph, CpuDevice(), backend="onnxruntime-openvino", threads=1)
    except DeviceError as error:
        if "offers no CPU" not in str(error):
            raise
        pytest.skip(str(error))
    binding = session.prepare()
    for factor in (1, 2):  # it has memory of its own: what was bound is copied again at each run
        binding.write("x", source * np.float32(factor))
        binding.run()
        exact = factor * source.astype(np.float64) @ weights
        assert np.abs(binding.read("y") - exact).max() < 1e-5 * np.abs(exact).max()
    assert any("are copied into memory of" in text for text in session.info()["warnings"])
    assert session.info()["nodes"] == {OPENVINO: 1}
    assert session.backend == "onnxruntime-openvino"
