"""Contexts, allocations and events of CUDA devices, each freed with its last reference, whoever holds that.

A buffer or a numpy view of page-locked memory may outlive its device object: it holds the context, so it stays valid.
Nothing is freed while a graph is recorded, since the driver would drop the recording: that work waits in `RECLAIMER`.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..errors import ContractError, DeviceMemoryError
from ..machine import memory
from .base import Array, Buffer, Shape
from .cuda_calls import ENDING, OUT_OF_MEMORY, CudaApi, CudaError, CudaFacts

logger = logging.getLogger(__name__)


class Reclaimer:
    """Runs the calls that free things, except while a graph is recorded anywhere in the process.

    Python's garbage collector may drop a buffer on any thread and between any two lines, so also inside `work` of
    `Device.capture`. Calls never block and never raise.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._recordings = 0  # nested ones are on different devices

    def submit(self, free: Callable[[], None]) -> None:
        """Frees now, or when the recording is over."""
        self._waiting.append(free)
        self.drain()

    def drain(self) -> None:
        """Runs what waits. Where another thread is at it already, that one does the rest."""
        while self._waiting:
            if not self._lock.acquire(blocking=False):
                return
            try:
                if self._recordings:
                    return
                while self._waiting:
                    self._waiting.popleft()()
            finally:
                self._lock.release()
            # Looks again: something may have come after the inner loop, while others could not take the lock.

    def __enter__(self) -> None:
        """Begins a recording; waits for one of another thread to end."""
        self._lock.acquire()
        self._recordings += 1

    def __exit__(self, *_: object) -> None:
        self._recordings -= 1
        self._lock.release()
        self.drain()


RECLAIMER = Reclaimer()
"""One per process: the driver's rule is about threads, not devices."""


class Context:
    """The primary context of one GPU, current on the calling thread inside ``with``; nests."""

    __slots__ = ("api", "handle", "index")

    def __init__(self, api: CudaApi, index: int) -> None:
        self.api = api
        self.index = index
        self.handle = api.retain(index)

    def __enter__(self) -> None:
        self.api.push(self.handle)

    def __exit__(self, *_: object) -> None:
        self.api.pop(self.handle)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            RECLAIMER.submit(partial(_quietly, partial(self.api.release, self.index, self.handle)))


class Stream:
    """The stream of one device object; `handle` is None once it is closed."""

    __slots__ = ("api", "context", "handle", "pointer")

    def __init__(self, context: Context) -> None:
        self.api = context.api
        self.context = context
        with context:
            self.handle: Any = self.api.stream_create()
        self.pointer = self.api.stream_pointer(self.handle)

    def synchronize(self) -> None:
        if self.handle is not None:
            self.api.stream_synchronize(self.handle)

    def __del__(self) -> None:
        # Only for a device that nobody closed.
        if getattr(self, "handle", None) is not None:
            free_later(self.context, partial(self.api.stream_destroy, self.handle))


class Allocation:
    """Memory, freed with the last reference to this object: a buffer's `owner`, or the base of a numpy view.

    Attributes:
        pointer: Address on the device.
        host: Address for the CPU, or 0.
        nbytes: Size.
        source: What is kept alive with it.
    """

    __slots__ = ("_free", "_stream", "host", "nbytes", "pointer", "source")

    def __init__(self, stream: Stream, pointer: int, host: int, nbytes: int, free: Callable[[], None]) -> None:
        self._stream = stream
        self._free = free
        self.pointer = pointer
        self.host = host
        self.nbytes = nbytes
        self.source: object = None

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "shape": (self.nbytes,), "typestr": "|u1", "data": (self.host, False)}

    def array(self, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """A host view that keeps this allocation alive."""
        used = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return np.asarray(self)[:used].view(dtype).reshape(shape)

    def __del__(self) -> None:
        stream = self._stream
        free_later(stream.context, partial(_free_memory, stream, self._free, bool(self.host), self.source))


def allocate(stream: Stream, nbytes: int, host: bool, name: str) -> Allocation:
    """Memory on the device, or page-locked host memory mapped for it; the context is current.

    Raises:
        DeviceMemoryError: Too little, also after everything that nobody refers to was freed.
        CudaError: Anything else.
    """
    size = max(nbytes, 1)  # the driver refuses 0
    take = _take_host if host else _take_device
    try:
        return take(stream, size)
    except CudaError as error:
        if error.code not in OUT_OF_MEMORY:
            raise
    gc.collect()  # buffers in reference cycles, which Python has not noticed yet
    RECLAIMER.drain()
    try:
        return take(stream, size)
    except CudaError as error:
        if error.code not in OUT_OF_MEMORY:
            raise
        total, free = memory() if host else stream.api.memory()[::-1]
        of = f"{free or 0} of {total or 0} bytes ({(free or 0) >> 20} of {(total or 0) >> 20} MiB)"
        what = f"page-locked host memory for {name}" if host else f"memory on {name}"
        raise DeviceMemoryError(
            f"Not enough {what}: asked for {size} bytes ({size >> 20} MiB), free are {of}.",
            "Unload a model, use a smaller model or batch, or end other programs on this device.",
        ) from error


def _take_device(stream: Stream, size: int) -> Allocation:
    pointer = stream.api.alloc(size)
    return Allocation(stream, pointer, 0, size, partial(stream.api.free, pointer))


def _take_host(stream: Stream, size: int) -> Allocation:
    host, pointer = stream.api.host_alloc(size)
    return Allocation(stream, pointer, host, size, partial(stream.api.host_free, host))


def map_host(stream: Stream, facts: CudaFacts, host: Buffer) -> tuple[int, object]:
    """Address at which kernels see a host buffer, and what keeps it there; the context is current.

    Page-locked memory has one; other memory is page-locked while the second value lives, unless the device can use any
    host memory.

    Raises:
        ContractError: The memory cannot be page-locked.
    """
    array = host.host()
    found = stream.api.locate(host.pointer) if host.nbytes else None
    if found is not None:
        return found[1], host.owner
    if facts.pageable or not host.nbytes:
        return host.pointer, host.owner
    action = "Copy it with Device.upload, or allocate it with Device.host_empty."
    if not facts.registers_host or not array.flags.writeable:
        why = "is read-only" if facts.registers_host else "cannot be page-locked on this device"
        raise ContractError(f"The {host.dtype}{list(host.shape)} host buffer {why}.", action)
    try:
        pointer = stream.api.host_register(host.pointer, host.nbytes)
    except CudaError as error:
        raise ContractError(f"The host buffer cannot be page-locked: {error.message}", action) from error
    kept = Allocation(stream, pointer, host.pointer, host.nbytes, partial(stream.api.host_unregister, host.pointer))
    kept.source = host.owner
    return pointer, kept


class CudaEvent:
    """A mark on a stream, from `CudaDevice.record`; goes back to its pool with the last reference."""

    __slots__ = ("_pool", "handle", "timed")

    def __init__(self, pool: EventPool, handle: Any, timed: bool) -> None:
        self._pool = pool
        self.handle = handle
        self.timed = timed

    @property
    def api(self) -> CudaApi:
        return self._pool.context.api

    @property
    def context(self) -> Context:
        return self._pool.context

    def __del__(self) -> None:
        self._pool.put(self.handle, self.timed)


class EventPool:
    """Events that are made once and used again, so that a steady state makes none."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._idle: dict[bool, list[Any]] = {False: [], True: []}
        self._open = True

    def get(self, timed: bool) -> CudaEvent:
        """An event; the context is current."""
        try:
            handle = self._idle[timed].pop()
        except IndexError:
            handle = self.context.api.event_create(timed)
        return CudaEvent(self, handle, timed)

    def put(self, handle: Any, timed: bool) -> None:
        if self._open:
            self._idle[timed].append(handle)
        else:
            free_later(self.context, partial(self.context.api.event_destroy, handle))

    def close(self) -> None:
        """Destroys the idle events; those in use go with their last reference."""
        self._open = False
        for idle in self._idle.values():
            while idle:
                free_later(self.context, partial(self.context.api.event_destroy, idle.pop()))

    def __del__(self) -> None:
        self.close()


def free_later(context: Context, call: Callable[[], None]) -> None:
    """Makes a call that frees something of `context`, now or when no graph is being recorded; failures are logged."""
    RECLAIMER.submit(partial(_in_context, context, call))


def _in_context(context: Context, call: Callable[[], None]) -> None:
    def run() -> None:
        with context:
            call()

    _quietly(run)


def _free_memory(stream: Stream, free: Callable[[], None], host: bool, source: object) -> None:
    # The driver waits by itself before it frees device memory, but does not promise so for host memory.
    if host:
        stream.synchronize()
    free()


def _quietly(call: Callable[[], None]) -> None:
    """Finalisers have no caller to raise to: what cannot be freed is logged."""
    try:
        call()
    except CudaError as error:
        if error.code not in ENDING:
            logger.warning("Could not free a CUDA object: %s", error)
