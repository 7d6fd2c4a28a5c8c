"""Which device a model goes to, and which idle models make room for it. Decisions only: nothing is loaded here.

``auto`` takes the GPU with the most free memory, by the budget's books and by the device's own report, whichever is
less; equal ones in order of their index. A named device is never replaced by another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..runtime.memory import MemoryUse, readable
from .budget import ADVICE, Booking, DeviceMemory, Devices, MemoryBudget, Room
from .errors import OutOfMemoryError


@dataclass(frozen=True)
class Plan:
    """Where a model goes.

    Attributes:
        device: The device, which is `Booking.place` afterwards.
        reason: Why this one; empty when it was the only choice.
        victims: Bookings of models to unload first, least recently used first.
    """

    device: DeviceMemory
    reason: str = ""
    victims: tuple[Booking, ...] = ()


def candidates(asked: str, devices: Devices, gpus: Iterable[str] = ()) -> list[DeviceMemory]:
    """Devices that `asked` allows, in order of their index.

    Args:
        asked: ``auto``, ``cpu``, ``cuda`` (any GPU) or ``cuda:N``.
        devices: All devices of the machine.
        gpus: Names of the GPUs that ``auto`` may take, in order; none means that it takes the CPU.
    """
    if asked == "auto":
        return [devices.get(name) or DeviceMemory(name) for name in tuple(gpus) or ("cpu",)]
    if asked == "cuda":
        found = [device for name, device in devices.items() if name.startswith("cuda:")]
        return found or [DeviceMemory("cuda:0")]
    # A device that the system does not tell of is left to the loader, which knows what is wrong with it.
    return [devices.get(asked) or DeviceMemory(asked)]


def auto_gpus() -> tuple[str, ...]:
    """Names of the GPUs that device ``auto`` may take (see `auto_device`); opens none."""
    from ..runtime.cuda_open import auto_device

    return auto_device().gpus


def plan(
    model: str,
    asked: str,
    need: MemoryUse,
    choices: Sequence[DeviceMemory],
    budget: MemoryBudget,
    idle: Sequence[Booking],
) -> Plan:
    """Chooses a device and the models to unload there: none where it can be helped, and none in vain.

    Args:
        model: Name of the model to load.
        asked: What its settings say, for the reason.
        need: What it declares.
        choices: From `candidates`.
        budget: The books.
        idle: Models that may be unloaded, least recently used first.

    Raises:
        OutOfMemoryError: It fits nowhere, even without the idle models; the message has the numbers of each device.
    """
    rooms = {device.name: budget.room(device) for device in choices}
    by_room = sorted(choices, key=lambda d: _order(rooms[d.name]))  # sorted is stable: equal ones stay in order
    for device in by_room:
        if rooms[device.name].fits(need):
            return Plan(device, _reason(asked, device, rooms))
    plans = [(device, make_room(need, rooms[device.name], device.pool, idle)) for device in by_room]
    possible = [(device, victims) for device, victims in plans if victims is not None]
    if possible:
        # Where the fewest bytes have to go.
        device, victims = min(possible, key=lambda found: sum(b.need.total for b in found[1]))
        return Plan(device, _reason(asked, device, rooms), victims)
    numbers = " ".join(f"On {device.name}: {budget.explain(device, need)}" for device in choices)
    held = " Models that are loading or in use are never unloaded." if budget.bookings() else ""
    raise OutOfMemoryError(f"Model '{model}' does not fit. {numbers}{held}", ADVICE)


def make_room(need: MemoryUse, room: Room, pool: str, idle: Sequence[Booking]) -> tuple[Booking, ...] | None:
    """The models of a pool to unload so that `need` fits, least recently used first; None if that is no use.

    Args:
        need: What shall fit; nothing, to bring a pool back within its budget.
        room: What is left of the pool now.
        pool: Its name.
        idle: Models that may go, least recently used first.
    """
    start, victims = room, []
    for booking in idle:
        if booking.pool != pool:
            continue
        victims.append(booking)
        room = room.without(booking)
        if room.fits(need):
            break
    else:
        return None
    # The last one was needed; an earlier, smaller one may not be.
    for booking in reversed(victims[:-1]):
        rest = [b for b in victims if b is not booking]
        if _after(start, rest).fits(need):
            victims = rest
    return tuple(victims)


def _after(room: Room, victims: Iterable[Booking]) -> Room:
    for booking in victims:
        room = room.without(booking)
    return room


def _order(room: Room) -> tuple[bool, int]:
    """Most free memory first, devices that tell nothing last."""
    return room.free is None, -(room.free or 0)


def _reason(asked: str, chosen: DeviceMemory, rooms: Mapping[str, Room]) -> str:
    if len(rooms) < 2:
        return ""
    numbers = ", ".join(f"{name} {readable(room.free)}" for name, room in rooms.items())
    return f"{asked}: {chosen.name} has the most free memory that fits ({numbers})"
