"""Where memory maps live: buffers on the device for the near ones, a temporary file for the far ones."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DeviceError
from ...runtime.base import Buffer, Shape

Float32 = npt.NDArray[np.float32]

_HIGH_HALF = 1 if sys.byteorder == "little" else 0


@dataclass(frozen=True, eq=False)
class Slot:
    """What one frame leaves behind for one object; used again and again.

    Attributes:
        features: Memory map, float32, on the device.
        pointer: (C,) float32 object pointer, on the device.
        logits: (m, m) float32 of the mask, on the host; a correction on that frame starts from them.
    """

    features: Buffer
    pointer: Buffer
    logits: Float32


class SlotPool:
    """Slots that are not in use, for the next frame.

    Args:
        new: Makes one.

    Attributes:
        made: Slots made so far; stands still in the steady state.
    """

    def __init__(self, new: Callable[[], Slot]) -> None:
        self._new = new
        self._free: list[Slot] = []
        self.made = 0

    def take(self, count: int) -> list[Slot]:
        """Slots with old contents; give them back when nothing reads them any more.

        Raises:
            DeviceMemoryError: No room for one more; none is taken then.
        """
        taken: list[Slot] = []
        try:
            while len(taken) < count:
                if self._free:
                    taken.append(self._free.pop())
                else:
                    taken.append(self._new())
                    self.made += 1
        except BaseException:
            self._free += taken
            raise
        return taken

    def give(self, *slots: Slot) -> None:
        """Puts slots back."""
        self._free += slots

    @property
    def free(self) -> int:
        """Slots that are not in use."""
        return len(self._free)

    def clear(self) -> None:
        """Frees what is not in use."""
        self.made -= len(self._free)
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
        self._buffer = np.empty(0, np.uint8)  # made at the first use: many clips need no file
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
        if not self._buffer.size:
            self._buffer = np.empty(self._record, np.uint8)
        halves, floats = self._views(self._buffer)
        np.copyto(halves, np.ascontiguousarray(features).view(np.uint16).reshape(-1, 2)[:, _HIGH_HALF])
        np.copyto(floats[: self._channels], pointer)
        np.copyto(floats[self._channels :], logits.reshape(-1))
        place = self._free[-1] if self._free else self._end
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="pixano-edge-")  # noqa: SIM115 (lives as long as this)
            written = os.pwrite(self._file.fileno(), self._buffer.data, place * self._record)
        except OSError as error:
            raise DeviceError(
                f"Memories of earlier frames cannot be written to '{tempfile.gettempdir()}': {error.strerror}.",
                "Free disk space, or set TMPDIR to another folder.",
            ) from error
        if written != self._record:
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
        try:
            data = os.pread(self._file.fileno(), self._record, place * self._record)
        except OSError as error:
            raise DeviceError(
                f"Memories of earlier frames cannot be read back: {error.strerror}.", "Track again."
            ) from error
        halves, floats = self._views(np.frombuffer(data, np.uint8))
        features = (halves.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(self._shape)
        logits = floats[self._channels :].reshape(self._side, self._side).copy()
        return features, floats[: self._channels].copy(), logits

    def _views(self, record: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint16], Float32]:
        """The map's upper halves, then pointer and logits, of one record."""
        return record[: 2 * self._values].view(np.uint16), record[2 * self._values :].view(np.float32)

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
