"""A recording TensorRT, for tests of the TensorRT back end without a GPU.

`FakeTensorRt` stands in for the Python module. It refuses what the real one refuses (shapes before a profile, sizes
outside the profile, no address, too little or freed scratch memory) and really computes, on the host memory behind
`GpuStub`. That the names exist in the real package is checked in `tests/engine/runtime/test_tensorrt_api.py`.
"""

from __future__ import annotations

import enum
import itertools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pixano_edge.engine.runtime.base import Array, Shape
from tests.support.gpu_stub import GpuStub

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name to TensorRT's dtype name and shape, -1 where open."""


@dataclass
class Plan:
    """What a serialised engine is.

    Attributes:
        function: Input arrays by name to output arrays by name.
        open_outputs: Outputs whose size depends on data; elsewhere -1 is the first size of the first input.
        fail: Step (``load``, ``context``, ``enqueue``) to the message with which it fails.
    """

    inputs: Tensors
    outputs: Tensors
    function: Callable[[dict[str, Array]], Mapping[str, Array]]
    profiles: list[dict[str, tuple[Shape, Shape, Shape]]] = field(default_factory=lambda: [{}])
    scratch: list[int] = field(default_factory=lambda: [1024])
    weights: int = 4096
    location: str = "DEVICE"
    open_outputs: tuple[str, ...] = ()
    fail: dict[str, str] = field(default_factory=dict)


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, INT64, BF16 = range(8)


_NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}


class ErrorCodeTRT(enum.Enum):
    UNSPECIFIED_ERROR = 1


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class TensorFormat(enum.Enum):
    LINEAR, CHW2 = range(2)


class Strategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class Specialization(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class EngineStat(enum.Enum):
    TOTAL_WEIGHTS_SIZE, STRIPPED_WEIGHTS_SIZE = range(2)


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        """As TensorRT's: subclasses must call it."""


class IErrorRecorder:
    def __init__(self) -> None:
        """As TensorRT's: subclasses must call it."""


class IOutputAllocator:
    def __init__(self) -> None:
        """As TensorRT's: subclasses must call it."""


class Runtime:
    fake: FakeTensorRt
    error_recorder: Any = None
    engine_host_code_allowed = False

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        weakref.finalize(self, self.fake.calls.append, ("free runtime",))

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        fake = self.fake
        assert fake.device.depth, "the device is not current"
        plan = fake.plans.get(bytes(serialized_engine))
        said = plan.fail.get("load") if plan else "Serialization assertion header.magicTag failed."
        if said:
            self.error_recorder.report_error(ErrorCodeTRT.UNSPECIFIED_ERROR, said)
            return None
        fake.calls.append(("load", self.engine_host_code_allowed))
        self._logger.log(Severity.WARNING, "this plan was built elsewhere")
        return fake.ICudaEngine(fake, plan, self.error_recorder)


class ICudaEngine:
    error_recorder: Any = None

    def __init__(self, fake: FakeTensorRt, plan: Plan, recorder: Any) -> None:
        self._fake, self._plan, self._recorder = fake, plan, recorder
        self._tensors = {**plan.inputs, **plan.outputs}
        self.contexts: weakref.WeakSet[IExecutionContext] = weakref.WeakSet()
        contexts, calls = self.contexts, fake.calls
        weakref.finalize(self, lambda: calls.append(("free engine", len(contexts))))

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._plan.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._plan.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._tensors[name][0]]

    def get_tensor_shape(self, name: str) -> Shape:
        return self._tensors[name][1]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation[self._plan.location]

    def get_tensor_format(self, name: str) -> TensorFormat:
        return TensorFormat.LINEAR

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Shape]:
        return list(self._plan.profiles[profile_index][name])

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._plan.scratch[profile_index]

    def get_engine_stat(self, stat: EngineStat) -> int:
        assert stat is EngineStat.TOTAL_WEIGHTS_SIZE
        return self._plan.weights

    def create_execution_context(self, strategy: Any) -> Any:
        fake = self._fake
        assert fake.device.depth, "the device is not current"
        assert fake.rtx or strategy is Strategy.USER_MANAGED
        fake.device._not_while_recording("making a context")
        if said := self._plan.fail.get("context"):
            self._recorder.report_error(ErrorCodeTRT.UNSPECIFIED_ERROR, said)
            return None
        context = fake.IExecutionContext(fake, self._plan)
        self.contexts.add(context)
        return context


class IExecutionContext:
    error_recorder: Any = None

    def __init__(self, fake: FakeTensorRt, plan: Plan) -> None:
        self.number = next(fake.numbers)
        self._fake, self._plan = fake, plan
        self._profile: int | None = None
        self._scratch = (0, 0)
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        self._note("context")
        weakref.finalize(self, fake.calls.append, ("free context", self.number))

    def _note(self, what: str, *values: Any) -> None:
        self._fake.calls.append((what, self.number, *values))

    def _refuse(self, text: str) -> bool:
        self.error_recorder.report_error(ErrorCodeTRT.UNSPECIFIED_ERROR, text)
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == self._fake.device.stream, "not on the device's stream"
        self._profile, self._shapes = profile_index, {}
        self._note("profile", profile_index)
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        self._scratch = (memory, size)
        self._note("scratch", memory, size)

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        assert isinstance(shape, tuple)
        if self._profile is None:
            return self._refuse("no profile is selected")
        low, _, high = self._plan.profiles[self._profile].get(name, (shape, shape, shape))
        if not all(a <= s <= b for a, s, b in zip(low, shape, high)):
            return self._refuse(f"{name} {shape} is outside profile {self._profile}")
        self._shapes[name] = shape
        self._note("shape", name, shape)
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        declared = self._plan.outputs[name][1]
        if name in self._plan.open_outputs:
            return declared
        first = self._shapes[next(iter(self._plan.inputs))][0]
        return tuple(first if size < 0 else size for size in declared)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        self._note("address", name, memory)
        return True

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        self._allocators[name] = output_allocator
        self._note("allocator", name)
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        device, plan = self._fake.device, self._plan
        assert device.depth, "the device is not current"
        assert stream_handle == device.stream, "not on the device's stream"
        if said := plan.fail.get("enqueue"):
            return self._refuse(said)
        if set(self._shapes) != set(plan.inputs) or set(self._addresses) != {*plan.inputs, *plan.outputs}:
            return self._refuse("shapes or addresses are missing")
        if self._scratch[1] < plan.scratch[self._profile or 0]:
            return self._refuse("too little scratch memory")
        self._note("enqueue")
        shapes, addresses, scratch = dict(self._shapes), dict(self._addresses), self._scratch
        if self._allocators:
            device.finish()
            return self._run_open(self._compute(shapes, addresses, scratch))

        def work() -> None:
            for name, array in self._compute(shapes, addresses, scratch).items():
                self._store(addresses[name], array)

        device.launch(f"context {self.number}", work)
        return True

    def _compute(
        self, shapes: dict[str, Shape], addresses: dict[str, int], scratch: tuple[int, int]
    ) -> Mapping[str, Array]:
        self._fake.device.at(*scratch)[:] = 0xAB  # whoever else still needs it would see
        inputs = {}
        for name, (kind, _) in self._plan.inputs.items():
            dtype = np.dtype(_NUMPY[kind])
            nbytes = int(np.prod(shapes[name])) * dtype.itemsize
            inputs[name] = self._fake.device.at(addresses[name], nbytes).view(dtype).reshape(shapes[name])
        return self._plan.function(inputs)

    def _store(self, pointer: int, array: Array) -> None:
        self._fake.device.at(pointer, array.nbytes)[:] = np.frombuffer(array.tobytes(), np.uint8)

    def _run_open(self, results: Mapping[str, Array]) -> bool:
        for name, array in results.items():
            pointer = self._addresses[name]
            if name in self._allocators:
                allocator = self._allocators[name]
                pointer = allocator.reallocate_output_async(name, pointer, array.nbytes, 256, self._fake.device.stream)
                if not pointer:
                    return self._refuse(f"no memory for {name}")
                allocator.notify_shape(name, array.shape)
            self._store(pointer, array)
        return True


class RtxCache:
    def __init__(self, fake: FakeTensorRt) -> None:
        self._fake = fake

    def deserialize(self, blob: bytes) -> bool:
        self._fake.calls.append(("kernels", bytes(blob)))
        return bytes(blob) == b"kernels"

    def serialize(self) -> bytes:
        return b"kernels"


class RtxConfig:
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self, fake: FakeTensorRt) -> None:
        self._fake = fake
        self.cache: Any = None
        self.strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RtxCache:
        return RtxCache(self._fake)

    def set_runtime_cache(self, cache: RtxCache) -> bool:
        self.cache = cache
        return True


class RtxEngine(ICudaEngine):
    def create_runtime_config(self) -> RtxConfig:
        return RtxConfig(self._fake)

    def create_execution_context(self, strategy: Any) -> Any:
        assert isinstance(strategy, RtxConfig)
        assert strategy.strategy is Strategy.USER_MANAGED
        assert strategy.cache is not None
        how = strategy.dynamic_shapes_kernel_specialization_strategy.name
        self._fake.calls.append(("specialization", how))
        return super().create_execution_context(strategy)


class RtxContext(IExecutionContext):
    def is_stream_capturable(self, stream: int) -> bool:
        return self._fake.capturable


class FakeTensorRt:
    """Stands in for the module ``tensorrt``, or ``tensorrt_rtx``.

    Args:
        device: Where engines run.
        plans: Serialised engine to what it is.

    Attributes:
        calls: Every call as a tuple of its name, the number of the context and the arguments.
    """

    def __init__(
        self, device: GpuStub, plans: Mapping[bytes, Plan], rtx: bool = False, version: str | None = None
    ) -> None:
        self.device, self.plans, self.rtx = device, plans, rtx
        self.calls: list[tuple[Any, ...]] = []
        self.numbers = itertools.count(1)
        self.capturable = True
        self.__version__ = version or ("1.7.1.116" if rtx else "10.16.1.2")
        self.ILogger, self.IErrorRecorder, self.IOutputAllocator = ILogger, IErrorRecorder, IOutputAllocator
        self.DataType, self.TensorIOMode, self.TensorLocation = DataType, TensorIOMode, TensorLocation
        self.TensorFormat, self.ExecutionContextAllocationStrategy = TensorFormat, Strategy
        self.EngineStat = EngineStat
        self.Runtime = type("Runtime", (Runtime,), {"fake": self})
        self.ICudaEngine: Any = RtxEngine if rtx else ICudaEngine
        self.IExecutionContext: Any = RtxContext if rtx else IExecutionContext
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = Specialization
            self.IRuntimeConfig, self.IRuntimeCache = RtxConfig, RtxCache

    @property
    def ops(self) -> list[str]:
        """Names of the calls, in order."""
        return [call[0] for call in self.calls]
