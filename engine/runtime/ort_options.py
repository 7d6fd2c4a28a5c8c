"""What `open_session(options=...)` may set for ONNX Runtime, and the session options made from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any

from ..errors import DeviceError
from ..machine import usable_cpus

_OPTIMIZATION = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "none": "ORT_DISABLE_ALL",
}

OPENVINO_PRECISIONS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "auto": None}
"""Our names -> OpenVINO's ``INFERENCE_PRECISION_HINT``; with ``auto`` OpenVINO chooses, on many CPUs bf16."""


@dataclass(frozen=True)
class OrtOptions:
    """What `open_session(options=...)` may set for ONNX Runtime.

    Attributes:
        provider: ``cpu``, ``cuda``, ``tensorrt``, ``tensorrt-rtx`` or ``openvino``; the device's own (cpu or cuda) if
            None. The full name of another execution provider is taken as it is, with `provider_options` alone.
        provider_options: Passed to the provider; they win over what the other options say.
        allow_cpu_nodes: Accept that nodes which compute more than shapes run on the CPU. They are counted in
            `OrtSession.info` either way; without it they are an error, because every one of them copies tensors
            between host and device at each run.
        optimization: ``all``, ``extended``, ``basic`` or ``none``.
        spinning: Let idle threads spin. Saves some microseconds per operator and keeps every core busy; off, since
            a labelling box serves other processes too.
        arena: Keep memory for intermediate tensors between runs. Off, every run allocates and frees it.
        memory_pattern: Plan one block for all intermediate tensors per set of shapes. Off: the block comes on top of
            the memory that the first run took piece by piece and that the arena keeps, so a session then holds twice
            what it needs (seen on onnxruntime 1.32: 115 MiB against 57 MiB), and plans are kept for every shape.
        memory_limit: Most bytes that the provider's arena (cuda, tensorrt) takes on the GPU; TensorRT's scratch
            memory at build time too. Weights and cuDNN's own memory come on top. None: no limit.
        tf32: Let CUDA compute float32 convolutions and matrix products in TF32, with 10 bits of mantissa. ONNX
            Runtime's default is on; here off, so that fp32 graphs keep the accuracy that they were verified with.
        cuda_graph: Let ONNX Runtime capture and replay CUDA graphs by itself (provider cuda). Sessions without it can
            be captured by `Device.capture`, which is what models do; use this where that is not offered because
            shapes are computed on the CPU. ONNX Runtime then checks by itself that no tensor is copied, waits for
            the stream at each replay (in most versions), and captures once per calling thread; while it captures,
            nothing else in the process may allocate GPU memory.
        max_graphs: With `cuda_graph`, most graphs kept. ONNX Runtime does not free them before the session closes.
        precision: OpenVINO only: ``fp32`` (default), ``fp16``, ``bf16``, or ``auto``, which lets OpenVINO choose.
        cache_dir: Where TensorRT keeps engines between processes, one folder per graph, shapes, versions and GPU.
            Default: ``$PIXANO_EDGE_HOME/engines/onnxruntime`` or ``~/.cache/pixano-edge/engines/onnxruntime``.
        profile: Prefix of a file that ONNX Runtime writes its profile to, see `OrtSession.end_profile`.
        config: Further ``session config entries``, name to value.
    """

    provider: str | None = None
    provider_options: Mapping[str, str] = field(default_factory=dict)
    allow_cpu_nodes: bool = False
    optimization: str = "all"
    spinning: bool = False
    arena: bool = True
    memory_pattern: bool = False
    memory_limit: int | None = None
    tf32: bool = False
    cuda_graph: bool = False
    max_graphs: int = 8
    precision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    profile: str | None = None
    config: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> OrtOptions:
        """Checks names and values; raises DeviceError on unknown ones."""
        values = dict(values or {})
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise DeviceError(f"ONNX Runtime sessions have no options {unknown}.", f"Known: {known}.")
        options = cls(**values)
        if options.optimization not in _OPTIMIZATION:
            raise DeviceError(f"Unknown optimization '{options.optimization}'.", f"Known: {sorted(_OPTIMIZATION)}.")
        if options.precision is not None and options.precision not in OPENVINO_PRECISIONS:
            raise DeviceError(f"Unknown precision '{options.precision}'.", f"Known: {', '.join(OPENVINO_PRECISIONS)}.")
        for name, least in (("memory_limit", 1), ("max_graphs", 1)):
            value = getattr(options, name)
            if value is not None and value < least:
                raise DeviceError(f"Option '{name}' is {value}.", f"Use at least {least}.")
        return options


ERROR, FATAL = 3, 4
"""Severities of ONNX Runtime's loggers; the second prints only what ends the process."""
INT32_BIASES = "WeightBiasQuantization"
"""The optimiser that makes biases of quantised convolutions int32, as the CPU's kernels want them. CUDA has no kernel
that reads them, and TensorRT refuses them."""


def session_options(ort: ModuleType, given: OrtOptions, threads: int) -> Any:
    """ONNX Runtime's ``SessionOptions`` without providers.

    Args:
        ort: The module.
        given: What was asked for.
        threads: From `thread_count`.
    """
    options = ort.SessionOptions()
    options.log_severity_level = FATAL  # errors come back as exceptions and need not be printed too
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _OPTIMIZATION[given.optimization])
    options.enable_cpu_mem_arena = given.arena
    options.enable_mem_reuse = True
    options.enable_mem_pattern = given.memory_pattern
    if given.profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = given.profile
    entries = {
        "session.intra_op.allow_spinning": str(int(given.spinning)),
        "session.inter_op.allow_spinning": str(int(given.spinning)),
        **given.config,
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, str(value))
    return options


def thread_count(asked: int | None, on_gpu: bool) -> int:
    """Threads per run; 0 means ONNX Runtime's default, which looks at the machine and not at the container's quota.

    On a GPU one thread is enough: it launches, and at most a few shape computations run on it.

    Raises:
        DeviceError: Fewer than one was asked for.
    """
    if asked is not None:
        if asked < 1:
            raise DeviceError(f"A session needs at least 1 thread, got {asked}.", "Pass threads=None for the default.")
        return asked
    if on_gpu:
        return 1
    usable = usable_cpus()
    return usable if usable < (os.cpu_count() or 1) else 0
