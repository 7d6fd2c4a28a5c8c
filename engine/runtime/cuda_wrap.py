"""Borrowing memory of other libraries for a CUDA device: what the exporter says, checked, without any CUDA call.

Sources: Numba's CUDA Array Interface (version 3), array API standard (DLPack).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ContractError
from .base import Buffer, Shape
from .dlpack import CUDA, CUDA_MANAGED, read_capsule


@dataclass(frozen=True)
class Borrowed:
    """Device memory of another library; held as the `owner` of its buffer.

    Attributes:
        pointer: Address on the device.
        shape: Shape.
        dtype: numpy dtype.
        readonly: Whether the exporter forbids writing.
        device: Index of the device, or None where the exporter does not say.
        stream: Stream whose work must be waited for, or None when nothing is pending (or waited for already).
        keep: What keeps the memory alive.
    """

    pointer: int
    shape: Shape
    dtype: np.dtype[Any]
    readonly: bool
    device: int | None
    stream: int | None
    keep: object


def borrow_device(source: Any, stream: int) -> Borrowed | None:
    """What `source` exports, or None when it is no exporter of CUDA memory.

    DLPack goes first where both are there: it says for sure which work is pending.

    Args:
        source: Exporter of DLPack or ``__cuda_array_interface__``.
        stream: Handle of the stream that will use the memory; a DLPack exporter makes it wait for pending work.

    Raises:
        ContractError: Not C-contiguous, or of a dtype that graphs do not take.
    """
    if hasattr(source, "__dlpack__") and hasattr(source, "__dlpack_device__"):
        return _from_dlpack(source, stream)
    interface = getattr(source, "__cuda_array_interface__", None)
    return None if interface is None else _from_interface(interface, source)


def _from_dlpack(source: Any, stream: int) -> Borrowed | None:
    try:
        if int(source.__dlpack_device__()[0]) not in (CUDA, CUDA_MANAGED):
            return None
        capsule = source.__dlpack__(stream=stream)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ContractError(
            f"The {type(source).__name__} does not share its memory: {error}", "Pass a plain array."
        ) from error
    tensor = read_capsule(capsule)
    _check(tensor.shape, tensor.strides, tensor.dtype, 1)
    return Borrowed(tensor.pointer, tensor.shape, tensor.dtype, False, tensor.device_id, None, (source, capsule))


def _from_interface(interface: Mapping[str, Any], source: object) -> Borrowed:
    if interface.get("mask") is not None:
        raise ContractError("A masked array cannot be bound: its mask would be lost.", "Fill it first.")
    shape = tuple(int(size) for size in interface["shape"])
    try:
        dtype = np.dtype(interface["typestr"])
    except TypeError as error:
        raise ContractError(f"The dtype '{interface['typestr']}' is unknown to numpy.", "Convert it first.") from error
    _check(shape, interface.get("strides"), dtype, dtype.itemsize)
    pointer, readonly = interface["data"]
    stream = interface.get("stream")
    if stream is not None and int(stream) == 0:
        raise ContractError("The exporter names stream 0, which the interface forbids.", "Synchronise and pass None.")
    pending = None if stream is None else int(stream)
    return Borrowed(int(pointer or 0), shape, dtype, bool(readonly), None, pending, source)


def _check(shape: Shape, strides: Sequence[int] | None, dtype: np.dtype[Any], item: int) -> None:
    """Refuses what no graph takes; `item` is the unit of `strides` per element."""
    if dtype.kind not in "biuf" or not dtype.isnative or dtype.itemsize > 8:
        raise ContractError(
            f"A buffer of dtype '{dtype}' cannot be bound to a graph.",
            "Use bool, integers or floats of at most 64 bits in this machine's byte order.",
        )
    if strides is None or 0 in shape:
        return
    expected = item
    for size, stride in zip(reversed(shape), reversed(tuple(strides))):
        if size != 1 and stride != expected:
            raise ContractError(
                f"The {dtype}{list(shape)} buffer is not C-contiguous (strides {tuple(strides)}).",
                "Make a contiguous copy first.",
            )
        expected *= size


def check_borrowed(buffer: Buffer) -> None:
    """Raises ContractError for device memory whose exporter forbids writing."""
    if isinstance(buffer.owner, Borrowed) and buffer.owner.readonly:
        raise ContractError("The borrowed buffer is read-only memory.", "Copy it first.")
