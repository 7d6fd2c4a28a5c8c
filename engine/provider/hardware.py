"""CPUs, memory and CUDA devices of this machine, for server info. Makes no CUDA context and imports NVML lazily.

Sources: see `engine.runtime.gpu_info`. Memory is in bytes; what the system does not tell is None.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..machine import ROOT, jetson, memory, usable_cpus
from ..runtime.base import DeviceInfo
from ..runtime.cuda_calls import CudaFacts
from ..runtime.gpu_info import cuda_facts, match, nvml_devices, sharing, tegra_device


@dataclass(frozen=True)
class Hardware:
    """One look at the machine.

    Attributes:
        num_cpus: CPUs that this process may use (its affinity mask and the container's quota).
        memory_total: RAM.
        memory_available: RAM that can be taken without swapping.
        gpus: CUDA devices that this process can see.
        reason: Why `gpus` is empty, None otherwise.
        notes: What could not be read about the devices.
    """

    num_cpus: int
    memory_total: int | None
    memory_available: int | None
    gpus: tuple[DeviceInfo, ...]
    reason: str | None
    notes: tuple[str, ...] = ()

    def gpu_dicts(self) -> list[dict[str, Any]]:
        """The devices as JSON-ready values."""
        return [asdict(gpu) for gpu in self.gpus]


def read_hardware(
    root: Path = ROOT,
    environ: Mapping[str, str] | None = None,
    cuda: Callable[[], tuple[tuple[CudaFacts, ...], str | None]] = cuda_facts,
) -> Hardware:
    """Reads the facts now (free memory changes). Blocks for up to a second on the first NVML or CUDA call.

    CUDA itself is asked only where NVML cannot know which GPU is ``cuda:N`` (several GPUs, CUDA_VISIBLE_DEVICES) or
    does not know the GPU at all (Jetson, no nvidia-ml-py).

    Args:
        root: Where ``/proc``, ``/sys`` and ``/etc`` are; another folder in tests.
        environ: Environment to read ``CUDA_VISIBLE_DEVICES`` from; the process's own when None.
        cuda: Asks CUDA; another function in tests.
    """
    total, available = memory(root)
    visible = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    board = jetson(root)
    known = nvml_devices()
    gpus, reason, notes = list(known.devices), known.reason, list(known.notes)
    facts: tuple[CudaFacts, ...] = ()
    if board is not None or visible is not None or len(gpus) != 1:
        facts, why = cuda()
        if facts:
            matched = match(facts, gpus, root)
            gpus, reason, notes = list(matched.devices), None, notes + list(matched.notes)
            if not known.devices:
                notes.append(f"Without load, temperature and power: {known.reason}")
        elif why and len(gpus) > 1:
            notes.append(f"The order of the GPUs is NVML's, that of cuda:N may differ: {why}")
    if board is not None:
        fact = next((f for f in facts if f.integrated), None)
        tegra = tegra_device(board, total, available, fact, root)
        if not known.devices:
            gpus, notes = [tegra], [f"NVML says nothing about this Jetson: {known.reason}"]
        else:
            gpus = [sharing(gpu, tegra) if _integrated(gpu, facts) else gpu for gpu in gpus]
    if gpus and not facts:
        found = len(gpus)
        gpus, masked = _visible(gpus, visible)
        notes = notes + masked
        reason = None if gpus else f"CUDA_VISIBLE_DEVICES='{visible}' hides the {found} CUDA device(s) of this machine."
    return Hardware(
        usable_cpus(root), total, available, tuple(gpus), None if gpus else reason, tuple(dict.fromkeys(notes))
    )


def _integrated(gpu: DeviceInfo, facts: Sequence[CudaFacts]) -> bool:
    """Whether a GPU shares the RAM: by CUDA's word, else because NVML does not report its memory."""
    fact = next((f for f in facts if f.index == gpu.index), None)
    return not gpu.memory_total if fact is None else fact.integrated


def _visible(devices: list[DeviceInfo], visible: str | None) -> tuple[list[DeviceInfo], list[str]]:
    """Applies ``CUDA_VISIBLE_DEVICES`` as the CUDA driver does: in its order, up to the first entry that fits nothing.

    For machines where CUDA cannot be asked. Indices are NVML's (PCI order); CUDA agrees when
    ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` or when all GPUs are alike.
    The result is renumbered, so that `index` is the N of ``cuda:N``.
    """
    if visible is None:
        return devices, []
    if "MIG-" in visible:
        return devices, ["CUDA_VISIBLE_DEVICES names MIG slices: names and memory are those of the whole GPUs."]
    chosen: list[DeviceInfo] = []
    for entry in (e.strip() for e in visible.split(",")):
        if entry.isdigit():
            match = [d for d in devices if d.index == int(entry)]
        else:
            match = [d for d in devices if entry and d.extra.get("uuid", "").startswith(entry)]
        if len(match) != 1 or match[0] in chosen:
            break
        chosen.append(match[0])
    return [replace(d, index=i) for i, d in enumerate(chosen)], []
