"""A device that behaves like a GPU towards back ends: memory of its own, captures, running out of memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.errors import DeviceMemoryError
from pixano_edge.engine.runtime.base import Array, Buffer, Shape
from pixano_edge.engine.runtime.cpu import address
from pixano_edge.engine.runtime.stub import StubDevice


class GpuStub(StubDevice):
    """A recorded stream with captures, 256-byte aligned memory that can run out, and freed memory that is noticed.

    Args:
        limit: Bytes that fit.

    Attributes:
        depth: Nesting of `current`; TensorRT must be called inside alone.
    """

    kind = "cuda"

    def __init__(self, limit: int | None = None, captures: bool = True, deferred: bool = False) -> None:
        super().__init__("cuda:0", deferred, discrete=True, captures=captures)
        self.limit = limit
        self.depth = 0
        self._blocks: list[tuple[int, int, weakref.ref[Any]]] = []

    @property
    def stream(self) -> int:
        return 77

    @property
    def used(self) -> int:
        """Bytes that live buffers take."""
        self._blocks = [b for b in self._blocks if b[2]() is not None]
        return sum(nbytes for _, nbytes, _ in self._blocks)

    def empty(self, shape: Shape, dtype: npt.DTypeLike) -> Buffer:
        self._not_while_recording("allocating")
        kind = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        if self.limit is not None and self.used + nbytes > self.limit:
            raise DeviceMemoryError(f"{nbytes} bytes do not fit.", "Unload a model.")
        self.calls.append(("empty", tuple(shape), kind.name))
        raw = np.zeros(nbytes + 256, np.uint8)
        start = -address(raw) % 256
        array = raw[start : start + nbytes].view(kind).reshape(shape)
        self._blocks.append((address(raw) + start, nbytes, weakref.ref(raw)))
        buffer = Buffer(self, tuple(shape), kind, address(raw) + start)
        buffer.owner = array
        return buffer

    def at(self, pointer: int, nbytes: int) -> Array:
        """The live memory at an address; an AssertionError if it was freed or is too small."""
        for start, size, ref in self._blocks:
            raw = ref()
            if raw is not None and start <= pointer and pointer + nbytes <= start + size:
                offset = pointer - address(raw)
                return raw[offset : offset + nbytes]
        raise AssertionError(f"{nbytes} bytes at {pointer:#x} are not allocated")

    @contextlib.contextmanager
    def _enter(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def current(self) -> AbstractContextManager[None]:
        return self._enter()
