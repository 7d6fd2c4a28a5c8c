"""Borrowing memory of other libraries: what is accepted, what waits for what, and what is kept alive."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.errors import ContractError
from pixano_edge.engine.runtime.cuda import CudaDevice
from pixano_edge.engine.runtime.dlpack import CPU, CUDA, read_capsule
from tests.support.fake_cuda import FakeDriver, fake_cuda_device

SHAPE = (2, 3)
ONES = np.ones(SHAPE, np.float32)


class Interface:
    """An exporter of ``__cuda_array_interface__``."""

    def __init__(self, pointer: int, **changes: Any) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": SHAPE,
            "typestr": "<f4",
            "data": (pointer, False),
            "strides": None,
            "stream": None,
        } | changes


class Dlpack:
    """An exporter of DLPack whose capsule says that the memory of a numpy array is on a CUDA device."""

    def __init__(self, array: Any, device: tuple[int, int] = (CUDA, 0)) -> None:
        self.array = array
        self.device = device
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None) -> object:
        self.streams.append(stream or 0)
        capsule = self.array.__dlpack__()
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        ctypes.cast(get(capsule, b"dltensor") + 8, ctypes.POINTER(ctypes.c_int32 * 2)).contents[:] = self.device
        return capsule


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> tuple[CudaDevice, FakeDriver]:
    return fake_cuda_device(monkeypatch, count=2)


class TestCapsule:
    @pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int64", "float16", "float32", "float64"])
    def test_what_numpy_exports(self, dtype: str) -> None:
        array = np.zeros((2, 3, 4), dtype)[1:]
        tensor = read_capsule(array.__dlpack__())
        assert (tensor.pointer, tensor.shape, tensor.dtype) == (array.ctypes.data, (1, 3, 4), array.dtype)
        assert (tensor.device_type, tensor.device_id) == (CPU, 0)
        assert tensor.strides in (None, (12, 4, 1))

    def test_it_keeps_the_memory_until_it_is_dropped(self) -> None:
        array = np.zeros(3)
        before = sys.getrefcount(array)
        tensor = read_capsule(array.__dlpack__())
        assert sys.getrefcount(array) > before
        del tensor
        gc.collect()
        assert sys.getrefcount(array) == before

    def test_refused(self) -> None:
        with pytest.raises(ContractError, match="no numpy equivalent"):
            read_capsule(np.zeros(2, np.complex64).__dlpack__())
        capsule = np.zeros(2).__dlpack__()
        np.from_dlpack(_Once(capsule))
        with pytest.raises(ContractError, match="cannot be read"):
            read_capsule(capsule)


class _Once:
    def __init__(self, capsule: object) -> None:
        self.capsule = capsule

    def __dlpack__(self, **_: object) -> object:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (CPU, 0)


class TestInterface:
    def test_no_copy_and_no_wait(self, pair: tuple[CudaDevice, FakeDriver]) -> None:
        device, driver = pair
        memory = device.empty(SHAPE, "float32")
        device.upload(memory, ONES)
        driver.calls.clear()
        source = Interface(memory.pointer)
        buffer = device.wrap(source)
        assert (buffer.pointer, buffer.shape, buffer.dtype) == (memory.pointer, SHAPE, np.float32)
        assert (buffer.owned, buffer.array) == (False, None)
        assert driver.calls == []
        assert (device.download(buffer) == 1).all()

    def test_the_source_lives_as_long(self, pair: tuple[CudaDevice, FakeDriver]) -> None:
        device, _ = pair
        memory = device.empty(SHAPE, "float32")
        source = Interface(memory.pointer)
        before = sys.getrefcount(source)
        buffer = device.wrap(source)
        assert sys.getrefcount(source) == before + 1
        del buffer
        assert sys.getrefcount(source) == before

    @pytest.mark.parametrize("stream", [1, 2, "foreign"])
    def test_pending_work_is_waited_for_on_the_stream(self, pair: Any, stream: Any) -> None:
        device, driver = pair
        memory = device.empty(SHAPE, "float32")
        number = driver.foreign_stream() if stream == "foreign" else stream
        driver.calls.clear()
        device.wrap(Interface(memory.pointer, stream=number))
        (made, recorded, waited) = driver.calls
        assert made[:2] == ("create", "event")
        assert recorded == ("record", made[2], number)
        assert waited == ("wait", device.stream, made[2])

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"strides": (4, 8)}, "not C-contiguous"),
            ({"typestr": "<c8"}, "dtype 'complex64'"),
            ({"typestr": ">f4"}, "byte order"),
            ({"typestr": "what"}, "unknown to numpy"),
            ({"mask": object()}, "masked"),
            ({"stream": 0}, "stream 0"),
            ({"data": (8, False)}, "memory that CUDA does not know"),
        ],
    )
    def test_refused(self, pair: tuple[CudaDevice, FakeDriver], changes: dict[str, Any], words: str) -> None:
        device, _ = pair
        memory = device.empty(SHAPE, "float32")
        with pytest.raises(ContractError, match=words):
            device.wrap(Interface(memory.pointer, **changes))

    def test_strides_of_single_rows_do_not_matter(self, pair: tuple[CudaDevice, FakeDriver]) -> None:
        device, _ = pair
        memory = device.empty((1, 6), "float32")
        assert device.wrap(Interface(memory.pointer, shape=(1, 6), strides=(999, 4))).shape == (1, 6)
        assert device.wrap(Interface(0, shape=(0, 6), strides=(999, 4))).nbytes == 0

    def test_another_device(self, pair: tuple[CudaDevice, FakeDriver]) -> None:
        device, _ = pair
        memory = CudaDevice(1).empty(SHAPE, "float32")
        with pytest.raises(ContractError, match="lives on cuda:1, not on cuda:0"):
            device.wrap(Interface(memory.pointer))

    def test_read_only(self, pair: tuple[CudaDevice, FakeDriver]) -> None:
        device, _ = pair
        memory = device.empty(SHAPE, "float32")
        buffer = device.wrap(Interface(memory.pointer, data=(memory.pointer, True)))
        for write in (lambda: device.upload(buffer, ONES), lambda: device.copy(buffer, memory)):
            with pytest.raises(ContractError, match="read-only"):
                write()
        device.copy(memory, buffer)


class TestDlpack:
    def test_the_exporter_orders_its_work_before_our_stream(self, pair: tuple[CudaDevice, FakeDriver]) -> None:
        device, _ = pair
        source = Dlpack(ONES.copy())
        buffer = device.wrap(source)
        assert source.streams == [device.stream]
        assert (buffer.pointer, buffer.shape) == (source.array.ctypes.data, SHAPE)

    def test_it_goes_before_the_interface(self, pair: tuple[CudaDevice, FakeDriver]) -> None:
        device, _ = pair

        class Both(Dlpack):
            __cuda_array_interface__ = property(lambda self: pytest.fail("asked for the interface"))

        assert device.wrap(Both(ONES.copy())).shape == SHAPE

    def test_refused(self, pair: tuple[CudaDevice, FakeDriver]) -> None:
        device, _ = pair
        with pytest.raises(ContractError, match="lives on cuda:1"):
            device.wrap(Dlpack(ONES.copy(), (CUDA, 1)))
        with pytest.raises(ContractError, match="not C-contiguous"):
            device.wrap(Dlpack(np.ones((3, 2), np.float32).T))
        with pytest.raises(ContractError, match="Host memory is not on cuda:0"):
            device.wrap(Dlpack(ONES.copy(), (CPU, 0)))

        class Broken(Dlpack):
            def __dlpack__(self, *, stream: int | None = None) -> object:
                raise BufferError("requires gradients")

        with pytest.raises(ContractError, match="requires gradients"):
            device.wrap(Broken(ONES))


class TestHostMemory:
    def test_not_on_a_gpu_with_memory_of_its_own(self, pair: tuple[CudaDevice, FakeDriver]) -> None:
        device, _ = pair
        for source in (ONES, bytearray(8), memoryview(ONES)):
            with pytest.raises(ContractError, match=r"Host memory is not on cuda:0.*upload"):
                device.wrap(source)

    def test_it_is_page_locked_while_it_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device, driver = fake_cuda_device(monkeypatch, INTEGRATED=1)
        array = ONES.copy()
        buffer = device.wrap(array)
        assert buffer.array is array
        assert driver.calls[-1] == ("register", array.ctypes.data, array.nbytes)
        before = sys.getrefcount(array)
        del buffer
        assert driver.calls[-1] == ("unregister", array.ctypes.data)
        assert sys.getrefcount(array) < before

    def test_page_locked_memory_is_used_as_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device, driver = fake_cuda_device(monkeypatch, INTEGRATED=1)
        own = device.host_empty(SHAPE, "float32").host()
        buffer = device.wrap(own)
        assert (buffer.pointer, buffer.array is own) == (own.ctypes.data, True)
        assert driver.live["register"] == 0

    def test_any_memory_where_kernels_can_use_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device, driver = fake_cuda_device(monkeypatch, INTEGRATED=1, PAGEABLE_MEMORY_ACCESS=1)
        assert device.wrap(ONES).pointer == ONES.ctypes.data
        assert driver.live["register"] == 0

    def test_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device, driver = fake_cuda_device(monkeypatch, INTEGRATED=1)
        frozen = ONES.copy()
        frozen.flags.writeable = False
        with pytest.raises(ContractError, match="read-only"):
            device.wrap(frozen)
        driver.fail["cuMemHostRegister"] = "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"
        with pytest.raises(ContractError, match=r"cannot be page-locked.*ALREADY_REGISTERED"):
            device.wrap(ONES.copy())
        with pytest.raises(ContractError, match="no buffer"):
            device.wrap([1.0])
        device, _ = fake_cuda_device(monkeypatch, INTEGRATED=1, HOST_REGISTER_SUPPORTED=0)
        with pytest.raises(ContractError, match="cannot be page-locked on this device"):
            device.wrap(ONES.copy())
