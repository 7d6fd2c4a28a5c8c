"""A `CudaDevice` on a stand-in for the driver, checked for leaks after each test, and what a back end does with it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.runtime.base import Buffer
from pixano_edge.engine.runtime.cuda import CudaDevice
from tests.support.fake_cuda import FakeDriver, fake_cuda_device

SHAPE = (2, 3)
ONES = np.ones(SHAPE, np.float32)
OOM = "CUDA_ERROR_OUT_OF_MEMORY"
Pair = tuple[CudaDevice, FakeDriver]


@pytest.fixture(name="pair")
def cuda_pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """A device, and the check that nothing of it is left and that no thread keeps its context."""
    device, driver = fake_cuda_device(monkeypatch)
    yield device, driver
    device.close()
    if driver.leaks() not in ({}, {"context": 1}):
        gc.collect()  # what a caught exception refers to
    assert driver.leaks() in ({}, {"context": 1}), "only the closed device itself, which pytest holds, may be left"
    assert driver.stack == []


def launch(device: CudaDevice, driver: FakeDriver, work: Any = lambda: None, name: str = "kernel") -> None:
    """What a back end does."""
    with device.current():
        driver.launch(name, device.stream, work)


def scale(driver: FakeDriver, buffer: Buffer, factor: float) -> Any:
    """A kernel that multiplies a buffer in place."""

    def work() -> None:
        values = driver.at(buffer.pointer, int(np.prod(buffer.shape)))
        values *= factor

    return work
