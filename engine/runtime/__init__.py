"""Sessions and devices: tensors in, tensors out, nothing of models. Importing it loads no back end."""

from __future__ import annotations

from .base import Array, Binding, Buffer, Device, DeviceInfo, Session, Shape
from .cpu import CpuDevice
from .cuda import CudaDevice
from .factory import open_device, open_session
from .ort import OrtOptions, OrtSession
from .pycuda import PycudaDevice
from .stub import StubDevice, StubSession

__all__ = [
    "Array",
    "Binding",
    "Buffer",
    "CpuDevice",
    "CudaDevice",
    "Device",
    "DeviceInfo",
    "OrtOptions",
    "OrtSession",
    "PycudaDevice",
    "Session",
    "Shape",
    "StubDevice",
    "StubSession",
    "open_device",
    "open_session",
]
