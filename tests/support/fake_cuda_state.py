"""What `FakeDriver` (fake_cuda.py) remembers: memory, streams, marks and graphs of a device in ordinary memory."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

CODES = {
    "CUDA_SUCCESS": 0,
    "CUDA_ERROR_INVALID_VALUE": 1,
    "CUDA_ERROR_OUT_OF_MEMORY": 2,
    "CUDA_ERROR_NO_DEVICE": 100,
    "CUDA_ERROR_INVALID_CONTEXT": 201,
    "CUDA_ERROR_INVALID_HANDLE": 400,
    "CUDA_ERROR_NOT_READY": 600,
    "CUDA_ERROR_ILLEGAL_ADDRESS": 700,
    "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED": 712,
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": 900,
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": 901,
}
ATTRIBUTES = {
    "COMPUTE_CAPABILITY_MAJOR": 8,
    "COMPUTE_CAPABILITY_MINOR": 6,
    "MULTIPROCESSOR_COUNT": 28,
    "INTEGRATED": 0,
    "CAN_MAP_HOST_MEMORY": 1,
    "PAGEABLE_MEMORY_ACCESS": 0,
    "HOST_REGISTER_SUPPORTED": 1,
}


class Status:
    """A CUresult."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __int__(self) -> int:
        return CODES[self.name]


class Handle:
    """An opaque handle; like the real ones it converts with int() and is no int."""

    _next = 0x1000

    def __init__(self, kind: str, value: int | None = None) -> None:
        if value is None:
            Handle._next += 16
            value = Handle._next
        self.kind = kind
        self.value = value

    def __int__(self) -> int:
        return self.value


class StreamState:
    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.graph: list[Callable[[], None]] | None = None  # while it records
        self.broken = False
        self.thread: int | None = None


class Refusal(Exception):
    """Becomes a status."""


def driver_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a method the form of cuda-bindings: status first, then the values; `fail` makes it fail."""

    def wrapper(self: FakeState, *arguments: Any) -> tuple[Any, ...]:
        name = function.__name__
        status = self.fail.pop(name, None)
        try:
            if status is not None:
                raise Refusal(status)
            values = function(self, *arguments)
        except Refusal as refusal:
            none = () if name.endswith("Destroy") or name in ("cuInit",) else (None,)
            return (Status(str(refusal)), *none)
        return (Status("CUDA_SUCCESS"), *(values if isinstance(values, tuple) else (values,)))[
            : 1 if values is None else None
        ]

    wrapper.__name__ = function.__name__
    wrapper.__wrapped__ = function  # type: ignore[attr-defined]
    return wrapper


class FakeState:
    """The state and its rules; see `FakeDriver` for what tests read."""

    def __init__(self, count: int = 1, total: int = 1 << 30, cuda: int = 13020, **attributes: int) -> None:
        self.count = count
        self.total = total
        self.cuda = cuda
        self.attributes = ATTRIBUTES | attributes
        self.calls: list[tuple[Any, ...]] = []
        self.live: Counter[str] = Counter()
        self.fail: dict[str, str] = {}
        self.clock = 0.0
        self._memory: dict[int, tuple[Any, int, str, int]] = {}  # pointer -> keep, nbytes, kind, device
        self._streams: dict[int, StreamState] = {}
        self._times: dict[int, float | None] = {}  # event -> when it was reached; None: pending
        self._event_streams: dict[int, int] = {}
        self._flags: dict[int, int] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._contexts: dict[int, int] = {}
        self._local = threading.local()

    # What tests use.

    @property
    def ops(self) -> list[str]:
        return [call[0] for call in self.calls]

    def leaks(self) -> dict[str, int]:
        """What is not freed."""
        return {kind: n for kind, n in self.live.items() if n}

    def launch(
        self, name: str, stream: int, work: Callable[[], None] = lambda: None, milliseconds: float = 1.0
    ) -> None:
        """Queues a kernel, as a back end would: by the number of the stream."""
        self._check_context()

        def run() -> None:
            self.clock += milliseconds
            work()

        self._queue(stream, ("launch", name, stream), run)

    def launch_host(self, stream: int, work: Callable[[], None]) -> None:
        """Queues a call of a function on the host (``cuLaunchHostFunc``)."""
        self._check_context()

        def run() -> None:
            work()

        run.on_host = True  # type: ignore[attr-defined]
        self._queue(stream, ("host", stream), run)

    def at(self, pointer: int, count: int, dtype: Any = np.float32) -> Any:
        """View of device memory for the kernel of a test."""
        kind = np.dtype(dtype)
        self._check_memory(pointer, count * kind.itemsize)
        raw = (ctypes.c_char * (count * kind.itemsize)).from_address(pointer)
        return np.frombuffer(raw, kind)

    def foreign_stream(self) -> int:
        """A stream that another library made."""
        handle = Handle("stream")
        self._streams[int(handle)] = StreamState()
        return int(handle)

    @property
    def stack(self) -> list[int]:
        """Current contexts of this thread."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        stack: list[int] = self._local.stack
        return stack

    # Helpers.

    def _check_context(self) -> int:
        if not self.stack:
            raise Refusal("CUDA_ERROR_INVALID_CONTEXT")
        return self._contexts[self.stack[-1]]

    def _forbidden(self) -> None:
        """A call that a thread must not make while it records."""
        self._check_context()
        for stream in self._streams.values():
            if stream.graph is not None and stream.thread == threading.get_ident():
                stream.broken = True
                raise Refusal("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    def _stream(self, stream: Any) -> StreamState:
        number = int(stream)
        assert number not in (0, 1, 2), "work on a default stream"
        if number not in self._streams:
            raise Refusal("CUDA_ERROR_INVALID_HANDLE")
        return self._streams[number]

    def _queue(self, number: int, note: tuple[Any, ...], work: Callable[[], None]) -> None:
        stream = self._stream(number)
        if stream.graph is not None:
            if stream.broken:
                raise Refusal("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
            self.calls.append(("recorded", *note))
            stream.graph.append(work)
        else:
            self.calls.append(note)
            stream.queue.append(work)

    def _drain(self, number: int) -> None:
        stream = self._streams[number]
        while stream.queue:
            stream.queue.pop(0)()

    def _make(self, kind: str) -> Handle:
        handle = Handle(kind)
        self.live[kind] += 1
        self.calls.append(("create", kind, int(handle)))
        return handle

    def _destroy(self, kind: str, handle: Any) -> None:
        self.live[kind] -= 1
        assert self.live[kind] >= 0, f"{kind} freed twice"
        self.calls.append(("destroy", kind, int(handle)))

    def _used(self) -> int:
        return sum(n for _, n, kind, _ in self._memory.values() if kind == "alloc")

    def _take(self, nbytes: int, kind: str) -> int:
        device = self._check_context()
        if nbytes <= 0:
            raise Refusal("CUDA_ERROR_INVALID_VALUE")
        memory = np.full(nbytes + 256, 0xCD, np.uint8)
        pointer = int(memory.ctypes.data) + -int(memory.ctypes.data) % 256
        self._memory[pointer] = (memory, nbytes, kind, device)
        self.live[kind] += 1
        self.calls.append(({"alloc": "alloc", "host": "host_alloc"}[kind], pointer, nbytes))
        return pointer

    def _give(self, pointer: int, kind: str, name: str) -> None:
        self._forbidden()
        entry = self._memory.pop(int(pointer), None)
        assert entry is not None, f"{name} of memory that is not there"
        assert entry[2] == kind, f"{name} of {entry[2]}"
        self.live[kind] -= 1
        self.calls.append((name, int(pointer)))

    def _find(self, pointer: int, nbytes: int = 1) -> int | None:
        for start, (_, size, _, _) in self._memory.items():
            if start <= pointer and pointer + nbytes <= start + size:
                return start
        return None

    def _on_host(self, pointer: int, nbytes: int) -> bool:
        start = self._find(pointer, nbytes)
        return start is not None and self._memory[start][2] != "alloc"

    def _check_memory(self, pointer: int, nbytes: int) -> None:
        assert self._find(pointer, nbytes) is not None, "memory that is neither on the device nor page-locked"
