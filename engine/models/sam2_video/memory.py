"""Where memory maps live: buffers on the device for the near ones, a temporary file for the far ones."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DeviceError
from ...runtime.base import Buffer, Device, Shape

Float32 = npt.NDArray[np.float32]


class MapPool:
    """Buffers of one shape, used again and again.

    Args:
        device: Where they are.
        shape: Shape of one memory map, float32.
    """

    def __init__(self, device: Device, shape: Shape) -> None:
        self._device = device
        self._shape = shape
        self._free: list[Buffer] = []
        self.made = 0

    def take(self) -> Buffer:
        """A buffer with old contents; give it back when nothing reads it any more."""
        if self._free:
            return self._free.pop()
        self.made += 1
        return self._device.empty(self._shape, "float32")

    def give(self, buffer: Buffer) -> None:
        """Puts a buffer back."""
        self._free.append(buffer)

    def clear(self) -> None:
        """Frees what is not in use."""
        self._free.clear()


class MapFile:
    """Maps, pointers and mask logits that no coming frame needs, on disk, so that a long clip does not fill the memory.

    A correction in the middle of a clip reads those around it back. Maps are stored as bfloat16, which is exact: the
    memory encoder rounds them so. The file has no name and goes away with the process.

    Args:
        shape: Shape of one map.
        channels: Length of one pointer.
        side: Height and width of one mask's logits.
    """

    def __init__(self, shape: Shape, channels: int, side: int) -> None:
        self._shape = shape
        self._channels = channels
        self._side = side
        self._values = int(np.prod(shape))
        self._record = 2 * self._values + 4 * channels + 4 * side * side
        self._places: dict[tuple[int, int], int] = {}
        self._free: list[int] = []
        self._end = 0
        self._file: Any = None

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._places

    def put(self, key: tuple[int, int], features: Float32, pointer: Float32, logits: Float32) -> None:
        """Writes what (object, frame) left behind; an older record of that key is replaced.

        Raises:
            DeviceError: The disk is full or cannot be written; nothing of this key is kept then.
        """
        self.drop(key)
        halves = np.ascontiguousarray(features, np.float32).view(np.uint32) >> np.uint32(16)
        data = b"".join((halves.astype(np.uint16).tobytes(), pointer.tobytes(), logits.tobytes()))
        place = self._free[-1] if self._free else self._end
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="pixano-edge-")  # noqa: SIM115 (lives as long as this)
            written = os.pwrite(self._file.fileno(), data, place * self._record)
        except OSError as error:
            raise DeviceError(
                f"Memories of earlier frames cannot be written to '{tempfile.gettempdir()}': {error.strerror}.",
                "Free disk space, or set TMPDIR to another folder.",
            ) from error
        if written != len(data):
            raise DeviceError(
                f"The disk of '{tempfile.gettempdir()}' is full.", "Free disk space, or set TMPDIR to another folder."
            )
        if place == self._end:
            self._end += 1
        else:
            self._free.pop()
        self._places[key] = place

    def get(self, key: tuple[int, int]) -> tuple[Float32, Float32, Float32] | None:
        """The map, the pointer and the logits of a key as new arrays, or None."""
        place = self._places.get(key)
        if place is None:
            return None
        data = os.pread(self._file.fileno(), self._record, place * self._record)
        halves = np.frombuffer(data, np.uint16, self._values).astype(np.uint32) << np.uint32(16)
        rest = np.frombuffer(data, np.float32, offset=2 * self._values).copy()
        logits = rest[self._channels :].reshape(self._side, self._side)
        return halves.view(np.float32).reshape(self._shape), rest[: self._channels], logits

    def frames(self, obj: int) -> list[int]:
        """Frames of an object that are in the file."""
        return [frame for key, frame in self._places if key == obj]

    def drop(self, key: tuple[int, int]) -> None:
        """Forgets one key; its place is used again."""
        place = self._places.pop(key, None)
        if place is not None:
            self._free.append(place)

    def drop_object(self, obj: int) -> None:
        """Forgets all frames of an object."""
        for frame in self.frames(obj):
            self.drop((obj, frame))

    def close(self) -> None:
        """Deletes the file."""
        self._places.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
