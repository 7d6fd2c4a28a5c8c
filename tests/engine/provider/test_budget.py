"""The memory books and the choice of a device, without any model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from pixano_edge.engine.errors import CancelledError
from pixano_edge.engine.provider.budget import Booking, DeviceMemory, MemoryBudget, ram, read_devices
from pixano_edge.engine.provider.errors import InferenceError, InvalidRequestError, OutOfMemoryError
from pixano_edge.engine.provider.hardware import Hardware
from pixano_edge.engine.provider.placement import candidates, make_room, plan
from pixano_edge.engine.provider.settings import read_limits
from pixano_edge.engine.runtime.base import DeviceInfo
from pixano_edge.engine.runtime.memory import MemoryUse

MIB = 1 << 20


def _devices(*free: int, total: int = 100) -> dict[str, DeviceMemory]:
    """GPUs with `free` MiB of `total` each, and a CPU."""
    gpus = {f"cuda:{i}": DeviceMemory(f"cuda:{i}", total * MIB, f * MIB) for i, f in enumerate(free)}
    return {"cpu": DeviceMemory("cpu", 1000 * MIB, 900 * MIB), **gpus}


def _budget(devices: dict[str, DeviceMemory], **limits: Any) -> MemoryBudget:
    return MemoryBudget(
        {name.replace("_", ":"): limit for name, limit in limits.items()} or {"*": 1.0}, lambda: devices
    )


def _use(weights: int, caches: int = 0) -> MemoryUse:
    return MemoryUse(weights=weights * MIB, caches=caches * MIB)


def _loaded(budget: MemoryBudget, name: str, device: DeviceMemory, mib: int) -> Booking:
    booking = budget.reserve(name, device, _use(mib))
    budget.loaded(booking, MemoryUse())
    return booking


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, {}),
        (0.5, {"*": 0.5}),
        (4096, {"*": 4096}),
        ("6GiB", {"*": 6 << 30}),
        ("500 MB", {"*": 500_000_000}),
        ("80%", {"*": 0.8}),
        ("cpu=1.5GiB, cuda:0=90%,cuda=0.7", {"cpu": 3 << 29, "cuda:0": 0.9, "cuda": 0.7}),
        ({"cuda:1": "2GiB", "*": 0.25}, {"cuda:1": 2 << 30, "*": 0.25}),
    ],
)
def test_limits_are_read(value: Any, expected: dict[str, Any]) -> None:
    assert read_limits(value, {}) == expected


def test_limits_come_from_the_environment_unless_given() -> None:
    environ = {"PIXANO_EDGE_MEMORY": "cuda:0=2GiB"}
    assert read_limits(None, environ) == {"cuda:0": 2 << 30}
    assert read_limits("1GiB", environ) == {"*": 1 << 30}


@pytest.mark.parametrize(
    "value",
    ["", "much", "120%", "0%", "-1GiB", "0", 0, -5, 1.5, 0.0, True, float("nan"), {"gpu": "1GiB"}, {"cpu": []}, []],
)
def test_bad_limits_are_refused(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="memory_limits"):
        read_limits(value, {})
    with pytest.raises(InvalidRequestError, match="PIXANO_EDGE_MEMORY"):
        read_limits(None, {"PIXANO_EDGE_MEMORY": "cuda:0=lots"})


def test_default_limits_are_shares() -> None:
    devices = _devices(100)
    budget = MemoryBudget(None, lambda: devices)
    assert budget.limit(devices["cpu"]) == 800 * MIB
    assert budget.limit(devices["cuda:0"]) == 90 * MIB
    assert budget.limit(DeviceMemory("cuda:7")) is None
    assert MemoryBudget({"cuda": 5}).limit(DeviceMemory("cuda:7")) == 5
    assert ram()["cpu"].total


def test_a_model_fits_until_the_last_byte_and_the_refusal_has_the_numbers() -> None:
    devices = _devices(100)
    budget = _budget(devices, cuda_0=60 * MIB)
    first = budget.reserve("first", devices["cuda:0"], _use(40))
    budget.release(budget.reserve("exact", devices["cuda:0"], _use(20)))
    with pytest.raises(OutOfMemoryError) as caught:
        budget.reserve("second", devices["cuda:0"], _use(16, caches=5))
    assert isinstance(caught.value, InferenceError)
    for part in (
        "'second'",
        "cuda:0",
        "21.0 MiB",
        "weights 16.0 MiB",
        "caches 5.0 MiB",
        "60.0 MiB",
        "first 40.0 MiB (loading)",
    ):
        assert part in caught.value.message
    assert "delete_model" in caught.value.action
    budget.release(first)
    budget.release(first)  # may be repeated
    assert budget.reserve("second", devices["cuda:0"], _use(16, caches=5)).need.total == 21 * MIB


def test_the_devices_own_report_counts_too_but_caches_may_fill_later() -> None:
    devices = _devices(10)  # another process has 90 of the 100
    budget = _budget(devices)
    with pytest.raises(OutOfMemoryError, match=r"reports 10\.0 MiB free"):
        budget.reserve("large", devices["cuda:0"], _use(11))
    budget.reserve("small", devices["cuda:0"], _use(8, caches=50))
    with pytest.raises(OutOfMemoryError):  # the load under way has not taken its 8 yet
        budget.reserve("next", devices["cuda:0"], _use(3))


def test_a_limit_in_bytes_alone_decides() -> None:
    devices = _devices(10)
    budget = _budget(devices, cuda=50 * MIB)
    budget.reserve("large", devices["cuda:0"], _use(45))
    with pytest.raises(OutOfMemoryError):
        budget.reserve("next", devices["cuda:0"], _use(6))


def test_corrections_after_loading() -> None:
    devices = _devices(100, 100)
    budget = _budget(devices)
    booking = budget.reserve("model", devices["cuda:0"], MemoryUse(weights=10, activations=50, caches=30))
    budget.loaded(booking, MemoryUse(weights=25, bindings=4, caches=0), devices["cuda:1"])
    assert (booking.state, booking.device) == ("loaded", "cuda:1")
    assert booking.need == MemoryUse(weights=25, activations=50, bindings=4, caches=30)
    assert booking.used is not None
    assert booking.used.total == 29
    budget.correct(booking, MemoryUse(activations=7, caches=12))
    assert (booking.need.total, booking.used.total) == (25 + 7 + 4 + 30, 25 + 4 + 7 + 12)
    before, after = budget.snapshot(devices)[1:]
    assert (before["reserved"], after["reserved"], after["used"]) == (0, 66, 48)
    assert after["budget_free"] == 100 * MIB - 66
    assert after["models"][0]["parts"]["activations"] == 7


def test_corrections_can_pass_the_budget_and_that_is_seen() -> None:
    devices = _devices(100)
    budget = _budget(devices)
    booking = _loaded(budget, "model", devices["cuda:0"], 90)
    assert budget.over(booking) is None
    budget.correct(booking, _use(130))
    room = budget.over(booking)
    assert room is not None
    assert room.left == -30 * MIB
    assert budget.snapshot(devices)[1]["over"] == 30 * MIB


def test_an_integrated_gpu_shares_the_ram() -> None:
    shared = DeviceInfo("Orin", "cuda", 0, memory_total=8000, memory_free=6000, extra={"memory": "shared with the CPU"})
    devices = read_devices(Hardware(4, 8000, 6000, (shared,), None))
    budget = MemoryBudget({"cpu": 1000}, lambda: devices)
    assert devices["cuda:0"].pool == "cpu"
    budget.reserve("on-cpu", devices["cpu"], MemoryUse(weights=600))
    with pytest.raises(OutOfMemoryError, match="on-cpu 600 B"):
        budget.reserve("on-gpu", devices["cuda:0"], MemoryUse(weights=500))
    budget.reserve("on-gpu", devices["cuda:0"], MemoryUse(weights=400))
    cpu, gpu = budget.snapshot(devices)
    assert cpu["reserved"] == gpu["reserved"] == 1000
    assert [m["model"] for m in gpu["models"]] == ["on-gpu"]


def test_gpus_are_read_in_order_of_their_index() -> None:
    gpus = tuple(DeviceInfo(f"GPU {i}", "cuda", i, memory_total=10, memory_free=i) for i in (1, 0))
    devices = read_devices(Hardware(4, 100, 90, gpus, None))
    assert [(d.name, d.free, d.pool) for d in devices.values()] == [
        ("cpu", 90, "cpu"), ("cuda:0", 0, "cuda:0"), ("cuda:1", 1, "cuda:1")
    ]  # fmt: skip


def test_a_device_without_figures_has_no_budget() -> None:
    budget = MemoryBudget(None, dict)
    booking = budget.reserve("model", DeviceMemory("cuda:3"), _use(1 << 20))
    assert budget.snapshot({})[0]["budget"] is None
    assert budget.snapshot({})[0]["models"][0]["model"] == "model"
    budget.release(booking)
    assert budget.snapshot({}) == []


def _wait(budget: MemoryBudget, booking: Booking, check: Callable[[], None] = lambda: None) -> threading.Thread:
    thread = threading.Thread(target=lambda: budget.wait(booking, check))
    thread.start()
    return thread


def test_a_load_waits_for_memory_that_is_being_freed() -> None:
    devices = _devices(100)
    budget = _budget(devices)
    old = _loaded(budget, "old", devices["cuda:0"], 80)
    budget.leave(old)
    new = budget.reserve("new", devices["cuda:0"], _use(70))  # counts on what old gives back
    with pytest.raises(OutOfMemoryError):  # which nobody else gets then
        budget.reserve("third", devices["cuda:0"], _use(70))
    waiting = _wait(budget, new)
    waiting.join(0.25)
    assert waiting.is_alive()
    budget.release(old)
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_load_does_not_wait_where_there_is_room() -> None:
    devices = _devices(100)
    budget = _budget(devices)
    budget.leave(_loaded(budget, "old", devices["cuda:0"], 20))
    budget.wait(budget.reserve("new", devices["cuda:0"], _use(50)), lambda: None)


def test_it_waits_for_the_device_where_the_books_alone_would_have_room() -> None:
    devices = _devices(10)
    budget = _budget(devices)
    old = budget.reserve("old", devices["cuda:0"], _use(10))
    budget.loaded(old, _use(10))
    devices["cuda:0"] = DeviceMemory("cuda:0", 100 * MIB, 0)
    budget.leave(old)
    new = budget.reserve("new", devices["cuda:0"], _use(8))
    waiting = _wait(budget, new)
    waiting.join(0.25)
    assert waiting.is_alive()
    devices["cuda:0"] = DeviceMemory("cuda:0", 100 * MIB, 10 * MIB)
    waiting.join(10)
    assert not waiting.is_alive()


def test_waiting_ends_when_the_load_is_given_up() -> None:
    devices = _devices(100)
    budget = _budget(devices)
    budget.leave(_loaded(budget, "old", devices["cuda:0"], 100))
    new = budget.reserve("new", devices["cuda:0"], _use(50))

    def left() -> None:
        raise CancelledError("left", "")

    with pytest.raises(CancelledError):
        budget.wait(new, left)


def test_many_threads_never_book_more_than_the_budget() -> None:
    devices = _devices(100)
    budget = _budget(devices)
    start, refused, highest = threading.Barrier(8), [], []

    def work(number: int) -> None:
        start.wait(10)
        for turn in range(40):
            try:
                booking = budget.reserve(f"{number}-{turn}", devices["cuda:0"], _use(30))
            except OutOfMemoryError:
                refused.append(number)
                continue
            highest.append(budget.room(devices["cuda:0"]).committed)
            budget.release(booking)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(refused) + len(highest) == 320
    assert max(highest) <= 90 * MIB
    assert budget.bookings() == []


@pytest.mark.parametrize(
    ("asked", "usable", "expected"),
    [
        ("auto", (), ["cpu"]),
        ("auto", ("cuda:0", "cuda:1"), ["cuda:0", "cuda:1"]),
        ("auto", ("cuda:1",), ["cuda:1"]),
        ("auto", ("cuda:4",), ["cuda:4"]),
        ("cpu", ("cuda:0",), ["cpu"]),
        ("cuda", (), ["cuda:0", "cuda:1"]),
        ("cuda:1", (), ["cuda:1"]),
        ("cuda:5", (), ["cuda:5"]),
    ],
)
def test_candidates(asked: str, usable: tuple[str, ...], expected: list[str]) -> None:
    assert [d.name for d in candidates(asked, _devices(50, 60), usable)] == expected


def _plan(
    budget: MemoryBudget, devices: dict[str, DeviceMemory], need: int, *idle: Booking, asked: str = "auto"
) -> Any:
    choices = candidates(asked, devices, tuple(devices)[1:])
    return plan("new", asked, _use(need), choices, budget, idle)


def test_most_free_memory_by_the_report_and_ties_by_index() -> None:
    devices = _devices(50, 80, 80)
    found = _plan(_budget(devices), devices, 10)
    assert found.device.name == "cuda:1"
    assert found.reason.startswith("auto: cuda:1")
    assert "cuda:0 50.0 MiB, cuda:1 80.0 MiB" in found.reason
    same = _devices(70, 70, 70)
    assert [_plan(_budget(same), same, 10).device.name for _ in range(3)] == ["cuda:0"] * 3


def test_most_free_memory_by_the_books() -> None:
    devices = _devices(100, 90)
    budget = _budget(devices)
    _loaded(budget, "first", devices["cuda:0"], 30)  # its caches are not in the report yet
    assert _plan(budget, devices, 10).device.name == "cuda:1"


def test_a_named_device_is_never_replaced() -> None:
    devices = _devices(10, 90)
    budget = _budget(devices)
    assert _plan(budget, devices, 5, asked="cuda:0").device.name == "cuda:0"
    with pytest.raises(OutOfMemoryError, match="On cuda:0"):
        _plan(budget, devices, 50, asked="cuda:0")


def test_nothing_is_unloaded_while_another_gpu_has_room() -> None:
    devices = _devices(100, 100)
    budget = _budget(devices)
    idle = [_loaded(budget, "a", devices["cuda:0"], 50), _loaded(budget, "b", devices["cuda:1"], 70)]
    found = _plan(budget, devices, 40, *idle)
    assert (found.device.name, found.victims) == ("cuda:0", ())


def test_least_recently_used_models_make_room_and_no_more_than_needed() -> None:
    devices = _devices(100)
    budget = _budget(devices)
    small, large, last = (
        _loaded(budget, n, devices["cuda:0"], m) for n, m in (("small", 10), ("large", 50), ("last", 40))
    )
    assert _plan(budget, devices, 10, small, large, last).victims == (small,)
    assert _plan(budget, devices, 55, small, large, last).victims == (small, large)
    assert _plan(budget, devices, 50, small, large, last).victims == (large,)  # small would go in vain
    assert _plan(budget, devices, 100, small, large, last).victims == (small, large, last)


def test_room_is_made_where_the_fewest_bytes_go() -> None:
    devices = _devices(100, 100)
    budget = _budget(devices)
    on_first, on_second = _loaded(budget, "a", devices["cuda:0"], 80), _loaded(budget, "b", devices["cuda:1"], 60)
    found = _plan(budget, devices, 50, on_first, on_second)
    assert (found.device.name, found.victims) == ("cuda:1", (on_second,))


def test_nothing_is_unloaded_in_vain() -> None:
    devices = _devices(100)
    budget = _budget(devices)
    idle = _loaded(budget, "idle", devices["cuda:0"], 30)
    _loaded(budget, "busy", devices["cuda:0"], 60)
    with pytest.raises(OutOfMemoryError, match="never unloaded") as caught:
        _plan(budget, devices, 50, idle)
    assert "busy 60.0 MiB" in caught.value.message
    assert idle.state == "loaded"


def test_a_pool_is_brought_back_within_its_budget() -> None:
    devices = _devices(100, 100)
    budget = _budget(devices)
    grown, idle = _loaded(budget, "grown", devices["cuda:0"], 60), _loaded(budget, "idle", devices["cuda:0"], 30)
    elsewhere = _loaded(budget, "elsewhere", devices["cuda:1"], 90)
    budget.correct(grown, _use(80))
    over = budget.over(grown)
    assert over is not None
    assert make_room(MemoryUse(), over, "cuda:0", [elsewhere, idle]) == (idle,)
    assert make_room(MemoryUse(), over, "cuda:0", [elsewhere]) is None


def test_what_a_model_on_a_gpu_keeps_in_ram_counts_there() -> None:
    devices = {"cpu": DeviceMemory("cpu", 1000, 1000), "cuda:0": DeviceMemory("cuda:0", 1000, 1000)}
    budget = MemoryBudget({"*": 500}, lambda: devices)
    booking = budget.reserve("dino", devices["cuda:0"], MemoryUse(weights=300, host=400))
    assert (booking.need.total, budget.room(devices["cuda:0"]).left, budget.room(devices["cpu"]).left) == (
        300,
        200,
        100,
    )
    with pytest.raises(OutOfMemoryError, match="400 B for models on GPUs"):
        budget.reserve("sam2", devices["cpu"], MemoryUse(weights=101))
    budget.loaded(booking, MemoryUse(weights=290, host=7))
    accounts = {one["device"]: one for one in budget.snapshot(devices)}
    assert (accounts["cpu"]["reserved"], accounts["cpu"]["used"], accounts["cpu"]["models"]) == (400, 7, [])
    assert (accounts["cuda:0"]["reserved"], accounts["cuda:0"]["used"]) == (290, 290)
    budget.leave(booking)
    assert budget.room(devices["cpu"]).left == 500
    budget.release(booking)
    assert budget.room(devices["cpu"]).committed == 0


def test_on_shared_memory_what_is_kept_in_ram_adds_to_the_rest() -> None:
    jetson = DeviceMemory("cuda:0", 1000, 1000, "cpu")
    budget = MemoryBudget({"*": 500}, lambda: {"cuda:0": jetson})
    booking = budget.reserve("dino", jetson, MemoryUse(weights=300, host=150))
    room = budget.room(jetson)
    assert (room.committed, room.without(booking).committed) == (450, 0)
