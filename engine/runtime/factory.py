"""Opening devices and sessions by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..contracts.base import GraphSpec
from ..errors import DeviceError
from .base import Device, Session
from .cpu import CpuDevice
from .cuda_open import open_auto, open_named
from .engine_file import read_engine
from .ort import OrtSession
from .ort_providers import BACKENDS as ORT_BACKENDS
from .tensorrt import TrtSession

BACKENDS = ("auto", *ORT_BACKENDS, "tensorrt")


def open_device(name: str = "auto", driver: str | None = None) -> Device:
    """Opens a device.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` (the first GPU) or ``cuda:N`` in CUDA's own order. `info().extra` says why
            ``auto`` chose what it did.
        driver: Library for the CUDA calls: ``cuda-bindings``, ``pycuda`` or ``auto``; None for the environment
            variable PIXANO_EDGE_CUDA, else ``auto``.

    Raises:
        DeviceError: Unknown or not available.
        MissingDependencyError: The library for CUDA is not installed.
    """
    if name == "cpu":
        return CpuDevice()
    if name == "auto":
        return open_auto(driver)
    device = open_named(name, driver)
    if device is None:
        raise DeviceError(f"Unknown device '{name}'.", "Use auto, cpu, cuda or cuda:N.")
    return device


def open_session(
    path: Path | str,
    spec: GraphSpec,
    device: Device,
    *,
    backend: str = "auto",
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
    weight_bytes: int | None = None,
) -> Session:
    """Opens one graph file on a device and checks it against its contract.

    Args:
        path: The file: ONNX for ``onnxruntime``, an ``*.engine`` of `pixano-edge build` for ``tensorrt``.
        spec: What the file must look like from outside.
        device: From `open_device`; sessions of one model share it.
        backend: ``auto``, ``onnxruntime`` (the device's own provider: CPU or CUDA), ``onnxruntime-tensorrt``,
            ``onnxruntime-tensorrt-rtx``, ``onnxruntime-openvino``, or ``tensorrt``; ``auto`` never takes an engine
            file by itself.
        threads: Threads per run on a CPU; None for the back end's default. TensorRT has none.
        options: Options of the back end, see `OrtOptions` and `TrtOptions`.
        weight_bytes: See `OrtSession`; an engine file tells it itself.

    Raises:
        DeviceError: Unknown back end, or the file or the provider does not load.
        ContractError: The file does not fit `spec`.
        BundleError: No such file.
        MissingDependencyError: The back end is not installed.
    """
    if backend not in BACKENDS:
        raise DeviceError(f"Back end '{backend}' is not there.", f"Use one of {', '.join(BACKENDS)}.")
    if backend == "tensorrt":
        return open_engine(Path(path), spec, device, options)
    if provider := ORT_BACKENDS.get(backend):
        options = dict(options or {})
        if options.setdefault("provider", provider) != provider:
            raise DeviceError(
                f"Back end '{backend}' is not provider '{options['provider']}'.", "Use --backend onnxruntime with it."
            )
    reason = "auto: the back end for ONNX files" if backend == "auto" else ""
    return OrtSession(path, spec, device, threads=threads, options=options, weight_bytes=weight_bytes, reason=reason)


def open_engine(
    path: Path, spec: GraphSpec, device: Device, options: Mapping[str, Any] | None = None, reason: str = ""
) -> TrtSession:
    """Opens an engine file with TensorRT; errors as of `open_session`."""
    header, engine = read_engine(path)
    return TrtSession(engine, spec, device, metadata={"file": path.name, **header.key}, options=options, reason=reason)
