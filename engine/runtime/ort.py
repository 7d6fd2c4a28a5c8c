"""ONNX Runtime back end: one `InferenceSession` per graph, one `IOBinding` per set of shapes.

On a CPU tensors are bound as OrtValues over numpy memory. On a GPU they are bound by address and everything runs on the
device's stream. A run there ends with a wait for the stream: without it ONNX Runtime keeps the host memory that some
kernels read until the session closes, and then frees it from a CUDA callback, which ends the process ("operation not
permitted" in cudaFreeHost; seen with onnxruntime-gpu 1.27 on an H100). Recorded launches do not wait.

ONNX Runtime is imported when the first session opens, never before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..contracts.base import GraphSpec
from ..errors import BundleError, DeviceError, DeviceMemoryError
from .base import Array, Binding, Buffer, Device, Session, Shape
from .cpu import check_writable
from .memory import MemoryUse, graph_bytes, is_out_of_memory
from .ort_check import check_graph, error_types, load_onnxruntime
from .ort_graphs import EAGER, RECORDED, GraphNumbers
from .ort_options import ERROR, FATAL, INT32_BIASES, OrtOptions, session_options, thread_count
from .ort_placement import CPU, NO_CPU, RECORD, Placement, check_placement, read_placement, tells_placement
from .ort_providers import (
    backend_name,
    find_provider,
    plugin_device,
    precision_text,
    precision_warnings,
    preload,
    provider_options,
)

__all__ = ["OrtBinding", "OrtOptions", "OrtSession", "check_graph", "load_onnxruntime"]


class OrtBinding(Binding):
    """A binding with ONNX Runtime's own object beside it.

    Attributes:
        io: The ``IOBinding``.
        addresses: On a GPU, what ONNX Runtime was given for each tensor.
    """

    def __init__(self, session: OrtSession, shapes: dict[str, Shape], outputs: dict[str, Shape], io: Any) -> None:
        super().__init__(session, shapes, outputs)
        self.io = io
        self.addresses: dict[str, int] = {}
        self.state: tuple[Any, ...] | None = None
        """Shapes and addresses, what a captured graph depends on; None after a change."""


class OrtSession(Session):
    """One ONNX graph in ONNX Runtime. Open it with `open_session`.

    Inputs and outputs are bound once; a run neither copies them nor allocates for them, but for providers on the CPU
    with memory of their own (OpenVINO), which warn. On a CPU the ``OrtValue`` of a buffer is cached in
    ``buffer.handle``; on a GPU addresses are bound. Either way an output buffer of one session bound as another's input
    is one and the same memory.

    After loading, the session is refused unless its provider really runs the graph: it must be the first one that
    loaded, have nodes, and leave the CPU nothing but shape computations (see `OrtOptions.allow_cpu_nodes`).

    With the option ``cuda_graph``, ONNX Runtime captures the second run with the same shapes and addresses, and
    replays from the third on. Binding another buffer never replays: it leads to another graph or to a plain run.

    Args:
        path: ONNX file; external weights lie beside it.
        spec: Contract of the graph, checked against the file.
        device: Where to run.
        threads: Threads per run; None leaves it to ONNX Runtime (physical cores), but no more than this process may
            use; 1 on a GPU.
        options: See `OrtOptions`.
        weight_bytes: Bytes of the weights once loaded, where the file and those named after it do not tell: they lie
            in another graph's file, or in a narrower type.

    Raises:
        MissingDependencyError: No ONNX Runtime, or the plug-in provider, is installed.
        BundleError: No such file.
        ContractError: The graph's inputs or outputs are not those of the contract.
        DeviceError: The file does not load, or the provider did not, or does not run the graph.
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
        weight_bytes: int | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(spec, device)
        self._ort = load_onnxruntime()
        self._errors = error_types(self._ort)
        self._path = Path(path)
        self._options = OrtOptions.from_dict(options)
        self._reason = reason
        if not self._path.is_file():
            raise BundleError(f"There is no graph file at '{self._path}'.", "Check the bundle with: pixano-edge verify")
        # Now: the file may be gone while the session goes on.
        self._weights = graph_bytes(self._path) if weight_bytes is None else weight_bytes
        self._on_gpu = device.kind == "cuda"
        self._threads = thread_count(threads, self._on_gpu)
        self._provider = find_provider(self._options.provider, device)
        self.backend = backend_name(self._provider)
        self._check_options()
        self._empty: dict[str, Any] = {}
        self._run_options: dict[int, Any] = {}
        self._graphs = GraphNumbers(self._options.max_graphs) if self._options.cuda_graph else None
        self._placement: Placement | None = None
        self._cpu_outputs: list[str] = []
        self._copied: list[str] = []
        """Inputs that a provider on the CPU reads in memory of its own; what is bound is copied there."""
        self.warnings = precision_warnings(self._provider)
        self._session: Any = None
        with device.current():
            self._session = self._open()
            try:
                self._check(self._session)
            except BaseException:  # whatever it is, the GPU's memory is given back
                self._session = None
                raise
        self.self_recording = self._graphs is not None
        self.capturable = self._can_be_captured()
        if not self._on_gpu:
            _trim()

    def _check_options(self) -> None:
        given, name = self._options, self._provider.name
        if given.cuda_graph and name != "cuda":
            raise DeviceError(
                f"Option 'cuda_graph' is for the provider cuda, not for {name}.",
                "Open it without, or use --backend tensorrt, which captures by itself.",
            )
        if given.precision is not None and name != "openvino":
            raise DeviceError(
                f"Option 'precision' is for the provider openvino, not for {name}: others compute what the graph says.",
                "Choose the bundle's precision variant instead: --precision",
            )

    def _open(self) -> Any:
        ort, given, provider = self._ort, self._options, self._provider
        options = session_options(ort, given, self._threads)
        if provider.ep != CPU and tells_placement(ort):
            options.add_session_config_entry(*RECORD)
        elif provider.ep != CPU and not given.allow_cpu_nodes:
            options.add_session_config_entry(*NO_CPU)
        missing, providers = "", None
        if provider.module:
            handle = plugin_device(ort, provider, self.device)
        elif provider.ep not in (compiled := ort.get_available_providers()):
            raise DeviceError(
                f"This ONNX Runtime has no {provider.ep}, only {compiled}.",
                "Run 'pixano-edge doctor' to see which package brings it.",
            )
        elif self._on_gpu:
            missing = preload(ort)
        chosen = provider_options(provider, ort, self._path, self.spec, self.device, given, self._threads)
        if self._on_gpu:
            ort.set_default_logger_severity(ERROR)  # a warning would tell that CUDA's provider is no plug-in
        try:
            if provider.module:
                options.add_provider_for_devices([handle], chosen[provider.ep])
            else:
                providers = list(chosen.items())
            left_out = [INT32_BIASES] if self._on_gpu else []
            session = ort.InferenceSession(
                str(self._path), options, providers=providers, enable_fallback=False, disabled_optimizers=left_out
            )
        except self._errors as error:
            raise self._error(
                f"ONNX Runtime {ort.__version__} cannot load graph '{self.spec.name}'", error,
                "Run 'pixano-edge doctor'; a newer onnxruntime may be needed, or the bundle exported again.",
            ) from error  # fmt: skip
        # Compiled in does not mean loaded: a missing CUDA library, for example, is only a log line to ONNX Runtime.
        loaded = session.get_providers()
        if loaded[0] != provider.ep:
            why = f" ({missing})" if missing else ""
            raise DeviceError(
                f"{provider.ep} was asked for but did not load; ONNX Runtime fell back to {loaded[0]}{why}.",
                "Run 'pixano-edge doctor' to see what is missing.",
            )
        if self._on_gpu:
            # From here on it would print each cuDNN plan that it does without; what fails is an exception besides.
            ort.set_default_logger_severity(FATAL)
        return session

    def _check(self, session: Any) -> None:
        """The file against the contract, and the provider against what was asked for."""
        check_graph(
            self.spec,
            {node.name: (node.type, node.shape) for node in session.get_inputs()},
            {node.name: (node.type, node.shape) for node in session.get_outputs()},
        )
        if self._provider.ep == CPU:
            return
        allow = self._options.allow_cpu_nodes
        if tells_placement(self._ort):
            self._placement = read_placement(session)
            self.warnings += check_placement(self._placement, self._provider.ep, self.spec.name, allow_cpu_nodes=allow)
        elif allow:
            self.warnings.append("this ONNX Runtime cannot tell which nodes run on the CPU (1.24 and newer can)")
        if not hasattr(session, "get_input_memory_infos"):  # before 1.23
            return
        if self._on_gpu:
            self._check_memory(session)
            return
        infos = zip(session.get_inputs(), session.get_input_memory_infos())
        self._copied = [node.name for node, info in infos if info.name.lower() != "cpu"]
        if self._copied:
            self.warnings.append(f"inputs {self._copied} are copied into memory of {self._provider.ep} at every run")

    def _check_memory(self, session: Any) -> None:
        def on_cpu(nodes: Any, infos: Any) -> list[str]:
            return [node.name for node, info in zip(nodes, infos) if info.name.lower() == "cpu"]

        # ONNX Runtime would copy such an input once, when it is bound, and every later run would see the old values.
        if inputs := on_cpu(session.get_inputs(), session.get_input_memory_infos()):
            raise DeviceError(
                f"Graph '{self.spec.name}' reads {inputs} on the CPU, or not at all.",
                "Export it so that these inputs are used on the GPU, or use --device cpu.",
            )
        self._cpu_outputs = on_cpu(session.get_outputs(), session.get_output_memory_infos())
        if self._cpu_outputs:
            self.warnings.append(f"outputs {self._cpu_outputs} come from the CPU and are copied at every run")

    def _can_be_captured(self) -> bool:
        """A recording holds what the CPU did at capture, so nothing may have run there."""
        if self._provider.name != "cuda" or self._graphs is not None or self._placement is None:
            return False
        return not self._placement.counts.get(CPU) and not self._cpu_outputs

    def _prepare_impl(self, shapes: dict[str, Shape], outputs: dict[str, Shape]) -> Binding:
        return OrtBinding(self, shapes, outputs, self._open_session().io_binding())

    def _bind_impl(self, binding: Binding, name: str, buffer: Buffer) -> None:
        assert isinstance(binding, OrtBinding)
        is_input = name in binding.shapes
        if not is_input:
            check_writable(buffer)
        if not self._on_gpu:
            bind = binding.io.bind_ortvalue_input if is_input else binding.io.bind_ortvalue_output
            bind(name, self._value(buffer))
            return
        bind = binding.io.bind_input if is_input else binding.io.bind_output
        index = int(self.device.name.rpartition(":")[2])
        try:
            bind(name, "cuda", index, buffer.dtype.type, buffer.shape, buffer.pointer)
        except self._errors as error:
            raise self._error(f"ONNX Runtime cannot bind '{name}' of graph '{self.spec.name}'", error) from error
        binding.addresses[name] = buffer.pointer
        binding.state = None

    def _unbind_impl(self, binding: Binding, name: str) -> None:
        """ONNX Runtime cannot unbind one tensor. On a CPU an empty one of the same dtype takes its place, so that the
        memory is let go; on a GPU it holds a bare address, which no run uses until another one is bound."""
        assert isinstance(binding, OrtBinding)
        if self._on_gpu:
            binding.addresses.pop(name, None)
            binding.state = None
            return
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
        self.device.upload(buffer, source)

    def _run_impl(self, binding: Binding) -> None:
        assert isinstance(binding, OrtBinding)
        session = self._open_session()
        try:
            for name in self._copied:
                binding.io.bind_ortvalue_input(name, self._value(binding.inputs[name]))
            with self.device.current():
                session.run_with_iobinding(binding.io, self._options_of_run(binding))
        except self._errors as error:
            raise self._error(f"Graph '{self.spec.name}' failed in {self._provider.ep}", error) from error

    def _options_of_run(self, binding: OrtBinding) -> Any:
        """None on a CPU; made once per graph number elsewhere."""
        if not self._on_gpu:
            return None
        number = EAGER
        if self.device.capturing:
            number = RECORDED
        elif self._graphs is not None:
            if binding.state is None:
                tensors = self._tensors
                shapes = tuple(binding._expected[t.name] for t in tensors)
                binding.state = (shapes, tuple(binding.addresses[t.name] for t in tensors))
            number = self._graphs.number(binding.state)
        options = self._run_options.get(number)
        if options is None:
            options = self._ort.RunOptions()
            if number == RECORDED:
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            if self._graphs is not None:
                options.add_run_config_entry("gpu_graph_id", str(max(number, EAGER)))
            self._run_options[number] = options
        return options

    def _read_impl(self, buffer: Buffer) -> Array:
        """On CPU the bound memory itself: no copy, overwritten by the next run."""
        return self.device.download(buffer)

    def memory(self) -> MemoryUse:
        """Weights, as was said at opening or as large as the file; what else ONNX Runtime takes is not known."""
        return MemoryUse(weights=self._weights)

    def end_profile(self) -> Path:
        """Ends the profile that the option ``profile`` asked for, and returns its file (see `read_profile`).

        Raises:
            DeviceError: The session was opened without it.
        """
        if self._options.profile is None:
            raise DeviceError("The session is not being profiled.", "Open it with the option profile.")
        with self.lock:
            return Path(self._open_session().end_profiling())

    def info(self) -> dict[str, Any]:
        """Facts of the open session; JSON-ready. ``nodes`` counts nodes by provider, None where it is not known."""
        providers = self._open_session().get_providers()
        facts = {
            "backend": self.backend,
            "version": self._ort.__version__,
            "provider": self._provider.ep,
            "providers": providers,
            "nodes": None if self._placement is None else self._placement.counts,
            "device": self.device.name,
            "graph": self.spec.name,
            "file": self._path.name,
            "precision": precision_text(self._provider, self._options),
            "threads": self._threads or "physical cores",
            "optimization": self._options.optimization,
            "spinning": self._options.spinning,
            "warnings": self._all_warnings(),
        }
        if self._graphs is not None:
            facts["graphs"] = len(self._graphs)
        return {**facts, "reason": self._reason} if self._reason else facts

    def _all_warnings(self) -> list[str]:
        if self._graphs is None or not self._graphs.refused:
            return list(self.warnings)
        text = f"{self._graphs.refused} runs without a CUDA graph: {self._graphs.limit} are kept (option max_graphs)"
        return [*self.warnings, text]

    def close(self) -> None:
        with self.lock:
            if self._session is not None and self._on_gpu:
                self.device.synchronize()  # queued work still uses weights and buffers
            super().close()
            self._session = None

    def _open_session(self) -> Any:
        if self._session is None:
            raise DeviceError(f"The session of graph '{self.spec.name}' is closed.", "Open it again.")
        return self._session

    def _error(self, what: str, error: BaseException, action: str = "") -> DeviceError:
        message = f"{what}: {error}"
        if is_out_of_memory(DeviceError(str(error))):
            return DeviceMemoryError(message, "Unload other models, or run fewer prompts at a time.")
        return DeviceError(message, action or "Check the bundle on this machine with: pixano-edge verify")


def _trim() -> None:
    """Gives back what parsing the graph left in the C heap: a fifth of the weights on a 64 MiB graph (glibc alone)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
