"""Reading a DLPack capsule: address, shape and dtype of memory that numpy cannot look at.

Source: dmlc/dlpack, include/dlpack/dlpack.h (DLManagedTensor, unversioned); array API standard, ``__dlpack__``.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ContractError

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
"""DLDeviceType."""

# DLDataTypeCode -> numpy kind; bfloat16 (4) and the 8-bit floats have no numpy dtype.
_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class DlpackTensor:
    """Borrowed memory.

    Attributes:
        pointer: Address of the first element.
        shape: Shape.
        strides: In elements; None for C-contiguous.
        dtype: numpy dtype.
        device_type: DLDeviceType.
        device_id: Index of the device.
        capsule: Keeps the memory alive. It is never marked as consumed, so its own destructor gives the memory back.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: np.dtype[Any]
    device_type: int
    device_id: int
    capsule: object


def read_capsule(capsule: object) -> DlpackTensor:
    """Reads what ``__dlpack__()`` returned (the unversioned form, which exporters give unless asked otherwise).

    Raises:
        ContractError: Not such a capsule, or a dtype that numpy does not have.
    """
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    try:
        address = get(capsule, b"dltensor")
    except ValueError as error:
        raise ContractError(
            f"The DLPack object cannot be read: {error}", "Pass an object that was not consumed."
        ) from error
    tensor = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
    kind = _KINDS.get(tensor.code)
    if kind is None or tensor.lanes != 1 or tensor.bits not in (8, 16, 32, 64):
        raise ContractError(
            f"DLPack dtype (code {tensor.code}, {tensor.bits} bits, {tensor.lanes} lanes) has no numpy equivalent.",
            "Use bool, integers or floats of at most 64 bits.",
        )
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else None
    return DlpackTensor(
        pointer=(tensor.data or 0) + tensor.byte_offset,
        shape=shape,
        strides=strides,
        dtype=np.dtype(f"{kind}{tensor.bits // 8}"),
        device_type=tensor.device_type,
        device_id=tensor.device_id,
        capsule=capsule,
    )
