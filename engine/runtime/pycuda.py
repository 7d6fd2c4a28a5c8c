"""A CUDA device through pycuda, for JetPack images that bring it. No graphs: pycuda has no calls for them.

pycuda has no wheel that could be checked against, so the calls are those of its documentation and sources
(inducer/pycuda: doc/source/driver.rst, src/wrapper/wrap_cudadrv.cpp, src/cpp/cuda.hpp), tested with a stand-in only.
Not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import DeviceError, MissingDependencyError
from .cuda import CudaDevice
from .cuda_calls import CudaApi, CudaError, CudaFacts, long_pci


class PycudaDevice(CudaDevice):
    """`CudaDevice` with pycuda below it: the same memory, copies and marks, no `capture`.

    Args:
        index: The N of ``cuda:N``.
        unified: See `CudaDevice`.
        reason: Why this device was chosen, for `info`.

    Raises:
        MissingDependencyError: pycuda is not installed.
        DeviceError: No driver, or no such device.
    """

    captures = False

    def __init__(self, index: int = 0, *, unified: bool | None = None, reason: str = "") -> None:
        super().__init__(index, api=PycudaApi(), unified=unified, reason=reason)


class _Slot:
    """Holds a pycuda object whose destructor frees it: emptied while the context is current."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


class PycudaApi(CudaApi):
    """pycuda's driver module. Host addresses are used as device addresses too (unified addressing), as for any
    page-locked memory on 64-bit systems.

    Raises:
        MissingDependencyError: pycuda is not installed.
        DeviceError: pycuda does not load, or there is no driver.
    """

    captures = False
    locates = False

    def __init__(self) -> None:
        try:
            self._d: Any = importlib.import_module("pycuda.driver")
            version = str(importlib.import_module("pycuda").VERSION_TEXT)
        except ModuleNotFoundError as error:
            raise MissingDependencyError("pycuda", "pycuda", "Running on a CUDA device with pycuda") from error
        except ImportError as error:
            raise DeviceError(
                f"pycuda is installed but does not load: {error}",
                "Use the pycuda of the JetPack image, or build it against this CUDA.",
            ) from error
        self.label = f"pycuda {version}"
        self._memory: dict[int, Any] = {}
        self._call(self._d.init)

    def _call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except self._d.Error as error:
            text = str(error)
            code = "CUDA_ERROR_UNKNOWN"
            if isinstance(error, self._d.MemoryError):
                code = "CUDA_ERROR_OUT_OF_MEMORY"
            elif "shutting down" in text or "deinitialized" in text:
                code = "CUDA_ERROR_DEINITIALIZED"
            raise CudaError(getattr(function, "__name__", "pycuda"), code, text) from error

    def count(self) -> int:
        return int(self._call(self._d.Device.count))

    def facts(self, index: int) -> CudaFacts:
        device = self._call(self._d.Device, index)
        major, minor = device.compute_capability()
        attributes = self._d.device_attribute
        maps_host = bool(device.get_attribute(attributes.CAN_MAP_HOST_MEMORY))
        cuda = int(self._d.get_driver_version())
        return CudaFacts(
            index=index,
            name=str(device.name()),
            compute_capability=f"{major}.{minor}",
            memory_total=int(device.total_memory()),
            multiprocessors=int(device.get_attribute(attributes.MULTIPROCESSOR_COUNT)),
            integrated=bool(device.get_attribute(attributes.INTEGRATED)),
            maps_host=maps_host,
            pageable=False,  # pycuda has no name for this attribute
            registers_host=maps_host,
            uuid=None,
            pci=long_pci(str(device.pci_bus_id())),
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        )

    def retain(self, index: int) -> Any:
        return self._call(self._call(self._d.Device, index).retain_primary_context)

    def release(self, index: int, context: Any) -> None:
        self._call(context.detach)

    def push(self, context: Any) -> None:
        self._call(context.push)

    def pop(self, context: Any) -> None:
        self._call(self._d.Context.pop)

    def memory(self) -> tuple[int, int]:
        free, total = self._call(self._d.mem_get_info)
        return int(free), int(total)

    def alloc(self, nbytes: int) -> int:
        held = self._call(self._d.mem_alloc, nbytes)
        self._memory[int(held)] = held
        return int(held)

    def free(self, pointer: int) -> None:
        self._call(self._memory.pop(pointer).free)

    def host_alloc(self, nbytes: int) -> tuple[int, int]:
        flags = self._d.host_alloc_flags
        array = self._call(self._d.pagelocked_empty, (nbytes,), np.uint8, mem_flags=flags.PORTABLE | flags.DEVICEMAP)
        host = int(array.ctypes.data)
        device = int(self._call(array.base.get_device_pointer))
        self._memory[host] = array.base
        return host, device

    def host_free(self, host: int) -> None:
        self._call(self._memory.pop(host).free)

    def host_register(self, host: int, nbytes: int) -> int:
        flags = self._d.mem_host_register_flags
        array = self._call(
            self._d.register_host_memory,
            np.frombuffer(memoryview(_bytes(host, nbytes)), np.uint8),
            flags.PORTABLE | flags.DEVICEMAP,
        )
        device = int(self._call(array.base.get_device_pointer))
        self._memory[host] = array.base
        return device

    def host_unregister(self, host: int) -> None:
        self._call(self._memory.pop(host).unregister)

    def locate(self, pointer: int) -> tuple[int, int] | None:
        """None always: pycuda does not tell whose memory an address is."""
        return None

    def copy(self, target: int, source: int, nbytes: int, stream: Any, kind: str) -> None:
        if kind in ("htod", "htoh"):
            self._call(self._d.memcpy_htod_async, target, _bytes(source, nbytes), stream.held)
        elif kind == "dtoh":
            self._call(self._d.memcpy_dtoh_async, _bytes(target, nbytes), source, stream.held)
        else:
            self._call(self._d.memcpy_dtod_async, target, source, nbytes, stream.held)

    def stream_create(self) -> Any:
        return _Slot(self._call(self._d.Stream, 1))  # CU_STREAM_NON_BLOCKING, which pycuda has no name for

    def stream_pointer(self, stream: Any) -> int:
        return int(stream.held.handle)

    def stream_synchronize(self, stream: Any) -> None:
        self._call(stream.held.synchronize)

    def stream_destroy(self, stream: Any) -> None:
        stream.held = None

    def stream_wait(self, stream: Any, event: Any) -> None:
        self._call(stream.held.wait_for_event, event.held)

    def event_create(self, timed: bool) -> Any:
        return _Slot(self._call(self._d.Event, 0 if timed else self._d.event_flags.DISABLE_TIMING))

    def event_record(self, event: Any, stream: Any) -> None:
        self._call(event.held.record, stream.held)

    def event_record_foreign(self, event: Any, stream: int) -> None:
        raise DeviceError(
            "pycuda cannot wait for a stream of another library.",
            "Synchronise that stream before you hand over memory.",
        )

    def event_synchronize(self, event: Any) -> None:
        self._call(event.held.synchronize)

    def event_elapsed(self, start: Any, end: Any) -> float:
        return float(self._call(end.held.time_since, start.held))

    def event_destroy(self, event: Any) -> None:
        event.held = None


def _bytes(address: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
    """Page-locked memory as an object with the buffer protocol, which is what pycuda takes."""
    return (ctypes.c_char * nbytes).from_address(address)
