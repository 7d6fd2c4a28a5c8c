"""The memory budget on a CPU with its RAM: real (tiny) SAM 2 bundles in ONNX Runtime."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixano_edge.engine.bundle import BundleStore, pack
from pixano_edge.engine.provider import EdgeProvider, ImageMaskGenerationInput, ModelConfig, OutOfMemoryError
from pixano_edge.engine.provider.needs import declared_needs
from pixano_edge.engine.provider.settings import LoadOptions
from pixano_edge.engine.runtime.memory import resident_bytes

MIB = 1 << 20
_TASK = "image_mask_generation"


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    noise = np.random.default_rng(5).integers(0, 256, (12, 20, 3), np.uint8)
    path = tmp_path_factory.mktemp("photo") / "noise.png"
    Image.fromarray(noise).resize((160, 96), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def store(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> BundleStore:
    store = BundleStore(tmp_path_factory.mktemp("store"))
    store.add(tiny_bundle, "one")
    store.add(tiny_bundle, "two")
    return store


@pytest.fixture
async def make(store: BundleStore) -> AsyncIterator[Callable[..., EdgeProvider]]:
    made: list[EdgeProvider] = []

    def build(**settings: Any) -> EdgeProvider:
        made.append(EdgeProvider(store=store, threads=1, device="cpu", **settings))
        return made[-1]

    yield build
    for provider in made:
        await provider.close()
        assert provider._table.budget.bookings() == []


async def _ask(provider: EdgeProvider, photo: Path, model: str = "one") -> Any:
    request = ImageMaskGenerationInput(image=str(photo), model=model, points=[[[50, 40]]])
    return (await provider.image_mask_generation(request, timeout=120)).data


async def _account(provider: EdgeProvider) -> dict[str, Any]:
    info = await provider.get_server_info()
    return next(a for a in info.gpu_info["memory"] if a["device"] == "cpu")


async def test_declared_and_found_figures(make: Any, tiny_bundle: Path, photo: Path) -> None:
    provider = make(cache_mb=20)
    declared = declared_needs(tiny_bundle, LoadOptions(cache_mb=20))
    files = sum(path.stat().st_size for path in (tiny_bundle / "graphs").glob("*.fp32.onnx"))
    assert declared.weights == files
    await provider.instantiate_model("edge", ModelConfig("one", _TASK))
    (model,) = (await _account(provider))["models"]
    assert files <= model["parts"]["weights"] <= 4 * files
    assert model["parts"]["caches"] == 20 * MIB
    await _ask(provider, photo)
    (model,) = (await _account(provider))["models"]
    slot = provider._table.get("one")
    cached = slot.model.predictor.cache.stats().bytes
    assert cached == 4 * (32 * 8 * 8 + 4 * 32 * 32 + 8 * 16 * 16)
    assert slot.booking.used.caches == cached
    assert slot.booking.used.bindings > 0
    assert model["parts"]["caches"] == 20 * MIB  # what it may still take stays reserved


async def test_past_the_ram_budget_the_idle_model_goes_and_comes_back_with_the_same_answers(
    make: Any, photo: Path
) -> None:
    provider = make(cache_mb=200, memory_limits={"cpu": 350 * MIB})
    first = await _ask(provider, photo, "one")
    await _ask(provider, photo, "two")
    assert [s.name for s in provider._table.slots()] == ["two"]
    assert any("'one'" in w and "unloaded" in w for w in (await provider.get_server_info()).warnings)
    again = await _ask(provider, photo, "one")
    assert again.masks == first.masks
    assert [s.name for s in provider._table.slots()] == ["one"]


async def test_a_model_larger_than_the_ram_budget_is_refused(make: Any, photo: Path) -> None:
    provider = make(cache_mb=64, memory_limits={"cpu": 50 * MIB})
    with pytest.raises(OutOfMemoryError, match=r"caches 64\.0 MiB.*budget is 50\.0 MiB"):
        await _ask(provider, photo)
    await provider.instantiate_model("edge", ModelConfig("one", _TASK, None, {"cache_mb": 1}))
    await _ask(provider, photo)


async def test_the_default_budget_is_a_share_of_the_ram(make: Any, photo: Path) -> None:
    provider = make()
    account = await _account(provider)
    assert account["budget"] == int(0.8 * account["memory_total"])
    assert 0 < account["memory_free"] <= account["memory_total"]


async def test_unloading_and_loading_again_does_not_grow(make: Any, photo: Path) -> None:
    provider = make(cache_mb=200, memory_limits={"cpu": 350 * MIB})
    for name in ("one", "two") * 2:
        await _ask(provider, photo, name)
    before = resident_bytes()
    for name in ("one", "two") * 4:
        await _ask(provider, photo, name)
    after = resident_bytes()
    assert before is not None
    assert after is not None
    assert after - before < 20 * MIB


def test_a_packed_bundle_declares_the_same(tiny_bundle: Path, tmp_path: Path) -> None:
    packed = pack(tiny_bundle, tmp_path / "tiny.pxe")
    options = LoadOptions()
    assert declared_needs(packed, options) == declared_needs(tiny_bundle, options)
    (tmp_path / "broken.pxe").write_bytes(b"PK no zip")
    assert declared_needs(tmp_path / "broken.pxe", options).total == 0


def test_precision_and_back_end_choose_the_graphs(tiny_bundle: Path) -> None:
    full, half = (declared_needs(tiny_bundle, LoadOptions(precision=p)).weights for p in ("fp32", "fp16"))
    assert full is not None
    assert half is not None
    assert half < 0.8 * full
    assert declared_needs(tiny_bundle, LoadOptions()).weights == full  # auto: the larger one
