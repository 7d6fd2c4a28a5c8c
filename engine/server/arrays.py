"""Arrays on the wire, ``{"shape", "dtype": "float32", "data": base64}``, without a Python object per number.

Base64 is written and read in steps of a few hundred KiB: each step holds Python's global lock, and an image embedding
of SAM 2 has 22 MB of it, so one step would hold up every other request. `pybase64` is used where it is installed.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..provider.errors import InvalidRequestError
from ..provider.types import ArrayData, NDArrayData

try:
    import pybase64 as _fast
except ImportError:  # the standard library does, some times slower
    _fast = None  # type: ignore[assignment]

Float = npt.NDArray[np.float32]

STEP = 3 << 16
"""Bytes per step; a multiple of three, so that the pieces join without padding."""
_TEXT_STEP = STEP // 3 * 4


def encode(data: Any) -> bytes:
    """Base64 of a bytes-like object."""
    if _fast is not None:
        found: bytes = _fast.b64encode(data)
        return found
    return binascii.b2a_base64(data, newline=False)


def decode(text: str | bytes) -> bytes:
    """The bytes behind base64 text; raises ValueError for anything else, white space included."""
    if _fast is not None:
        found: bytes = _fast.b64decode(text, validate=True)
        return found
    return binascii.a2b_base64(text, strict_mode=True) if text else b""


@dataclass(frozen=True, eq=False)
class WireArray:
    """An array to be sent. `array` is float32, C-contiguous, little-endian, and not changed before it is sent."""

    array: Float

    def json(self) -> Iterator[bytes]:
        """Its JSON in pieces."""
        shape = ",".join(map(str, self.array.shape))
        yield f'{{"shape":[{shape}],"dtype":"float32","data":"'.encode()
        content = self.array.reshape(-1).view(np.uint8).data
        for start in range(0, len(content), STEP):
            yield encode(content[start : start + STEP])
        yield b'"}'


def wire_array(value: NDArrayData | None) -> WireArray | None:
    """An array of an answer; None for none, and for one without elements, which clients refuse."""
    if value is None or not value.shape or 0 in value.shape:
        return None
    return WireArray(np.ascontiguousarray(value.to_array(), "<f4"))


def read_array(shape: list[int], data: str, what: str) -> ArrayData:
    """An array of a request; owned by the caller.

    Args:
        shape: Each 1 or more.
        data: Base64 of little-endian float32 in C order.
        what: Its name, for messages.

    Raises:
        InvalidRequestError: Not base64, or not as many bytes as the shape says.
    """
    size = 4
    for side in shape:
        size *= side
    expected = (size + 2) // 3 * 4
    if len(data) != expected:
        raise InvalidRequestError(
            f"{what} has {len(data)} characters of base64, shape {shape} needs {expected}.",
            "Send little-endian float32 values in C order, or send back what you received, unchanged.",
        )
    out = np.empty(size // 4, "<f4")
    target = out.view(np.uint8).data
    try:
        for start in range(0, len(data), _TEXT_STEP):
            part = decode(data[start : start + _TEXT_STEP])
            begin = start // 4 * 3
            if len(part) != min(STEP, len(target) - begin):
                raise ValueError("padding before the end")
            target[begin : begin + len(part)] = part
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(f"{what} is not valid base64: {error}.", "Encode it again.") from error
    return ArrayData(out, list(shape))
