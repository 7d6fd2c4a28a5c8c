"""Sessions and devices: tensors in, tensors out, nothing of models. Importing it loads no back end."""

from __future__ import annotations

from .base import Array, Binding, Buffer, Device, DeviceInfo, Session, Shape
from .cpu import CpuDevice
from .factory import open_device, open_session
from .ort import OrtOptions, OrtSession
from .stub import StubDevice, StubSession

__all__ = [
    "Array",
    "Binding",
    "Buffer",
    "CpuDevice",
    "Device",
    "DeviceInfo",
    "OrtOptions",
    "OrtSession",
    "Session",
    "Shape",
    "StubDevice",
    "StubSession",
    "open_device",
    "open_session",
]
