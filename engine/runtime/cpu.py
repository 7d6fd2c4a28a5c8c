"""The CPU device: aligned numpy memory, no stream, copies at once."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ContractError
from ..machine import memory, usable_cpus
from .base import Array, Buffer, Device, DeviceInfo, Shape

ALIGNMENT = 64
"""Bytes; one cache line and one AVX-512 register."""

# DLPack device types whose memory the CPU reads: kDLCPU, kDLCUDAHost, kDLROCMHost.
_DLPACK_HOST = (1, 3, 11)


def aligned_empty(shape: Shape, dtype: npt.DTypeLike) -> Array:
    """Uninitialised C-contiguous array that starts at a multiple of `ALIGNMENT` bytes."""
    kind = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -address(raw) % ALIGNMENT
    return raw[start : start + nbytes].view(kind).reshape(shape)


def address(array: Array) -> int:
    """Address of the first byte (`ndarray.ctypes.data` without the object it makes)."""
    return int(array.__array_interface__["data"][0])


class CpuDevice(Device):
    """Host memory.

    Args:
        reason: Why this device was chosen, for `info`.
    """

    kind = "cpu"

    def __init__(self, reason: str = "") -> None:
        self._reason = reason

    @property
    def name(self) -> str:
        return "cpu"

    @property
    def stream(self) -> int:
        return 0

    def info(self) -> DeviceInfo:
        total, free = memory()
        extra = {"cpus": str(usable_cpus()), "architecture": platform.machine()}
        if self._reason:
            extra["reason"] = self._reason
        return DeviceInfo(self.name, self.kind, memory_total=total, memory_free=free, extra=extra)

    def empty(self, shape: Shape, dtype: npt.DTypeLike) -> Buffer:
        """Allocates uninitialised memory, 64-byte aligned, freed with the buffer's last reference."""
        array = aligned_empty(shape, dtype)
        return Buffer(self, tuple(shape), array.dtype, address(array), array)

    def host_empty(self, shape: Shape, dtype: npt.DTypeLike) -> Buffer:
        """The same as `empty`: on CPU all memory is host memory."""
        return self.empty(shape, dtype)

    def wrap(self, source: object) -> Buffer:
        """Borrows a C-contiguous host buffer without a copy; the result keeps `source` alive.

        Read-only memory can be bound as an input only.

        Args:
            source: numpy array, DLPack exporter on a CPU, or buffer-protocol object (memoryview, bytearray, mmap).

        Raises:
            ContractError: Device memory, not C-contiguous, not aligned, a dtype that graphs do not take, or an object
                without a buffer.
        """
        array = _borrow(source)
        kind = array.dtype
        if kind.kind not in "biuf" or not kind.isnative or kind.itemsize > 8:
            raise ContractError(
                f"A buffer of dtype '{kind}' cannot be bound to a graph.",
                "Use bool, integers or floats of at most 64 bits in this machine's byte order.",
            )
        if not array.flags.c_contiguous or not array.flags.aligned:
            raise ContractError(
                f"The {kind}{list(array.shape)} buffer is not C-contiguous and aligned (strides {array.strides}).",
                "Pass numpy.ascontiguousarray(...), or copy it with Binding.write.",
            )
        return Buffer(self, array.shape, kind, address(array), array, owned=False, owner=source)

    def copy(self, target: Buffer, source: Buffer) -> None:
        """Copies at once.

        Raises:
            ContractError: Shape or dtype differ, the target is read-only, or one is not in host memory.
        """
        check_copy(target, source)
        np.copyto(target.host(), source.host(), casting="no")

    def upload(self, target: Buffer, source: Array) -> None:
        """Copies at once, without staging memory."""
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ContractError(
                f"Cannot copy {source.dtype}{list(source.shape)} to {target.dtype}{list(target.shape)}.",
                "Copies never reshape nor convert.",
            )
        check_writable(target)
        np.copyto(target.host(), source, casting="no")

    def download(self, source: Buffer) -> Array:
        """The memory itself."""
        return source.host()

    def synchronize(self) -> None:
        """Nothing to wait for."""


def check_copy(target: Buffer, source: Buffer) -> None:
    """Raises ContractError unless `source` can be copied to `target` byte by byte."""
    if target.shape != source.shape or target.dtype != source.dtype:
        raise ContractError(
            f"Cannot copy {source.dtype}{list(source.shape)} to {target.dtype}{list(target.shape)}.",
            "Copies never reshape nor convert.",
        )
    check_writable(target)


def check_writable(buffer: Buffer) -> None:
    """Raises ContractError for borrowed read-only memory."""
    if buffer.array is not None and not buffer.array.flags.writeable:
        raise ContractError("The bound buffer is read-only memory.", "Bind a writable buffer, or copy it first.")


def _borrow(source: object) -> Array:
    if isinstance(source, np.ma.MaskedArray):
        raise ContractError("A masked array cannot be bound: its mask would be lost.", "Pass .filled(value).")
    if isinstance(source, np.ndarray):
        return source
    if hasattr(source, "__cuda_array_interface__"):
        raise ContractError(
            f"The {type(source).__name__} lives on a CUDA device, not in host memory.",
            "Copy it to the host first, or open the session on that device.",
        )
    if hasattr(source, "__dlpack__") and hasattr(source, "__dlpack_device__"):
        return _borrow_dlpack(source)
    try:
        # Not np.asarray(source): that would also take lists and copy them.
        view = memoryview(source)  # type: ignore[arg-type]
    except (TypeError, BufferError, ValueError) as error:
        raise ContractError(
            f"A {type(source).__name__} has no buffer that can be bound.",
            "Pass a numpy array, a memoryview, or an object with DLPack.",
        ) from error
    try:
        return np.asarray(view)
    except (TypeError, ValueError, BufferError) as error:
        raise ContractError(
            f"The buffer's format '{view.format}' is unknown to numpy.", "Pass a numpy array."
        ) from error


def _borrow_dlpack(source: Any) -> Array:
    try:
        device = int(source.__dlpack_device__()[0])
        if device not in _DLPACK_HOST:
            raise ContractError(
                f"The {type(source).__name__} is on DLPack device type {device}, not in host memory.",
                "Copy it to the host first, or open the session on that device.",
            )
        array: Array = np.from_dlpack(source)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ContractError(
            f"The {type(source).__name__} does not share its memory: {error}", "Pass a plain host array."
        ) from error
    return array
