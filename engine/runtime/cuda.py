"""A CUDA device through cuda-bindings: one stream, page-locked and device memory, events, recorded graphs.

Run on an H100 with cuda-bindings 13.3 (docs/gpu-h100.md); elsewhere tested against a stand-in for the driver, and the
calls against the real package's signatures. Integrated memory (Jetson) was not run on a GPU yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ContractError, DeviceError
from ..machine import memory, nvidia_driver
from .base import Array, Buffer, CapturedGraph, Device, DeviceInfo, Shape
from .cpu import CpuDevice, address, check_copy, check_writable
from .cuda_api import BindingsApi
from .cuda_calls import CudaApi, device_info
from .cuda_graph import CudaGraph, Current, Staging, as_mark, end_capture
from .cuda_memory import RECLAIMER, Allocation, Context, CudaEvent, EventPool, Stream, allocate, map_host
from .cuda_wrap import borrow_device, check_borrowed


class CudaDevice(Device):
    """One stream on one GPU.

    Calls may come from any thread: each makes the GPU's primary context current while it lasts and leaves the
    thread's own choice as it was. Calls of other threads wait while one records a graph.

    Buffers that `empty` and `host_empty` return are freed with the last reference to them and to their arrays, which
    may be after `close`.

    Args:
        index: The N of ``cuda:N``, in CUDA's own order.
        api: Library that makes the calls; cuda-bindings when None.
        unified: Whether all buffers are page-locked host memory that kernels use in place. None means yes on
            integrated GPUs (Jetson), which saves every copy; their GPU does not cache such memory (NVIDIA, "CUDA for
            Tegra", memory types), so a model that reads its tensors many times may run faster with False.
        reason: Why this device was chosen, for `info`.

    Raises:
        MissingDependencyError: The library is not installed.
        DeviceError: No driver, no such device, or memory that is not `unified` asked to be so.
    """

    kind = "cuda"
    captures = True

    def __init__(
        self, index: int = 0, *, api: CudaApi | None = None, unified: bool | None = None, reason: str = ""
    ) -> None:
        self._api = BindingsApi() if api is None else api
        count = self._api.count()
        if not 0 <= index < count:
            raise DeviceError(f"There is no device 'cuda:{index}'.", f"CUDA devices here: {count}, counted from 0.")
        self._facts = self._api.facts(index)
        shares = self._facts.integrated and self._facts.maps_host
        if unified and not shares:
            raise DeviceError(f"'cuda:{index}' has memory of its own.", "Open it without unified=True.")
        self.unified = shares if unified is None else unified
        self.captures = self._api.captures
        self._index = index
        self._reason = reason
        self._driver = nvidia_driver()
        self._lock = threading.RLock()
        self._recording = False
        self._stream = Stream(Context(self._api, index))
        self._events = EventPool(self._stream.context)
        self._current = Current(self._lock, self._stream, self.name)

    @property
    def name(self) -> str:
        return f"cuda:{self._index}"

    @property
    def stream(self) -> int:
        """Handle of the stream (a CUstream, which is a cudaStream_t); never the default stream.

        Raises:
            DeviceError: The device is closed.
        """
        self._handle()
        return self._stream.pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        """Lets cuda.core, CuPy and others take the stream: version of the protocol, handle."""
        return 0, self.stream

    def current(self) -> Current:
        """Makes the device current on the calling thread inside ``with``; back ends launch there. Nests.

        Other threads wait meanwhile, so that nothing of theirs gets into a graph that this one records.

        Raises:
            DeviceError: The device is closed (at ``with``).
        """
        return self._current

    def info(self) -> DeviceInfo:
        """Facts of the device, and its memory now; of an integrated GPU the RAM's."""
        total, free = self._facts.memory_total, None
        if self._facts.integrated:
            ram, free = memory()
            total = ram or total
        elif self._stream.handle is not None:
            with self._current:
                if not self._recording:
                    free, total = self._api.memory()
        extra = {"library": self._api.label, "buffers": "mapped host memory" if self.unified else "device memory"}
        if self._reason:
            extra["reason"] = self._reason
        return device_info(self._facts, total, free, self._driver, extra)

    def empty(self, shape: Shape, dtype: npt.DTypeLike) -> Buffer:
        """Allocates uninitialised memory, 256-byte aligned or better.

        On the device; where memory is `unified` page-locked host memory, which then has an `array`.

        Raises:
            DeviceMemoryError: Too little memory; says how much was asked, is free and is there.
        """
        return self._new(shape, dtype, host=self.unified)

    def host_empty(self, shape: Shape, dtype: npt.DTypeLike) -> Buffer:
        """Allocates page-locked host memory; its `pointer` is the address at which kernels see it.

        Copies from and to it do not wait, so keep the buffer unchanged until they are done.

        Raises:
            DeviceMemoryError: Too little memory.
        """
        return self._new(shape, dtype, host=True)

    def wrap(self, source: object) -> Buffer:
        """Borrows C-contiguous memory without a copy; the result keeps `source` alive.

        Work that the exporter says is pending is waited for on the stream, not by the caller.

        Args:
            source: Exporter of DLPack or ``__cuda_array_interface__`` on this GPU; where memory is `unified` also any
                host buffer, which is page-locked while the result lives (unless kernels can use any host memory).

        Raises:
            ContractError: On another device, host memory on a GPU with memory of its own, not C-contiguous, or a dtype
                that graphs do not take.
        """
        with self._current:
            self._refuse_recording("wrap memory")
            borrowed = borrow_device(source, self.stream)
            if borrowed is None:
                return self._wrap_host(source)
            index = borrowed.device
            if index is None and borrowed.pointer and self._api.locates:
                index, _ = self._api.locate(borrowed.pointer) or (-1, 0)
            if index not in (None, self._index):
                where = f"lives on cuda:{index}" if index >= 0 else "is memory that CUDA does not know"
                raise ContractError(f"The {type(source).__name__} {where}, not on {self.name}.", "Copy it there first.")
            if borrowed.stream is not None:
                done = self._events.get(False)
                self._api.event_record_foreign(done.handle, borrowed.stream)
                self._api.stream_wait(self._stream.handle, done.handle)
            return Buffer(self, borrowed.shape, borrowed.dtype, borrowed.pointer, owned=False, owner=borrowed)

    def copy(self, target: Buffer, source: Buffer) -> None:
        """Queues a copy between buffers of CUDA devices, page-locked ones included; can be recorded.

        A buffer of the CPU device as `source` is uploaded. Buffers of another stream: let this one `wait` first.

        Raises:
            ContractError: Shape or dtype differ, the target is read-only or in memory that is not page-locked.
        """
        if isinstance(source.device, CpuDevice) and not isinstance(target.device, CpuDevice):
            self.upload(target, source.host())
            return
        check_copy(target, source)
        check_borrowed(target)
        for buffer in (target, source):
            if not isinstance(buffer.device, CudaDevice):
                raise ContractError(
                    f"'{self.name}' cannot copy to or from a buffer of '{buffer.device.name}'.", "Use download."
                )
        kind = f"{_side(source)}to{_side(target)}"
        with self._current:
            self._queue_copy(target.pointer, source.pointer, target.nbytes, kind)

    def upload(self, target: Buffer, source: Array) -> None:
        """Queues a copy of a host array into `target`; `source` may be changed on return.

        Goes through page-locked memory that is made at the first upload into `target`. Where `target` is host memory
        itself, waits for the stream and copies at once.

        Raises:
            ContractError: Shape or dtype differ, or `target` is read-only.
            DeviceError: A graph is being recorded: it would repeat this very array.
        """
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ContractError(
                f"Cannot copy {source.dtype}{list(source.shape)} to {target.dtype}{list(target.shape)}.",
                "Copies never reshape nor convert.",
            )
        check_writable(target)
        check_borrowed(target)
        with self._current:
            self._refuse_recording("upload")
            if target.array is not None:
                self._api.stream_synchronize(self._handle())
                np.copyto(target.array, source, casting="no")
                return
            staging = self._staging(target)
            if staging.up is None:
                staging.up = self._allocate(target.nbytes, host=True).array(target.shape, target.dtype)
            if staging.sent is None:
                staging.sent = self._events.get(False)
            else:
                self._api.event_synchronize(staging.sent.handle)  # the copy before this one has left `up`
            np.copyto(staging.up, source, casting="no")
            self._queue_copy(target.pointer, address(staging.up), target.nbytes, "htod")
            self._api.event_record(staging.sent.handle, self._handle())

    def download(self, source: Buffer) -> Array:
        """Waits for the stream and returns a host view of `source`.

        The view is the memory itself where that is host memory, else page-locked memory that is made at the first
        download of `source` and overwritten by the next one.

        Raises:
            DeviceError: A graph is being recorded, or queued work failed.
        """
        with self._current:
            self._refuse_recording("download")
            if source.array is not None:
                view = source.array
            else:
                staging = self._staging(source)
                if staging.down is None:
                    staging.down = self._allocate(source.nbytes, host=True).array(source.shape, source.dtype)
                view = staging.down
                self._queue_copy(address(view), source.pointer, source.nbytes, "dtoh")
            self._api.stream_synchronize(self._handle())
            return view

    def synchronize(self) -> None:
        """Waits until everything queued on the stream is done.

        Raises:
            DeviceError: A graph is being recorded, or queued work failed.
        """
        with self._current:
            self._refuse_recording("synchronise")
            self._api.stream_synchronize(self._handle())

    def capture(self, work: Callable[[], None], *, host_copies: bool = True) -> CapturedGraph:
        """Records what `work` queues on the stream, without running it.

        One recording at a time in a process; other threads that use this device wait. Take the locks of all sessions
        that `work` runs before the call (a thread that holds one and waits for the device would never give it back).
        The buffers that `work` uses must live as long as the graph.

        Raises:
            DeviceError: `work` queued nothing on the stream, a call of a host function, a copy out of host memory
                without `host_copies`, or did what cannot be recorded (allocate, upload, download, synchronise); the
                stream is usable again. What else `work` raises passes through.
        """
        if not self.captures:
            return super().capture(work, host_copies=host_copies)
        with RECLAIMER, self._current:
            self._refuse_recording("record a second graph")
            stream = self._handle()
            self._api.capture_begin(stream)
            self._recording, finished = True, False
            try:
                work()
                finished = True
            finally:
                self._recording = False
                graph = end_capture(self._api, stream, finished)
            try:
                if self._api.graph_empty(graph):
                    raise DeviceError(
                        f"Nothing was recorded on the stream of {self.name}.",
                        "Let the back end launch on Device.stream.",
                    )
                # ONNX Runtime's CUDA provider hands some kernels (Concat of unequal parts, Split, ScatterND, MatMul
                # over many matrices) their arguments through host memory and frees it behind them, by a call of a
                # host function where it may: each replay would read, and free, what belongs to somebody else.
                calls, copies = self._api.graph_host_work(graph)
                if calls or (copies and not host_copies):
                    what = "calls a function on the host" if calls else "copies out of host memory"
                    raise DeviceError(
                        f"What was recorded on {self.name} {what}, made for one run only.",
                        "Run without graph capture.",
                    )
                executable = self._api.graph_instantiate(graph)
            finally:
                self._api.graph_destroy(graph)
            return CudaGraph(self, self._stream.context, executable)

    def record(self, timed: bool = False) -> CudaEvent:
        """Marks the point reached on the stream; the mark is used again once nobody refers to it."""
        with self._current:
            event = self._events.get(timed)
            self._api.event_record(event.handle, self._handle())
            return event

    def elapsed(self, start: object, end: object) -> float:
        """Milliseconds between two marks made with ``record(timed=True)``; waits for both.

        Raises:
            DeviceError: A mark is not timed.
        """
        first, last = as_mark(start, self._api), as_mark(end, self._api)
        if not (first.timed and last.timed):
            raise DeviceError("A mark without time cannot be measured.", "Make both with record(timed=True).")
        with self._current:
            self._refuse_recording("wait for a mark")
            self._api.event_synchronize(first.handle)
            self._api.event_synchronize(last.handle)
            return self._api.event_elapsed(first.handle, last.handle)

    def wait(self, event: object) -> None:
        """Lets the stream wait for a mark of any CUDA device object; None (a mark of the CPU) is done already."""
        if event is None:
            return
        mark = as_mark(event, self._api)
        with self._current:
            self._api.stream_wait(self._handle(), mark.handle)

    def wait_on_host(self, event: object) -> None:
        """Blocks the caller until a mark is reached; what was queued behind it may still run."""
        if event is None:
            return
        mark = as_mark(event, self._api)
        with self._current:
            self._refuse_recording("wait for a mark")
            self._api.event_synchronize(mark.handle)

    def close(self) -> None:
        """Waits for the stream and frees it; buffers free themselves with their last reference.

        Raises:
            DeviceError: Work that was queued had failed; the stream is freed all the same.
        """
        with self._lock:
            if self._stream.handle is None:
                return
            with self._current:
                self._refuse_recording("close the device")
                handle = self._stream.handle
                try:
                    self._api.stream_synchronize(handle)
                finally:
                    self._stream.handle = None
                    self._events.close()
                    self._api.stream_destroy(handle)

    def _handle(self) -> Any:
        if self._stream.handle is None:
            raise DeviceError(f"Device '{self.name}' is closed.", "Open it again.")
        return self._stream.handle

    def launch_graph(self, executable: Any) -> None:
        """Queues a recorded graph; for `CudaGraph`, inside ``with current()``."""
        self._api.graph_launch(executable, self._handle())

    def _refuse_recording(self, what: str) -> None:
        # Only the thread that records gets here meanwhile: the others wait for the lock.
        if self._recording:
            raise DeviceError(
                f"Cannot {what} while a graph is recorded on {self.name}.", "Do it before or after Device.capture."
            )

    def _allocate(self, nbytes: int, host: bool) -> Allocation:
        self._refuse_recording("allocate")
        return allocate(self._stream, nbytes, host, self.name)

    def _new(self, shape: Shape, dtype: npt.DTypeLike, host: bool) -> Buffer:
        shape, kind = tuple(int(size) for size in shape), np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        with self._current:
            taken = self._allocate(nbytes, host)
        return Buffer(self, shape, kind, taken.pointer, taken.array(shape, kind) if host else None, owner=taken)

    def _wrap_host(self, source: object) -> Buffer:
        if not self.unified:
            raise ContractError(
                f"Host memory is not on {self.name}.", "Copy it with Device.upload, or Binding.write for an input."
            )
        host = CpuDevice().wrap(source)
        pointer, kept = map_host(self._stream, self._facts, host)
        return Buffer(self, host.shape, host.dtype, pointer, host.array, owned=False, owner=(kept, source))

    def _staging(self, buffer: Buffer) -> Staging:
        if buffer.staging is None:
            buffer.staging = Staging()
        staging: Staging = buffer.staging
        return staging

    def _queue_copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        if nbytes:
            self._api.copy(target, source, nbytes, self._handle(), kind)


def _side(buffer: Buffer) -> str:
    return "d" if buffer.array is None else "h"
