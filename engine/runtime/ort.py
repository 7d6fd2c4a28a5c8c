"""ONNX Runtime back end: one `InferenceSession` per graph, one `IOBinding` per set of shapes.

ONNX Runtime is imported when the first session opens, never before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..contracts.base import GraphSpec, TensorSpec
from ..errors import BundleError, ContractError, DeviceError, MissingDependencyError
from ..machine import usable_cpus
from .base import Array, Binding, Buffer, Device, Session, Shape
from .cpu import check_writable

# Device kind -> provider that must really run there.
_PROVIDERS = {"cpu": "CPUExecutionProvider"}

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
}

_OPTIMIZATION = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "none": "ORT_DISABLE_ALL",
}


@dataclass(frozen=True)
class OrtOptions:
    """What `open_session(options=...)` may set for ONNX Runtime.

    Attributes:
        provider: Execution provider; the device's own if None.
        provider_options: Passed to the provider.
        optimization: ``all``, ``extended``, ``basic`` or ``none``.
        spinning: Let idle threads spin. Saves some microseconds per operator and keeps every core busy; off, since
            a labelling box serves other processes too.
        arena: Keep memory for intermediate tensors between runs. Off, every run allocates and frees it.
        memory_pattern: Plan one block for all intermediate tensors per set of shapes. Default: only for graphs
            without dynamic dimensions, because plans are kept for every shape ever seen.
        config: Further ``session config entries``, name to value.
    """

    provider: str | None = None
    provider_options: Mapping[str, str] = field(default_factory=dict)
    optimization: str = "all"
    spinning: bool = False
    arena: bool = True
    memory_pattern: bool | None = None
    config: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> OrtOptions:
        """Checks the names and the optimisation level; raises DeviceError on unknown ones."""
        values = dict(values or {})
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise DeviceError(f"ONNX Runtime sessions have no options {unknown}.", f"Known: {known}.")
        options = cls(**values)
        if options.optimization not in _OPTIMIZATION:
            raise DeviceError(f"Unknown optimization '{options.optimization}'.", f"Known: {sorted(_OPTIMIZATION)}.")
        return options


class OrtBinding(Binding):
    """A binding with ONNX Runtime's own object beside it."""

    def __init__(self, session: OrtSession, shapes: dict[str, Shape], outputs: dict[str, Shape], io: Any) -> None:
        super().__init__(session, shapes, outputs)
        self.io = io


class OrtSession(Session):
    """One ONNX graph in ONNX Runtime. Open it with `open_session`.

    Inputs and outputs are bound to numpy memory once; a run neither copies them nor allocates for them. The
    ``OrtValue`` of a buffer is cached in ``buffer.handle``, so an output buffer of one session bound as another's
    input is one and the same memory.

    Args:
        path: ONNX file; external weights lie beside it.
        spec: Contract of the graph, checked against the file.
        device: Where to run.
        threads: Threads per run; None leaves it to ONNX Runtime (physical cores), but no more than this process may
            use.
        options: See `OrtOptions`.

    Raises:
        MissingDependencyError: No ONNX Runtime is installed.
        BundleError: No such file.
        ContractError: The graph's inputs or outputs are not those of the contract.
        DeviceError: The file does not load, or the provider did not.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        path: Path | str,
        spec: GraphSpec,
        device: Device,
        *,
        threads: int | None = None,
        options: Mapping[str, Any] | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(spec, device)
        self._ort = load_onnxruntime()
        self._errors = _error_types(self._ort)
        self._path = Path(path)
        self._options = OrtOptions.from_dict(options)
        self._reason = reason
        if not self._path.is_file():
            raise BundleError(f"There is no graph file at '{self._path}'.", "Check the bundle with: pixano-edge verify")
        if threads is not None and threads < 1:
            raise DeviceError(
                f"A session needs at least 1 thread, got {threads}.", "Pass threads=None for the default."
            )
        self._threads = _threads(threads)
        self._provider = self._options.provider or _PROVIDERS.get(device.kind, "")
        if not self._provider:
            raise DeviceError(f"ONNX Runtime has no provider for '{device.name}' here.", "Use --device cpu.")
        self._empty: dict[str, Any] = {}
        self._session: Any = self._open()
        check_graph(
            spec,
            {node.name: (node.type, node.shape) for node in self._session.get_inputs()},
            {node.name: (node.type, node.shape) for node in self._session.get_outputs()},
        )

    def _open(self) -> Any:
        compiled = self._ort.get_available_providers()
        if self._provider not in compiled:
            raise DeviceError(
                f"This ONNX Runtime has no {self._provider}, only {compiled}.",
                "Run 'pixano-edge doctor' to see which package brings it.",
            )
        try:
            session = self._ort.InferenceSession(
                str(self._path),
                self._session_options(),
                providers=[(self._provider, dict(self._options.provider_options))],
                enable_fallback=False,
            )
        except self._errors as error:
            raise DeviceError(
                f"ONNX Runtime {self._ort.__version__} cannot load graph '{self.spec.name}': {error}",
                "Run 'pixano-edge doctor'; a newer onnxruntime may be needed, or the bundle exported again.",
            ) from error
        # Compiled in does not mean loaded: a missing CUDA library, for example, is only a log line to ONNX Runtime.
        loaded = session.get_providers()
        if loaded[0] != self._provider:
            raise DeviceError(
                f"{self._provider} was asked for but did not load; ONNX Runtime fell back to {loaded[0]}.",
                "Run 'pixano-edge doctor' to see what is missing.",
            )
        return session

    def _session_options(self) -> Any:
        ort, given = self._ort, self._options
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors come back as exceptions and need not be printed too
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _OPTIMIZATION[given.optimization])
        options.enable_cpu_mem_arena = given.arena
        options.enable_mem_reuse = True
        static = not any(s.dynamic for s in (*self.spec.inputs, *self.spec.outputs))
        options.enable_mem_pattern = static if given.memory_pattern is None else given.memory_pattern
        entries = {
            "session.intra_op.allow_spinning": str(int(given.spinning)),
            "session.inter_op.allow_spinning": str(int(given.spinning)),
            **given.config,
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, str(value))
        return options

    def _prepare_impl(self, shapes: dict[str, Shape], outputs: dict[str, Shape]) -> Binding:
        return OrtBinding(self, shapes, outputs, self._open_session().io_binding())

    def _bind_impl(self, binding: Binding, name: str, buffer: Buffer) -> None:
        assert isinstance(binding, OrtBinding)
        if name in binding.shapes:
            binding.io.bind_ortvalue_input(name, self._value(buffer))
        else:
            check_writable(buffer)
            binding.io.bind_ortvalue_output(name, self._value(buffer))

    def _unbind_impl(self, binding: Binding, name: str) -> None:
        """ONNX Runtime cannot unbind one tensor, so an empty one of the same dtype takes its place."""
        assert isinstance(binding, OrtBinding)
        dtype = self.spec.tensor(name).dtype
        empty = self._empty.get(dtype)
        if empty is None:
            empty = self._empty[dtype] = self._ort.OrtValue.ortvalue_from_numpy(np.empty(0, dtype))
        bind = binding.io.bind_ortvalue_input if name in binding.shapes else binding.io.bind_ortvalue_output
        bind(name, empty)

    def _value(self, buffer: Buffer) -> Any:
        """The buffer's OrtValue, made once; it shares the memory."""
        if not isinstance(buffer.handle, self._ort.OrtValue):
            value = self._ort.OrtValue.ortvalue_from_numpy(buffer.host())
            if buffer.nbytes and value.data_ptr() != buffer.pointer:
                raise DeviceError(
                    f"ONNX Runtime {self._ort.__version__} copied a bound buffer instead of sharing it.",
                    "Install another onnxruntime version.",
                )
            buffer.handle = value
        return buffer.handle

    def _write_impl(self, buffer: Buffer, source: Array) -> None:
        check_writable(buffer)
        np.copyto(buffer.host(), source, casting="no")

    def _run_impl(self, binding: Binding) -> None:
        assert isinstance(binding, OrtBinding)
        try:
            self._open_session().run_with_iobinding(binding.io)
        except self._errors as error:
            raise DeviceError(
                f"Graph '{self.spec.name}' failed in {self._provider}: {error}",
                "Check the bundle on this machine with: pixano-edge verify",
            ) from error

    def _read_impl(self, buffer: Buffer) -> Array:
        """The bound memory itself: no copy, overwritten by the next run."""
        return buffer.host()

    def info(self) -> dict[str, Any]:
        """Facts of the open session. ``precision`` is always the graph's own: this back end converts nothing."""
        facts = {
            "backend": self.backend,
            "version": self._ort.__version__,
            "provider": self._provider,
            "providers": self._open_session().get_providers(),
            "device": self.device.name,
            "graph": self.spec.name,
            "file": self._path.name,
            "precision": "as stored in the graph",
            "threads": self._threads or "physical cores",
            "optimization": self._options.optimization,
            "spinning": self._options.spinning,
            "warnings": [],
        }
        return {**facts, "reason": self._reason} if self._reason else facts

    def close(self) -> None:
        with self.lock:
            super().close()
            self._session = None

    def _open_session(self) -> Any:
        if self._session is None:
            raise DeviceError(f"The session of graph '{self.spec.name}' is closed.", "Open it again.")
        return self._session


def load_onnxruntime() -> ModuleType:
    """Imports ONNX Runtime at first use.

    Raises:
        MissingDependencyError: Not installed.
        DeviceError: Installed, but it does not load or its files are incomplete (two wheels overwrote each other).
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingDependencyError("onnxruntime", "cpu", "Running graphs") from error
    except ImportError as error:
        raise DeviceError(
            f"onnxruntime is installed but does not load: {error}", "Run 'pixano-edge doctor'."
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise DeviceError(
            "onnxruntime is installed but its files are incomplete.",
            "Run 'pixano-edge doctor': onnxruntime and onnxruntime-gpu may have overwritten each other.",
        )
    module: ModuleType = onnxruntime
    return module


def check_graph(
    spec: GraphSpec,
    inputs: Mapping[str, tuple[str, list[Any] | None]],
    outputs: Mapping[str, tuple[str, list[Any] | None]],
) -> None:
    """Compares what a file declares (type and shape by name) with the contract.

    A dimension that the file leaves open is accepted anywhere; a fixed one must be the contract's.

    Raises:
        ContractError: Lists every difference.
    """
    problems: list[str] = []
    for kind, specs, found in (("input", spec.inputs, inputs), ("output", spec.outputs, outputs)):
        names = {s.name for s in specs}
        problems += [f"{kind} '{n}' is missing" for n in sorted(names - set(found))]
        problems += [f"{kind} '{n}' is not in the contract" for n in sorted(set(found) - names)]
        problems += [
            f"{kind} '{s.name}' {why}" for s in specs if s.name in found for why in _differs(s, *found[s.name])
        ]
    if problems:
        raise ContractError(
            f"The file of graph '{spec.name}' does not fit its contract: {'; '.join(problems)}.",
            "Export the bundle again with this version of pixano-edge.",
        )


def _differs(spec: TensorSpec, kind: str, shape: list[Any] | None) -> list[str]:
    dtype = _DTYPES.get(kind, kind)
    if dtype != spec.dtype:
        return [f"is {dtype} instead of {spec.dtype}"]
    if shape is None:
        return []
    if len(shape) != spec.rank:
        return [f"has rank {len(shape)} {shape} instead of {spec.rank} {list(spec.dims)}"]
    return [
        f"has {got} instead of {want} in dimension {axis}"
        for axis, (want, got) in enumerate(zip(spec.dims, shape))
        if isinstance(got, int) and got != want
    ]


def _threads(asked: int | None) -> int:
    """0 means ONNX Runtime's default, which looks at the machine and not at the container's quota."""
    if asked is not None:
        return asked
    usable = usable_cpus()
    return usable if usable < (os.cpu_count() or 1) else 0


def _error_types(ort: ModuleType) -> tuple[type[Exception], ...]:
    """Everything that ONNX Runtime raises: its own types have no common base below Exception."""
    state = ort.capi.onnxruntime_pybind11_state
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError)
