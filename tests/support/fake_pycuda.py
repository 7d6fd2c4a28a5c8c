"""A stand-in for ``pycuda.driver`` over `FakeDriver`, with the forms of pycuda's documentation and sources.

There is no wheel to compare it with: it shows that `PycudaApi` and the device fit together, not that pycuda answers so.
As in pycuda, destructors need a current context, and host memory is given as objects with the buffer protocol.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from .fake_cuda import FakeDriver


class Error(Exception):
    """pycuda.driver.Error."""


class MemoryError_(Error):
    """pycuda.driver.MemoryError."""


class _Context:
    def __init__(self, module: FakePycuda, index: int, handle: Any) -> None:
        self.module, self.index, self.handle = module, index, handle

    def push(self) -> None:
        self.module.call("cuCtxPushCurrent", self.handle)

    def detach(self) -> None:
        self.module.call("cuDevicePrimaryCtxRelease", self.index)


class _Device:
    def __init__(self, module: FakePycuda, index: int) -> None:
        self.module, self.index = module, index

    def name(self) -> str:
        return f"Fake GPU {self.index}"

    def compute_capability(self) -> tuple[int, int]:
        return 8, 7

    def total_memory(self) -> int:
        return self.module.driver.total

    def pci_bus_id(self) -> str:
        return "0000:01:00.0"

    def get_attribute(self, name: str) -> int:
        return self.module.driver.attributes[name]

    def retain_primary_context(self) -> _Context:
        return _Context(self.module, self.index, self.module.call("cuDevicePrimaryCtxRetain", self.index))


class _DeviceAllocation:
    def __init__(self, module: FakePycuda, nbytes: int) -> None:
        self.module = module
        self.pointer = int(module.call("cuMemAlloc", nbytes))

    def __int__(self) -> int:
        return self.pointer

    def free(self) -> None:
        self.module.call("cuMemFree", self.pointer)


class _Host:
    """PagelockedHostAllocation and RegisteredHostMemory: the base of a numpy array."""

    def __init__(self, module: FakePycuda, pointer: int, nbytes: int, keep: Any = None) -> None:
        self.module, self.pointer, self.keep = module, pointer, keep
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (pointer, False)}

    def get_device_pointer(self) -> int:
        return self.pointer

    def free(self) -> None:
        self.module.call("cuMemFreeHost", self.pointer)

    def unregister(self) -> None:
        self.module.call("cuMemHostUnregister", self.pointer)


class _Stream:
    def __init__(self, module: FakePycuda, flags: int = 0) -> None:
        self.module = module
        self.raw = module.call("cuStreamCreate", flags)

    @property
    def handle(self) -> int:
        return int(self.raw)

    def synchronize(self) -> None:
        self.module.call("cuStreamSynchronize", self.raw)

    def wait_for_event(self, event: _Event) -> None:
        self.module.call("cuStreamWaitEvent", self.raw, event.raw, 0)

    def __del__(self) -> None:
        if hasattr(self, "raw"):
            assert self.module.driver.stack, "destroyed without a current context"
            self.module.call("cuStreamDestroy", self.raw)


class _Event:
    def __init__(self, module: FakePycuda, flags: int = 0) -> None:
        self.module = module
        self.raw = module.call("cuEventCreate", flags)

    def record(self, stream: _Stream) -> _Event:
        self.module.call("cuEventRecord", self.raw, stream.raw)
        return self

    def synchronize(self) -> _Event:
        self.module.call("cuEventSynchronize", self.raw)
        return self

    def time_since(self, start: _Event) -> float:
        return float(self.module.call("cuEventElapsedTime", start.raw, self.raw))

    def __del__(self) -> None:
        assert self.module.driver.stack, "destroyed without a current context"
        self.module.call("cuEventDestroy", self.raw)


class FakePycuda(ModuleType):
    """The module ``pycuda.driver``; `driver` is the recording device behind it."""

    Error = Error
    MemoryError = MemoryError_
    host_alloc_flags = SimpleNamespace(PORTABLE=1, DEVICEMAP=2)
    mem_host_register_flags = SimpleNamespace(PORTABLE=1, DEVICEMAP=2)
    event_flags = SimpleNamespace(DISABLE_TIMING=2)
    device_attribute = SimpleNamespace(
        MULTIPROCESSOR_COUNT="MULTIPROCESSOR_COUNT", INTEGRATED="INTEGRATED", CAN_MAP_HOST_MEMORY="CAN_MAP_HOST_MEMORY"
    )

    def __init__(self, driver: FakeDriver) -> None:
        super().__init__("pycuda.driver")
        self.driver = driver
        self.Context = SimpleNamespace(pop=lambda: self.call("cuCtxPopCurrent"))

    def call(self, name: str, *arguments: Any) -> Any:
        """Makes a driver call and raises as pycuda does."""
        status, *values = getattr(self.driver, name)(*arguments)
        if int(status):
            kind = MemoryError_ if status.name == "CUDA_ERROR_OUT_OF_MEMORY" else Error
            raise kind(f"{name} failed: {status.name.lower()}")
        return values[0] if len(values) == 1 else tuple(values)

    def init(self, flags: int = 0) -> None:
        self.call("cuInit", flags)

    @property
    def Device(self) -> Any:
        maker: Any = lambda index: _Device(self, index)  # noqa: E731
        maker.count = lambda: self.call("cuDeviceGetCount")
        return maker

    def get_driver_version(self) -> int:
        return self.driver.cuda

    def mem_get_info(self) -> Any:
        return self.call("cuMemGetInfo")

    def mem_alloc(self, nbytes: int) -> _DeviceAllocation:
        return _DeviceAllocation(self, nbytes)

    def pagelocked_empty(self, shape: tuple[int], dtype: Any, order: str = "C", mem_flags: int = 0) -> Any:
        assert (len(shape), dtype) == (1, np.uint8)
        return np.asarray(_Host(self, self.call("cuMemHostAlloc", shape[0], mem_flags), shape[0]))

    def register_host_memory(self, ary: Any, flags: int = 0) -> Any:
        self.call("cuMemHostRegister", ary.ctypes.data, ary.nbytes, flags)
        return np.asarray(_Host(self, ary.ctypes.data, ary.nbytes, ary))

    def Stream(self, flags: int = 0) -> _Stream:
        return _Stream(self, flags)

    def Event(self, flags: int = 0) -> _Event:
        return _Event(self, flags)

    def memcpy_htod_async(self, dest: int, src: Any, stream: _Stream) -> None:
        source = np.frombuffer(src, np.uint8)
        self.call("cuMemcpyAsync", dest, source.ctypes.data, source.nbytes, stream.raw)

    def memcpy_dtoh_async(self, dest: Any, src: int, stream: _Stream) -> None:
        target = np.frombuffer(dest, np.uint8)
        assert target.flags.writeable
        self.call("cuMemcpyAsync", target.ctypes.data, src, target.nbytes, stream.raw)

    def memcpy_dtod_async(self, dest: int, src: int, size: int, stream: _Stream) -> None:
        self.call("cuMemcpyAsync", dest, src, size, stream.raw)


def install_fake_pycuda(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> FakePycuda:
    """Puts the fake where `PycudaApi` imports pycuda from."""
    package: Any = ModuleType("pycuda")
    package.VERSION_TEXT = "2025.1"
    module = FakePycuda(driver)
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", module)
    return module
