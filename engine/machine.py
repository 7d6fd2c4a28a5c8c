"""What the system says about this machine: its CPUs and how many are usable, memory, and whether it is a Jetson.

Reads ``/proc``, ``/sys`` and ``/etc``. The one place for these questions: the runtime, the provider's server info,
`doctor` and the benchmarks ask here. `root` is the folder that stands for ``/``, another one in tests.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")

# Chip in the device tree -> compute capability of its integrated GPU.
_TEGRA = {"nvidia,tegra194": "7.2", "nvidia,tegra234": "8.7", "nvidia,tegra264": "11.0"}
# Name shown -> flag in /proc/cpuinfo (x86: "flags", Arm: "Features").
_CPU_FLAGS = {
    "AVX2": "avx2",
    "AVX512": "avx512f",
    "AVX512-VNNI": "avx512_vnni",
    "AVX512-BF16": "avx512_bf16",
    "AMX-BF16": "amx_bf16",
    "AMX-INT8": "amx_int8",
    "NEON": "asimd",
    "FP16": "asimdhp",
    "DOTPROD": "asimddp",
    "BF16": "bf16",
    "I8MM": "i8mm",
    "SVE": "sve",
}


@dataclass(frozen=True)
class Jetson:
    """A board with an integrated NVIDIA GPU.

    Attributes:
        model: Name of the board.
        compute_capability: Of its GPU; None for a chip that is not known here.
        l4t: First line of ``/etc/nv_tegra_release``; None where there is no such file.
    """

    model: str
    compute_capability: str | None
    l4t: str | None


def read_text(path: Path) -> str:
    """Text of a small system file without the NULs and line ends around it; empty where it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8", "replace").strip("\0\n ")
    except OSError:
        return ""


def affinity_cpus() -> int:
    """Logical CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs that the container's quota allows (cgroup v2), or None without one."""
    parts = read_text(root / "sys/fs/cgroup/cpu.max").split()
    if len(parts) == 2 and parts[0].isdigit() and parts[1].isdigit() and int(parts[1]):
        return int(parts[0]) / int(parts[1])
    return None


def usable_cpus(root: Path = ROOT) -> int:
    """CPUs that this process can use: affinity and container quota (rounded up), at least 1."""
    count, quota = affinity_cpus(), cpu_quota(root)
    return max(1, count if quota is None else min(count, -int(-quota // 1)))


def memory(root: Path = ROOT) -> tuple[int | None, int | None]:
    """RAM in bytes: in all, and what can be taken without swapping. The container's limit counts; None if unknown."""
    values: dict[str, int] = {}
    for line in read_text(root / "proc/meminfo").splitlines():
        key, _, rest = line.partition(":")
        number = rest.split()
        if number and number[0].isdigit():
            values[key] = int(number[0]) * 1024
    total, available = values.get("MemTotal"), values.get("MemAvailable")
    limit = read_text(root / "sys/fs/cgroup/memory.max")
    if total is not None and limit.isdigit():
        total = min(total, int(limit))
        available = min(available, total) if available is not None else None
    return total, available


def jetson(root: Path = ROOT) -> Jetson | None:
    """The board when this is a Jetson: by the chip or model in the device tree, or by NVIDIA's release file."""
    chips = read_text(root / "proc/device-tree/compatible").split("\0")
    capability = next((_TEGRA[chip] for chip in chips if chip in _TEGRA), None)
    model = read_text(root / "proc/device-tree/model")
    release = read_text(root / "etc/nv_tegra_release").splitlines()
    named = any(word in model.lower() for word in ("jetson", "tegra"))
    if capability is None and not named and not release:
        return None
    return Jetson(model or "NVIDIA Jetson (model unknown)", capability, release[0] if release else None)


def nvidia_driver(root: Path = ROOT) -> str | None:
    """Version of the NVIDIA kernel driver, for example "580.65.06"; on a Jetson without one the L4T release.

    None where there is neither.
    """
    for line in read_text(root / "proc/driver/nvidia/version").splitlines():
        if line.startswith("NVRM version:"):
            return next((word for word in line.split() if word[0].isdigit() and "." in word), None)
    board = jetson(root)
    return board.l4t.lstrip("# ") if board is not None and board.l4t else None


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """Model name and the flags that matter from the text of ``/proc/cpuinfo`` (x86 or Arm)."""
    model, flags = "", set[str]()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        key = key.strip()
        if key in ("model name", "Model") and not model:
            model = value.strip()
        elif key in ("flags", "Features"):
            flags.update(value.split())
    return model, tuple(name for name, flag in _CPU_FLAGS.items() if flag in flags)


def cpu_model(root: Path = ROOT) -> str:
    """What a result computed on this CPU in reduced precision depends on: its model and instruction sets."""
    model, flags = parse_cpuinfo(read_text(root / "proc/cpuinfo"))
    return " ".join((model, *flags))
