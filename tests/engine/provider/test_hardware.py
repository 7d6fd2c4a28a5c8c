"""CPU, memory and GPU facts, with a stand-in for NVML and a stand-in for a Jetson's file system."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pixano_edge.engine.provider.hardware import Hardware, read_hardware
from pixano_edge.engine.runtime.cuda_calls import CudaFacts
from tests.support.system import write_system


class NvmlError(Exception):
    pass


def look(
    root: Path = Path("/"), environ: Mapping[str, str] | None = None, facts: tuple[CudaFacts, ...] = (), why: str = "no"
) -> Hardware:
    """One reading in which CUDA says what the test wants."""
    return read_hardware(root, environ, lambda: (facts, None if facts else why))


def fact(index: int, uuid: str | None = None, pci: str | None = None, **changes: Any) -> CudaFacts:
    """What CUDA says of one device."""
    given = {
        "name": f"CUDA's name {index}",
        "compute_capability": "8.6",
        "memory_total": (index + 1) << 30,
        "multiprocessors": 28,
        "integrated": False,
        "maps_host": True,
        "pageable": False,
        "registers_host": True,
        "cuda": "13.2",
    } | changes
    return CudaFacts(index=index, uuid=uuid, pci=pci, **given)


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

    def read_power(handle: int) -> int:
        if handle:
            raise NvmlError("Not Supported")
        return 43210

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
    module.nvmlDeviceGetPciInfo = lambda handle: SimpleNamespace(busId=f"00000000:0{handle + 1}:00.0".encode())
    module.nvmlDeviceGetUtilizationRates = lambda handle: SimpleNamespace(gpu=35, memory=10)
    module.NVML_TEMPERATURE_GPU = 0
    module.nvmlDeviceGetTemperature = lambda handle, sensor: 61 + sensor
    module.nvmlDeviceGetPowerUsage = read_power
    return module


@pytest.fixture
def with_nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(module: ModuleType | None) -> ModuleType | None:
        monkeypatch.setitem(sys.modules, "pynvml", module)
        return module

    return install


def test_devices(with_nvml: Any) -> None:
    module = with_nvml(_nvml())
    found = look(environ={})
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
    assert (first.utilisation, first.temperature, first.power) == (35, 61, 43.2)
    assert found.gpus[1].power is None
    assert not any("power" in note for note in found.notes), "few boards have every sensor"
    assert first.extra == {"uuid": "GPU-a123", "pci": "00000000:01:00.0"}
    assert module.calls == ["init", "shutdown"]


def test_cuda_has_its_own_order(with_nvml: Any) -> None:
    """CUDA's default is the fastest first; the figures must follow, by UUID or else by PCI address."""
    with_nvml(_nvml())
    for facts in (
        (fact(0, "GPU-b123", memory_total=2 << 30), fact(1, "GPU-a123")),
        (fact(0, "other", "00000000:02:00.0", memory_total=2 << 30), fact(1, None, "00000000:01:00.0")),
    ):
        found = look(environ={"CUDA_VISIBLE_DEVICES": "1,0"}, facts=facts)
        assert [(g.index, g.name, g.memory_total) for g in found.gpus] == [(0, "GPU 1", 2 << 30), (1, "GPU 0", 1 << 30)]
        assert found.gpus[0].extra["multiprocessors"] == "28"
        assert found.notes == ()
    (only,) = look(environ={"CUDA_VISIBLE_DEVICES": "GPU-b"}, facts=(fact(0, "GPU-b123", memory_total=2 << 30),)).gpus
    assert (only.index, only.name) == (0, "GPU 1")


def test_without_cuda_the_order_is_said_to_be_a_guess(with_nvml: Any) -> None:
    with_nvml(_nvml())
    found = look(environ={}, why="cuda-bindings is not installed")
    assert any("may differ: cuda-bindings is not installed" in note for note in found.notes)
    with_nvml(_nvml(count=1))
    assert read_hardware(environ={}, cuda=lambda: pytest.fail("one GPU: no need to ask")).notes == ()


def test_part_of_a_gpu(with_nvml: Any) -> None:
    with_nvml(_nvml())
    found = look(environ={"CUDA_VISIBLE_DEVICES": "MIG-x"}, facts=(fact(0, "GPU-x", "00000000:02:00.0"),))
    (gpu,) = found.gpus
    assert (gpu.name, gpu.memory_total, gpu.memory_free) == ("GPU 1", 1 << 30, None)
    assert any("part of a GPU" in note for note in found.notes)


def test_cuda_without_nvml(with_nvml: Any, tmp_path: Path) -> None:
    with_nvml(None)
    write_system(
        tmp_path, {"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  X"}
    )
    found = look(tmp_path, environ={}, facts=(fact(0, "GPU-a123"),))
    (gpu,) = found.gpus
    assert (gpu.name, gpu.driver, gpu.runtime, gpu.memory_total) == ("CUDA's name 0", "580.65.06", "CUDA 13.2", 1 << 30)
    assert found.reason is None
    assert any("Without load, temperature and power" in note for note in found.notes)


def test_a_gpu_that_nvml_does_not_know(with_nvml: Any) -> None:
    with_nvml(_nvml(count=2))
    found = look(environ={}, facts=(fact(0, "GPU-a123"), fact(1, "GPU-z", "00000000:09:00.0")))
    assert [g.name for g in found.gpus] == ["GPU 0", "CUDA's name 1"]
    assert any("does not know cuda:1" in note for note in found.notes)


def test_no_module(with_nvml: Any, tmp_path: Path) -> None:
    with_nvml(None)
    found = look(tmp_path, environ={})
    assert found.gpus == ()
    assert "pip install nvidia-ml-py" in str(found.reason)


def test_no_driver(with_nvml: Any, tmp_path: Path) -> None:
    with_nvml(_nvml(init=NvmlError("Driver Not Loaded")))
    found = look(tmp_path, environ={})
    assert found.gpus == ()
    assert "Driver Not Loaded" in str(found.reason)


def test_no_device(with_nvml: Any, tmp_path: Path) -> None:
    module = with_nvml(_nvml(count=0))
    assert "no device" in str(look(tmp_path, environ={}).reason)
    assert module.calls == ["init", "shutdown"]


def test_one_missing_fact_does_not_hide_the_device(with_nvml: Any) -> None:
    with_nvml(_nvml(memory=NvmlError("Not Supported")))
    found = look(environ={})
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
    found = look(environ={"CUDA_VISIBLE_DEVICES": visible})
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
    found = look(jetson, environ={})
    assert found.reason is None
    gpu = found.gpus[0]
    assert (gpu.name, gpu.compute_capability) == ("NVIDIA Jetson Orin Nano", "8.7")
    assert (gpu.memory_total, gpu.memory_free) == (8_192_000_000, 6_144_000_000)
    assert gpu.driver == "R36 (release), REVISION: 4.3, BOARD: generic"
    assert any("nvidia-ml-py" in note for note in found.notes)


def test_jetson_whose_nvml_reports_no_memory(with_nvml: Any, jetson: Path) -> None:
    with_nvml(_nvml(count=1, memory=NvmlError("Not Supported")))
    (gpu,) = look(jetson, environ={}).gpus
    assert (gpu.name, gpu.memory_total, gpu.memory_free) == ("GPU 0", 8_192_000_000, 6_144_000_000)
    assert gpu.extra["memory"] == "shared with the CPU"


SENSORS = {
    "sys/devices/platform/bus@0/17000000.gpu/load": "421\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "70000\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "51234\n",
    "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/in1_label": "VDD_IN\n",
    "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/in1_input": "5000\n",
    "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/curr1_input": "1700\n",
    "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV\n",
    "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/in2_input": "5000\n",
    "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/curr2_input": "400\n",
}


def test_sensors_of_a_jetson(with_nvml: Any, jetson: Path) -> None:
    with_nvml(None)
    write_system(jetson, SENSORS)
    orin = fact(0, name="Orin", compute_capability="8.7", integrated=True, multiprocessors=8)
    (gpu,) = look(jetson, environ={}, facts=(orin,)).gpus
    assert (gpu.utilisation, gpu.temperature, gpu.power) == (42, 51, 8.5)
    assert gpu.extra == {
        "memory": "shared with the CPU",
        "gpu": "Orin",
        "multiprocessors": "8",
        "power_rail": "VDD_IN",
    }
    assert (gpu.name, gpu.compute_capability, gpu.runtime) == ("NVIDIA Jetson Orin Nano", "8.7", "CUDA 13.2")


def test_power_of_a_jetson_that_measures_only_the_gpu(with_nvml: Any, jetson: Path) -> None:
    with_nvml(_nvml(count=1, memory=NvmlError("Not Supported")))
    rails = {name: text.replace("VDD_IN", "VDD_CPU") for name, text in SENSORS.items()}
    write_system(jetson, rails)
    (gpu,) = look(jetson, environ={}).gpus
    assert (gpu.power, "power_rail" in gpu.extra) == (43.2, False), "NVML's own figure goes first"
    with_nvml(None)
    (gpu,) = look(jetson, environ={}).gpus
    assert (gpu.power, gpu.extra["power_rail"]) == (2.0, "VDD_CPU_GPU_CV")


def test_cpus_and_memory_are_those_of_the_container(with_nvml: Any, jetson: Path) -> None:
    with_nvml(None)
    write_system(jetson, {"sys/fs/cgroup/cpu.max": "50000 100000\n", "sys/fs/cgroup/memory.max": "4000000000\n"})
    found = look(jetson, environ={})
    assert (found.num_cpus, found.memory_total) == (1, 4_000_000_000)


def test_this_machine() -> None:
    found = read_hardware()
    assert found.num_cpus >= 1
    assert found.memory_total is None or found.memory_total > 1 << 28
    assert bool(found.gpus) != bool(found.reason)
