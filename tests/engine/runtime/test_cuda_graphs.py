"""Recorded graphs and threads of `CudaDevice`, over a stand-in for the driver."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from pixano_edge.engine.errors import DeviceError
from pixano_edge.engine.runtime.base import Buffer
from pixano_edge.engine.runtime.cuda import CudaDevice
from pixano_edge.engine.runtime.cuda_memory import RECLAIMER
from tests.engine.runtime.cuda_pair import ONES, OOM, SHAPE, Pair, cuda_pair, launch, scale
from tests.support.fake_cuda import FakeDriver, fake_cuda_device

__all__ = ["cuda_pair"]  # the fixture


class TestGraphs:
    def test_replay_equals_eager(self, pair: Pair) -> None:
        device, driver = pair
        source, target = device.host_empty(SHAPE, "float32"), device.empty(SHAPE, "float32")

        def work() -> None:
            device.copy(target, source)
            launch(device, driver, scale(driver, target, 3))

        source.host()[:] = 1
        work()
        eager = device.download(target).copy()
        driver.calls.clear()
        graph = device.capture(work)
        assert not device.capturing
        assert [c[0] for c in driver.calls] == ["begin", "recorded", "recorded", "end", "create", "create", "destroy"]
        driver.calls.clear()
        for value in (1, 2):
            source.host()[:] = value
            graph.replay()
            assert (device.download(target) == eager * value).all()
        assert [c[0] for c in driver.calls] == ["replay", "copy", "synchronize"] * 2
        graph.close()
        graph.close()
        assert driver.live["executable"] == driver.live["graph"] == 0
        with pytest.raises(DeviceError, match="closed"):
            graph.replay()

    @pytest.mark.parametrize("what", ["allocate", "upload", "download", "synchronise", "wrap", "second graph", "close"])
    def test_what_cannot_be_recorded(self, pair: Pair, what: str) -> None:
        device, driver = pair
        buffer = device.empty(SHAPE, "float32")
        calls = {
            "allocate": lambda: device.host_empty(SHAPE, "float32"),
            "upload": lambda: device.upload(buffer, ONES),
            "download": lambda: device.download(buffer),
            "synchronise": device.synchronize,
            "wrap": lambda: device.wrap(ONES),
            "second graph": lambda: device.capture(lambda: None),
            "close": device.close,
        }

        def work() -> None:
            launch(device, driver)
            calls[what]()

        with pytest.raises(DeviceError, match=f"{what}.* while a graph is recorded"):
            device.capture(work)
        self._usable(device, driver, buffer)

    def test_a_back_end_that_allocates(self, pair: Pair) -> None:
        device, driver = pair
        buffer = device.empty(SHAPE, "float32")

        def work() -> None:  # the driver refuses, the back end carries on as if nothing was
            launch(device, driver)
            driver.cuMemAlloc(64)

        with pytest.raises(DeviceError, match=r"could not be recorded.*INVALIDATED.*Run the work once before"):
            device.capture(work)
        self._usable(device, driver, buffer)

    def test_a_launch_on_another_stream(self, pair: Pair) -> None:
        device, driver = pair
        buffer = device.empty(SHAPE, "float32")
        other = driver.foreign_stream()
        with pytest.raises(DeviceError, match=r"Nothing was recorded.*Device\.stream"):
            device.capture(lambda: driver.launch("lost", other))
        self._usable(device, driver, buffer)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_an_error_of_the_work_passes_through(self, pair: Pair, error: type[BaseException]) -> None:
        device, driver = pair
        buffer = device.empty(SHAPE, "float32")

        def work() -> None:
            launch(device, driver)
            raise error("from the work")

        with pytest.raises(error, match="from the work"):
            device.capture(work)
        self._usable(device, driver, buffer)

    def test_a_graph_that_does_not_instantiate(self, pair: Pair) -> None:
        device, driver = pair
        buffer = device.empty(SHAPE, "float32")
        driver.fail["cuGraphInstantiate"] = OOM
        with pytest.raises(DeviceError, match="cuGraphInstantiate"):
            device.capture(lambda: launch(device, driver))
        self._usable(device, driver, buffer)

    def test_calls_of_host_functions_are_refused(self, pair: Pair) -> None:
        """They free what one run used: ONNX Runtime's CUDA provider would free it again at each replay."""
        device, driver = pair
        buffer, freed = device.empty(SHAPE, "float32"), []

        def work() -> None:
            launch(device, driver)
            driver.launch_host(device.stream, lambda: freed.append(1))
            launch(device, driver)

        with device.current():
            work()
        device.synchronize()
        assert freed == [1]
        with pytest.raises(DeviceError, match=r"calls a function on the host.*without graph capture"):
            device.capture(work)
        self._usable(device, driver, buffer)
        assert freed == [1]

    def test_copies_out_of_host_memory_are_refused_where_asked(self, pair: Pair) -> None:
        """The memory may be a back end's own, free again by the time of the replay."""
        device, driver = pair
        source, buffer = device.host_empty(SHAPE, "float32"), device.empty(SHAPE, "float32")
        other = device.empty(SHAPE, "float32")
        device.capture(lambda: device.copy(buffer, source)).close()
        device.capture(lambda: device.copy(other, buffer), host_copies=False).close()
        with pytest.raises(DeviceError, match=r"copies out of host memory.*without graph capture"):
            device.capture(lambda: device.copy(buffer, source), host_copies=False)
        self._usable(device, driver, buffer)

    def _usable(self, device: CudaDevice, driver: FakeDriver, buffer: Buffer) -> None:
        assert not device.capturing
        assert driver.live["graph"] == driver.live["executable"] == 0
        device.upload(buffer, ONES)
        assert (device.download(buffer) == 1).all()
        device.capture(lambda: launch(device, driver)).replay()
        device.synchronize()

    def test_memory_dropped_on_the_way_is_freed_afterwards(self, pair: Pair) -> None:
        device, driver = pair
        holder = [device.empty(SHAPE, "float32"), device.host_empty(SHAPE, "float32")]

        def work() -> None:
            launch(device, driver)
            holder.clear()  # as the garbage collector might
            assert driver.live["alloc"] == driver.live["host"] == 1

        device.capture(work).replay()
        assert driver.live["alloc"] == driver.live["host"] == 0

    def test_memory_dropped_by_another_thread_is_freed_afterwards(self, pair: Pair) -> None:
        device, driver = pair
        holder = [device.empty(SHAPE, "float32")]

        def work() -> None:
            launch(device, driver)
            thread = threading.Thread(target=holder.clear)
            thread.start()
            thread.join(10)
            assert not thread.is_alive(), "freeing must not wait for a recording"

        device.capture(work)
        assert driver.live["alloc"] == 0

    def test_other_threads_wait_for_the_recording(self, pair: Pair) -> None:
        device, driver = pair
        buffer = device.empty(SHAPE, "float32")
        began, order = threading.Event(), []

        def upload() -> None:
            began.set()
            device.upload(buffer, ONES)
            order.append("upload")

        thread = threading.Thread(target=upload)

        def work() -> None:
            thread.start()
            began.wait(10)
            thread.join(0.2)
            launch(device, driver)
            order.append("recorded")

        device.capture(work)
        thread.join(10)
        assert order == ["recorded", "upload"]
        assert (device.download(buffer) == 1).all()

    def test_an_open_graph_frees_itself(self, pair: Pair) -> None:
        device, driver = pair
        graph = device.capture(lambda: launch(device, driver))
        device.close()
        with pytest.raises(DeviceError, match="closed"):
            graph.replay()
        del graph
        assert driver.live["executable"] == 0


class TestThreads:
    def test_any_thread_may_call_and_keeps_its_own_context(self, pair: Pair) -> None:
        device, driver = pair
        results: list[Any] = []

        def run() -> None:
            driver.stack.append(0xBEEF)  # another library's device is current on this thread
            buffer = device.empty(SHAPE, "float32")
            device.upload(buffer, ONES)
            results.append(device.download(buffer).sum())
            results.append(list(driver.stack))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(10)
        assert results == [6.0, [0xBEEF]]
        assert driver.leaks() == {"stream": 1, "context": 1, "event": 1}

    def test_two_devices_in_one_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first, driver = fake_cuda_device(monkeypatch, count=2)
        second = CudaDevice(1)
        with first.current(), second.current():
            assert driver.stack == [0xC000, 0xC001]
            with first.current():
                assert driver.stack[-1] == 0xC000
        assert driver.stack == []
        assert (second.name, second.info().name) == ("cuda:1", "Fake GPU 1")

    def test_an_error_leaves_no_lock_behind(self, pair: Pair) -> None:
        device, driver = pair
        driver.fail["cuCtxPushCurrent"] = "CUDA_ERROR_INVALID_CONTEXT"
        with pytest.raises(DeviceError, match="cuCtxPushCurrent"):
            device.synchronize()
        thread = threading.Thread(target=device.synchronize)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()

    def test_frees_from_many_threads(self, pair: Pair) -> None:
        device, driver = pair

        def churn() -> None:
            for _ in range(50):
                device.host_empty((8,), "uint8")

        threads = [threading.Thread(target=churn) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert driver.live["host"] == 0
        assert not RECLAIMER._waiting
