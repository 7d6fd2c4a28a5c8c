"""Scratch memory of TensorRT contexts: one block per device object, used by its engines in turns.

Everything on one device object runs on one stream, in order, so two contexts never use the block at the same time
and it needs to be as large as the hungriest engine only, not the sum (`USER_MANAGED` in TensorRT's documentation).
"""

from __future__ import annotations

import threading
import weakref

import numpy as np

from ..errors import DeviceError, DeviceMemoryError
from .base import Buffer, Device

ALIGNMENT = 256
"""Bytes; what TensorRT asks of scratch memory and of every bound address."""


class ScratchPool:
    """One growing block of device memory. Get it with `scratch_pool`.

    Hold `lock` from reading `pointer` until the work that uses it is queued. Growing waits for the device, so it must
    not happen while a graph is captured: reserve before.

    Attributes:
        lock: Re-entrant.
        generation: Changes whenever the block moves; graphs captured before must not be replayed then.
    """

    def __init__(self, device: Device) -> None:
        self.lock = threading.RLock()
        self.generation = 0
        self._device = device
        self._buffer: Buffer | None = None
        self._needs: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()

    @property
    def nbytes(self) -> int:
        """Usable size of the block."""
        return self._buffer.nbytes - ALIGNMENT if self._buffer else 0

    @property
    def pointer(self) -> int:
        """Address of the block, a multiple of `ALIGNMENT`; 0 when nothing is reserved."""
        return -(-self._buffer.pointer // ALIGNMENT) * ALIGNMENT if self._buffer else 0

    @property
    def block(self) -> Buffer | None:
        """The block itself: who keeps it can go on using it after the pool has moved on."""
        return self._buffer

    @property
    def users(self) -> int:
        """Number of owners with a reservation."""
        return len(self._needs)

    def reserve(self, owner: object, nbytes: int) -> None:
        """Makes sure that the block holds `nbytes`, until `release` or until `owner` is gone.

        Raises:
            DeviceMemoryError: It does not fit; the block is as large as before, though it may have moved.
        """
        with self.lock:
            if nbytes > self.nbytes or self._buffer is None:
                self._grow(max(nbytes, ALIGNMENT))
            self._needs[owner] = nbytes

    def release(self, owner: object) -> None:
        """Ends a reservation; the last one frees the block. The owner's work must be done."""
        with self.lock:
            self._needs.pop(owner, None)
            if not self._needs and self._buffer is not None:
                self._replace(None)

    def _grow(self, nbytes: int) -> None:
        self._device.synchronize()  # queued work may still use the block
        old = self.nbytes
        try:
            new = self._empty(nbytes)
        except DeviceError:
            self._replace(None)  # on a full device both blocks at once may be what is too much
            try:
                new = self._empty(nbytes)
            except DeviceError as error:
                if old:
                    self._replace(self._empty(old))
                raise DeviceMemoryError(
                    f"{self._device.name} has no {nbytes} bytes for TensorRT's scratch memory: {error.message}",
                    "Unload other models, or build the engine for smaller sizes.",
                ) from error
        self._replace(new)

    def _empty(self, nbytes: int) -> Buffer:
        return self._device.empty((nbytes + ALIGNMENT,), np.uint8)

    def _replace(self, buffer: Buffer | None) -> None:
        self._buffer = buffer
        self.generation += 1


def scratch_pool(device: Device) -> ScratchPool:
    """The pool of a device object, made at the first call.

    It is kept on the device itself: its block refers to the device, so a table of pools would keep both forever.
    """
    pool = vars(device).setdefault("_scratch_pool", ScratchPool(device))
    assert isinstance(pool, ScratchPool)
    return pool
