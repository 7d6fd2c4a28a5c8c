"""CPU, memory and GPU facts, with a stand-in for NVML and a stand-in for a Jetson's file system."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pixano_edge.engine.provider.hardware import read_hardware
from tests.support.system import write_system


class NvmlError(Exception):
    pass


def _nvml(count: int = 2, init: Exception | None = None, memory: Exception | None = None) -> ModuleType:
    module: Any = ModuleType("pynvml")
    calls: list[str] = []

    def start() -> None:
        calls.append("init")
        if init:
            raise init

    def read_memory(handle: int) -> Any:
        if memory:
            raise memory
        return SimpleNamespace(total=(handle + 1) << 30, free=(handle + 1) << 29, used=0)

    module.calls = calls
    module.NVMLError = NvmlError
    module.nvmlInit = start
    module.nvmlShutdown = lambda: calls.append("shutdown")
    module.nvmlSystemGetDriverVersion = lambda: b"580.65.06"
    module.nvmlSystemGetCudaDriverVersion_v2 = lambda: 13020
    module.nvmlDeviceGetCount = lambda: count
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetName = lambda handle: f"GPU {handle}"
    module.nvmlDeviceGetCudaComputeCapability = lambda handle: (8, 6 + handle)
    module.nvmlDeviceGetMemoryInfo = read_memory
    module.nvmlDeviceGetUUID = lambda handle: f"GPU-{'ab'[handle]}123"
    return module


@pytest.fixture
def with_nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(module: ModuleType | None) -> ModuleType | None:
        monkeypatch.setitem(sys.modules, "pynvml", module)
        return module

    return install


def test_devices(with_nvml: Any) -> None:
    module = with_nvml(_nvml())
    found = read_hardware(environ={})
    assert found.reason is None
    assert [g["index"] for g in found.gpu_dicts()] == [0, 1]
    first = found.gpus[0]
    assert (first.name, first.compute_capability, first.driver, first.runtime) == (
        "GPU 0",
        "8.6",
        "580.65.06",
        "CUDA 13.2",
    )
    assert (first.memory_total, first.memory_free) == (1 << 30, 1 << 29)
    assert module.calls == ["init", "shutdown"]


def test_no_module(with_nvml: Any, tmp_path: Path) -> None:
    with_nvml(None)
    found = read_hardware(tmp_path, environ={})
    assert found.gpus == ()
    assert "pip install nvidia-ml-py" in str(found.reason)


def test_no_driver(with_nvml: Any, tmp_path: Path) -> None:
    with_nvml(_nvml(init=NvmlError("Driver Not Loaded")))
    found = read_hardware(tmp_path, environ={})
    assert found.gpus == ()
    assert "Driver Not Loaded" in str(found.reason)


def test_no_device(with_nvml: Any, tmp_path: Path) -> None:
    module = with_nvml(_nvml(count=0))
    assert "no device" in str(read_hardware(tmp_path, environ={}).reason)
    assert module.calls == ["init", "shutdown"]


def test_one_missing_fact_does_not_hide_the_device(with_nvml: Any) -> None:
    with_nvml(_nvml(memory=NvmlError("Not Supported")))
    found = read_hardware(environ={})
    assert len(found.gpus) == 2
    assert found.gpus[0].memory_total is None
    assert any("memory of device 0" in note for note in found.notes)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1,0", ["GPU 1", "GPU 0"]),
        ("1", ["GPU 1"]),
        ("0,7,1", ["GPU 0"]),
        ("GPU-b1", ["GPU 1"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("MIG-x/1/0", ["GPU 0", "GPU 1"]),
    ],
)
def test_visible_devices(with_nvml: Any, visible: str, names: list[str]) -> None:
    with_nvml(_nvml())
    found = read_hardware(environ={"CUDA_VISIBLE_DEVICES": visible})
    assert [g.name for g in found.gpus] == names
    assert [g.index for g in found.gpus] == list(range(len(names)))
    assert (found.reason is None) == bool(names)
    if not names:
        assert "CUDA_VISIBLE_DEVICES" in str(found.reason)


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    return write_system(
        tmp_path,
        {
            "proc/meminfo": "MemTotal:       8000000 kB\nMemAvailable:   6000000 kB\n",
            "proc/device-tree/compatible": "nvidia,p3768-0000\0nvidia,tegra234\0",
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, BOARD: generic\n",
        },
    )


def test_jetson_without_nvml(with_nvml: Any, jetson: Path) -> None:
    with_nvml(None)
    found = read_hardware(jetson, environ={})
    assert found.reason is None
    gpu = found.gpus[0]
    assert (gpu.name, gpu.compute_capability) == ("NVIDIA Jetson Orin Nano", "8.7")
    assert (gpu.memory_total, gpu.memory_free) == (8_192_000_000, 6_144_000_000)
    assert gpu.driver == "R36 (release), REVISION: 4.3, BOARD: generic"
    assert any("nvidia-ml-py" in note for note in found.notes)


def test_jetson_whose_nvml_reports_no_memory(with_nvml: Any, jetson: Path) -> None:
    with_nvml(_nvml(count=1, memory=NvmlError("Not Supported")))
    (gpu,) = read_hardware(jetson, environ={}).gpus
    assert (gpu.name, gpu.memory_total, gpu.memory_free) == ("GPU 0", 8_192_000_000, 6_144_000_000)
    assert gpu.extra["memory"] == "shared with the CPU"


def test_cpus_and_memory_are_those_of_the_container(with_nvml: Any, jetson: Path) -> None:
    with_nvml(None)
    write_system(jetson, {"sys/fs/cgroup/cpu.max": "50000 100000\n", "sys/fs/cgroup/memory.max": "4000000000\n"})
    found = read_hardware(jetson, environ={})
    assert (found.num_cpus, found.memory_total) == (1, 4_000_000_000)


def test_this_machine() -> None:
    found = read_hardware()
    assert found.num_cpus >= 1
    assert found.memory_total is None or found.memory_total > 1 << 28
    assert bool(found.gpus) != bool(found.reason)
