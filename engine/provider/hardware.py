"""CPUs, memory and CUDA devices of this machine, for server info. Makes no CUDA context and imports NVML lazily.

Sources: NVML through the module ``pynvml`` (distribution nvidia-ml-py); on a Jetson whose NVML is absent or silent,
the device tree and the L4T release file. Memory is in bytes; what the system does not tell is None.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..machine import Jetson, jetson, memory, usable_cpus
from ..runtime.base import DeviceInfo


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


def read_hardware(root: Path = Path("/"), environ: Mapping[str, str] | None = None) -> Hardware:
    """Reads the facts now (free memory changes). Blocks for up to a second on the first NVML call.

    Args:
        root: Where ``/proc`` and ``/etc`` are; another folder in tests.
        environ: Environment to read ``CUDA_VISIBLE_DEVICES`` from; the process's own when None.
    """
    total, available = memory(root)
    visible = (os.environ if environ is None else environ).get("CUDA_VISIBLE_DEVICES")
    gpus, reason, notes = _nvml_devices()
    tegra = _tegra_device(jetson(root), total, available)
    if tegra is not None and not gpus:
        gpus, notes = [tegra], [f"NVML says nothing about this Jetson: {reason}"]
    elif tegra is not None:
        gpus = [gpu if gpu.memory_total else _sharing(gpu, tegra) for gpu in gpus]
    if gpus:
        found = len(gpus)
        gpus, masked = _visible(gpus, visible)
        notes = notes + masked
        reason = None if gpus else f"CUDA_VISIBLE_DEVICES='{visible}' hides the {found} CUDA device(s) of this machine."
    return Hardware(usable_cpus(root), total, available, tuple(gpus), reason, tuple(notes))


def _nvml_devices() -> tuple[list[DeviceInfo], str | None, list[str]]:
    """Every device NVML knows, or none and the reason."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return [], "NVML cannot be asked: pip install nvidia-ml-py", []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return [], f"No NVIDIA driver answers: {error}.", []
    notes: list[str] = []

    def ask(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        # One missing fact (integrated GPUs do not report memory, for example) must not hide the device.
        try:
            return function(*arguments)
        except nvml.NVMLError as error:
            notes.append(f"NVML does not tell {what}: {error}.")
            return None

    try:
        driver = _text(ask("the driver version", nvml.nvmlSystemGetDriverVersion))
        cuda = ask("the CUDA version", nvml.nvmlSystemGetCudaDriverVersion_v2)
        runtime = None if cuda is None else f"CUDA {cuda // 1000}.{cuda % 1000 // 10}"
        count = ask("the number of devices", nvml.nvmlDeviceGetCount)
        if not count:
            return [], notes[-1] if count is None else "The NVIDIA driver reports no device.", notes
        devices = []
        for index in range(count):
            handle = ask(f"anything about device {index}", nvml.nvmlDeviceGetHandleByIndex, index)
            if handle is None:
                continue
            name = _text(ask(f"the name of device {index}", nvml.nvmlDeviceGetName, handle))
            capability = ask(f"the capability of device {index}", nvml.nvmlDeviceGetCudaComputeCapability, handle)
            memory = ask(f"the memory of device {index}", nvml.nvmlDeviceGetMemoryInfo, handle)
            uuid = _text(ask(f"the id of device {index}", nvml.nvmlDeviceGetUUID, handle))
            devices.append(
                DeviceInfo(
                    name=name or f"CUDA device {index}",
                    kind="cuda",
                    index=index,
                    compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
                    driver=driver,
                    runtime=runtime,
                    memory_total=None if memory is None else int(memory.total),
                    memory_free=None if memory is None else int(memory.free),
                    extra={"uuid": uuid} if uuid else {},
                )
            )
        return devices, None if devices else notes[-1], notes
    finally:
        ask("whether it was closed", nvml.nvmlShutdown)


def _text(value: Any) -> str | None:
    """Older pynvml versions return bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _tegra_device(board: Jetson | None, total: int | None, available: int | None) -> DeviceInfo | None:
    """The integrated GPU of a Jetson; it shares the RAM, so the RAM figures are its memory."""
    if board is None:
        return None
    return DeviceInfo(
        name=board.model,
        kind="cuda",
        compute_capability=board.compute_capability,
        driver=None if board.l4t is None else board.l4t.lstrip("# "),
        memory_total=total,
        memory_free=available,
        extra={"memory": "shared with the CPU"},
    )


def _sharing(gpu: DeviceInfo, tegra: DeviceInfo) -> DeviceInfo:
    """An integrated GPU, whose memory NVML does not report, with the figures of the RAM that it uses."""
    return replace(
        gpu, memory_total=tegra.memory_total, memory_free=tegra.memory_free, extra={**gpu.extra, **tegra.extra}
    )


def _visible(devices: list[DeviceInfo], visible: str | None) -> tuple[list[DeviceInfo], list[str]]:
    """Applies ``CUDA_VISIBLE_DEVICES`` as the CUDA driver does: in its order, up to the first entry that fits nothing.

    Indices are NVML's (PCI order); CUDA agrees when ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` or when all GPUs are alike.
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
