"""`CudaDevice` over a stand-in for the driver: order of calls, memory, marks, errors, nothing left behind."""

from __future__ import annotations

import gc
import logging

import numpy as np
import pytest

from pixano_edge.engine.errors import ContractError, DeviceError, DeviceMemoryError
from pixano_edge.engine.runtime.base import Array, Buffer
from pixano_edge.engine.runtime.cpu import CpuDevice
from pixano_edge.engine.runtime.cuda import CudaDevice
from tests.engine.runtime.cuda_pair import ONES, OOM, SHAPE, Pair, cuda_pair, launch, scale
from tests.support.fake_cuda import FakeDriver, fake_cuda_device, install_fake_cuda

__all__ = ["cuda_pair"]  # the fixture


class TestMemory:
    def test_buffers(self, pair: Pair) -> None:
        device, driver = pair
        there, here = device.empty(SHAPE, "float16"), device.host_empty(SHAPE, np.int64)
        assert (there.nbytes, there.array, there.owned, there.dtype) == (12, None, True, np.float16)
        assert here.array is not None
        assert (here.array.shape, here.array.dtype, here.array.flags.c_contiguous) == (SHAPE, np.int64, True)
        assert there.pointer % 256 == 0
        with pytest.raises(ContractError, match="no host memory"):
            there.host()
        assert [c[0] for c in driver.calls] == ["create", "alloc", "host_alloc"]
        assert device.info().memory_free == driver.total - 12

    def test_each_is_freed_with_its_last_reference(self, pair: Pair) -> None:
        device, driver = pair
        there, here = device.empty(SHAPE, "float32"), device.host_empty(SHAPE, "float32")
        pointers = there.pointer, here.pointer
        del there
        assert driver.calls[-1] == ("free", pointers[0])
        view = here.host()[1]
        del here
        assert driver.live["host"] == 1, "the view still uses the memory"
        view[:] = 3
        del view
        assert driver.calls[-2:] == [("synchronize", device.stream), ("host_free", pointers[1])]

    def test_they_outlive_the_device(self, pair: Pair) -> None:
        device, driver = pair
        there, here = device.empty(SHAPE, "float32"), device.host_empty(SHAPE, "float32")
        here.host()[:] = 7
        device.close()
        device.close()  # nothing happens
        assert driver.live["stream"] == 0
        assert driver.live["context"] == 1
        assert (here.host() == 7).all()
        for call in (device.synchronize, lambda: device.empty(SHAPE, "float32"), lambda: device.stream, device.record):
            with pytest.raises(DeviceError, match="closed"):
                call()
        assert device.info().memory_free is None
        del there, here, call
        assert driver.live["alloc"] == driver.live["host"] == 0

    def test_empty_tensors(self, pair: Pair) -> None:
        device, driver = pair
        buffer = device.empty((0, 4), "float32")
        device.upload(buffer, np.empty((0, 4), np.float32))
        assert device.download(buffer).shape == (0, 4)
        assert "copy" not in driver.ops

    def test_too_little(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device, driver = fake_cuda_device(monkeypatch, total=1000)
        kept = device.empty((600,), "uint8")
        with pytest.raises(DeviceMemoryError, match=r"asked for 500 bytes .* free are 400 of 1000 bytes"):
            device.empty((500,), "uint8")
        device.upload(kept, np.zeros(600, np.uint8))  # what is there still works

        class Knot:
            buffer: Buffer
            me: Knot

        gc.disable()
        try:
            knot = Knot()
            knot.buffer, knot.me = device.empty((300,), "uint8"), knot
            del knot
            assert driver.live["alloc"] == 2
            assert device.empty((400,), "uint8").nbytes == 400, "memory in a reference cycle is collected first"
        finally:
            gc.enable()

    def test_too_little_for_page_locking_tells_of_the_ram(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        device, driver = pair
        monkeypatch.setattr("pixano_edge.engine.runtime.cuda_memory.memory", lambda: (1 << 30, 1 << 20))
        again = driver.cuMemHostAlloc
        monkeypatch.setattr(driver, "cuMemHostAlloc", lambda *a: driver.fail.update(cuMemHostAlloc=OOM) or again(*a))
        with pytest.raises(DeviceMemoryError, match=r"page-locked .* free are 1048576 of 1073741824 bytes"):
            device.host_empty((8,), "uint8")

    def test_what_cannot_be_freed_is_logged(self, pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
        device, driver = pair
        buffer = device.empty(SHAPE, "float32")
        driver.fail["cuMemFree"] = "CUDA_ERROR_ILLEGAL_ADDRESS"
        with caplog.at_level(logging.WARNING):
            pointer = buffer.pointer
            del buffer
        assert "CUDA_ERROR_ILLEGAL_ADDRESS" in caplog.text
        with device.current():
            driver.cuMemFree(pointer)


class TestCopies:
    def test_up_and_down(self, pair: Pair) -> None:
        device, driver = pair
        buffer = device.empty(SHAPE, "float32")
        driver.calls.clear()
        source = np.arange(6, dtype=np.float32).reshape(SHAPE)
        device.upload(buffer, source)
        launch(device, driver, scale(driver, buffer, 2))
        down = device.download(buffer)
        assert (down == source * 2).all()
        assert driver.ops == ["host_alloc", "create", "copy", "record", "launch", "host_alloc", "copy", "synchronize"]
        stream = device.stream
        assert [c[-1] for c in driver.calls if c[0] in ("copy", "record", "launch", "synchronize")] == [stream] * 5

    def test_nothing_is_made_in_a_steady_state(self, pair: Pair) -> None:
        device, driver = pair
        buffer = device.empty(SHAPE, "float32")
        for turn in range(3):
            driver.calls.clear()
            device.upload(buffer, ONES * turn)
            device.wait(device.record())
            assert (device.download(buffer) == turn).all()
        assert driver.ops == ["synchronize_event", "copy", "record", "record", "wait", "copy", "synchronize"]

    def test_the_caller_may_change_its_array_at_once(self, pair: Pair) -> None:
        device, _ = pair
        buffer = device.empty(SHAPE, "float32")
        source = ONES.copy()
        device.upload(buffer, source)
        source[:] = 9
        assert (device.download(buffer) == 1).all()

    def test_staging_is_not_overwritten_while_it_is_read(self, pair: Pair) -> None:
        device, driver = pair
        buffer, seen = device.empty(SHAPE, "float32"), []
        for value in (1, 2, 3):
            device.upload(buffer, ONES * value)
            launch(device, driver, lambda: seen.append(float(driver.at(buffer.pointer, 1)[0])))
        device.synchronize()
        assert seen == [1, 2, 3]

    def test_an_upload_leaves_a_downloaded_view_alone(self, pair: Pair) -> None:
        device, _ = pair
        buffer = device.empty(SHAPE, "float32")
        device.upload(buffer, ONES)
        view = device.download(buffer)
        device.upload(buffer, ONES * 2)
        device.synchronize()
        assert (view == 1).all()
        assert device.download(buffer) is view

    def test_any_layout_of_the_source(self, pair: Pair) -> None:
        device, _ = pair
        buffer = device.empty(SHAPE, "float32")
        device.upload(buffer, np.arange(6, dtype=np.float32).reshape(3, 2).T)
        assert device.download(buffer).tolist() == [[0, 2, 4], [1, 3, 5]]

    def test_between_buffers(self, pair: Pair) -> None:
        device, _ = pair
        here, there, end = (make(SHAPE, "float32") for make in (device.host_empty, device.empty, device.host_empty))
        here.host()[:] = 5
        end.host()[:] = 0
        device.copy(there, here)
        device.copy(end, there)
        assert (end.host() == 0).all(), "queued, not done"
        device.synchronize()
        assert (end.host() == 5).all()
        device.copy(there, CpuDevice().wrap(ONES))
        assert (device.download(there) == 1).all()
        with pytest.raises(ContractError, match="Use download"):
            device.copy(CpuDevice().wrap(ONES.copy()), there)
        device.upload(here, ONES * 8)
        assert device.download(here) is here.array
        assert (here.host() == 8).all()

    @pytest.mark.parametrize("source", [np.ones((3, 2), np.float32), np.ones(SHAPE, np.float64)])
    def test_no_change_of_shape_or_dtype(self, pair: Pair, source: Array) -> None:
        device, driver = pair
        buffer = device.empty(SHAPE, "float32")
        with pytest.raises(ContractError, match="Cannot copy"):
            device.upload(buffer, source)
        with pytest.raises(ContractError, match="Cannot copy"):
            device.copy(buffer, device.empty(source.shape, source.dtype))
        assert "copy" not in driver.ops

    def test_a_failed_copy(self, pair: Pair) -> None:
        device, driver = pair
        buffer = device.empty(SHAPE, "float32")
        driver.fail["cuMemcpyAsync"] = "CUDA_ERROR_INVALID_VALUE"
        with pytest.raises(DeviceError, match="cuMemcpyAsync failed: CUDA_ERROR_INVALID_VALUE"):
            device.upload(buffer, ONES)
        device.upload(buffer, ONES)
        assert (device.download(buffer) == 1).all()


class TestMarks:
    def test_one_stream_waits_for_another(self, pair: Pair) -> None:
        device, driver = pair
        other = CudaDevice(0)
        assert other.stream != device.stream
        buffer, seen = device.empty(SHAPE, "float32"), []
        device.upload(buffer, ONES)
        launch(device, driver, scale(driver, buffer, 4))
        other.wait(device.record())
        launch(other, driver, lambda: seen.append(float(driver.at(buffer.pointer, 1)[0])))
        other.synchronize()
        assert seen == [4]
        other.wait(None)  # what the CPU's record returns
        other.close()

    def test_time(self, pair: Pair) -> None:
        device, driver = pair
        start = device.record(timed=True)
        for _ in range(3):
            launch(device, driver)
        end = device.record(timed=True)
        assert device.elapsed(start, end) == 3.0
        with pytest.raises(DeviceError, match="without time"):
            device.elapsed(start, device.record())
        for wrong in (4, object()):
            with pytest.raises(ContractError, match="no mark"):
                device.wait(wrong)

    def test_the_host_waits_only_to_the_mark(self, pair: Pair) -> None:
        device, driver = pair
        done: list[int] = []
        launch(device, driver, lambda: done.append(1))
        mark = device.record()
        launch(device, driver, lambda: done.append(2))
        device.wait_on_host(mark)
        assert done == [1]

    def test_marks_are_used_again_and_outlive_the_device(self, pair: Pair) -> None:
        device, driver = pair
        first = int(device.record().handle)
        assert int(device.record().handle) == first
        kept = device.record()
        device.close()
        assert driver.live["event"] == 1
        del kept
        assert driver.live["event"] == 0


class TestOpening:
    def test_no_such_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(DeviceError, match=r"no device 'cuda:3'.*devices here: 2"):
            fake_cuda_device(monkeypatch, index=3, count=2)

    def test_a_stream_that_cannot_be_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        driver = install_fake_cuda(monkeypatch, FakeDriver())
        driver.fail["cuStreamCreate"] = OOM
        with pytest.raises(DeviceError, match="cuStreamCreate"):
            CudaDevice(0)
        if driver.leaks():
            gc.collect()
        assert driver.leaks() == {}

    def test_facts(self, pair: Pair) -> None:
        device, driver = pair
        info = device.info()
        assert (info.name, info.kind, info.index, info.compute_capability) == ("Fake GPU 0", "cuda", 0, "8.6")
        assert (info.runtime, info.memory_total, info.memory_free) == ("CUDA 13.2", driver.total, driver.total)
        assert info.extra["multiprocessors"] == "28"
        assert info.extra["library"] == "cuda-bindings 13.5.0"
        assert device.__cuda_stream__() == (0, device.stream)
        assert device.stream > 2, "a default stream"
        assert device.captures
        assert not device.unified

    def test_work_that_failed_shows_at_close_and_the_stream_is_freed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device, driver = fake_cuda_device(monkeypatch)
        driver.fail["cuStreamSynchronize"] = "CUDA_ERROR_ILLEGAL_ADDRESS"
        with pytest.raises(DeviceError, match="start the process again"):
            device.close()
        assert driver.live["stream"] == 0


class TestIntegrated:
    """A Jetson: the device uses the RAM."""

    @pytest.fixture
    def orin(self, monkeypatch: pytest.MonkeyPatch) -> Pair:
        return fake_cuda_device(monkeypatch, INTEGRATED=1)

    def test_every_buffer_is_host_memory_and_nothing_is_copied(self, orin: Pair) -> None:
        device, driver = orin
        assert device.unified
        buffer = device.empty(SHAPE, "float32")
        driver.calls.clear()
        device.upload(buffer, ONES)
        launch(device, driver, scale(driver, buffer, 2))
        result = device.download(buffer)
        assert result is buffer.array
        assert (result == 2).all()
        assert driver.ops == ["synchronize", "launch", "synchronize"], "no copy, but no access while kernels run"

    def test_host_access_waits(self, orin: Pair) -> None:
        device, driver = orin
        buffer, seen = device.empty(SHAPE, "float32"), []
        device.upload(buffer, ONES)
        launch(device, driver, lambda: seen.append(float(driver.at(buffer.pointer, 1)[0])))
        device.upload(buffer, ONES * 2)
        assert seen == [1]

    def test_facts_are_those_of_the_ram(self, orin: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        device, _ = orin
        monkeypatch.setattr("pixano_edge.engine.runtime.cuda.memory", lambda: (8 << 30, 6 << 30))
        info = device.info()
        assert (info.memory_total, info.memory_free) == (8 << 30, 6 << 30)
        assert info.extra["memory"] == "shared with the CPU"

    def test_it_can_be_switched_off_but_not_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device, _ = fake_cuda_device(monkeypatch, unified=False, INTEGRATED=1)
        assert device.empty(SHAPE, "float32").array is None
        with pytest.raises(DeviceError, match="memory of its own"):
            fake_cuda_device(monkeypatch, unified=True)
