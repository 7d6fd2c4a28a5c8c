"""The memory books: what each model has reserved on which device, against a limit per device.

A booking is made before a model loads, from declared figures, corrected by measured ones, and released when its
memory is free. Models on the same memory share a pool: the GPU of a Jetson uses the CPU's RAM.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..machine import memory
from ..runtime.memory import MemoryUse, readable
from .errors import OutOfMemoryError
from .hardware import Hardware
from .needs import LOAD, SOURCES
from .settings import Limit, Limits

DEFAULT_SHARES: Mapping[str, float] = {"cpu": 0.8, "cuda": 0.9}
"""Share of a device's whole memory that models may take. The rest is for requests (decoded images, answers), the
driver and other processes; on the CPU also for the system."""

ADVICE = (
    "Unload a model with delete_model, load with a smaller cache_mb or another precision, "
    "or set the limit in bytes (memory_limits, PIXANO_EDGE_MEMORY) if you know that it fits."
)

RAM = "cpu"
"""The pool of the CPU, and of GPUs that share its memory."""

_RECHECK = 0.1


@dataclass(frozen=True)
class DeviceMemory:
    """One device's memory as the system tells it.

    Attributes:
        name: ``cpu`` or ``cuda:N``.
        total: Bytes in all; None where unknown.
        free: Bytes free now, for anyone; None where unknown.
        pool: Device whose memory this is: ``cpu`` for an integrated GPU, else the device itself.
    """

    name: str
    total: int | None = None
    free: int | None = None
    pool: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", self.pool or self.name)


Devices = Mapping[str, DeviceMemory]


def read_devices(hardware: Hardware) -> dict[str, DeviceMemory]:
    """CPU and CUDA devices of this machine by name, GPUs in order of their index."""
    found = {"cpu": DeviceMemory("cpu", hardware.memory_total, hardware.memory_available)}
    for gpu in sorted(hardware.gpus, key=lambda g: g.index):
        pool = "cpu" if gpu.extra.get("memory", "").startswith("shared with the CPU") else ""
        name = f"cuda:{gpu.index}"
        found[name] = DeviceMemory(name, gpu.memory_total, gpu.memory_free, pool)
    return found


def ram() -> dict[str, DeviceMemory]:
    """The CPU alone."""
    return {"cpu": DeviceMemory("cpu", *memory())}


class Booking:
    """One model's place in the books. Change it through `MemoryBudget` only.

    Attributes:
        model: Name of the model.
        place: Where it is, or will be; `free` is that of the time of booking.
        need: Reserved.
        sources: Where the figures for ``weights`` and ``work`` memory come from: keys of `needs.SOURCES`.
        used: Found to be in use; None until it was measured.
        state: ``loading``, ``loaded``, ``leaving`` (it is being freed) or ``released``.
    """

    def __init__(self, model: str, place: DeviceMemory, need: MemoryUse, sources: Mapping[str, str]) -> None:
        self.model = model
        self.place = place
        self.need = need
        self.sources = dict(sources)
        self.used: MemoryUse | None = None
        self.state = "loading"

    @property
    def device(self) -> str:
        """Name of the device."""
        return self.place.name

    @property
    def pool(self) -> str:
        """Device whose memory it takes."""
        return self.place.pool

    def takes(self, use: MemoryUse, pool: str) -> int:
        """Bytes of `use` that are in a pool: a model on a GPU may keep some in RAM, too."""
        return (use.total if self.pool == pool else 0) + ((use.host or 0) if pool == RAM else 0)

    def describe(self) -> str:
        """``sam2 1.20 GiB (loading)``."""
        state = "" if self.state == "loaded" else f" ({self.state})"
        return f"{self.model} {readable(self.need.total)}{state}"


@dataclass(frozen=True)
class Room:
    """What is left of one pool.

    Attributes:
        limit: Budget; None without one.
        committed: Reserved by models that stay.
        leaving: Reserved by models that are being freed.
        reported: Free by the device's own report, less what loads under way will take, plus what is being freed.
        by_hand: Whether the limit was set in bytes: then it alone decides, since declared figures are in part
            estimates and a report is of one moment.
    """

    limit: int | None
    committed: int
    leaving: int
    reported: int | None
    by_hand: bool = False

    @property
    def left(self) -> int | None:
        """Bytes of the budget for more models; None without a limit."""
        return None if self.limit is None else self.limit - self.committed

    @property
    def free(self) -> int | None:
        """The smaller of what budget and report leave; None where neither says anything."""
        return min((v for v in (self.left, self.reported) if v is not None), default=None)

    def fits(self, need: MemoryUse) -> bool:
        """Whether a model fits: all of it in the budget, and what it needs at once in what the device reports."""
        return (self.left is None or need.total <= self.left) and (
            self.by_hand or self.reported is None or need.at_once <= self.reported
        )

    def without(self, booking: Booking) -> Room:
        """The same pool once a model that stays is gone."""
        used = booking.takes(booking.used or booking.need, booking.pool)
        reported = None if self.reported is None else self.reported + used
        committed = self.committed - booking.takes(booking.need, booking.pool)
        return replace(self, committed=committed, reported=reported)


class MemoryBudget:
    """Bookings of all models of one provider. Every method may be called from any thread and returns at once, but
    `wait`.

    Args:
        limits: Bytes or shares per device, see `settings.read_limits`; devices that it does not name get
            `DEFAULT_SHARES`.
        probe: Reads the devices now.
    """

    def __init__(self, limits: Limits | None = None, probe: Callable[[], Devices] = ram) -> None:
        self._limits = dict(limits or {})
        self.probe = probe
        self._lock = threading.Condition()
        self._bookings: list[Booking] = []

    def limit(self, device: DeviceMemory) -> int | None:
        """Bytes that the models of the device's pool may take together; None where its size is unknown and no bytes
        were set."""
        chosen = self._chosen(device)
        if isinstance(chosen, int):
            return chosen
        return None if device.total is None else int(device.total * chosen)

    def _chosen(self, device: DeviceMemory) -> Limit:
        keys = (device.name, device.name.partition(":")[0], device.pool, "*")
        share = DEFAULT_SHARES.get(device.pool.partition(":")[0], min(DEFAULT_SHARES.values()))
        return next((self._limits[key] for key in keys if key in self._limits), share)

    def room(self, device: DeviceMemory) -> Room:
        """What is left on a device."""
        with self._lock:
            return self._room(device)

    def reserve(
        self, model: str, device: DeviceMemory, need: MemoryUse, sources: Mapping[str, str] | None = None
    ) -> Booking:
        """Books memory for a model that is about to load; `wait` before taking it. `sources`: see `Booking`.

        Raises:
            OutOfMemoryError: It does not fit, models that are being freed left out.
        """
        with self._lock:
            room = self._room(device)
            if not room.fits(need):
                raise OutOfMemoryError(
                    f"Model '{model}' does not fit. On {device.name}: {self._explain(device, need, room)}", ADVICE
                )
            booking = Booking(model, device, need, sources or {})
            self._bookings.append(booking)
            return booking

    def wait(self, booking: Booking, check: Callable[[], None]) -> None:
        """Blocks until models that are being freed have left the memory that `booking` counts on.

        Args:
            booking: Made by `reserve`.
            check: Called every 0.1 s; what it raises ends the waiting.
        """
        while True:
            check()
            with self._lock:
                if not self._leaving(booking.pool):
                    return
            free = self.probe().get(booking.device, booking.place).free
            with self._lock:
                room = self._room(booking.place)
                over = room.limit is not None and room.committed + room.leaving > room.limit
                coming = sum(b.need.at_once for b in self._bookings if b.pool == booking.pool and b.state == "loading")
                short = free is not None and free < coming
                if not self._leaving(booking.pool) or not (over or short):
                    return
                self._lock.wait(_RECHECK)

    def loaded(self, booking: Booking, found: MemoryUse, device: DeviceMemory | None = None) -> None:
        """Notes the end of a load, with what it was found to take and where it really went."""
        with self._lock:
            if booking.state == "loading":
                booking.state = "loaded"
            if device is not None:
                booking.place = device
        self.correct(booking, found)

    def correct(self, booking: Booking, found: MemoryUse) -> None:
        """Replaces declared figures by found ones; see `MemoryUse.corrected`."""
        with self._lock:
            booking.need = booking.need.corrected(found)
            if found.weights is not None:
                booking.sources["weights"] = LOAD
            if found.activations is not None or found.shared is not None:
                booking.sources["work"] = LOAD
            before = MemoryUse() if booking.used is None else booking.used
            known = {k: v for k, v in found.parts().items() if v is not None}
            booking.used = replace(before, **known)

    def leave(self, booking: Booking) -> None:
        """Says that the model is being freed: what it has will be there for others, who `wait` for it."""
        with self._lock:
            if booking.state != "released":
                booking.state = "leaving"

    def release(self, booking: Booking) -> None:
        """Says that the memory is free. May be repeated."""
        with self._lock:
            if booking in self._bookings:
                self._bookings.remove(booking)
            booking.state = "released"
            self._lock.notify_all()

    def over(self, booking: Booking) -> Room | None:
        """What is left of the pool of `booking` when its models take more than the budget, else None."""
        room = self.room(booking.place)
        return room if room.left is not None and room.left < 0 else None

    def explain(self, device: DeviceMemory, need: MemoryUse | None = None) -> str:
        """One sentence with the numbers of a device."""
        with self._lock:
            return self._explain(device, need, self._room(device))

    def bookings(self) -> list[Booking]:
        """All of them, in order of their making."""
        with self._lock:
            return list(self._bookings)

    def snapshot(self, devices: Devices) -> list[dict[str, Any]]:
        """Per device: ``device``, ``pool``, ``memory_total``, ``memory_free`` (its own report), ``budget``,
        ``reserved``, ``used`` (as found in use), ``budget_free``, ``over`` (above the budget) and ``models``; bytes,
        JSON-ready. A pool's figures stand at each device that shares it; ``models`` lists those of the device."""
        with self._lock:
            return [self._account(device) for device in self._with_strays(devices).values()]

    def _account(self, device: DeviceMemory) -> dict[str, Any]:
        room = self._room(device)
        return {
            "device": device.name,
            "pool": device.pool,
            "memory_total": device.total,
            "memory_free": device.free,
            "budget": room.limit,
            "reserved": room.committed + room.leaving,
            "used": sum(b.takes(b.used, device.pool) for b in self._bookings if b.used is not None),
            "budget_free": None if room.left is None else max(0, room.left - room.leaving),
            "over": 0 if room.left is None else max(0, -room.left),
            "models": [
                {
                    "model": b.model,
                    "state": b.state,
                    "reserved": b.need.total,
                    "used": None if b.used is None else b.used.total,
                    "parts": b.need.parts(),
                    "sources": {part: SOURCES[source] for part, source in b.sources.items()},
                }
                for b in self._bookings
                if b.device == device.name
            ],
        }

    def _with_strays(self, devices: Devices) -> dict[str, DeviceMemory]:
        """The devices, and those that only a booking knows (the driver stopped answering, for example)."""
        return {**devices, **{b.device: replace(b.place, free=None) for b in self._bookings if b.device not in devices}}

    def _leaving(self, pool: str) -> list[Booking]:
        return [b for b in self._bookings if b.pool == pool and b.state == "leaving"]

    def _room(self, device: DeviceMemory) -> Room:
        pool = device.pool
        leaving = [b for b in self._bookings if b.state == "leaving"]
        reported = device.free
        if reported is not None:
            reported -= sum(b.need.at_once for b in self._bookings if b.state == "loading" and b.pool == pool)
            reported += sum(b.takes(b.used or b.need, pool) for b in leaving)
        total = sum(b.takes(b.need, pool) for b in self._bookings)
        gone = sum(b.takes(b.need, pool) for b in leaving)
        return Room(self.limit(device), total - gone, gone, reported, isinstance(self._chosen(device), int))

    def _explain(self, device: DeviceMemory, need: MemoryUse | None, room: Room) -> str:
        parts = []
        if need is not None:
            named = ", ".join(f"{k} {readable(v)}" for k, v in need.parts().items() if v)
            parts.append(f"it needs {readable(need.total)}" + (f" ({named})" if named else ""))
        there = [b.describe() for b in self._bookings if b.pool == device.pool]
        beside = sum(b.takes(b.need, device.pool) for b in self._bookings if b.pool != device.pool)
        there += [f"{readable(beside)} for models on GPUs"] if beside else []
        limit = "no budget is known" if room.limit is None else f"the budget is {readable(room.limit)}"
        parts.append(f"{limit} of {readable(device.total)}")
        parts.append(f"models hold {', '.join(there) or 'nothing'}")
        if device.free is not None:
            parts.append(f"the device reports {readable(device.free)} free")
        return "; ".join(parts) + "."
