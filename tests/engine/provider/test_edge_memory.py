"""The memory budget at work in `EdgeProvider`: on fake GPUs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.errors import BundleError
from pixano_edge.engine.provider import (
    EdgeProvider,
    ImageMaskGenerationInput,
    InferenceTimeoutError,
    InvalidRequestError,
    ModelConfig,
    ModelNotFoundError,
    OutOfMemoryError,
    edge,
)
from pixano_edge.engine.runtime.memory import MemoryUse

from .fakes import add_bundle, data_uri, make_provider, png, until
from .gpus import MIB, GpuOpener, Machine

_TASK = "image_mask_generation"
_IMAGE = data_uri(png())
Make = Callable[..., EdgeProvider]


def _config(name: str = "a", path: Any = None, **config: Any) -> ModelConfig:
    return ModelConfig(name, _TASK, path, config)


async def _ask(provider: EdgeProvider, model: str = "a", timeout: float = 20) -> Any:
    request = ImageMaskGenerationInput(image=_IMAGE, model=model, points=[[[3, 4]]])
    return await provider.image_mask_generation(request, timeout=timeout)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Bundles ``a``, ``b``, ``c`` of 100 MiB each and ``large`` of 200."""
    for name, mib in {"a": 100, "b": 100, "c": 100, "large": 200}.items():
        add_bundle(tmp_path / "store", name, weights=mib * MIB)
    return tmp_path / "store"


@pytest.fixture
def machine() -> Machine:
    return Machine(300)


@pytest.fixture
def opener(machine: Machine) -> GpuOpener:
    return GpuOpener(machine)


@pytest.fixture
async def make(root: Path, opener: GpuOpener, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Makes providers that see the fake machine; the budget is 250 MiB per GPU and models have no cache."""
    made: list[EdgeProvider] = []
    monkeypatch.setattr(edge, "read_hardware", machine.hardware)
    monkeypatch.setattr(edge, "auto_gpus", lambda: machine.gpus)

    def build(**settings: Any) -> EdgeProvider:
        values = {"cache_mb": 0, "memory_limits": {"cuda": 250 * MIB}, **settings}
        made.append(make_provider(root, opener, **values))
        return made[-1]

    yield build
    opener.gate.set()
    for predictor in opener.opened:
        predictor.gate.set()
    for provider in made:
        await provider.close()
        assert provider._table.budget.bookings() == []
    assert set(machine.taken.values()) == {0}


async def _memory(provider: EdgeProvider, device: str = "cuda:0") -> dict[str, Any]:
    info = await provider.get_server_info()
    return next(account for account in info.gpu_info["memory"] if account["device"] == device)


def _loaded(provider: EdgeProvider) -> list[str]:
    return sorted(slot.name for slot in provider._table.slots() if slot.model is not None)


async def _busy(provider: EdgeProvider, opener: GpuOpener, model: str) -> asyncio.Task[Any]:
    """A request that is running and stays so until the predictor's gate opens."""
    predictor = opener.models[model]
    predictor.gate.clear()
    predictor.entered.clear()
    task = asyncio.create_task(_ask(provider, model))
    assert await asyncio.to_thread(predictor.entered.wait, 10)
    return task


async def test_server_info_tells_budget_use_and_room(make: Make) -> None:
    provider = make(cache_mb=32)
    await _ask(provider)
    account = await _memory(provider)
    (model,) = account["models"]
    assert (account["budget"], account["memory_total"], account["memory_free"]) == (250 * MIB, 300 * MIB, 200 * MIB)
    assert (model["model"], model["state"]) == ("a", "loaded")
    assert model["parts"]["weights"] == 100 * MIB
    assert model["parts"]["caches"] == 32 * MIB
    assert account["reserved"] == model["reserved"] > 132 * MIB
    assert account["budget_free"] == 250 * MIB - account["reserved"]
    assert model["used"] == 100 * MIB
    cpu = await _memory(provider, "cpu")
    assert (cpu["reserved"], cpu["models"]) == (0, [])
    await provider.delete_model("a")
    account = await _memory(provider)
    assert (account["reserved"], account["models"]) == (0, [])


async def test_figures_say_what_kind_they_are_and_what_was_found_serves_the_next_load(
    make: Make, opener: GpuOpener
) -> None:
    provider = make(cache_mb=0)
    await provider.instantiate_model("edge", _config())
    (model,) = (await _memory(provider))["models"]
    assert model["sources"] == {"weights": "found at a load on this device", "work": "an estimate"}
    opener.models["a"].reported = MemoryUse(activations=30 * MIB)
    await _ask(provider)
    (model,) = (await _memory(provider))["models"]
    assert model["parts"]["activations"] == 30 * MIB
    assert model["sources"]["work"] == "found at a load on this device"
    await provider.delete_model("a")
    await provider.instantiate_model("edge", _config())
    (model,) = (await _memory(provider))["models"]
    assert opener.models["a"].reported == MemoryUse()  # a new predictor, which told nothing yet
    assert model["parts"]["activations"] == 30 * MIB
    assert model["sources"]["work"] == "found at a load on this device"
    await provider.instantiate_model("edge", _config("b"))
    assert (await _memory(provider))["models"][1]["sources"]["work"] == "an estimate"


async def test_the_least_recently_used_model_makes_room_and_comes_back(make: Make, opener: GpuOpener) -> None:
    provider = make()
    await _ask(provider, "a")
    await _ask(provider, "b")
    await _ask(provider, "a")
    await _ask(provider, "c")  # b is the one that was not used for longest
    assert _loaded(provider) == ["a", "c"]
    info = await provider.get_server_info()
    (warning,) = [w for w in info.warnings if "unloaded" in w]
    for part in ("'b'", "cuda:0", "'c'", "comes back", "budget is 250.0 MiB"):
        assert part in warning
    assert [(u["model"], u["device"]) for u in info.gpu_info["unloaded"]] == [("b", "cuda:0")]
    assert info.gpu_info["unloaded"][0]["bytes"] > 100 * MIB
    assert "b" in info.models
    assert opener.opened[1].closed

    assert (await _ask(provider, "b")).status == "SUCCESS"
    assert _loaded(provider) == ["b", "c"]
    assert [u["model"] for u in (await provider.get_server_info()).gpu_info["unloaded"]] == ["a"]
    assert [name for name, _ in opener.loads] == ["a", "b", "c", "b"]


async def test_the_memory_is_free_before_the_next_model_takes_it(
    make: Make, opener: GpuOpener, machine: Machine
) -> None:
    provider = make(memory_limits={"cuda": 300 * MIB})
    for name in ("a", "b", "large", "c", "a", "large"):
        await _ask(provider, name)
    assert machine.highest["cuda:0"] <= 300 * MIB


async def test_a_busy_model_is_never_unloaded_and_the_refusal_has_the_numbers(make: Make, opener: GpuOpener) -> None:
    provider = make()
    await _ask(provider, "a")
    running = await _busy(provider, opener, "a")
    for load in (_ask(provider, "large"), provider.instantiate_model("edge", _config("large"))):
        with pytest.raises(OutOfMemoryError) as caught:
            await load
        message = caught.value.message
        assert "'large' does not fit" in message
        assert "weights 200.0 MiB" in message
        assert "the budget is 250.0 MiB of 300.0 MiB" in message
        assert "models hold a 100.4 MiB; the device reports 200.0 MiB free" in message
        assert "delete_model" in caught.value.action
    assert _loaded(provider) == ["a"]
    opener.models["a"].gate.set()
    assert (await running).status == "SUCCESS"
    await _ask(provider, "large")
    assert _loaded(provider) == ["large"]


async def test_waiting_requests_protect_a_model_too(make: Make, opener: GpuOpener) -> None:
    provider = make()
    await _ask(provider, "a")
    first = await _busy(provider, opener, "a")
    second = asyncio.create_task(_ask(provider, "a"))
    slot: Any = provider._table.get("a")
    await asyncio.to_thread(until, lambda: slot.users == 2)
    first.cancel()  # its owner leaves, its work goes on
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(OutOfMemoryError):
        await _ask(provider, "large")
    opener.models["a"].gate.set()
    assert (await second).status == "SUCCESS"


async def test_a_request_between_finding_and_using_a_model_protects_it(make: Make) -> None:
    provider = make()
    await _ask(provider, "a")
    slot: Any = provider._table.get("a")
    assert provider._table.hold(slot)
    with pytest.raises(OutOfMemoryError):
        await _ask(provider, "large")
    provider._table.let_go(slot)
    await _ask(provider, "large")
    assert slot.evicted
    assert not provider._table.hold(slot)


async def test_a_request_that_finds_a_model_just_before_it_is_unloaded_loads_it_again(
    make: Make, opener: GpuOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = make()
    await _ask(provider, "a")
    find = provider._slot

    async def slow(*args: Any) -> Any:
        slot = await find(*args)
        if args[0] == "a" and not slot.evicted:
            monkeypatch.setattr(provider, "_slot", find)
            await _ask(provider, "large")  # comes in between
        return slot

    monkeypatch.setattr(provider, "_slot", slow)
    assert (await _ask(provider, "a")).status == "SUCCESS"
    assert [name for name, _ in opener.loads] == ["a", "large", "a"]


async def test_two_loads_race_for_the_last_memory(make: Make, opener: GpuOpener) -> None:
    provider = make()
    await _ask(provider, "a")
    opener.gate.clear()
    opener.entered.clear()
    loads = [asyncio.create_task(_ask(provider, name)) for name in ("large", "b", "c")]
    # One more of 100 fits beside a; large fits without a; one of the others is left over.
    assert await asyncio.to_thread(opener.entered.wait, 10)
    done, _ = await asyncio.wait(loads, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    assert all(isinstance(task.exception(), OutOfMemoryError) for task in done)
    opener.gate.set()
    results = await asyncio.gather(*loads, return_exceptions=True)
    failed = [r for r in results if isinstance(r, BaseException)]
    assert failed
    assert all(isinstance(f, OutOfMemoryError) for f in failed)
    assert any("(loading)" in str(f) for f in failed)
    for name in ("large", "b", "c"):  # and later each of them has its turn
        assert (await _ask(provider, name)).status == "SUCCESS"


async def test_many_requests_for_more_models_than_fit(make: Make, opener: GpuOpener, machine: Machine) -> None:
    provider = make()

    async def click(number: int) -> str:
        name = ("a", "b", "c", "large")[number * 7 % 4]
        while True:
            with contextlib.suppress(OutOfMemoryError):  # all others are in use right now
                return str((await _ask(provider, name, timeout=60)).status)
            await asyncio.sleep(0.005)

    clicks = asyncio.gather(*(click(n) for n in range(40)))
    assert set(await asyncio.wait_for(clicks, 120)) == {"SUCCESS"}
    assert machine.highest["cuda:0"] <= 250 * MIB
    account = await _memory(provider)
    assert sum(m["parts"]["weights"] for m in account["models"]) == machine.taken["cuda:0"]


@pytest.mark.parametrize("leave", ["timeout", "cancel", "delete"])
async def test_a_load_that_is_given_up_gives_its_memory_back(make: Make, opener: GpuOpener, leave: str) -> None:
    provider = make()
    opener.gate.clear()
    timeout = 3.0 if leave == "timeout" else 20
    loading = asyncio.create_task(provider.instantiate_model("edge", _config("large"), timeout))  # type: ignore[arg-type]
    assert await asyncio.to_thread(opener.entered.wait, 10)
    assert (await _memory(provider))["reserved"] > 200 * MIB
    if leave == "cancel":
        loading.cancel()
    deleting = asyncio.create_task(provider.delete_model("large")) if leave == "delete" else None
    if leave != "delete":
        with pytest.raises(InferenceTimeoutError if leave == "timeout" else asyncio.CancelledError):
            await loading
    # The back end is still at it, so its memory is not free yet; the next load waits for that.
    second = asyncio.create_task(_ask(provider, "a" if leave == "delete" else "large"))
    await asyncio.sleep(0.05)
    opener.gate.set()
    assert (await second).status == "SUCCESS"
    if deleting is not None:
        await deleting
        with pytest.raises(ModelNotFoundError):
            await loading
    await asyncio.to_thread(until, lambda: len(provider._table.budget.bookings()) == 1)


async def test_a_load_given_up_while_it_waits_for_memory(make: Make, opener: GpuOpener) -> None:
    provider = make()
    await _ask(provider, "a")
    running = await _busy(provider, opener, "a")
    deleting = asyncio.create_task(provider.delete_model("a"))  # frees its memory when the request is done
    await asyncio.to_thread(until, lambda: provider._table.get("a") is None)
    with pytest.raises(InferenceTimeoutError):
        await provider.instantiate_model("edge", _config("large"), timeout=0.3)  # type: ignore[arg-type]
    await asyncio.to_thread(until, lambda: [b.model for b in provider._table.budget.bookings()] == ["a"])
    assert [name for name, _ in opener.loads] == ["a"]
    opener.models["a"].gate.set()
    assert (await running).status == "SUCCESS"
    await deleting
    await _ask(provider, "large")


async def test_a_failed_load_gives_its_memory_back(make: Make, opener: GpuOpener) -> None:
    provider = make()
    opener.error = BundleError("damaged", "copy again")
    with pytest.raises(InvalidRequestError, match="damaged"):
        await provider.instantiate_model("edge", _config("large"))
    await asyncio.to_thread(until, lambda: provider._table.budget.bookings() == [])
    opener.error = None
    await _ask(provider, "b")


async def test_a_model_that_was_unloaded_and_fails_to_come_back_is_tried_again(make: Make, opener: GpuOpener) -> None:
    provider = make()
    await provider.instantiate_model("edge", _config("mine", "a", precision="fp32"))
    await _ask(provider, "large")
    running = await _busy(provider, opener, "large")
    for _ in range(2):
        with pytest.raises(OutOfMemoryError):
            await _ask(provider, "mine")
    opener.models["large"].gate.set()
    await running
    assert (await _ask(provider, "mine")).status == "SUCCESS"


async def test_out_of_memory_while_loading(make: Make, opener: GpuOpener, machine: Machine) -> None:
    provider = make(memory_limits={"cuda": 400 * MIB})
    machine.others["cuda:0"] = 50 * MIB
    opener.extra["large"] = 80 * MIB  # 280 of 250
    with pytest.raises(OutOfMemoryError) as caught:
        await provider.instantiate_model("edge", _config("large"))
    assert "'large' did not load" in caught.value.message
    assert "reports 250.0 MiB free" in caught.value.message
    await asyncio.to_thread(until, lambda: provider._table.budget.bookings() == [])
    await _ask(provider, "a")


async def test_out_of_memory_while_answering_is_told_and_survived(
    make: Make, opener: GpuOpener, machine: Machine
) -> None:
    provider = make(memory_limits={"cuda": 300 * MIB}, cache_mb=64)
    await _ask(provider, "a")
    predictor = opener.models["a"]
    predictor.grows = 40 * MIB
    await _ask(provider, "a")
    assert (await _memory(provider))["models"][0]["used"] >= 140 * MIB
    predictor.grows, predictor.peak = 0, 200 * MIB
    with pytest.raises(OutOfMemoryError) as caught:
        await _ask(provider, "a")
    message = caught.value.message
    for part in ("'a' could not answer", "cuda:0 has no memory left", "models hold a", "budget is 300.0 MiB"):
        assert part in message
    assert "smaller image" in caught.value.action
    assert predictor.cached == 0
    (model,) = (await _memory(provider))["models"]
    assert machine.taken["cuda:0"] == 100 * MIB
    assert model["used"] - (model["parts"]["activations"] or 0) == 100 * MIB  # the cache is gone from the books
    predictor.peak = 0
    assert (await _ask(provider, "a")).status == "SUCCESS"


async def test_host_memory_is_named_when_numpy_has_none(
    make: Make, opener: GpuOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = make()
    await _ask(provider, "a")

    def refuse(*_: Any, **__: Any) -> Any:
        raise MemoryError("Unable to allocate 70. GiB")

    with monkeypatch.context() as patch:
        patch.setattr(opener.models["a"], "encode", refuse)
        with pytest.raises(OutOfMemoryError, match=r"cpu has no memory left\. Unable to allocate 70"):
            await _ask(provider, "a")
    assert (await _ask(provider, "a")).status == "SUCCESS"


async def test_a_model_that_takes_more_than_it_declared_moves_idle_ones_out(make: Make, opener: GpuOpener) -> None:
    provider = make(memory_limits={"cuda": 280 * MIB})
    await _ask(provider, "a")
    opener.extra["b"] = 90 * MIB
    await _ask(provider, "b")
    assert _loaded(provider) == ["b"]
    assert any("more than it declared" in w for w in (await provider.get_server_info()).warnings)


async def test_a_model_that_takes_more_than_there_is_does_not_stay(
    make: Make, opener: GpuOpener, machine: Machine
) -> None:
    provider = make()
    opener.extra["large"] = 80 * MIB
    with pytest.raises(OutOfMemoryError, match="more than it declared"):
        await provider.instantiate_model("edge", _config("large"))
    await asyncio.to_thread(until, lambda: machine.taken["cuda:0"] == 0)
    assert _loaded(provider) == []


async def test_requests_that_make_a_model_grow_move_idle_ones_out(make: Make, opener: GpuOpener) -> None:
    provider = make()
    await _ask(provider, "a")
    await _ask(provider, "b")
    opener.models["b"].reported = MemoryUse(bindings=60 * MIB)
    await _ask(provider, "b")
    assert _loaded(provider) == ["b"]
    opener.models["b"].reported = MemoryUse(bindings=190 * MIB)
    await _ask(provider, "b")  # nobody left to move: it goes on, and server info says so
    account = await _memory(provider)
    assert account["over"] > 0
    assert any("more than its budget of 250.0 MiB" in w for w in (await provider.get_server_info()).warnings)


async def test_what_was_loaded_by_hand_comes_back_as_it_was(make: Make, opener: GpuOpener, root: Path) -> None:
    outside = add_bundle(root.parent / "elsewhere", "bundle", weights=100 * MIB)
    provider = make(autoload=False)
    await provider.instantiate_model("edge", _config("mine", outside, precision="fp32", device="cuda:0"))
    await provider.instantiate_model("edge", _config("large"))
    assert _loaded(provider) == ["large"]
    assert [m.name for m in await provider.list_models()] == ["large", "mine"]
    assert (await _ask(provider, "mine")).status == "SUCCESS"
    slot: Any = provider._table.get("mine")
    assert (slot.options.precision, slot.source.path) == ("fp32", outside.resolve())
    await provider.instantiate_model("edge", _config("mine", outside, precision="fp32", device="cuda:0"))
    assert len(opener.loads) == 3


async def test_what_was_unloaded_can_be_deleted(make: Make) -> None:
    provider = make()
    await provider.instantiate_model("edge", _config("mine", "a"))
    await _ask(provider, "b")
    await _ask(provider, "large")
    for name in ("mine", "b"):
        await provider.delete_model(name)
        with pytest.raises(ModelNotFoundError):
            await _ask(provider, name)
        with pytest.raises(ModelNotFoundError):
            await provider.delete_model(name)
    info = await provider.get_server_info()
    assert (info.gpu_info["unloaded"], info.models) == ([], ["a", "c", "large"])
    assert not any("unloaded" in w for w in info.warnings)


async def test_a_bundle_that_is_gone_when_its_model_comes_back(make: Make, root: Path) -> None:
    outside = add_bundle(root.parent / "elsewhere", "bundle", weights=100 * MIB)
    provider = make()
    await provider.instantiate_model("edge", _config("mine", outside))
    await _ask(provider, "large")
    (outside / "manifest.json").unlink()
    with pytest.raises(ModelNotFoundError, match="cannot be read again"):
        await _ask(provider, "mine")


async def test_auto_places_models_by_free_memory(
    root: Path, opener: GpuOpener, machine: Machine, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.__init__(300, 300, 300)  # type: ignore[misc]
    machine.others["cuda:1"] = 20 * MIB
    provider = make()
    for name in ("a", "b", "c", "large"):
        await _ask(provider, name)
    # Ties by index; the second GPU has less free because of another process. The books have 250 each, so by them all
    # are alike, and large makes room where the fewest bytes go.
    assert [device for _, device in opener.loads] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    info = await provider.get_server_info()
    assert info.gpus_used == [0, 1, 2]
    assert info.gpu_info["placement"]["b"].startswith("auto: cuda:1 has the most free memory")
    assert _loaded(provider) == ["b", "c", "large"]


async def test_a_named_gpu_is_respected_and_cuda_means_any(make: Make, opener: GpuOpener, machine: Machine) -> None:
    machine.__init__(300, 900)  # type: ignore[misc]
    provider = make(memory_limits={"cuda": 1.0})
    await provider.instantiate_model("edge", _config("a", device="cuda:0"))
    await provider.instantiate_model("edge", _config("b", device="cuda"))
    await provider.instantiate_model("edge", _config("large", device="cuda:0"))  # not moved to the larger one
    assert opener.loads == [("a", "cuda:0"), ("b", "cuda:1"), ("large", "cuda:0")]
    assert _loaded(provider) == ["b", "large"]


async def test_without_a_gpu_auto_books_ram(make: Make, opener: GpuOpener, machine: Machine) -> None:
    machine.__init__(ram=1000)  # type: ignore[misc]
    provider = make(memory_limits={"cpu": "250MiB"})
    await _ask(provider, "a")
    await _ask(provider, "large")
    assert opener.loads == [("a", "cpu"), ("large", "cpu")]
    assert _loaded(provider) == ["large"]
    account = await _memory(provider, "cpu")
    assert (account["budget"], account["models"][0]["model"]) == (250 * MIB, "large")


async def test_the_limit_comes_from_the_environment(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXANO_EDGE_MEMORY", "cuda:0=150MiB")
    provider = make(memory_limits=None)
    assert (await _memory(provider))["budget"] == 150 * MIB
    with pytest.raises(OutOfMemoryError, match=r"budget is 150\.0 MiB"):
        await _ask(provider, "large")
    with pytest.raises(InvalidRequestError, match="memory_limits"):
        make(memory_limits="plenty")


async def test_closing_ends_a_load_that_waits_for_memory(make: Make, opener: GpuOpener) -> None:
    provider = make()
    await _ask(provider, "a")
    running = await _busy(provider, opener, "a")
    deleting = asyncio.create_task(provider.delete_model("a"))
    await asyncio.to_thread(until, lambda: provider._table.get("a") is None)
    waiting = asyncio.create_task(_ask(provider, "large"))
    await asyncio.to_thread(until, lambda: len(provider._table.budget.bookings()) == 2)
    closing = asyncio.create_task(provider.close())
    with pytest.raises(ModelNotFoundError):
        await waiting
    opener.models["a"].gate.set()
    await asyncio.gather(running, deleting, closing)
