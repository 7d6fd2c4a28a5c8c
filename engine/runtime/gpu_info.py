"""CUDA devices without opening one: what NVML, the CUDA driver and a Jetson's system files say. Makes no context.

Sources: NVML through ``pynvml`` (nvidia-ml-py), which knows load, temperature and power but counts in PCI order and
past CUDA_VISIBLE_DEVICES; the CUDA driver, which alone knows which GPU is ``cuda:N``; on a Jetson, whose NVML is absent
or knows little, ``/sys`` (Jetson Linux Developer Guide: INA3221 power monitor, thermal zones, GPU load).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import EdgeError
from ..machine import ROOT, Jetson, nvidia_driver, read_text
from .base import DeviceInfo
from .cuda_calls import CudaFacts, device_info, long_pci
from .cuda_open import open_cuda_api

_GPU_LOADS = (
    "sys/devices/gpu.0/load",
    "sys/devices/platform/gpu.0/load",
    "sys/devices/platform/*.gpu/load",
    "sys/devices/platform/bus@0/*.gpu/load",
)


@dataclass(frozen=True)
class Found:
    """Devices of one source.

    Attributes:
        devices: In the order of the source.
        reason: Why there are none; None otherwise.
        notes: What the source did not tell.
    """

    devices: tuple[DeviceInfo, ...] = ()
    reason: str | None = None
    notes: tuple[str, ...] = ()


def cuda_facts() -> tuple[tuple[CudaFacts, ...], str | None]:
    """Every device that CUDA lets this process see, in the order of ``cuda:N``, or none and the reason.

    Initialises the driver (up to a second, once per process) and makes no context.
    """
    try:
        api = open_cuda_api()
        return tuple(api.facts(index) for index in range(api.count())), None
    except EdgeError as error:
        return (), error.message


def nvml_devices() -> Found:
    """Every device NVML knows, in its own order, with memory, load, temperature and power now."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return Found(reason="NVML cannot be asked: pip install nvidia-ml-py")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Found(reason=f"No NVIDIA driver answers: {error}.")
    reader = _Nvml(nvml)
    try:
        return reader.read()
    finally:
        reader.ask("whether it was closed", nvml.nvmlShutdown)


class _Nvml:
    """One reading. A missing fact (integrated GPUs do not report memory, for example) must not hide the device."""

    def __init__(self, nvml: Any) -> None:
        self.nvml = nvml
        self.notes: list[str] = []

    def ask(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The answer, or None; `what` goes into the notes then, unless it is empty (sensors that few boards have)."""
        try:
            return function(*arguments)
        except self.nvml.NVMLError as error:
            if what:
                self.notes.append(f"NVML does not tell {what}: {error}.")
            return None

    def read(self) -> Found:
        nvml = self.nvml
        driver = _text(self.ask("the driver version", nvml.nvmlSystemGetDriverVersion))
        cuda = self.ask("the CUDA version", nvml.nvmlSystemGetCudaDriverVersion_v2)
        runtime = None if cuda is None else f"CUDA {cuda // 1000}.{cuda % 1000 // 10}"
        count = self.ask("the number of devices", nvml.nvmlDeviceGetCount)
        if not count:
            reason = self.notes[-1] if count is None else "The NVIDIA driver reports no device."
            return Found((), reason, tuple(self.notes))
        devices = []
        for index in range(count):
            handle = self.ask(f"anything about device {index}", nvml.nvmlDeviceGetHandleByIndex, index)
            if handle is not None:
                devices.append(self._device(index, handle, driver, runtime))
        return Found(tuple(devices), None if devices else self.notes[-1], tuple(self.notes))

    def _device(self, index: int, handle: Any, driver: str | None, runtime: str | None) -> DeviceInfo:
        nvml, ask = self.nvml, self.ask
        name = _text(ask(f"the name of device {index}", nvml.nvmlDeviceGetName, handle))
        capability = ask(f"the capability of device {index}", nvml.nvmlDeviceGetCudaComputeCapability, handle)
        memory = ask(f"the memory of device {index}", nvml.nvmlDeviceGetMemoryInfo, handle)
        uuid = _text(ask(f"the id of device {index}", nvml.nvmlDeviceGetUUID, handle))
        pci = ask("", nvml.nvmlDeviceGetPciInfo, handle)
        load = ask("", nvml.nvmlDeviceGetUtilizationRates, handle)
        heat = ask("", nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        power = ask("", nvml.nvmlDeviceGetPowerUsage, handle)
        bus = "" if pci is None else long_pci(_text(pci.busId) or "")
        return DeviceInfo(
            name=name or f"CUDA device {index}",
            kind="cuda",
            index=index,
            compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
            driver=driver,
            runtime=runtime,
            memory_total=None if memory is None else int(memory.total),
            memory_free=None if memory is None else int(memory.free),
            extra={key: value for key, value in (("uuid", uuid), ("pci", bus)) if value},
            utilisation=None if load is None else int(load.gpu),
            temperature=None if heat is None else int(heat),
            power=None if power is None else round(power / 1000, 1),
        )


def match(facts: Sequence[CudaFacts], known: Sequence[DeviceInfo], root: Path = ROOT) -> Found:
    """One entry per ``cuda:N``, with NVML's figures of the same GPU: the one of the same UUID, else PCI address.

    Args:
        facts: From `cuda_facts`.
        known: From `nvml_devices`.
        root: Where ``/proc`` is.
    """
    devices, notes = [], []
    for fact in facts:
        same = next((d for d in known if fact.uuid and d.extra.get("uuid") == fact.uuid), None)
        same = same or next((d for d in known if fact.pci and d.extra.get("pci") == fact.pci), None)
        own = device_info(fact, fact.memory_total, None, nvidia_driver(root), {})
        if same is None:
            devices.append(own)
            if known:
                notes.append(f"NVML does not know cuda:{fact.index} ({fact.name}).")
            continue
        # A MIG slice has the address of the whole GPU, and less memory than NVML tells of that.
        slice_ = same.memory_total is not None and fact.memory_total < 0.9 * same.memory_total
        if slice_:
            notes.append(f"cuda:{fact.index} is a part of a GPU: load, temperature and power are those of the whole.")
        devices.append(
            replace(
                same,
                index=fact.index,
                compute_capability=own.compute_capability,
                memory_total=own.memory_total if slice_ else same.memory_total,
                memory_free=None if slice_ else same.memory_free,
                extra={**same.extra, **own.extra},
            )
        )
    return Found(tuple(devices), None, tuple(notes))


def tegra_device(
    board: Jetson, total: int | None, available: int | None, fact: CudaFacts | None, root: Path = ROOT
) -> DeviceInfo:
    """The integrated GPU of a Jetson; it shares the RAM, so the RAM figures are its memory.

    Args:
        board: The board.
        total: RAM in bytes.
        available: RAM that can be taken, in bytes.
        fact: What CUDA says, or None where it cannot be asked.
        root: Where ``/sys`` is.
    """
    power, rail = _tegra_power(root)
    extra = {"memory": "shared with the CPU"}
    if fact is not None:
        extra |= {"gpu": fact.name, "multiprocessors": str(fact.multiprocessors)}
    if rail:
        extra["power_rail"] = rail
    return DeviceInfo(
        name=board.model,
        kind="cuda",
        compute_capability=board.compute_capability if fact is None else fact.compute_capability,
        driver=None if board.l4t is None else board.l4t.lstrip("# "),
        runtime=None if fact is None else f"CUDA {fact.cuda}",
        memory_total=total,
        memory_free=available,
        extra=extra,
        utilisation=_tegra_load(root),
        temperature=_tegra_temperature(root),
        power=power,
    )


def sharing(gpu: DeviceInfo, tegra: DeviceInfo) -> DeviceInfo:
    """An integrated GPU of which NVML knows little, with the figures of the system files where NVML has none."""
    rail = {} if gpu.power is None else {"power_rail": ""}
    extra = {key: value for key, value in {**gpu.extra, **tegra.extra, **rail}.items() if value}
    return replace(
        gpu,
        memory_total=tegra.memory_total,
        memory_free=tegra.memory_free,
        extra=extra,
        utilisation=tegra.utilisation if gpu.utilisation is None else gpu.utilisation,
        temperature=tegra.temperature if gpu.temperature is None else gpu.temperature,
        power=tegra.power if gpu.power is None else gpu.power,
    )


def _text(value: Any) -> str | None:
    """Older pynvml versions return bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _number(path: Path) -> int | None:
    text = read_text(path)
    return int(text) if text.lstrip("-").isdigit() else None


def _tegra_load(root: Path) -> int | None:
    """Percent; the file counts in thousandths."""
    for pattern in _GPU_LOADS:
        for path in sorted(root.glob(pattern)):
            value = _number(path)
            if value is not None:
                return round(value / 10)
    return None


def _tegra_temperature(root: Path) -> int | None:
    """Degrees Celsius of the zone whose name starts with GPU; the file counts in thousandths."""
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        if read_text(zone / "type").lower().startswith("gpu"):
            value = _number(zone / "temp")
            if value is not None:
                return round(value / 1000)
    return None


def _tegra_power(root: Path) -> tuple[float | None, str]:
    """Watts and the rail they were measured on: the whole board's where there is one, else the GPU's."""
    rails: dict[str, float] = {}
    for label in sorted(root.glob("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in*_label")):
        number = label.name[2:].partition("_")[0]
        volts, amperes = _number(label.parent / f"in{number}_input"), _number(label.parent / f"curr{number}_input")
        if volts is not None and amperes is not None:
            rails[read_text(label)] = round(volts * amperes / 1e6, 1)
    rail = next((name for name in rails if name == "VDD_IN"), "") or next((n for n in rails if "GPU" in n), "")
    return rails.get(rail), rail
