"""A recording stand-in for the builder's half of full TensorRT, which needs a GPU and cannot run in tests.

`FakeBuilderModule` has the names of `pixano_edge.engine.build.names`; the tests compare that table with the real
TensorRT for RTX package, whose builder half is the same API.
"""

from __future__ import annotations

import enum
from typing import Any

DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT8 INT32 INT64 UINT8 BOOL")
LayerType = enum.Enum("LayerType", "MATRIX_MULTIPLY UNARY CAST CONSTANT ELEMENTWISE SHUFFLE")
Op = enum.Enum("Op", "SIN ADD")


class Tensor:
    """``ITensor``."""

    is_shape_tensor = False

    def __init__(self, name: str, dtype: DataType, shape: tuple[int, ...]) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape


class Layer:
    """``ILayer``; its class is changed by `describe_layers`, as with the real one."""

    op = Op.ADD

    def __init__(self, name: str, kind: LayerType, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self.name = name
        self.type = kind
        self.metadata = f"[ONNX Layer: node_{name}]"
        self.num_inputs = len(inputs)
        self.num_outputs = len(outputs)
        self.get_input = inputs.__getitem__
        self.get_output = outputs.__getitem__


class ElementWise(Layer):
    """``IElementWiseLayer``."""


class Network:
    """``INetworkDefinition`` with what a test put into it."""

    def __init__(self, inputs: list[Tensor], outputs: list[Tensor], layers: list[Layer]) -> None:
        self.num_inputs, self.num_outputs, self.num_layers = len(inputs), len(outputs), len(layers)
        self.get_input, self.get_output, self.get_layer = (x.__getitem__ for x in (inputs, outputs, layers))


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"+timed"


class Config:
    """``IBuilderConfig``."""

    def __init__(self, fake: FakeBuilderModule) -> None:
        self.fake = fake
        self.set: set[str] = {"TF32"}
        self.profiles: list[dict[str, Any]] = []
        self.pools: dict[str, int] = {}
        self.timing: TimingCache | None = None
        self.hardware_compatibility_level: Any = None
        self.profiling_verbosity: Any = None
        self.progress_monitor: Any = None

    def set_flag(self, flag: str) -> None:
        self.set.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.set.discard(flag)

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.pools[pool] = size

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile.shapes)
        return -1 if self.fake.refuse_profiles else len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> TimingCache:
        return TimingCache(data)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch, "a timing cache of another GPU must not be taken"
        if cache.data == b"foreign":
            return False
        self.timing = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.timing


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, typical: Any, high: Any) -> None:
        self.shapes[name] = (low, typical, high)


class FakeBuilderModule:
    """The module. `log` has what was called in order; `config` is the last build's configuration.

    Args:
        network: What every parse gives.
        version: Of the library.
        engine: What a build gives; None for a failure, with `said` as TensorRT's message.
    """

    def __init__(self, network: Network, version: str = "10.16.2", engine: bytes | None = b"plan") -> None:
        self.__version__ = version
        self.network = network
        self.engine = engine
        self.said = "no tactic"
        self.refuse_profiles = False
        self.parses = True
        self.log: list[str] = []
        self.config: Config | None = None
        self.flags = 0
        fake = self

        class ILogger:
            Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

        class Builder:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def create_network(self, flags: int) -> Network:
                fake.flags = flags
                return fake.network

            def create_builder_config(self) -> Config:
                fake.config = Config(fake)
                return fake.config

            def create_optimization_profile(self) -> Profile:
                return Profile()

            def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
                monitor = config.progress_monitor
                monitor.phase_start("Building engine", None, 2)
                assert monitor.step_complete("Building engine", 0)
                monitor.phase_finish("Building engine")
                if fake.engine is None:
                    self.logger.log(ILogger.Severity.ERROR, fake.said)
                self.logger.log(ILogger.Severity.WARNING, "careful")
                return fake.engine

        class OnnxParser:
            num_errors = 1

            def __init__(self, network: Network, logger: Any) -> None: ...

            def parse_from_file(self, path: str) -> bool:
                fake.log.append(f"parse {path}")
                return fake.parses

            def get_error(self, index: int) -> str:
                return "Unsupported operator"

        class IProgressMonitor:
            def __init__(self) -> None: ...

        self.ILogger, self.Builder, self.OnnxParser, self.IProgressMonitor = (
            ILogger,
            Builder,
            OnnxParser,
            IProgressMonitor,
        )
        self.IElementWiseLayer = ElementWise
        self.BuilderFlag = enum.Enum("BuilderFlag", {n: n for n in ("TF32", "VERSION_COMPATIBLE")}, type=str)
        self.MemoryPoolType = enum.Enum("MemoryPoolType", {"WORKSPACE": "WORKSPACE"}, type=str)
        self.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED")
        self.HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS")
        self.NetworkDefinitionCreationFlag = enum.IntEnum(
            "NetworkDefinitionCreationFlag", {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
        )
