"""Execution providers of ONNX Runtime: which one a name means, what it is given, and loading the plug-in ones.

Option names are those of onnxruntime-gpu 1.31, onnxruntime-ep-nv-tensorrt-rtx 0.5 and onnxruntime-ep-openvino 1.8.
The CUDA provider was run on an H100; TensorRT's and the RTX plug-in were not run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..contracts.base import GraphSpec
from ..errors import DeviceError, MissingDependencyError
from .base import Device
from .ort_cache import cache_folder, cache_key, default_root, profile_shapes, tensorrt_version
from .ort_check import error_types
from .ort_options import OPENVINO_PRECISIONS, OrtOptions


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        name: Our name.
        ep: ONNX Runtime's name.
        kinds: Kinds of device it works on; empty where we do not know the provider.
        extra: Extra of pixano-edge that installs it.
        module: Python module of a plug-in, which ONNX Runtime loads at run time; empty for built-in ones.
    """

    name: str
    ep: str
    kinds: tuple[str, ...]
    extra: str = ""
    module: str = ""


PROVIDERS = (
    Provider("cpu", "CPUExecutionProvider", ("cpu",), "cpu"),
    Provider("cuda", "CUDAExecutionProvider", ("cuda",), "cuda"),
    Provider("tensorrt", "TensorrtExecutionProvider", ("cuda",), "cuda"),
    Provider(
        "tensorrt-rtx",
        "NvTensorRTRTXExecutionProvider",
        ("cuda",),
        "onnxruntime-tensorrt-rtx",
        "onnxruntime_ep_nv_tensorrt_rtx",
    ),
    Provider("openvino", "OpenVINOExecutionProvider", ("cpu",), "openvino", "onnxruntime_ep_openvino"),
)
"""The first one of a device kind is its default."""

OWN, OPENVINO = "onnxruntime", "onnxruntime-openvino"
BACKENDS = {
    OWN: None,
    "onnxruntime-tensorrt": "tensorrt",
    "onnxruntime-tensorrt-rtx": "tensorrt-rtx",
    OPENVINO: "openvino",
}
"""Names that `open_session(backend=...)` takes for ONNX Runtime -> provider; None is the device's own."""

_REDUCED = ("trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable", "fp16_enable", "prefer_bf16")
_registering = threading.Lock()


def backend_name(provider: Provider) -> str:
    """Of `BACKENDS`, the one that a provider is."""
    return next((name for name, each in BACKENDS.items() if each == provider.name), OWN)


def stored_precision(backend: str, precision: str, held: Collection[str]) -> str:
    """Precision of the files that are run for one: OpenVINO computes fp32's in bf16 where `held` has no others."""
    return "fp32" if (backend, precision) == (OPENVINO, "bf16") and precision not in held else precision


def find_provider(name: str | None, device: Device) -> Provider:
    """The provider for a name of ours, a full name of ONNX Runtime's, or None for the device's own.

    Raises:
        DeviceError: None for this device, or a provider of ours on a device that it does not know.
    """
    if name is None:
        for provider in PROVIDERS:
            if device.kind in provider.kinds:
                return provider
        raise DeviceError(f"ONNX Runtime has no provider for '{device.name}' here.", "Use --device cpu.")
    for provider in PROVIDERS:
        if name in (provider.name, provider.ep) and device.kind in provider.kinds:
            return provider
        if name == provider.name:
            raise DeviceError(
                f"Provider '{name}' runs on {' or '.join(provider.kinds)}, not on '{device.name}'.",
                f"Use --device {provider.kinds[0]}.",
            )
    if name.endswith("ExecutionProvider"):
        return Provider(name, name, ())
    raise DeviceError(f"Unknown provider '{name}'.", f"Known: {', '.join(p.name for p in PROVIDERS)}.")


def provider_options(
    provider: Provider, ort: ModuleType, path: Path, spec: GraphSpec, device: Device, given: OrtOptions, threads: int
) -> dict[str, dict[str, str]]:
    """Options by full name, of the provider and of those that may take nodes which it leaves, in order.

    Raises:
        DeviceError: No stream, no TensorRT, or the engine folder cannot be written.
        ContractError: An input has an open dimension without a range.
    """
    own = {str(k): str(v) for k, v in given.provider_options.items()}
    if provider.name == "cuda":
        return {provider.ep: {**_cuda(device, given), **own}}
    if provider.name == "openvino":
        return {provider.ep: {**_openvino(given, threads), **own}}
    if provider.name not in ("tensorrt", "tensorrt-rtx"):
        return {provider.ep: own}
    shapes = profile_shapes(spec)
    versions = {"onnxruntime": str(ort.__version__)}
    if provider.name == "tensorrt":
        versions["tensorrt"] = tensorrt_version()
        options = {"device_id": str(_index(device)), **_stream(device), "trt_engine_cache_enable": "1"}
        options |= {"trt_timing_cache_enable": "1"}
        options |= {f"trt_profile_{which}_shapes": text for which, text in shapes.items()}
        if given.memory_limit is not None:
            options["trt_max_workspace_size"] = str(given.memory_limit)
    else:
        versions[provider.module] = str(getattr(_plugin(provider), "__version__", "unknown"))
        # Without the last one, scratch memory is taken from the driver and given back at each run.
        options = {**_stream(device), "nv_persistent_context_memory": "1"}
        options |= {f"nv_profile_{which}_shapes": text for which, text in shapes.items()}
    options |= own
    root = Path(given.cache_dir).expanduser() if given.cache_dir is not None else default_root()
    folder = str(cache_folder(root, spec.name, cache_key(path, device.info(), versions, options)))
    if provider.name == "tensorrt-rtx":
        return {provider.ep: {"nv_runtime_cache_path": folder, **options}}
    paths = {"trt_engine_cache_path": folder, "trt_timing_cache_path": folder}
    # What TensorRT leaves runs on the same GPU and stream, and is counted in the warnings.
    return {provider.ep: {**paths, **options}, "CUDAExecutionProvider": _cuda(device, given)}


def _index(device: Device) -> int:
    return device.info().index


def _stream(device: Device) -> dict[str, str]:
    if not device.stream:
        raise DeviceError(
            f"'{device.name}' has no stream of its own, and the default stream would stop every other one.",
            "Open the device with open_device.",
        )
    return {"has_user_compute_stream": "1", "user_compute_stream": str(device.stream)}


def _cuda(device: Device, given: OrtOptions) -> dict[str, str]:
    options = {
        "device_id": str(_index(device)),
        **_stream(device),
        # EXHAUSTIVE, the default, times every cuDNN algorithm again for each new shape.
        "cudnn_conv_algo_search": "HEURISTIC",
        # The default doubles each extension of the arena; what one model over-reserves, the next one lacks.
        "arena_extend_strategy": "kSameAsRequested",
        # Copies on the compute stream: with 0 ONNX Runtime uses streams that nobody orders against ours.
        "do_copy_in_default_stream": "1",
        "use_tf32": str(int(given.tf32)),
        "enable_cuda_graph": str(int(given.cuda_graph)),
    }
    if given.memory_limit is not None:
        options["gpu_mem_limit"] = str(given.memory_limit)
    return options


def _openvino(given: OrtOptions, threads: int) -> dict[str, str]:
    """OpenVINO computes in bf16 unasked where the CPU can; the plug-in takes a precision in ``load_config`` alone."""
    hint = OPENVINO_PRECISIONS[given.precision or "fp32"]
    properties = {"INFERENCE_PRECISION_HINT": hint} if hint else {}
    if threads:
        properties["INFERENCE_NUM_THREADS"] = str(threads)
    return {"load_config": json.dumps({"CPU": properties})} if properties else {}


def precision_text(provider: Provider, given: OrtOptions) -> str:
    """What `OrtSession.info` says about the precision of float32 operators."""
    if provider.name == "openvino":
        if "load_config" in given.provider_options:
            return "as the provider option load_config says"
        asked = given.precision or "fp32"
        return "chosen by OpenVINO, on many CPUs bf16" if asked == "auto" else f"{asked} where the graph has fp32"
    changed = [k for k in _REDUCED if str(given.provider_options.get(k, "0")).lower() in ("1", "true")]
    if changed:
        return f"changed by the provider options {', '.join(changed)}"
    if provider.name == "cuda" and given.tf32:
        return "as stored in the graph, float32 convolutions and matrix products in TF32"
    return "as stored in the graph"


def precision_warnings(provider: Provider) -> list[str]:
    """What a provider does to float32 and cannot be told not to do."""
    if provider.name in ("tensorrt", "tensorrt-rtx"):
        return ["TensorRT may compute float32 matrix products and convolutions in TF32; this provider has no switch"]
    return []


def preload(ort: ModuleType) -> str:
    """Loads the CUDA and cuDNN libraries that came as Python wheels, so that the provider finds them.

    Returns:
        The libraries that were not found, as text. Whether they were needed shows when the session opens.
    """
    if not hasattr(ort, "preload_dlls"):  # before 1.21, and system builds
        return ""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            ort.preload_dlls(directory="")
        except (OSError, RuntimeError) as error:
            return str(error)
    absent = re.findall(r"Failed to load (\S+?):", printed.getvalue())
    return f"not found: {', '.join(absent)}" if absent else ""


def plugin_device(ort: ModuleType, provider: Provider, device: Device) -> Any:
    """Loads a plug-in provider once per process and returns its handle of our device.

    Raises:
        MissingDependencyError: The plug-in's wheel is not installed.
        DeviceError: This ONNX Runtime takes no plug-ins, the library does not load, or it does not know the device.
    """
    module = _plugin(provider)
    if not hasattr(ort, "register_execution_provider_library"):
        raise DeviceError(
            f"onnxruntime {ort.__version__} takes no plug-in providers such as {provider.ep}.",
            "Install onnxruntime 1.24 or newer.",
        )
    with _registering:
        if not _devices(ort, provider):
            try:
                ort.register_execution_provider_library(provider.ep, module.get_library_path())
            except error_types(ort) as error:
                # Registered before, with no device for it here: the check below says so.
                if "already registered" not in str(error):
                    raise DeviceError(f"{provider.ep} does not load: {error}", "Run 'pixano-edge doctor'.") from error
        found = _devices(ort, provider)
    kind = "GPU" if "cuda" in provider.kinds else "CPU"
    fitting = [d for d in found if d.device.type.name == kind and d.ep_metadata.get("ov_device", kind) == kind]
    if not fitting:
        takes = "Intel processors only" if provider.name == "openvino" else "NVIDIA RTX GPUs (Ampere or newer) only"
        raise DeviceError(f"{provider.ep} offers no {kind} here; it takes {takes}.", "Use --backend onnxruntime.")
    if kind == "CPU" or len(fitting) == 1:
        return fitting[0]
    index = str(_index(device))
    for candidate in fitting:
        named: Mapping[str, str] = {**candidate.ep_metadata, **candidate.ep_options}
        if named.get("device_id", named.get("cuda_device_id")) == index:
            return candidate
    raise DeviceError(
        f"{provider.ep} offers {len(fitting)} GPUs and does not say which one is '{device.name}'.",
        f"Hide the others: CUDA_VISIBLE_DEVICES={index}, then use cuda:0.",
    )


def _devices(ort: ModuleType, provider: Provider) -> list[Any]:
    return [d for d in ort.get_ep_devices() if d.ep_name == provider.ep]


def _plugin(provider: Provider) -> ModuleType:
    try:
        return importlib.import_module(provider.module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(provider.module, provider.extra, f"Provider '{provider.name}'") from error
