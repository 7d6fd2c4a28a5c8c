"""How fast this machine is allowed to run (governor, power mode, battery), and who else used it meanwhile."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixano_edge.engine.machine import read_text

_CPU = "sys/devices/system/cpu"


def read_power_mode(root: Path = Path("/")) -> dict[str, Any]:
    """What the system says; JSON-ready.

    Args:
        root: Folder that stands for ``/``.

    Returns:
        ``governor``, ``energy_preference``, ``boost``, ``platform_profile``, ``on_battery``, ``jetson_mode`` and
        ``virtual``; None for what is not told, as in most virtual machines.
    """
    boost = read_text(root / _CPU / "cpufreq/boost")
    turbo = read_text(root / _CPU / "intel_pstate/no_turbo")
    adapters = [
        read_text(supply / "online")
        for supply in sorted((root / "sys/class/power_supply").glob("*"))
        if read_text(supply / "type") == "Mains"
    ]
    mode = read_text(root / "var/lib/nvpmodel/status")
    flags = next((line for line in read_text(root / "proc/cpuinfo").splitlines() if line.startswith("flags")), "")
    return {
        "governor": read_text(root / _CPU / "cpu0/cpufreq/scaling_governor") or None,
        "energy_preference": read_text(root / _CPU / "cpu0/cpufreq/energy_performance_preference") or None,
        "boost": {"1": True, "0": False}.get(boost, {"0": True, "1": False}.get(turbo)),
        "platform_profile": read_text(root / "sys/firmware/acpi/platform_profile") or None,
        "on_battery": "1" not in adapters if adapters else None,
        "jetson_mode": mode.partition(":")[2] or None,
        "virtual": "hypervisor" in flags.split() if flags else None,
    }


def power_text(power: dict[str, Any]) -> str:
    """One line for people."""
    said = [
        f"governor {power['governor']}" if power["governor"] else "",
        f"preference {power['energy_preference']}" if power["energy_preference"] else "",
        "" if power["boost"] is None else f"boost {'on' if power['boost'] else 'off'}",
        f"profile {power['platform_profile']}" if power["platform_profile"] else "",
        "" if power["on_battery"] is None else "on battery" if power["on_battery"] else "on mains",
        f"Jetson power mode {power['jetson_mode']}" if power["jetson_mode"] else "",
    ]
    text = ", ".join(part for part in said if part) or "the system does not tell"
    return f"{text} (virtual machine)" if power["virtual"] else text


@dataclass(frozen=True)
class _Reading:
    busy: float
    total: float
    own: float


class LoadWatch:
    """Which share of the machine others used between `start` and `stop`; a shared machine gives no figures.

    Args:
        root: Folder that stands for ``/``.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._begun: _Reading | None = None

    def start(self) -> None:
        """Begins a stretch."""
        self._begun = self._read()

    def stop(self) -> float | None:
        """CPUs that others kept busy since `start`, of all CPUs: 0 to 1. None where the system does not tell.

        What the hypervisor gave to others ("steal") counts as theirs.
        """
        begun, ended = self._begun, self._read()
        if begun is None or ended is None or ended.total <= begun.total:
            return None
        others = (ended.busy - begun.busy) - (ended.own - begun.own)
        return max(0.0, min(1.0, others / (ended.total - begun.total)))

    def _read(self) -> _Reading | None:
        line = read_text(self._root / "proc/stat").splitlines()[:1]
        if not line or not line[0].startswith("cpu "):
            return None
        user, nice, system, idle, wait, irq, soft, steal = (float(v) for v in [*line[0].split()[1:9], *"00000000"][:8])
        tick = os.sysconf("SC_CLK_TCK")
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        busy = user + nice + system + irq + soft + steal
        return _Reading(busy / tick, (busy + idle + wait) / tick, sum(u.ru_utime + u.ru_stime for u in used))
