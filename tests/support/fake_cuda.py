"""A stand-in for the module ``cuda.bindings.driver``: an asynchronous device in ordinary memory that notes every call.

Copies and launches wait in their stream until something synchronises, so code that reads or overwrites too early gets
wrong data, as on a GPU. It refuses what the driver refuses: calls without a current context, forbidden calls while the
thread records a graph, memory it does not know, and any work on a default stream. `live` counts what is not freed.

`tests/engine/runtime/test_cuda_api.py` compares its names, arguments and numbers with the real package.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import uuid
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pixano_edge.engine.runtime.cuda import CudaDevice

from .fake_cuda_state import ATTRIBUTES, CODES, FakeState, Handle, Refusal, Status, StreamState, driver_call

__all__ = ["ATTRIBUTES", "CODES", "FakeDriver", "fake_cuda_device", "install_fake_cuda"]


class FakeDriver(FakeState):
    """One fake driver with `count` devices.

    Attributes:
        calls: Everything that was queued or that makes or frees something, in order, as tuples that start with the
            name: ``("copy", target, source, nbytes, stream)``, ``("launch", name, stream)``, ``("record", event,
            stream)``, ``("wait", stream, event)``, ``("synchronize", stream)``, ``("synchronize_event", event)``,
            ``("alloc"|"host_alloc"|"register", pointer, nbytes)``, ``("free"|"host_free"|"unregister", pointer)``,
            ``("create"|"destroy", kind, handle)``, ``("begin"|"end", stream)``, ``("replay", graph, stream)``.
        live: How many of each kind exist now: alloc, host, register, stream, event, graph, executable, context.
        fail: Name of a function -> status of its next call.
        total: Bytes of each device.
        attributes: Of the devices, by name without the prefix.
    """

    CU_MEMHOSTALLOC_PORTABLE = 1
    CU_MEMHOSTALLOC_DEVICEMAP = 2
    CU_MEMHOSTREGISTER_PORTABLE = 1
    CU_MEMHOSTREGISTER_DEVICEMAP = 2
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DEFAULT=0, CU_EVENT_DISABLE_TIMING=2)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_MEMCPY=1, CU_GRAPH_NODE_TYPE_HOST=3)
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_HOST=1)
    CUpointer_attribute = SimpleNamespace(CU_POINTER_ATTRIBUTE_DEVICE_POINTER=3, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9)
    CUdevice_attribute = SimpleNamespace(**{f"CU_DEVICE_ATTRIBUTE_{name}": name for name in ATTRIBUTES})

    def CUstream(self, number: int) -> Handle:
        return Handle("stream", number)

    @driver_call
    def cuInit(self, Flags: int) -> None:
        if not self.count:
            raise Refusal("CUDA_ERROR_NO_DEVICE")

    @driver_call
    def cuDriverGetVersion(self) -> int:
        return self.cuda

    def cuGetErrorString(self, error: Status) -> tuple[Status, bytes]:
        return Status("CUDA_SUCCESS"), error.name.lower().encode()

    @driver_call
    def cuDeviceGetCount(self) -> int:
        return self.count

    @driver_call
    def cuDeviceGet(self, ordinal: int) -> int:
        return ordinal

    @driver_call
    def cuDeviceGetName(self, length: int, dev: int) -> bytes:
        return f"Fake GPU {dev}".encode().ljust(length, b"\0")

    @driver_call
    def cuDeviceGetAttribute(self, attrib: str, dev: int) -> int:
        return self.attributes[attrib]

    @driver_call
    def cuDeviceTotalMem(self, dev: int) -> int:
        return self.total

    @driver_call
    def cuDeviceGetUuid(self, dev: int) -> Any:
        return SimpleNamespace(bytes=uuid.UUID(int=dev + 1).bytes)

    @driver_call
    def cuDeviceGetPCIBusId(self, length: int, dev: int) -> bytes:
        return f"0000:{dev + 1:02X}:00.0".encode().ljust(length, b"\0")

    @driver_call
    def cuDevicePrimaryCtxRetain(self, dev: int) -> Handle:
        handle = Handle("context", 0xC000 + dev)
        self._contexts[int(handle)] = dev
        self.live["context"] += 1
        return handle

    @driver_call
    def cuDevicePrimaryCtxRelease(self, dev: int) -> None:
        self.live["context"] -= 1
        assert self.live["context"] >= 0

    @driver_call
    def cuCtxPushCurrent(self, ctx: Handle) -> None:
        if not self.live["context"]:
            raise Refusal("CUDA_ERROR_INVALID_CONTEXT")
        self.stack.append(int(ctx))

    @driver_call
    def cuCtxPopCurrent(self) -> Handle:
        return Handle("context", self.stack.pop())

    @driver_call
    def cuMemGetInfo(self) -> tuple[int, int]:
        self._check_context()
        return self.total - self._used(), self.total

    @driver_call
    def cuMemAlloc(self, bytesize: int) -> Handle:
        self._forbidden()
        if self._used() + bytesize > self.total:
            raise Refusal("CUDA_ERROR_OUT_OF_MEMORY")
        return Handle("pointer", self._take(bytesize, "alloc"))

    @driver_call
    def cuMemFree(self, dptr: int) -> None:
        for number in self._streams:  # the driver waits before it frees
            if self._streams[number].graph is None:
                self._drain(number)
        self._give(dptr, "alloc", "free")

    @driver_call
    def cuMemHostAlloc(self, bytesize: int, Flags: int) -> int:
        self._forbidden()
        assert Flags & self.CU_MEMHOSTALLOC_DEVICEMAP
        return self._take(bytesize, "host")

    @driver_call
    def cuMemHostGetDevicePointer(self, p: int, Flags: int) -> Handle:
        if self._find(p) is None:
            raise Refusal("CUDA_ERROR_INVALID_VALUE")
        return Handle("pointer", p)

    @driver_call
    def cuMemFreeHost(self, p: int) -> None:
        self._give(p, "host", "host_free")

    @driver_call
    def cuMemHostRegister(self, p: int, bytesize: int, Flags: int) -> None:
        self._forbidden()
        if self._find(p) is not None:
            raise Refusal("CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED")
        self._memory[p] = (None, bytesize, "register", self._check_context())
        self.live["register"] += 1
        self.calls.append(("register", p, bytesize))

    @driver_call
    def cuMemHostUnregister(self, p: int) -> None:
        self._give(p, "register", "unregister")

    @driver_call
    def cuPointerGetAttribute(self, attribute: int, ptr: int) -> Any:
        self._check_context()
        start = self._find(ptr)
        if start is None:
            raise Refusal("CUDA_ERROR_INVALID_VALUE")
        return self._memory[start][3] if attribute == 9 else Handle("pointer", ptr)

    @driver_call
    def cuMemcpyAsync(self, dst: int, src: int, ByteCount: int, hStream: Handle) -> None:
        self._check_context()
        assert ByteCount > 0
        self._check_memory(dst, ByteCount)
        self._check_memory(src, ByteCount)

        def run() -> None:
            _move(self, dst, src, ByteCount)

        run.from_host = self._on_host(src, ByteCount)  # type: ignore[attr-defined]
        self._queue(int(hStream), ("copy", dst, src, ByteCount, int(hStream)), run)

    @driver_call
    def cuStreamCreate(self, Flags: int) -> Handle:
        self._check_context()
        assert Flags == 1, "a stream that waits for the default stream"
        handle = self._make("stream")
        self._streams[int(handle)] = StreamState()
        return handle

    @driver_call
    def cuStreamSynchronize(self, hStream: Handle) -> None:
        stream = self._stream(hStream)
        self._check_context()
        if stream.graph is not None:
            stream.broken = True
            raise Refusal("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        self.calls.append(("synchronize", int(hStream)))
        self._drain(int(hStream))

    @driver_call
    def cuStreamDestroy(self, hStream: Handle) -> None:
        self._drain(int(hStream))
        del self._streams[int(hStream)]
        self._destroy("stream", hStream)

    @driver_call
    def cuStreamWaitEvent(self, hStream: Handle, hEvent: Handle, Flags: int) -> None:
        event = int(hEvent)
        source = self._event_streams.get(event)
        pending = self._times.get(event) is None and source is not None

        def work() -> None:
            if pending and source in self._streams:
                while self._times.get(event) is None and self._streams[source].queue:
                    self._streams[source].queue.pop(0)()

        self._queue(int(hStream), ("wait", int(hStream), event), work)

    @driver_call
    def cuEventCreate(self, Flags: int) -> Handle:
        self._check_context()
        handle = self._make("event")
        self._flags[int(handle)] = Flags
        return handle

    @driver_call
    def cuEventRecord(self, hEvent: Handle, hStream: Handle) -> None:
        self._check_context()
        event, number = int(hEvent), int(hStream)
        if number in (1, 2):  # somebody else's default stream: what is on it is done here
            self._times[event] = self.clock
            self.calls.append(("record", event, number))
            return
        if self._stream(hStream).graph is None:
            self._times[event] = None
            self._event_streams[event] = number

        def reached() -> None:
            self._times[event] = self.clock

        self._queue(number, ("record", event, number), reached)

    @driver_call
    def cuEventSynchronize(self, hEvent: Handle) -> None:
        self._forbidden()
        event = int(hEvent)
        self.calls.append(("synchronize_event", event))
        stream = self._streams.get(self._event_streams.get(event, -1))
        while stream is not None and self._times.get(event) is None and stream.queue:
            stream.queue.pop(0)()

    @driver_call
    def cuEventElapsedTime(self, hStart: Handle, hEnd: Handle) -> float:
        if self._flags[int(hStart)] or self._flags[int(hEnd)]:
            raise Refusal("CUDA_ERROR_INVALID_HANDLE")
        start, end = self._times[int(hStart)], self._times[int(hEnd)]
        if start is None or end is None:
            raise Refusal("CUDA_ERROR_NOT_READY")
        return end - start

    @driver_call
    def cuEventDestroy(self, hEvent: Handle) -> None:
        self._check_context()
        self._destroy("event", hEvent)

    @driver_call
    def cuStreamBeginCapture(self, hStream: Handle, mode: int) -> None:
        self._check_context()
        assert mode == 1, "not thread-local"
        stream = self._stream(hStream)
        stream.graph, stream.broken, stream.thread = [], False, threading.get_ident()
        self.calls.append(("begin", int(hStream)))

    @driver_call
    def cuStreamEndCapture(self, hStream: Handle) -> Handle:
        stream = self._stream(hStream)
        work, stream.graph = stream.graph, None
        assert work is not None, "nothing is recorded"
        self.calls.append(("end", int(hStream)))
        if stream.broken:
            raise Refusal("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        handle = self._make("graph")
        self._graphs[int(handle)] = work
        return handle

    @driver_call
    def cuGraphGetNodes(self, hGraph: Handle, numNodes: int = 0) -> tuple[list[Any], int]:
        steps = self._graphs[int(hGraph)]
        return list(steps[:numNodes]), len(steps)

    @driver_call
    def cuGraphNodeGetType(self, hNode: Any) -> int:
        return 3 if getattr(hNode, "on_host", False) else 1 if getattr(hNode, "from_host", None) is not None else 0

    @driver_call
    def cuGraphMemcpyNodeGetParams(self, hNode: Any) -> SimpleNamespace:
        return SimpleNamespace(srcMemoryType=1 if hNode.from_host else 2)

    @driver_call
    def cuGraphInstantiate(self, hGraph: Handle, flags: int) -> Handle:
        self._forbidden()
        handle = self._make("executable")
        self._graphs[int(handle)] = list(self._graphs[int(hGraph)])
        return handle

    @driver_call
    def cuGraphLaunch(self, hGraphExec: Handle, hStream: Handle) -> None:
        self._check_context()
        work = self._graphs[int(hGraphExec)]
        note = ("replay", int(hGraphExec), int(hStream))
        self._queue(int(hStream), note, lambda: [step() for step in work] and None)

    @driver_call
    def cuGraphDestroy(self, hGraph: Handle) -> None:
        del self._graphs[int(hGraph)]
        self._destroy("graph", hGraph)

    @driver_call
    def cuGraphExecDestroy(self, hGraphExec: Handle) -> None:
        del self._graphs[int(hGraphExec)]
        self._destroy("executable", hGraphExec)


def _move(driver: FakeDriver, target: int, source: int, nbytes: int) -> None:
    driver._check_memory(target, nbytes)  # still there when the copy happens
    driver._check_memory(source, nbytes)
    ctypes.memmove(target, source, nbytes)


def install_fake_cuda(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver, version: str = "13.5.0") -> FakeDriver:
    """Puts the fake where `BindingsApi` imports cuda-bindings from."""
    package: Any = ModuleType("cuda.bindings")
    package.__version__ = version
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)  # type: ignore[arg-type]
    return driver


def fake_cuda_device(
    monkeypatch: pytest.MonkeyPatch, index: int = 0, unified: bool | None = None, **options: Any
) -> tuple[CudaDevice, FakeDriver]:
    """A `CudaDevice` on a fake driver of its own; `options` are those of `FakeDriver`."""
    driver = install_fake_cuda(monkeypatch, FakeDriver(**options))
    return CudaDevice(index, unified=unified), driver
