"""CPU counts, memory and Jetson detection from stand-ins for ``/``, and that everyone gives the same answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pixano_edge.engine import machine
from pixano_edge.engine.cli.host import read_host
from pixano_edge.engine.provider.hardware import read_hardware
from pixano_edge.engine.runtime import CpuDevice
from tests.support.system import write_system


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.usable_cpus() == machine.affinity_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert machine.affinity_cpus() == len(before)


@pytest.mark.parametrize(
    ("text", "quota", "usable"),
    [
        ("150000 100000", 1.5, 2),
        ("50000 100000", 0.5, 1),
        ("1000 100000", 0.01, 1),
        ("9900000 100000", 99.0, 8),
        ("max 100000", None, 8),
        ("1 0", None, 8),
        ("", None, 8),
        ("x y z", None, 8),
    ],
)
def test_quota(tmp_path: Path, text: str, quota: float | None, usable: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "affinity_cpus", lambda: 8)
    write_system(tmp_path, {"sys/fs/cgroup/cpu.max": text})
    assert machine.cpu_quota(tmp_path) == quota
    assert machine.usable_cpus(tmp_path) == usable


def test_memory(tmp_path: Path) -> None:
    assert machine.memory(tmp_path) == (None, None)
    write_system(tmp_path, {"proc/meminfo": "MemTotal:  1000 kB\nMemAvailable: 600 kB\nHugePages_Total: 0\nodd\n"})
    assert machine.memory(tmp_path) == (1_024_000, 614_400)
    write_system(tmp_path, {"sys/fs/cgroup/memory.max": "500000\n"})
    assert machine.memory(tmp_path) == (500_000, 500_000)
    write_system(tmp_path, {"sys/fs/cgroup/memory.max": "max\n"})
    assert machine.memory(tmp_path) == (1_024_000, 614_400)


def test_jetsons(tmp_path: Path) -> None:
    assert machine.jetson(tmp_path) is None
    board = write_system(tmp_path / "pi", {"proc/device-tree/model": "Raspberry Pi 5\0"})
    assert machine.jetson(board) is None
    chip = write_system(tmp_path / "chip", {"proc/device-tree/compatible": "nvidia,p3768\0nvidia,tegra234\0"})
    assert machine.jetson(chip) == machine.Jetson("NVIDIA Jetson (model unknown)", "8.7", None)
    named = write_system(tmp_path / "named", {"proc/device-tree/model": "NVIDIA Jetson Next\0"})
    assert machine.jetson(named) == machine.Jetson("NVIDIA Jetson Next", None, None)
    released = write_system(tmp_path / "released", {"etc/nv_tegra_release": "# R36\nmore\n"})
    assert machine.jetson(released) == machine.Jetson("NVIDIA Jetson (model unknown)", None, "# R36")


def test_everyone_gives_the_same_answer(tmp_path: Path) -> None:
    write_system(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 6000 kB\n",
            "sys/fs/cgroup/memory.max": "5000000\n",
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0",
            "proc/device-tree/compatible": "nvidia,tegra234\0",
        },
    )
    host, hardware = read_host(tmp_path), read_hardware(tmp_path, environ={})
    assert (host.memory_total, host.memory_available) == (hardware.memory_total, hardware.memory_available)
    assert host.jetson == "NVIDIA Jetson Orin Nano"
    assert read_hardware().num_cpus == machine.usable_cpus() == int(CpuDevice().info().extra["cpus"])
