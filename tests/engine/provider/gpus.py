"""A machine with fake GPUs: stub devices with a limited memory, and models that take it and give it back."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixano_edge.engine.bundle import MANIFEST_NAME, parse_manifest
from pixano_edge.engine.errors import DeviceMemoryError
from pixano_edge.engine.provider.families import LoadedModel, check_task
from pixano_edge.engine.provider.hardware import Hardware
from pixano_edge.engine.provider.settings import LoadOptions
from pixano_edge.engine.provider.types import InferenceTask
from pixano_edge.engine.provider.worker import Job
from pixano_edge.engine.runtime import StubDevice
from pixano_edge.engine.runtime.base import DeviceInfo
from pixano_edge.engine.runtime.memory import MemoryUse

from .fakes import FakeOpener, FakePrediction, FakePredictor

MIB = 1 << 20


class Machine:
    """Memory of several devices.

    Args:
        gpus: MiB of each GPU.
        ram: MiB of RAM.
    """

    def __init__(self, *gpus: int, ram: int = 10_000) -> None:
        self.total = {"cpu": ram * MIB, **{f"cuda:{i}": mib * MIB for i, mib in enumerate(gpus)}}
        self.taken = dict.fromkeys(self.total, 0)
        self.others = dict.fromkeys(self.total, 0)
        """Bytes of other processes."""
        self.highest = dict.fromkeys(self.total, 0)
        self._lock = threading.Lock()

    @property
    def gpus(self) -> tuple[str, ...]:
        return tuple(name for name in self.total if name != "cpu")

    def free(self, name: str) -> int:
        return self.total[name] - self.taken[name] - self.others[name]

    def hardware(self) -> Hardware:
        gpus = tuple(
            DeviceInfo(n, "cuda", i, memory_total=self.total[n], memory_free=self.free(n))
            for i, n in enumerate(self.gpus)
        )
        return Hardware(2, self.total["cpu"], self.free("cpu"), gpus, None if gpus else "no driver answers")

    def take(self, name: str, nbytes: int) -> None:
        with self._lock:
            if nbytes > self.free(name):
                raise DeviceMemoryError(f"{name} has no {nbytes} bytes.", "Use less.")
            self.taken[name] += nbytes
            self.highest[name] = max(self.highest[name], self.taken[name])

    def give(self, name: str, nbytes: int) -> None:
        with self._lock:
            self.taken[name] -= nbytes
            assert self.taken[name] >= 0


class StubGpu(StubDevice):
    """A recording device whose memory is the machine's."""

    def __init__(self, machine: Machine, name: str) -> None:
        super().__init__(name)
        self._machine = machine

    def info(self) -> DeviceInfo:
        return DeviceInfo(
            self.name, self.kind, memory_total=self._machine.total[self.name], memory_free=self._machine.free(self.name)
        )

    def take(self, nbytes: int) -> None:
        self.calls.append(("take", nbytes))
        self._machine.take(self.name, nbytes)

    def give(self, nbytes: int) -> None:
        self.calls.append(("give", nbytes))
        self._machine.give(self.name, nbytes)


@dataclass
class GpuPredictor(FakePredictor):
    """Holds `weights` bytes of a stub device; each request keeps `grows` bytes more in its cache and needs `peak`."""

    device: Any = None
    weights: int = 0
    grows: int = 0
    peak: int = 0
    cached: int = 0
    reported: MemoryUse = field(default_factory=MemoryUse)

    def predict(self, *args: Any, **options: Any) -> FakePrediction:
        answer = super().predict(*args, **options)
        self.device.take(self.grows)
        self.cached += self.grows
        self.device.take(self.peak)
        self.device.give(self.peak)
        return answer

    def use(self) -> MemoryUse:
        return MemoryUse(weights=self.weights, bindings=0, caches=self.cached) + self.reported

    def shrink(self) -> None:
        self.device.give(self.cached)
        self.cached = 0

    def close(self) -> None:
        self.shrink()
        self.device.give(self.weights)
        super().close()


class GpuOpener(FakeOpener):
    """Opens bundles of `add_bundle` on stub GPUs. `extra` bytes by model are taken beyond what the bundle declares."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.extra: dict[str, int] = {}
        self.loads: list[tuple[str, str]] = []
        self.models: dict[str, GpuPredictor] = {}

    def __call__(self, path: Path, task: str, options: LoadOptions, job: Job) -> LoadedModel:
        self.entered.set()
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        manifest = parse_manifest((path / MANIFEST_NAME).read_bytes())
        kind = check_task(manifest.family, task, manifest.name)
        first = next(iter(self.machine.gpus), "cpu")
        device = StubGpu(self.machine, first if options.device in ("auto", "cuda") else options.device)
        weights = sum(f.size for f in manifest.files.values()) + self.extra.get(manifest.name, 0)
        device.take(weights)
        predictor = GpuPredictor(device=device, weights=weights)
        self.opened.append(predictor)
        self.models[manifest.name] = predictor
        self.loads.append((manifest.name, device.name))
        return LoadedModel(
            predictor, InferenceTask(task), kind, manifest.source.checkpoint, device.name, options,
            use=predictor.use, shrink=predictor.shrink,
        )  # fmt: skip
