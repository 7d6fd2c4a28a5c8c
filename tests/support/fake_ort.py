"""A stand-in for ONNX Runtime that notes every call and computes on the addresses it was given.

It copies the behaviour our code relies on: a provider that does not load leaves the CPU in its place; a run replays
what was captured under its ``gpu_graph_id``, with the addresses of then; nodes are where `FakeOrt.placement` says.
``test_ort_signatures.py`` compares its names and parameters with the real package.
"""

from __future__ import annotations

import ctypes
import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.engine.runtime.base import DeviceInfo
from tests.support.gpu_stub import GpuStub

CUDA, TRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
RTX, OPENVINO = "NvTensorRTRTXExecutionProvider", "OpenVINOExecutionProvider"

_KINDS = {"float32": "tensor(float)", "float16": "tensor(float16)", "int32": "tensor(int32)", "int64": "tensor(int64)"}

# Provider options that exist, read from the wheels: the libraries of onnxruntime-gpu 1.31.1, and the header of
# onnxruntime-ep-nv-tensorrt-rtx-cu13 0.5.0. CUDA and TensorRT refuse others; the plug-ins may ignore them.
KNOWN_OPTIONS = {
    CUDA: """arena_extend_strategy cudnn_conv_algo_search cudnn_conv_use_max_workspace device_id
        do_copy_in_default_stream enable_cuda_graph enable_skip_layer_norm_strict_mode fuse_conv_bias gpu_mem_limit
        has_user_compute_stream prefer_nhwc sdpa_kernel tunable_op_enable use_ep_level_unified_stream use_tf32
        user_compute_stream""",
    TRT: """device_id has_user_compute_stream user_compute_stream trt_bf16_enable trt_builder_optimization_level
        trt_context_memory_sharing_enable trt_cuda_graph_enable trt_engine_cache_enable trt_engine_cache_path
        trt_engine_cache_prefix trt_engine_hw_compatible trt_fp16_enable trt_int8_enable trt_max_workspace_size
        trt_min_subgraph_size trt_profile_max_shapes trt_profile_min_shapes trt_profile_opt_shapes
        trt_timing_cache_enable trt_timing_cache_path""",
    RTX: """enable_cuda_graph has_user_compute_stream nv_hardware_device_id nv_max_workspace_size
        nv_multi_profile_enable nv_op_types_to_exclude nv_persistent_context_memory nv_profile_max_shapes
        nv_profile_min_shapes nv_profile_opt_shapes nv_runtime_cache_path nv_target_sm
        nv_use_external_data_initializer user_compute_stream""",
    OPENVINO: "cache_dir load_config reshape_input",
}


class OrtGpu(GpuStub):
    """`GpuStub` with an index and facts."""

    def __init__(self, index: int = 0, driver: str = "570.1", **given: Any) -> None:
        super().__init__(**given)
        self._name, self._index, self._driver = f"cuda:{index}", index, driver

    def info(self) -> DeviceInfo:
        extra = {"multiprocessors": "46"}
        return DeviceInfo("Test GPU", self.kind, self._index, "8.6", self._driver, "CUDA 13.0", extra=extra)


class FakeSessionOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.devices: list[Any] = []
        self.device_options: dict[str, str] = {}
        self.log_severity_level = 2
        self.intra_op_num_threads = self.inter_op_num_threads = 0
        self.execution_mode = self.graph_optimization_level = ""
        self.enable_cpu_mem_arena = self.enable_mem_reuse = self.enable_mem_pattern = True
        self.enable_profiling = False
        self.profile_file_prefix = ""

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value

    def get_session_config_entry(self, key: str) -> str:
        return self.entries[key]

    def add_provider_for_devices(self, devices: Sequence[Any], options: Mapping[str, str]) -> None:
        if not devices:
            raise RuntimeError("Must provide one or more OrtEpDevice instances.")
        self.devices, self.device_options = list(devices), dict(options)


class FakeRunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class FakeIOBinding:
    def __init__(self, session: FakeSession) -> None:
        self._session = session
        self.addresses: dict[str, tuple[int, tuple[int, ...], Any]] = {}

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Sequence[int], buffer_ptr: int
    ) -> None:
        self._bind("bind_input", name, device_type, device_id, element_type, shape, buffer_ptr)

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: Any = None,
        shape: Sequence[int] | None = None,
        buffer_ptr: int | None = None,
    ) -> None:
        assert shape is not None
        assert buffer_ptr is not None
        self._bind("bind_output", name, device_type, device_id, element_type, shape, buffer_ptr)

    def _bind(
        self, call: str, name: str, kind: str, index: int, dtype: Any, shape: Sequence[int], pointer: int
    ) -> None:
        self._session.ort.calls.append((call, name, kind, index, np.dtype(dtype).name, tuple(shape), pointer))
        self.addresses[name] = (pointer, tuple(shape), np.dtype(dtype))


class FakeSession:
    """See the module. ``FakeOrt`` makes a subclass with itself as ``ort``."""

    ort: FakeOrt

    def __init__(
        self,
        path_or_bytes: str,
        sess_options: FakeSessionOptions | None = None,
        providers: Sequence[Any] | None = None,
        provider_options: Any = None,
        **kwargs: Any,
    ) -> None:
        ort = self.ort
        assert sess_options is not None
        self.disabled = list(kwargs.pop("disabled_optimizers"))
        assert kwargs == {"enable_fallback": False}
        self.options = sess_options
        if ort.load_error is not None:
            raise ort.load_error
        if sess_options.devices:
            self.asked = {sess_options.devices[0].ep_name: sess_options.device_options}
        else:
            self.asked = {name: dict(options) for name, options in providers or ()}
        for name, options in self.asked.items():
            assert all(isinstance(k, str) and isinstance(v, str) for k, v in options.items()), options
            assert set(options) <= set(KNOWN_OPTIONS[name].split()), f"{name} has no such option: {options}"
        self.graphs: dict[int, dict[str, Any]] = {}
        ort.sessions.append(self)
        ort.calls.append(("open", Path(path_or_bytes).name, tuple(self.asked)))

    def get_providers(self) -> list[str]:
        return self.ort.loaded or [*self.asked, CPU]

    def _nodes(self, tensors: Sequence[TensorSpec]) -> list[Any]:
        return [types.SimpleNamespace(name=t.name, type=_KINDS[t.dtype], shape=list(t.dims)) for t in tensors]

    def get_inputs(self) -> list[Any]:
        return self._nodes(self.ort.spec.inputs)

    def get_outputs(self) -> list[Any]:
        return self._nodes(self.ort.spec.outputs)

    def io_binding(self) -> FakeIOBinding:
        return FakeIOBinding(self)

    def run_with_iobinding(self, iobinding: FakeIOBinding, run_options: FakeRunOptions | None = None) -> None:
        if self.ort.run_error is not None:
            raise self.ort.run_error
        assert self.ort.device.depth > 0, "launched outside Device.current"
        entries = {} if run_options is None else run_options.entries
        capturing = self.asked.get(CUDA, {}).get("enable_cuda_graph") == "1"
        number = int(entries.get("gpu_graph_id", 0)) if capturing else -1
        bound = dict(iobinding.addresses)
        if number != -1:
            bound = self.graphs.setdefault(number, bound)  # the addresses of the run that was captured
        self.ort.calls.append(("run", number, entries.get("disable_synchronize_execution_providers")))
        self.ort.device.launch(self.ort.spec.name, lambda: self._compute(bound))

    def _compute(self, bound: Mapping[str, tuple[int, tuple[int, ...], Any]]) -> None:
        arrays = {name: _at(*place) for name, place in bound.items()}
        results = self.ort.function({t.name: arrays[t.name] for t in self.ort.spec.inputs})
        for tensor in self.ort.spec.outputs:
            np.copyto(arrays[tensor.name], results[tensor.name], casting="no")

    def end_profiling(self) -> str:
        return self.options.profile_file_prefix + ".json"


class TellingSession(FakeSession):
    """Since 1.24: says where nodes run and tensors lie."""

    def _memory(self, tensors: Sequence[TensorSpec]) -> list[Any]:
        return [types.SimpleNamespace(name=self.ort.places.get(t.name, "Cuda")) for t in tensors]

    def get_input_memory_infos(self) -> list[Any]:
        return self._memory(self.ort.spec.inputs)

    def get_output_memory_infos(self) -> list[Any]:
        return self._memory(self.ort.spec.outputs)

    def get_provider_graph_assignment_info(self) -> list[Any]:
        if self.options.entries.get("session.record_ep_graph_assignment_info") != "1":
            raise RuntimeError('must be set to "1" to retrieve EP graph assignment information.')
        placement = self.ort.placement or [(next(iter(self.asked)), ["Add", "Relu"])]
        return [
            types.SimpleNamespace(
                ep_name=ep, get_nodes=lambda ops=ops: [types.SimpleNamespace(op_type=op) for op in ops]
            )
            for ep, ops in placement
        ]


def ep_device(ep: str, kind: str = "GPU", **metadata: str) -> Any:
    """An ``OrtEpDevice`` that a plug-in offers."""
    device = types.SimpleNamespace(type=types.SimpleNamespace(name=kind))
    return types.SimpleNamespace(ep_name=ep, ep_metadata=metadata, ep_options={}, device=device)


class FakeOrt(types.ModuleType):
    """Put it into ``sys.modules['onnxruntime']``.

    Args:
        spec: The graph that every session loads.
        device: Its `calls` take this module's too, so that the order of all is seen; its `launch` runs the graph.
        function: The graph: arrays by input name to arrays by output name.
        tells: False for a version before 1.23, which cannot say where nodes run and tensors lie.

    Attributes:
        placement: ``(provider, operators)`` per subgraph; all on the provider asked for when empty.
        places: Memory of a tensor by name, "Cuda" if not there.
        loaded: What ``get_providers`` of sessions answers; what was asked for when empty.
        plugins: Devices that appear once their library is registered, by registration name.
        load_error, run_error: Raised by opening and by running.
    """

    __version__ = "1.32.0"

    def __init__(
        self,
        spec: GraphSpec,
        device: GpuStub,
        function: Callable[[dict[str, Any]], Mapping[str, Any]],
        tells: bool = True,
    ) -> None:
        super().__init__("onnxruntime")
        self.spec, self.device, self.function = spec, device, function
        self.calls = device.calls
        self.sessions: list[FakeSession] = []
        self.compiled = [TRT, CUDA, CPU]
        self.placement: list[tuple[str, list[str]]] = []
        self.places: dict[str, str] = {}
        self.loaded: list[str] = []
        self.plugins: dict[str, list[Any]] = {}
        self.registered: dict[str, str] = {}
        self.load_error: Exception | None = None
        self.run_error: Exception | None = None
        self.SessionOptions, self.RunOptions = FakeSessionOptions, FakeRunOptions
        self.InferenceSession: Any = type(
            "InferenceSession", (TellingSession if tells else FakeSession,), {"ort": self}
        )
        self.ExecutionMode = types.SimpleNamespace(ORT_SEQUENTIAL="sequential")
        levels = ("ORT_ENABLE_ALL", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_BASIC", "ORT_DISABLE_ALL")
        self.GraphOptimizationLevel = types.SimpleNamespace(**{level: level for level in levels})
        state = types.SimpleNamespace(RuntimeException=type("RuntimeException", (Exception,), {}))
        self.capi = types.SimpleNamespace(onnxruntime_pybind11_state=state)

    def set_default_logger_severity(self, severity: int) -> None:
        self.severity = severity

    def get_available_providers(self) -> list[str]:
        return list(self.compiled)

    def preload_dlls(
        self, cuda: bool = True, cudnn: bool = True, msvc: bool = True, directory: str | None = None
    ) -> None:
        self.calls.append(("preload_dlls", directory))

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if name in self.registered:
            raise RuntimeError(f"EP library is already registered under {name}")
        self.registered[name] = path

    def get_ep_devices(self) -> list[Any]:
        return list(itertools.chain.from_iterable(self.plugins.get(name, ()) for name in self.registered))


def _at(pointer: int, shape: tuple[int, ...], dtype: Any) -> Any:
    count = int(np.prod(shape))
    raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer)
    return np.frombuffer(raw, dtype).reshape(shape)
