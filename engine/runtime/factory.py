"""Opening devices and sessions by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..contracts.base import GraphSpec
from ..errors import DeviceError
from .base import Device, Session
from .cpu import CpuDevice
from .ort import OrtSession

BACKENDS = ("auto", "onnxruntime")
LATER_BACKENDS = ("tensorrt",)
"""Names that settings take already; opening a session with one is an error until the back end is there."""


def open_device(name: str = "auto") -> Device:
    """Opens a device.

    Args:
        name: ``auto`` or ``cpu``. `info().extra` says why ``auto`` chose what it did.

    Raises:
        DeviceError: Unknown or not available.
    """
    if name == "cpu":
        return CpuDevice()
    if name == "auto":
        return CpuDevice(reason="auto: this version of pixano-edge runs on CPUs only")
    if re.fullmatch(r"cuda(:\d+)?", name):
        raise DeviceError(f"Device '{name}' is not there yet: this version runs on CPUs only.", "Use --device cpu.")
    raise DeviceError(f"Unknown device '{name}'.", "Use auto or cpu.")


def open_session(
    path: Path | str,
    spec: GraphSpec,
    device: Device,
    *,
    backend: str = "auto",
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Session:
    """Opens one graph file on a device and checks it against its contract.

    Args:
        path: The file.
        spec: What the file must look like from outside.
        device: From `open_device`; sessions of one model share it.
        backend: ``auto`` or ``onnxruntime``.
        threads: Threads per run; None for the back end's default.
        options: Options of the back end, see `OrtOptions`.

    Raises:
        DeviceError: Unknown back end, or the file or the provider does not load.
        ContractError: The file does not fit `spec`.
        BundleError: No such file.
        MissingDependencyError: The back end is not installed.
    """
    if backend in LATER_BACKENDS:
        raise DeviceError(
            f"Back end '{backend}' is not there yet: this version has ONNX Runtime only.", "Use --backend onnxruntime."
        )
    if backend not in BACKENDS:
        raise DeviceError(f"Back end '{backend}' is not there.", f"Use one of {', '.join(BACKENDS)}.")
    reason = "auto: the only back end for CPUs so far" if backend == "auto" else ""
    return OrtSession(path, spec, device, threads=threads, options=options, reason=reason)
