"""The CPU device: alignment, borrowing without copies, refusals."""

from __future__ import annotations

import array
import gc
import mmap
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pixano_edge.engine.errors import ContractError, DeviceError
from pixano_edge.engine.runtime import CpuDevice, StubDevice, open_device
from pixano_edge.engine.runtime.cpu import usable_cpus

torch.set_num_threads(1)


@given(
    st.lists(st.integers(0, 7), max_size=4).map(tuple),
    st.sampled_from(["float32", "float16", "int32", "uint8", "bool", "float64"]),
)
def test_empty_is_aligned(shape: tuple[int, ...], dtype: str) -> None:
    device = CpuDevice()
    for buffer in (device.empty(shape, dtype), device.host_empty(shape, dtype)):
        assert buffer.shape == shape == buffer.host().shape
        assert buffer.dtype == np.dtype(dtype) == buffer.host().dtype
        assert buffer.pointer % 64 == 0 or not buffer.nbytes
        assert buffer.host().ctypes.data == buffer.pointer
        assert buffer.host().flags.c_contiguous
        assert buffer.host().flags.writeable
        assert buffer.nbytes == buffer.host().nbytes
        assert buffer.owned


def test_wrap_numpy_shares_memory() -> None:
    source = np.arange(6, dtype=np.float32).reshape(2, 3)
    buffer = CpuDevice().wrap(source)
    assert buffer.pointer == source.ctypes.data
    assert not buffer.owned
    source[0, 0] = 9
    assert buffer.host()[0, 0] == 9


def test_wrap_keeps_the_source_alive() -> None:
    source = torch.ones(3)
    alive = weakref.ref(source)
    buffer = CpuDevice().wrap(source)
    del source
    gc.collect()
    assert alive() is not None
    del buffer
    gc.collect()
    assert alive() is None


def test_wrap_buffer_protocol(tmp_path: Path) -> None:
    device = CpuDevice()
    raw = bytearray(b"\0" * 16)
    assert device.wrap(raw).shape == (16,)
    floats = memoryview(raw).cast("f", (2, 2))
    buffer = device.wrap(floats)
    assert (buffer.dtype, buffer.shape) == (np.float32, (2, 2))
    buffer.host()[1, 1] = 1
    assert raw[12:] == np.float32(1).tobytes()
    assert device.wrap(array.array("i", [1, 2])).dtype == np.int32
    assert not device.wrap(b"ab").host().flags.writeable
    (tmp_path / "f").write_bytes(b"abcd")
    with (tmp_path / "f").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        buffer = device.wrap(mapped)
        assert buffer.host().tobytes() == b"abcd"
        del buffer


def test_wrap_dlpack_shares_memory() -> None:
    source = torch.zeros(2, 3)
    buffer = CpuDevice().wrap(source)
    assert buffer.pointer == source.data_ptr()
    assert buffer.shape == (2, 3)
    source[1, 2] = 5
    assert buffer.host()[1, 2] == 5


class OnCuda:
    __cuda_array_interface__ = {"shape": (1,), "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012


class OnGpuDlpack:
    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: object) -> object:
        raise AssertionError("must not be asked for memory on another device")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((4, 4), np.float32)[:, ::2], "not C-contiguous"),
        (np.zeros((4, 4), np.float32).T[:, :2], "not C-contiguous"),
        (np.asfortranarray(np.zeros((2, 3))), "not C-contiguous"),
        (np.frombuffer(bytes(9), np.uint8)[1:].view(np.float32), "aligned"),
        (memoryview(bytes(8))[::2], "not C-contiguous"),
        (torch.zeros(3, 2).T, "not C-contiguous"),
        (np.zeros(2, ">f4"), "dtype '>f4'"),
        (np.zeros(2, object), "dtype 'object'"),
        (np.zeros(2, complex), "dtype 'complex128'"),
        (np.zeros(2, np.longdouble), "dtype"),
        (np.array(["a"]), "dtype '<U1'"),
        (np.zeros(2, [("a", "f4")]), "dtype"),
        (np.ma.masked_array([1.0], mask=[True]), "masked"),
        (OnCuda(), "CUDA device"),
        (OnGpuDlpack(), "DLPack device type 2"),
        (torch.zeros(2, device="meta"), "DLPack|share"),
        (torch.zeros(2, requires_grad=True), "gradient"),
        (torch.zeros(2, dtype=torch.bfloat16), "share its memory"),
        ([1.0, 2.0], "list has no buffer"),
        (1.0, "float has no buffer"),
        ("text", "str has no buffer"),
        (None, "NoneType has no buffer"),
    ],
)
def test_wrap_refuses(source: object, words: str) -> None:
    with pytest.raises(ContractError, match=words) as caught:
        CpuDevice().wrap(source)
    assert caught.value.action


def test_copy() -> None:
    device = CpuDevice()
    source, target = device.wrap(np.arange(3.0)), device.empty((3,), "float64")
    device.copy(target, source)
    device.synchronize()
    assert target.host().tolist() == [0, 1, 2]
    with pytest.raises(ContractError, match="Cannot copy"):
        device.copy(device.empty((3,), "float32"), source)
    with pytest.raises(ContractError, match="Cannot copy"):
        device.copy(device.empty((1, 3), "float64"), source)
    with pytest.raises(ContractError, match="read-only"):
        device.copy(device.wrap(b"abc"), device.wrap(bytearray(3)))


def test_info_and_events() -> None:
    device = CpuDevice()
    info = device.info()
    assert (info.name, info.kind, device.stream) == ("cpu", "cpu", 0)
    assert info.memory_total is None or info.memory_total > (info.memory_free or 0) > 0
    assert int(info.extra["cpus"]) == usable_cpus() >= 1
    device.wait(device.record())


def test_open_device() -> None:
    assert open_device("cpu").name == "cpu"
    assert "reason" in open_device("auto").info().extra
    for name in ("", "gpu", "cuda:x", "CPU"):
        with pytest.raises(DeviceError, match="Unknown device"):
            open_device(name)


def test_stub_device_counts_as_another_device() -> None:
    assert StubDevice().name != CpuDevice().name
