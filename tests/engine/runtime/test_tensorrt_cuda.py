"""TensorRT sessions on the real `CudaDevice`, with stand-ins for the driver and for TensorRT below them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.errors import DeviceError, DeviceMemoryError
from pixano_edge.engine.runtime import open_session
from pixano_edge.engine.runtime.base import Array
from pixano_edge.engine.runtime.cuda import CudaDevice
from pixano_edge.engine.runtime.engine_file import write_engine
from pixano_edge.engine.runtime.memory import session_memory
from tests.engine.runtime import trt
from tests.engine.runtime.test_tensorrt import ONES, binding_of
from tests.engine.runtime.trt import DYNAMIC, FIXED, FIXED_SPEC
from tests.support.fake_cuda import FakeDriver, fake_cuda_device
from tests.support.fake_tensorrt import FakeTensorRt


class Bridge:
    """What `FakeTensorRt` needs of a device, from the fake driver."""

    def __init__(self, device: CudaDevice, driver: FakeDriver) -> None:
        self.stream = device.stream
        self._driver = driver

    @property
    def depth(self) -> int:
        return len(self._driver.stack)

    def at(self, pointer: int, nbytes: int) -> Array:
        memory: Array = self._driver.at(pointer, nbytes, np.uint8)
        return memory

    def launch(self, name: str, work: Callable[[], None]) -> None:
        self._driver.launch(name, self.stream, work)

    def finish(self) -> None:
        self._driver._drain(self.stream)

    def _not_while_recording(self, what: str) -> None:
        self._driver._forbidden()


def setup(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[CudaDevice, FakeDriver, FakeTensorRt]:
    device, driver = fake_cuda_device(monkeypatch, **options)
    bridge: Any = Bridge(device, driver)
    return device, driver, trt.fake(bridge)


def test_runs_graphs_and_buffers_on_an_asynchronous_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device, driver, fake = setup(monkeypatch)
    first, second = (trt.session(device, fake, engine) for engine in (FIXED, DYNAMIC))  # type: ignore[arg-type]
    a, b = binding_of(first), binding_of(second, {"P": 2}, borrowed=["x"])
    b.bind("x", a.outputs["y"])
    for value in range(6):
        a.write("x", ONES * value)
        a.run()
        b.run()
        assert (b.read("y") == 4 * value).all()
    assert driver.ops.count("replay") == 8
    assert not driver.stack, "each call leaves the thread as it was"
    assert session_memory(second).shared == 16384
    a.run()
    first.close()
    second.close()
    del a, b, first, second
    gc.collect()
    assert driver.leaks() == {"context": 1, "stream": 1, "event": driver.live["event"]}


def test_a_closed_device_does_not_keep_a_session_open(monkeypatch: pytest.MonkeyPatch) -> None:
    device, _, fake = setup(monkeypatch)
    session = trt.session(device, fake)  # type: ignore[arg-type]
    session.prepare().run()
    device.close()
    session.close()
    gc.collect()
    assert fake.ops[-3:] == ["free context", "free engine", "free runtime"]


def test_threads_capture_and_run_on_one_device_without_a_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    device, _, fake = setup(monkeypatch)
    sessions = [trt.session(device, fake, engine) for engine in (FIXED, DYNAMIC, DYNAMIC)]  # type: ignore[arg-type]
    wrong: list[Any] = []

    def work(which: int) -> None:
        session = sessions[which]
        try:
            for value in range(30):
                with session.lock:
                    binding = session.prepare(None if which == 0 else {"P": 1 + value // 10})
                    shape = binding.inputs["x"].shape
                    binding.write("x", np.full(shape, value + which, np.float32))
                    binding.run()
                    if not (binding.read("y") == 2 * (value + which)).all():
                        wrong.append((which, value))
        except DeviceError as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(which,), daemon=True) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    assert wrong == []
    assert all(session.replays for session in sessions)


def test_a_full_gpu_takes_the_smaller_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    device, _, fake = setup(monkeypatch, total=9000)
    session = trt.session(device, fake, DYNAMIC)  # type: ignore[arg-type]
    assert [p["index"] for p in session.info()["profiles"]] == [1, 2]
    with pytest.raises(DeviceMemoryError, match="16384 bytes"):
        session.prepare({"P": 64})
    binding = session.prepare({"P": 2})
    binding.write("x", ONES)
    binding.run()
    assert (binding.read("y") == 2).all()


def test_open_session_takes_an_engine_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device, _, fake = setup(monkeypatch)
    plan, file = tmp_path / "plan", tmp_path / "fixed.engine"
    plan.write_bytes(FIXED)
    key = {"flavour": "tensorrt", "version": fake.__version__, "flags": []}
    write_engine(file, plan, key, {})
    monkeypatch.setattr(
        "pixano_edge.engine.runtime.tensorrt.load_tensorrt",
        lambda flavour: trt.TensorRt(fake, flavour),
    )
    session = open_session(file, FIXED_SPEC, device, backend="tensorrt", threads=4)
    binding = session.prepare()
    binding.write("x", ONES)
    binding.run()
    assert (binding.read("y") == 2).all()
    assert session.info()["engine"] == {"file": "fixed.engine", **key}
    write_engine(file, plan, key | {"version": "10.3.0"}, {})
    with pytest.raises(DeviceError, match=r"built with tensorrt 10\.3\.0, installed is .*pixano-edge build"):
        open_session(file, FIXED_SPEC, device, backend="tensorrt")
