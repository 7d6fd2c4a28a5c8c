"""`CudaDevice` on a real device: what the stand-in for the driver cannot show. `pytest -m gpu`."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from pixano_edge.engine.errors import ContractError, DeviceError, DeviceMemoryError, EdgeError
from pixano_edge.engine.runtime.cuda import CudaDevice
from pixano_edge.engine.runtime.cuda_open import open_cuda_api
from tests.support.system import resident as resident_bytes

pytestmark = pytest.mark.gpu

SHAPE = (1024, 1024)
NBYTES = 4 << 20


@pytest.fixture(scope="module")
def reason() -> str | None:
    """Why there is no device, from CUDA itself: NVML may see GPUs that this process cannot use."""
    try:
        return None if open_cuda_api("cuda-bindings").count() else "CUDA sees no device"
    except EdgeError as error:
        return error.message


@pytest.fixture
def device(reason: str | None) -> Iterator[CudaDevice]:
    if reason:
        pytest.skip(reason)
    opened = CudaDevice(0)
    yield opened
    opened.close()


def free_memory(device: CudaDevice) -> int:
    with device.current():
        return device._api.memory()[0]


def test_facts(device: CudaDevice) -> None:
    info = device.info()
    assert info.name
    assert float(info.compute_capability or 0) >= 5
    assert info.memory_total
    assert info.memory_free
    assert 0 < info.memory_free <= info.memory_total
    assert int(info.extra["multiprocessors"]) > 0
    assert device.stream > 2


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "int64", "float16", "float32", "float64"])
def test_bytes_survive_the_way(device: CudaDevice, dtype: str) -> None:
    data = np.random.default_rng(0).integers(0, 255, (257, 33)).astype(dtype)
    buffer, second, host = (
        device.empty(data.shape, dtype),
        device.empty(data.shape, dtype),
        device.host_empty(data.shape, dtype),
    )
    assert buffer.pointer % 256 == 0
    device.upload(buffer, data)
    device.copy(second, buffer)
    device.copy(host, second)
    device.synchronize()
    assert (host.host() == data).all()
    assert (device.download(second) == data).all()


def test_uploads_in_a_row_do_not_mix(device: CudaDevice) -> None:
    buffer, kept = device.empty(SHAPE, "float32"), [device.empty(SHAPE, "float32") for _ in range(8)]
    source = np.empty(SHAPE, np.float32)
    for value, target in enumerate(kept):
        source[:] = value
        device.upload(buffer, source)
        device.copy(target, buffer)
    for value, target in enumerate(kept):
        assert (device.download(target) == value).all()


def test_capture_equals_eager(device: CudaDevice) -> None:
    source, middle, target = (
        device.host_empty(SHAPE, "float32"),
        device.empty(SHAPE, "float32"),
        device.empty(SHAPE, "float32"),
    )

    def work() -> None:
        device.copy(middle, source)
        device.copy(target, middle)

    data = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    source.host()[:] = data
    work()
    eager = device.download(target).copy()
    device.upload(target, np.zeros(SHAPE, np.float32))
    device.synchronize()
    graph = device.capture(work)
    assert (device.download(target) == 0).all(), "recording runs nothing"
    for factor in (1, 2):
        source.host()[:] = data * factor
        graph.replay()
        assert np.array_equal(device.download(target), eager * factor)
    graph.close()


def test_a_failed_capture_leaves_the_stream_usable(device: CudaDevice) -> None:
    buffer = device.empty(SHAPE, "float32")
    other = device.empty(SHAPE, "float32")

    def ours() -> None:
        device.copy(other, buffer)
        device.empty((8,), "uint8")

    def drivers() -> None:  # as a back end that does not ask us
        device.copy(other, buffer)
        device._api.alloc(64)

    for work in (ours, drivers, lambda: None):
        with pytest.raises(DeviceError):
            device.capture(work)
        device.upload(buffer, np.full(SHAPE, 3, np.float32))
        assert (device.download(buffer) == 3).all()
    device.capture(lambda: device.copy(other, buffer)).replay()
    assert (device.download(other) == 3).all()


def test_a_capture_with_a_call_of_a_host_function_is_refused(device: CudaDevice) -> None:
    """What ONNX Runtime queues behind kernels whose host memory it frees; see `CudaDevice.capture`."""
    source, target = device.empty(SHAPE, "float32"), device.empty(SHAPE, "float32")
    called = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
    address = ctypes.cast(called, ctypes.c_void_p).value

    def work() -> None:
        device.copy(target, source)
        driver.cuLaunchHostFunc(driver.CUstream(device.stream), driver.CUhostFn(address), 0)

    driver = pytest.importorskip("cuda.bindings.driver")
    with pytest.raises(DeviceError, match="calls a function on the host"):
        device.capture(work)
    device.capture(lambda: device.copy(target, source)).replay()
    device.synchronize()


def test_frees_of_other_threads_do_not_break_a_capture(device: CudaDevice) -> None:
    source, target = device.empty(SHAPE, "float32"), device.empty(SHAPE, "float32")
    stop = threading.Event()

    def churn() -> None:
        other = CudaDevice(0)
        while not stop.is_set():
            other.host_empty((4096,), "uint8")
            other.empty((4096,), "uint8")
        other.close()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(50):
            graph = device.capture(lambda: device.copy(target, source))
            graph.replay()
            graph.close()
    finally:
        stop.set()
        thread.join(60)
    device.synchronize()


def test_streams_wait_for_each_other(device: CudaDevice) -> None:
    other = CudaDevice(0)
    first, second = device.empty((16, *SHAPE), "float32"), other.empty((16, *SHAPE), "float32")
    device.upload(first, np.zeros(first.shape, np.float32))
    device.synchronize()
    device.upload(first, np.full(first.shape, 7, np.float32))
    other.wait(device.record())
    other.copy(second, first)
    assert (other.download(second) == 7).all()
    other.close()


def test_time_of_copies(device: CudaDevice) -> None:
    source, target = device.empty((16, *SHAPE), "float32"), device.empty((16, *SHAPE), "float32")
    start = device.record(timed=True)
    for _ in range(20):
        device.copy(target, source)
    end = device.record(timed=True)
    assert 0 < device.elapsed(start, end) < 10_000


def test_a_thousand_turns_without_growth(device: CudaDevice) -> None:
    source, buffer, end = np.ones(SHAPE, np.float32), device.empty(SHAPE, "float32"), device.empty(SHAPE, "float32")
    graph = device.capture(lambda: device.copy(end, buffer))

    def turn() -> None:
        device.upload(buffer, source)
        graph.replay()
        device.wait(device.record())
        device.download(end)

    for _ in range(20):
        turn()
    gc.collect()
    free, resident = free_memory(device), resident_bytes()
    for _ in range(1000):
        turn()
    assert free - free_memory(device) < NBYTES
    assert resident_bytes() - resident < 8 * NBYTES


def test_memory_comes_back(device: CudaDevice) -> None:
    device.empty((64 << 20,), "uint8")
    before = free_memory(device)
    for _ in range(20):
        kept = device.empty((256 << 20,), "uint8")
        del kept
    assert before - free_memory(device) < 64 << 20


def test_too_little_memory_is_told_with_numbers_and_survived(device: CudaDevice) -> None:
    total = device.info().memory_total or 0
    with pytest.raises(DeviceMemoryError, match=rf"asked for {2 * total} bytes"):
        device.empty((2 * total,), "uint8")
    buffer = device.empty(SHAPE, "float32")
    device.upload(buffer, np.ones(SHAPE, np.float32))
    assert (device.download(buffer) == 1).all()


def test_buffers_outlive_the_device(device: CudaDevice) -> None:
    opened = CudaDevice(0)
    buffer, view = opened.empty(SHAPE, "float32"), opened.host_empty(SHAPE, "float32").host()
    opened.close()
    del opened
    view[:] = 4
    assert float(view.sum()) == 4 * view.size
    del buffer, view
    gc.collect()
    device.synchronize()


def test_another_libraries_memory(device: CudaDevice) -> None:
    other = CudaDevice(0)
    memory = other.empty(SHAPE, "float32")
    other.upload(memory, np.full(SHAPE, 6, np.float32))

    class Foreign:
        __cuda_array_interface__ = {  # noqa: RUF012
            "version": 3,
            "shape": SHAPE,
            "typestr": "<f4",
            "data": (memory.pointer, False),
            "stream": other.stream,
        }

    assert (device.download(device.wrap(Foreign())) == 6).all()
    Foreign.__cuda_array_interface__["data"] = (np.empty(SHAPE, np.float32).ctypes.data, False)
    with pytest.raises(ContractError, match="does not know"):
        device.wrap(Foreign())
    core = pytest.importorskip("cuda.core")
    unit = core.Device(0)
    unit.set_current()
    stream = unit.create_stream(device)  # through __cuda_stream__
    assert int(stream.handle) == device.stream
    raw = unit.allocate(256, stream=stream)
    assert device.wrap(raw).pointer == int(raw.handle)
    other.close()


def test_unified_memory(device: CudaDevice) -> None:
    if not device.unified:
        with pytest.raises(ContractError, match="Host memory"):
            device.wrap(np.ones(SHAPE, np.float32))
        return
    array = np.full(SHAPE, 5, np.float32)
    target = device.empty(SHAPE, "float32")
    device.copy(target, device.wrap(array))
    assert (device.download(target) == 5).all()
