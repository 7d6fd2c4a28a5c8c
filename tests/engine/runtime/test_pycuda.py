"""`PycudaDevice` over a stand-in for pycuda: the protocol of `CudaDevice`, without graphs."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from pixano_edge.engine.errors import ContractError, DeviceError, DeviceMemoryError, MissingDependencyError
from pixano_edge.engine.runtime.cuda import CudaDevice
from pixano_edge.engine.runtime.pycuda import PycudaApi, PycudaDevice
from tests.support.fake_cuda import FakeDriver, fake_cuda_device
from tests.support.fake_pycuda import install_fake_pycuda

SHAPE = (2, 3)
ONES = np.ones(SHAPE, np.float32)
Pair = tuple[CudaDevice, FakeDriver]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    driver = FakeDriver()
    install_fake_pycuda(monkeypatch, driver)
    device = PycudaDevice()
    yield device, driver
    device.close()
    if driver.leaks() not in ({}, {"context": 1}):
        gc.collect()
    assert driver.leaks() in ({}, {"context": 1})
    assert driver.stack == []


def test_up_kernel_down(pair: Pair) -> None:
    device, driver = pair
    buffer = device.empty(SHAPE, "float32")
    view = driver.at(buffer.pointer, 6)
    for value in (1, 2):
        driver.calls.clear()
        device.upload(buffer, ONES * value)
        with device.current():
            driver.launch("kernel", device.stream, lambda: np.multiply(view, 3, out=view))
        assert (device.download(buffer) == 3 * value).all()
    assert driver.ops == ["synchronize_event", "copy", "record", "launch", "copy", "synchronize"]
    assert {c[-1] for c in driver.calls if c[0] in ("copy", "record", "launch")} == {device.stream}


def test_copies_of_every_kind(pair: Pair) -> None:
    device, _ = pair
    here, there, also, end = (
        device.host_empty(SHAPE, "float32"),
        device.empty(SHAPE, "float32"),
        device.empty(SHAPE, "float32"),
        device.host_empty(SHAPE, "float32"),
    )
    here.host()[:] = 5
    device.copy(there, here)
    device.copy(also, there)
    device.copy(end, also)
    device.synchronize()
    assert (end.host() == 5).all()
    device.copy(end, here)
    device.synchronize()
    assert (end.host() == 5).all()


def test_marks(pair: Pair) -> None:
    device, driver = pair
    start = device.record(timed=True)
    with device.current():
        driver.launch("kernel", device.stream)
    assert device.elapsed(start, device.record(timed=True)) == 1.0
    other = PycudaDevice()
    other.wait(device.record())
    device.wait_on_host(start)
    other.close()


def test_no_graphs(pair: Pair) -> None:
    device, _ = pair
    assert not device.captures
    with pytest.raises(DeviceError, match=r"cannot record graphs.*Run without graph capture"):
        device.capture(lambda: None)


def test_memory_is_freed_by_any_thread_and_after_the_device(pair: Pair) -> None:
    device, driver = pair
    holder = [device.empty(SHAPE, "float32"), device.host_empty(SHAPE, "float32"), device.record()]
    device.close()
    thread = threading.Thread(target=holder.clear)
    thread.start()
    thread.join(10)
    assert driver.leaks() == {"context": 1}


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_pycuda(monkeypatch, FakeDriver(total=100))
    with pytest.raises(DeviceMemoryError, match=r"asked for 200 bytes .* free are 100 of 100 bytes"):
        PycudaDevice().empty((200,), "uint8")


def test_foreign_memory(pair: Pair) -> None:
    device, _ = pair
    memory = device.empty(SHAPE, "float32")

    class Foreign:
        __cuda_array_interface__ = {  # noqa: RUF012
            "version": 3,
            "shape": SHAPE,
            "typestr": "<f4",
            "data": (memory.pointer, False),
            "stream": None,
        }

    assert device.wrap(Foreign()).pointer == memory.pointer
    Foreign.__cuda_array_interface__["stream"] = 1
    with pytest.raises(DeviceError, match="Synchronise that stream"):
        device.wrap(Foreign())


def test_jetson(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(INTEGRATED=1)
    install_fake_pycuda(monkeypatch, driver)
    device = PycudaDevice()
    assert device.unified
    buffer = device.empty(SHAPE, "float32")
    device.upload(buffer, ONES)
    assert device.download(buffer) is buffer.array
    assert "copy" not in driver.ops
    array = ONES.copy()
    wrapped = device.wrap(array)
    assert wrapped.pointer == array.ctypes.data
    assert driver.live["register"] == 1
    del wrapped
    assert driver.live["register"] == 0


def test_facts(pair: Pair) -> None:
    device, _ = pair
    info = device.info()
    assert (info.name, info.compute_capability, info.runtime) == ("Fake GPU 0", "8.7", "CUDA 13.2")
    assert info.extra["library"] == "pycuda 2025.1"
    assert "uuid" not in info.extra


def test_marks_of_the_other_library_are_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    device, _ = pair
    bindings, _ = fake_cuda_device(monkeypatch)
    with pytest.raises(ContractError, match="no mark"):
        device.wait(bindings.record())


def test_without_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(MissingDependencyError, match=r"pixano-edge\[pycuda\]"):
        PycudaApi()
