"""TensorRT under one set of names: `tensorrt` 10.x and 11.x, and TensorRT for RTX 1.x.

The only file of the run time that imports TensorRT, and only when `load_tensorrt` is called. What differs between
releases is resolved here: what was renamed is looked up by name, what must be there is checked when it is loaded, so
that a removed call is a clear error instead of an AttributeError in the middle of a run. Networks are strongly typed
always (TensorRT 11 and RTX know nothing else), so nothing here sets a precision.

Names as in NVIDIA's Python API reference; the bindings' source is `python/src/infer/pyCore.cpp` in NVIDIA/TensorRT.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DeviceError, DeviceMemoryError, MissingDependencyError
from .base import Shape
from .tensorrt_callbacks import Allocate, make_allocator, make_logger, make_recorder
from .tensorrt_names import CALLS, RTX_CALLS, SCRATCH_SIZE, SET_SCRATCH, first_of, missing_calls

# Flavour -> module names to try in turn; of a group the last is the API, the others load its shared libraries.
_MODULES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "tensorrt": (("tensorrt",), ("tensorrt_libs", "tensorrt_bindings")),
    "tensorrt_rtx": (("tensorrt_rtx",), ("tensorrt_rtx_libs", "tensorrt_rtx_bindings")),
}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
_MAJORS = {"tensorrt": ("10", "11"), "tensorrt_rtx": ("1",)}

# TensorRT's dtype -> numpy's; the ones without a numpy dtype (BF16, FP8, FP4, INT4) cannot be a contract's.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}

_NO_MEMORY = ("out of memory", "outofmemory", "cudaerror 2:", "memoryallocation", "failed_allocation")
_NO_DRIVER = ("driver version is insufficient", "cudaerror 35", "no cuda-capable device", "cudaerror 100")
_OTHER_ENGINE = ("serialization", "version tag", "magictag", "compute capability", "platform specific tag", "mismatch")


@dataclass(frozen=True)
class EngineTensor:
    """An input or output as an engine declares it; an open dimension is -1."""

    name: str
    dtype: str
    shape: Shape
    is_input: bool
    on_device: bool
    linear: bool


class TensorRt:
    """One loaded TensorRT.

    Args:
        module: The Python module, for example ``tensorrt``.
        flavour: ``tensorrt`` or ``tensorrt_rtx``.

    Attributes:
        version: Full version of the library.

    Raises:
        DeviceError: A release that is not supported, or one that lacks a call.
    """

    def __init__(self, module: Any, flavour: str) -> None:
        self.module = module
        self.flavour = flavour
        self.version = str(module.__version__)
        if self.version.split(".")[0] not in _MAJORS[flavour]:
            raise DeviceError(
                f"{flavour} {self.version} is not supported, only {' and '.join(_MAJORS[flavour])}.x.",
                f"Install another one: pip install 'pixano-edge[{_EXTRAS[flavour]}]'",
            )
        missing = missing_calls(module, CALLS)
        if self.rtx:
            missing += missing_calls(module, RTX_CALLS)
        if missing:
            raise DeviceError(
                f"{flavour} {self.version} has no {', '.join(missing)}.",
                "Use a release that pixano-edge was tested with.",
            )

    @property
    def rtx(self) -> bool:
        """Whether kernels are compiled on this machine at first use (TensorRT for RTX)."""
        return self.flavour == "tensorrt_rtx"

    def open(self, data: bytes | memoryview, name: str, host_code: bool = False) -> TrtEngine:
        """Loads an engine onto the current CUDA device.

        Args:
            data: Serialised engine; may be freed afterwards.
            name: For messages.
            host_code: Let TensorRT run the library that a version compatible engine brings along.

        Raises:
            DeviceError: With TensorRT's own words: no driver, an engine for another GPU or release, a broken file.
            DeviceMemoryError: The weights do not fit.
        """
        return TrtEngine(self, data, name, host_code)


def load_tensorrt(flavour: str | None = None) -> TensorRt:
    """Imports TensorRT.

    Args:
        flavour: ``tensorrt`` or ``tensorrt_rtx``, what the engine was built with; None takes the first one installed.

    Raises:
        MissingDependencyError: Not installed.
        DeviceError: Unknown flavour, or it is installed but does not load.
    """
    if flavour is not None and flavour not in _MODULES:
        raise DeviceError(f"Unknown TensorRT flavour '{flavour}'.", f"Known: {', '.join(_MODULES)}.")
    for name in [flavour] if flavour else list(_MODULES):
        for group in _MODULES[name]:
            if all(importlib.util.find_spec(module) for module in group):
                return TensorRt(_import(group, name), name)
    raise MissingDependencyError(flavour or "tensorrt", _EXTRAS[flavour or "tensorrt"], "The TensorRT back end")


class TrtEngine:
    """A deserialised engine with its own runtime, log and error recorder. Made by `TensorRt.open`.

    Attributes:
        warnings: What TensorRT warned about; at most 20.
    """

    def __init__(self, api: TensorRt, data: bytes | memoryview, name: str, host_code: bool) -> None:
        self.api = api
        self.name = name
        self.warnings: list[str] = []
        self._errors: list[str] = []
        self._config: Any = None
        self._cache: Any = None
        self._logger = make_logger(api.module, self._errors, self.warnings)
        self._recorder = make_recorder(api.module, self._errors)
        self._runtime: Any = api.module.Runtime(self._logger)
        self._runtime.error_recorder = self._recorder
        if host_code:
            self._runtime.engine_host_code_allowed = True
        self._engine: Any = self._call("load", lambda: self._runtime.deserialize_cuda_engine(data))
        if self._engine is None:
            self.close()
            raise self.failure("load")

    def tensors(self) -> dict[str, EngineTensor]:
        """Inputs and outputs by name, in the engine's order."""
        trt, engine = self.api.module, self._engine
        found = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            kind = engine.get_tensor_dtype(name).name
            found[name] = EngineTensor(
                name,
                _DTYPES.get(kind, kind),
                _shape(engine.get_tensor_shape(name)),
                engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                engine.get_tensor_location(name) == trt.TensorLocation.DEVICE
                and not engine.is_shape_inference_io(name),
                engine.get_tensor_format(name) == trt.TensorFormat.LINEAR,
            )
        return found

    def profile_shapes(self) -> list[dict[str, tuple[Shape, Shape, Shape]]]:
        """Per optimisation profile the (min, opt, max) shape of each input that has open dimensions."""
        open_inputs = [t.name for t in self.tensors().values() if t.is_input and -1 in t.shape]
        shapes = []
        for index in range(max(1, int(self._engine.num_optimization_profiles))):
            profile = {}
            for name in open_inputs:
                low, typical, high = self._engine.get_tensor_profile_shape(name, index)
                profile[name] = (_shape(low), _shape(typical), _shape(high))
            shapes.append(profile)
        return shapes

    def scratch_bytes(self, profile: int) -> int:
        """Device memory for intermediate tensors that a context needs under a profile."""
        return int(first_of(self._engine, SCRATCH_SIZE)(profile))

    def weight_bytes(self) -> int | None:
        """Size of the weights on the device; None where the release cannot tell (before 10.8)."""
        stat = getattr(self.api.module, "EngineStat", None)
        if stat is None or not hasattr(self._engine, "get_engine_stat"):
            return None
        size = int(self._engine.get_engine_stat(stat.TOTAL_WEIGHTS_SIZE))
        return size if size >= 0 else None

    def configure(self, specialization: str, cache: bytes | None) -> bool:
        """Sets how TensorRT for RTX compiles kernels; for contexts made afterwards. Nothing to do elsewhere.

        Args:
            specialization: ``lazy``, ``eager`` or ``none``: when kernels are made for the shapes that come up.
            cache: What `cache_bytes` gave in an earlier process; refused by TensorRT when anything changed.

        Returns:
            Whether `cache` was taken.
        """
        if not self.api.rtx:
            return False
        trt = self.api.module
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, specialization.upper())
        self._cache = config.create_runtime_cache()
        taken = cache is not None and bool(self._cache.deserialize(cache))
        config.set_runtime_cache(self._cache)  # shared by all contexts: each kernel is compiled once
        self._config = config
        self._recorder.clear()  # a refused cache is not an error of the next call
        return taken

    def cache_bytes(self) -> bytes | None:
        """Kernels compiled so far, for `configure` in a later process; None where nothing is compiled here."""
        return bytes(memoryview(self._cache.serialize())) if self._cache is not None else None

    def context(self) -> TrtContext:
        """A new execution context without scratch memory of its own.

        Raises:
            DeviceError: TensorRT refused.
        """
        strategy = self.api.module.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._call(
            "make a context for", lambda: self._engine.create_execution_context(self._config or strategy)
        )
        if context is None:
            raise self.failure("make a context for")
        context.error_recorder = self._recorder
        return TrtContext(self, context)

    def layer_json(self) -> str:
        """The engine inspector's JSON: layers after fusion, with tactics and formats if built with detailed verbosity.

        Raises:
            DeviceError: TensorRT refused.
        """
        form = self.api.module.LayerInformationFormat.JSON
        inspector = self._call("inspect", self._engine.create_engine_inspector)
        return str(self._call("inspect", lambda: inspector.get_engine_information(form)))

    def output_allocator(self, allocate: Allocate, notify: Callable[[str, Shape], None]) -> Any:
        """An ``IOutputAllocator`` for outputs whose size depends on data."""
        return make_allocator(self.api.module, allocate, notify)

    def failure(self, verb: str, detail: str = "") -> DeviceError:
        """The error for what just failed, in TensorRT's own words."""
        said = "; ".join(dict.fromkeys(self._errors)) or detail or "it gave no reason"
        self._recorder.clear()
        message = f"{self.api.flavour} {self.api.version} cannot {verb} graph '{self.name}': {said}"
        lower = said.lower()
        if any(word in lower for word in _NO_MEMORY):
            return DeviceMemoryError(message, "Unload other models, or use a smaller model or precision.")
        if any(word in lower for word in _NO_DRIVER):
            return DeviceError(message, "Run 'pixano-edge doctor': TensorRT needs an NVIDIA GPU and a recent driver.")
        if any(word in lower for word in _OTHER_ENGINE):
            return DeviceError(message, "Build the engine again on this machine: pixano-edge build")
        return DeviceError(message, "Run 'pixano-edge doctor', then build the engine again: pixano-edge build")

    def close(self) -> None:
        """Frees the engine, then the runtime. Close every context first."""
        self._config = self._cache = None
        self._engine = None
        self._runtime = None

    def _call(self, verb: str, work: Callable[[], Any]) -> Any:
        self._recorder.clear()
        try:
            return work()
        except (RuntimeError, TypeError, ValueError) as error:  # what pybind11 makes of a refusal
            raise self.failure(verb, str(error)) from error


class TrtContext:
    """One execution context; every call raises DeviceError with TensorRT's words when it is refused."""

    def __init__(self, engine: TrtEngine, context: Any) -> None:
        self._engine = engine
        self._context = context
        self._set_scratch = first_of(context, SET_SCRATCH)

    def select_profile(self, index: int, stream: int) -> None:
        """Takes an optimisation profile; all input shapes must be set again afterwards."""
        self._do("select a profile of", lambda: self._context.set_optimization_profile_async(index, stream))

    def set_scratch(self, pointer: int, nbytes: int) -> None:
        """Gives the context memory for intermediate tensors (256-byte aligned)."""
        self._set_scratch(pointer, nbytes)

    def set_shape(self, name: str, shape: Shape) -> None:
        self._do(f"take {name}{list(shape)} in", lambda: self._context.set_input_shape(name, shape))

    def shape(self, name: str) -> Shape:
        """Shape of a tensor for the input shapes set; -1 where it depends on data."""
        return _shape(self._context.get_tensor_shape(name))

    def set_address(self, name: str, pointer: int) -> None:
        self._do(f"bind '{name}' of", lambda: self._context.set_tensor_address(name, pointer))

    def set_output_allocator(self, name: str, allocator: Any) -> None:
        self._do("set an allocator in", lambda: self._context.set_output_allocator(name, allocator))

    def capturable(self, stream: int) -> bool:
        """Whether this context's work can be recorded in a CUDA graph (only TensorRT for RTX can tell)."""
        return not self._engine.api.rtx or bool(self._context.is_stream_capturable(stream))

    def enqueue(self, stream: int) -> None:
        """Queues one run."""
        self._do("run", lambda: self._context.execute_async_v3(stream))

    def close(self) -> None:
        self._set_scratch = None
        self._context = None

    def _do(self, verb: str, work: Callable[[], Any]) -> None:
        if not self._engine._call(verb, work):
            raise self._engine.failure(verb)


def _import(group: tuple[str, ...], flavour: str) -> Any:
    try:
        return [importlib.import_module(name) for name in group][-1]
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        raise DeviceError(f"{flavour} is installed but does not load: {error}", "Run 'pixano-edge doctor'.") from error


def _shape(dims: Any) -> Shape:
    return tuple(int(size) for size in dims)
