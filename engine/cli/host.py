"""Facts about this machine for `doctor`, `info` and the benchmarks: OS, CPU, memory, board. No GPU library needed."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from ..machine import affinity_cpus, cpu_quota, jetson, memory, parse_cpuinfo, read_text


@dataclass(frozen=True)
class Host:
    """One machine. Memory in bytes, None where the system does not say.

    Attributes:
        os: Name and release of the operating system.
        kernel: Kernel and architecture.
        python: Version and implementation.
        cpu: Model name.
        threads: Logical CPUs of the machine.
        usable_threads: Logical CPUs that this process may use (affinity).
        cpu_quota: CPUs that the container's quota allows, or None without one.
        cpu_flags: Instruction sets that matter for inference.
        memory_total: RAM, or the container's limit where that is smaller.
        memory_available: RAM that can be taken without swapping.
        jetson: Board model of a Jetson, or None.
        l4t: First line of ``/etc/nv_tegra_release`` on a Jetson, or None.
    """

    os: str
    kernel: str
    python: str
    cpu: str
    threads: int
    usable_threads: int
    cpu_quota: float | None
    cpu_flags: tuple[str, ...]
    memory_total: int | None
    memory_available: int | None
    jetson: str | None
    l4t: str | None


def _os_name(root: Path) -> str:
    for line in read_text(root / "etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return f"{platform.system()} {platform.release()}"


def read_host(root: Path = Path("/")) -> Host:
    """Reads the facts from ``/proc``, ``/etc`` and ``/sys`` below `root` (another root for tests)."""
    model, flags = parse_cpuinfo(read_text(root / "proc/cpuinfo"))
    board = jetson(root)
    total, available = memory(root)
    return Host(
        os=_os_name(root),
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        cpu=model or platform.processor() or platform.machine(),
        threads=os.cpu_count() or 1,
        usable_threads=affinity_cpus(),
        cpu_quota=cpu_quota(root),
        cpu_flags=flags,
        memory_total=total,
        memory_available=available,
        jetson=board.model if board else None,
        l4t=board.l4t if board else None,
    )
