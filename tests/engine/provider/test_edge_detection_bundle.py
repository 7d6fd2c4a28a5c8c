"""The provider on real (tiny) detector bundles: answers equal to the detector's own, memory, caches, other tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.models.detection.opening import open_detector
from pixano_edge.engine.models.images import decode_image
from pixano_edge.engine.provider import (
    EdgeProvider,
    ImageMaskGenerationInput,
    ImageZeroShotDetectionInput,
    InvalidRequestError,
    ModelConfig,
    TaskNotSupportedError,
)
from pixano_edge.engine.provider.needs import declared
from pixano_edge.engine.provider.settings import LoadOptions

from .fakes import FolderStore, data_uri

TASK = "image_zero_shot_detection"
CLASSES = {"owl": ["cat", "remote control", "a cup"], "dino": ["a cat", "spoon", "remote control"]}


@pytest.fixture(scope="module")
def bundles(owl_bundle: Path, dino_bundle: Path) -> dict[str, Path]:
    return {"owl": owl_bundle, "dino": dino_bundle}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real photo, not square."""
    data = pytest.importorskip("skimage.data", reason="a real photo needs pixano-edge[benchmarks]")
    from PIL import Image

    path = tmp_path_factory.mktemp("photo") / "coffee.png"
    Image.fromarray(data.coffee()[:300, :440]).save(path)
    return path


@pytest.fixture
async def provider(bundles: dict[str, Path], tmp_path: Path) -> AsyncIterator[EdgeProvider]:
    edge = EdgeProvider(store=FolderStore(tmp_path), device="cpu", threads=1)
    for name, bundle in bundles.items():
        await edge.instantiate_model("edge", ModelConfig(name, TASK, bundle))
    yield edge
    await edge.close()


@pytest.fixture(params=["owl", "dino"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def detector(bundles: dict[str, Path], name: str) -> Iterator[Any]:
    opened: Any = open_detector(bundles[name], device="cpu", threads=1)
    yield opened
    opened.close()


def _threshold(detector: Any, image: np.ndarray, classes: list[str]) -> float:
    """Between the scores of the sixth and the seventh box."""
    scores = detector.detect(image, classes, box_threshold=0.0, text_threshold=0.0).scores
    assert scores[5] - scores[6] > 1e-5
    return float(scores[5] + scores[6]) / 2


def _request(name: str, picture: Path, threshold: float, classes: Any = None) -> ImageZeroShotDetectionInput:
    return ImageZeroShotDetectionInput(
        data_uri(picture.read_bytes()), name, classes or CLASSES[name], threshold, min(threshold, 0.5)
    )


async def test_answers_are_the_detectors(provider: EdgeProvider, detector: Any, name: str, picture: Path) -> None:
    image = decode_image(picture)
    threshold = _threshold(detector, image, CLASSES[name])
    expected = detector.detect(image, CLASSES[name], box_threshold=threshold, text_threshold=min(threshold, 0.5))
    result = await provider.image_zero_shot_detection(_request(name, picture, threshold))
    data = result.data
    assert len(data.boxes) == len(expected) == 6
    assert data.boxes == np.rint(expected.boxes).astype(int).tolist()
    np.testing.assert_allclose(data.scores, expected.scores, atol=1e-6)
    assert data.classes == expected.names()
    assert result.metadata["precision"] == "fp32"
    assert result.metadata["model_class"] == type(detector).__name__
    text = await provider.image_zero_shot_detection(_request(name, picture, threshold, ". ".join(CLASSES[name]) + "."))
    assert text.data == data
    # Negative control: other classes and a turned picture give something else.
    other = await provider.image_zero_shot_detection(_request(name, picture, threshold, ["table"]))
    assert other.data.scores != data.scores
    turned = detector.detect(
        np.ascontiguousarray(image.transpose(1, 0, 2)), CLASSES[name], box_threshold=threshold, text_threshold=0.0
    )
    assert np.rint(turned.boxes).astype(int).tolist() != data.boxes


async def test_text_is_encoded_once_per_list_and_dropped_under_pressure(
    provider: EdgeProvider, name: str, picture: Path
) -> None:
    slot = provider._table.get(name)
    assert slot is not None
    model = slot.model
    assert model is not None
    assert model.detector is not None
    stats = model.detector.text_cache.stats
    for classes, misses in ((["cat"], 1), (["cat"], 1), (["spoon"], 2), (["cat"], 2)):
        await provider.image_zero_shot_detection(_request(name, picture, 0.5, classes))
        assert stats().misses == misses
    assert model.use is not None
    assert (model.use().caches or 0) >= stats().bytes > 0
    assert model.shrink is not None
    model.shrink()
    assert model.use().caches == stats().bytes == 0
    await provider.image_zero_shot_detection(_request(name, picture, 0.5, ["cat"]))
    assert stats().misses == 3


async def test_no_cache(bundles: dict[str, Path], tmp_path: Path, name: str, picture: Path) -> None:
    edge = EdgeProvider(store=FolderStore(tmp_path), device="cpu", threads=1, cache_mb=0)
    await edge.instantiate_model("edge", ModelConfig(name, TASK, bundles[name]))
    await edge.image_zero_shot_detection(_request(name, picture, 0.5))
    slot = edge._table.get(name)
    assert slot is not None
    assert slot.model is not None
    assert slot.model.use is not None
    assert slot.model.use().caches == 0
    await edge.close()


def test_declared_needs(bundles: dict[str, Path], name: str) -> None:
    found = declared(bundles[name], LoadOptions(device="cpu", cache_mb=100), TASK)
    assert found.weights_from == found.work_from == "manifest"
    mib = 1 << 20
    assert found.use.caches == {"owl": 100 * mib, "dino": 64 * mib}[name]
    assert (found.use.bindings or 0) > 0
    assert (found.use.weights or 0) > 0
    assert declared(bundles[name], LoadOptions(device="cpu", cache_mb=1), TASK).use.caches == mib


async def test_bookings_hold_what_is_used(provider: EdgeProvider, name: str, picture: Path) -> None:
    await provider.image_zero_shot_detection(_request(name, picture, 0.5))
    (account,) = [a for a in (await provider.get_server_info()).gpu_info["memory"] if a["device"] == "cpu"]
    (model,) = [m for m in account["models"] if m["model"] == name]
    slot = provider._table.get(name)
    assert slot is not None
    assert slot.booking is not None
    assert slot.booking.used is not None
    assert slot.booking.used.caches is not None
    assert slot.booking.need.total >= slot.booking.used.total
    assert model


async def test_refusals(provider: EdgeProvider, name: str, picture: Path, tiny_bundle: Path) -> None:
    with pytest.raises(TaskNotSupportedError, match=f"'{name}' does {TASK}"):
        await provider.image_mask_generation(ImageMaskGenerationInput(str(picture), name, points=[[[1, 1]]]))
    with pytest.raises(TaskNotSupportedError, match="does image_mask_generation"):
        await provider.instantiate_model("edge", ModelConfig("sam", TASK, tiny_bundle))
    with pytest.raises(InvalidRequestError, match="token"):  # more than the text encoder takes
        await provider.image_zero_shot_detection(_request(name, picture, 0.5, ["q x " * 240]))
