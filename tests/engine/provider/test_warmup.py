"""What a model does between its load and its first request: once, for nobody's cost, and without a trace."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.bundle import demo_path
from pixano_edge.engine.errors import DeviceError
from pixano_edge.engine.provider import (
    EdgeProvider,
    ImageMaskGenerationInput,
    InferenceTimeoutError,
    InvalidRequestError,
    ModelConfig,
    families,
)
from pixano_edge.engine.provider.families import DETECTION, IMAGES, TEXT, VIDEOS, LoadedModel
from pixano_edge.engine.provider.settings import LoadOptions
from pixano_edge.engine.provider.worker import Job

from .fakes import FakeOpener, data_uri, make_provider, png

_IMAGE = data_uri(png())


class WarmOpener(FakeOpener):
    """Models whose warm-up counts, waits for `go_on`, looks whether it is to end, and may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.fault: Exception | None = None

    def __call__(self, path: Path, task: str, options: LoadOptions, job: Job) -> LoadedModel:
        model = super().__call__(path, task, options, job)
        model.warm_up = self.warm_up
        return model

    def warm_up(self, check: Callable[[], None]) -> None:
        self.begun.set()
        assert self.go_on.wait(20)
        check()
        self.runs += 1
        if self.fault is not None:
            raise self.fault


@pytest.fixture
def opener() -> WarmOpener:
    return WarmOpener()


@pytest.fixture
async def make(root: Path, opener: WarmOpener) -> AsyncIterator[Callable[..., EdgeProvider]]:
    made: list[EdgeProvider] = []

    def build(**settings: Any) -> EdgeProvider:
        made.append(make_provider(root, opener, **settings))
        return made[-1]

    yield build
    for event in (opener.gate, opener.go_on):
        event.set()
    for provider in made:
        await provider.close()
        assert provider._table.budget.bookings() == []


async def _until(condition: Callable[[], Any]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("did not happen in time")


async def _ask(provider: EdgeProvider) -> Any:
    request = ImageMaskGenerationInput(image=_IMAGE, model="alpha", points=[[[3, 4]]])
    return await provider.image_mask_generation(request, timeout=20)


async def _told(provider: EdgeProvider) -> Any:
    return (await provider.get_server_info()).gpu_info["warm_up"]["alpha"]


async def test_a_preloaded_model_runs_once_before_it_is_ready(make: Any, opener: WarmOpener) -> None:
    provider = make()
    stages: list[str] = []
    provider.observe(lambda model, stage, seconds: stages.append(stage))
    await provider.preload("alpha")
    assert opener.runs == 1
    assert stages == ["load", "warm_up"]
    assert await _told(provider) >= 0
    await _ask(provider)
    assert opener.runs == 1


async def test_so_does_one_that_a_client_loads(make: Any, opener: WarmOpener) -> None:
    provider = make(autoload=False)
    await provider.instantiate_model("edge", ModelConfig("alpha", IMAGES))
    assert opener.runs == 1


async def test_it_can_be_switched_off(make: Any, opener: WarmOpener) -> None:
    provider = make(warm_up=False)
    await provider.preload("alpha")
    await provider.instantiate_model("edge", ModelConfig("beta", IMAGES, config={"warm_up": True}))
    assert opener.runs == 1
    assert await _told(provider) is None
    with pytest.raises(InvalidRequestError, match="warm_up"):
        await provider.instantiate_model("edge", ModelConfig("beta", IMAGES, config={"warm_up": "no"}))


async def test_a_request_that_loads_its_model_does_not_wait_for_it(make: Any, opener: WarmOpener) -> None:
    provider = make()
    opener.gate.clear()
    asked = asyncio.ensure_future(_ask(provider))
    await _until(lambda: (slot := provider._table.get("alpha")) is not None and slot.awaited)
    opener.gate.set()
    await asked
    assert opener.runs == 0
    assert await _told(provider) is None


async def test_a_request_that_comes_meanwhile_ends_it(make: Any, opener: WarmOpener) -> None:
    provider = make()
    opener.go_on.clear()
    loading = asyncio.ensure_future(provider.preload("alpha"))
    await _until(opener.begun.is_set)
    asked = asyncio.ensure_future(_ask(provider))
    await _until(lambda: provider._table.get("alpha").awaited)
    opener.go_on.set()
    await asyncio.gather(asked, loading)
    assert opener.runs == 0
    assert await _told(provider) is None


async def test_a_fault_is_told_and_the_model_stays(make: Any, opener: WarmOpener) -> None:
    provider = make()
    opener.fault = DeviceError("A graph failed.", "Look.")
    await provider.preload("alpha")
    assert any("A graph failed." in text for text in (await provider.get_server_info()).warnings)
    assert await _told(provider) is None
    await _ask(provider)


async def test_deleting_the_model_meanwhile_frees_it(make: Any, opener: WarmOpener) -> None:
    provider = make()
    opener.go_on.clear()
    loading = asyncio.ensure_future(provider.preload("alpha"))
    await _until(opener.begun.is_set)
    deleting = asyncio.ensure_future(provider.delete_model("alpha"))
    await _until(lambda: provider._table.get("alpha") is None)
    opener.go_on.set()
    await deleting
    assert (await asyncio.gather(loading, return_exceptions=True))[0] is not None
    assert opener.runs == 0
    assert opener.opened[0].closed
    assert provider._table.budget.bookings() == []


async def test_who_waits_too_shortly_ends_it(make: Any, opener: WarmOpener) -> None:
    provider = make(autoload=False)
    opener.go_on.clear()
    loading = asyncio.ensure_future(provider.instantiate_model("edge", ModelConfig("alpha", IMAGES), timeout=3))
    await _until(opener.begun.is_set)
    with pytest.raises(InferenceTimeoutError):
        await loading
    opener.go_on.set()
    await _until(lambda: opener.opened[0].closed)
    assert opener.runs == 0


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("sam2-demo", IMAGES),
        ("sam2-demo", VIDEOS),
        ("owlv2-demo", DETECTION),
        ("grounding-dino-demo", DETECTION),
        ("smolvlm-demo", TEXT),
    ],
)
def test_every_family_runs_its_graphs_and_keeps_nothing(name: str, task: str) -> None:
    model = families.open_model(demo_path(name), task, LoadOptions(device="cpu", threads=1, context=256), Job())
    try:
        found: Any = model.video or model.detector or model.vlm or model.predictor
        before = _caches(found.info())
        assert before
        checks: list[None] = []
        assert model.warm_up is not None
        model.warm_up(lambda: checks.append(None))
        assert checks
        assert _caches(found.info()) == before
        assert model.seen._seen == {}
        assert model.memory._best == {}
        runs = [session.runs for session in _sessions(found)]
        assert runs
        assert min(runs) > 0
    finally:
        model.close()


def _caches(info: dict[str, Any]) -> dict[str, Any]:
    names = ("cache", "text_cache", "image_cache", "kv_cache", "answers", "tokens", "reused_tokens", "tiles_encoded")
    return {name: info[name] for name in names if name in info}


def _sessions(model: Any) -> list[Any]:
    """Those that a request with points or a box, a class or a prompt launches."""
    if hasattr(model, "predictor"):
        return [*_sessions(model.predictor), *model._sessions.values()]
    if hasattr(model, "_clicks"):
        return [model._encoder, model._clicks._image, model._clicks._decoder]
    return list(model._sessions)
