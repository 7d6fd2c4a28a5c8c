"""Choosing the library for CUDA calls, and whether device ``auto`` is a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass

from ..errors import DeviceError, EdgeError
from .base import Device
from .cpu import CpuDevice
from .cuda import CudaDevice
from .cuda_api import BindingsApi
from .cuda_calls import CudaApi
from .ort import load_onnxruntime
from .pycuda import PycudaApi, PycudaDevice

DRIVERS = ("auto", "cuda-bindings", "pycuda")
DRIVER_VARIABLE = "PIXANO_EDGE_CUDA"
"""Environment variable with one of `DRIVERS`, for those that ask for none."""

_TENSORRT = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
_GPU_PROVIDERS = {"CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"}


def choose_driver(driver: str | None = None) -> str:
    """``cuda-bindings`` or ``pycuda``: what is asked, else the first that is installed, cuda-bindings if none is.

    Args:
        driver: One of `DRIVERS`; None for the environment's word.

    Raises:
        DeviceError: Unknown name.
    """
    asked = driver or os.environ.get(DRIVER_VARIABLE) or "auto"
    if asked not in DRIVERS:
        raise DeviceError(
            f"'{asked}' is no library for CUDA.", f"Set {DRIVER_VARIABLE} to one of {', '.join(DRIVERS)}."
        )
    if asked != "auto":
        return asked
    return "pycuda" if _installed("pycuda") and not _installed("cuda.bindings") else "cuda-bindings"


def open_cuda_api(driver: str | None = None) -> CudaApi:
    """The library's calls, without a device; errors as of `open_cuda`."""
    return PycudaApi() if choose_driver(driver) == "pycuda" else BindingsApi()


def open_cuda(index: int, driver: str | None = None, reason: str = "") -> CudaDevice:
    """Opens ``cuda:index``.

    Raises:
        MissingDependencyError: The library is not installed.
        DeviceError: Unknown library, no driver, or no such device.
    """
    if choose_driver(driver) == "pycuda":
        return PycudaDevice(index, reason=reason)
    return CudaDevice(index, reason=reason)


def open_named(name: str, driver: str | None = None) -> CudaDevice | None:
    """Opens ``cuda`` (the first GPU) or ``cuda:N``; None for any other name."""
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    return None if match is None else open_cuda(int(match[1] or 0), driver)


def gpu_backends() -> list[str]:
    """Back ends here that can run on a GPU: ONNX Runtime when a provider for it is compiled in, TensorRT."""
    found = []
    try:
        if _GPU_PROVIDERS & set(load_onnxruntime().get_available_providers()):
            found.append("onnxruntime")
    except EdgeError:
        pass  # without ONNX Runtime TensorRT still serves; opening a session says what is missing
    if any(_installed(module) for module in _TENSORRT):
        found.append("tensorrt")
    return found


@dataclass(frozen=True)
class AutoDevice:
    """What device ``auto`` is.

    Attributes:
        gpus: Names of the GPUs that it may take; empty when it is the CPU.
        reason: Why.
        action: What would make it a GPU, where something can be done.
    """

    gpus: tuple[str, ...]
    reason: str
    action: str = ""


def auto_device(driver: str | None = None) -> AutoDevice:
    """Looks whether ``auto`` can be a GPU; initialises the CUDA driver but opens no device."""
    try:
        api = open_cuda_api(driver)
        names = tuple(f"cuda:{index}" for index in range(api.count()))
    except EdgeError as error:
        return AutoDevice((), f"no CUDA device can be used: {error.message}", error.action)
    if not names:
        return AutoDevice((), "CUDA sees no device", "Look at CUDA_VISIBLE_DEVICES.")
    backends = gpu_backends()
    if not backends:
        action = "pip uninstall -y onnxruntime && pip install 'pixano-edge[cuda]', or install TensorRT."
        return AutoDevice((), f"{api.label} works, but no back end for GPUs is installed", action)
    return AutoDevice(names, f"{api.label} works, {' and '.join(backends)} can run on it")


def open_auto(driver: str | None = None) -> Device:
    """Opens the first GPU that can be used, else the CPU; `info` says why."""
    auto = auto_device(driver)
    if not auto.gpus:
        return CpuDevice(reason=f"auto: {auto.reason}")
    try:
        return open_cuda(0, driver, reason=f"auto: {auto.reason}")
    except EdgeError as error:
        return CpuDevice(reason=f"auto: {auto.gpus[0]} does not open: {error.message}")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # its parent package is missing; a stand-in without a spec
        return False
