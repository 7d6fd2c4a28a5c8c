"""The provider on a real (tiny) SAM 2 bundle: loading from disk, and answers equal to the predictor's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixano_edge.engine import runtime
from pixano_edge.engine.bundle import BundleStore, pack
from pixano_edge.engine.errors import CancelledError, DeviceError
from pixano_edge.engine.models.rle import decode_rle
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.provider import (
    EdgeMaskGenerationInput,
    EdgeProvider,
    InvalidRequestError,
    ModelConfig,
    ModelNotFoundError,
    NDArrayData,
    TaskNotSupportedError,
    families,
)
from pixano_edge.engine.provider.settings import LoadOptions
from pixano_edge.engine.provider.worker import Job

from .fakes import data_uri

_TASK = "image_mask_generation"
_THREADS = {"threads": 1}


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """161x97: not square, and larger than the model's grid in one direction only."""
    noise = np.random.default_rng(3).integers(0, 256, (13, 21, 3), np.uint8)
    path = tmp_path_factory.mktemp("photo") / "noise.png"
    Image.fromarray(noise).resize((161, 97), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def store(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> BundleStore:
    store = BundleStore(tmp_path_factory.mktemp("store"))
    store.add(tiny_bundle, "tiny")
    return store


@pytest.fixture
async def provider(store: BundleStore) -> AsyncIterator[EdgeProvider]:
    edge = EdgeProvider(store=store, threads=1)
    yield edge
    await edge.close()


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Any:
    with Sam2ImagePredictor.open(tiny_bundle, threads=1) as opened:
        yield opened


def _request(photo: Path, **fields: Any) -> EdgeMaskGenerationInput:
    return EdgeMaskGenerationInput(**{"image": str(photo), "model": "tiny", **fields})


async def _ask(provider: EdgeProvider, photo: Path, **fields: Any) -> Any:
    return (await provider.image_mask_generation(_request(photo, **fields), timeout=60)).data


def _masks(data: Any) -> np.ndarray:
    return np.array([[decode_rle({"size": m.size, "counts": m.counts}) for m in row] for row in data.masks])


def _pixels(photo: Path) -> np.ndarray:
    return np.array(Image.open(photo).convert("RGB"))


@pytest.mark.parametrize("multimask", [True, False])
async def test_answers_are_the_predictors(provider: EdgeProvider, predictor: Any, photo: Path, multimask: bool) -> None:
    data = await _ask(
        provider,
        photo,
        points=[[[50, 40], [10, 80]], [[120, 20]], []],
        labels=[[1, 0], [1], []],
        boxes=[None, [90, 5, 150, 60], [20, 30, 60, 90]],
        multimask_output=multimask,
        return_logits=True,
    )
    prompts = [
        Prompt(points=[[50, 40], [10, 80]], labels=[1, 0]),
        Prompt(points=[[120, 20]], labels=[1], box=[90, 5, 150, 60]),
        Prompt(box=[20, 30, 60, 90]),
    ]
    expected = predictor.predict(_pixels(photo), prompts, multimask=multimask, return_logits=True)
    got = _masks(data)
    assert got.shape == expected.masks.shape == (3, 3 if multimask else 1, 97, 161)
    np.testing.assert_array_equal(got, expected.masks)
    np.testing.assert_allclose(data.scores.to_array(), expected.scores, rtol=1e-5)
    np.testing.assert_allclose(data.mask_logits.to_array(), expected.low_res_logits, rtol=1e-4, atol=1e-4)
    assert got.any()
    assert not got.all()
    # Controls: this comparison would notice a wrong label and coordinates swapped.
    wrong = predictor.predict(_pixels(photo), [Prompt(points=[[50, 40], [10, 80]], labels=[1, 1])], multimask=multimask)
    assert not np.allclose(wrong.scores, expected.scores[:1], rtol=1e-5)
    turned = predictor.predict(
        _pixels(photo), [Prompt(points=[[40, 50], [80, 10]], labels=[1, 0])], multimask=multimask
    )
    assert not np.allclose(turned.scores, expected.scores[:1], rtol=1e-5)


async def test_a_click_after_the_pages_protocol(provider: EdgeProvider, photo: Path) -> None:
    """Warm-up without prompt, then clicks with the features and the previous logits echoed."""
    one: dict[str, Any] = {"multimask_output": False, "num_multimask_outputs": 1, "return_logits": True}
    warm = await _ask(provider, photo, return_image_embedding=True, **one)
    assert warm.image_embedding.shape == [32, 8, 8]
    assert [h.shape for h in warm.high_resolution_features] == [[4, 32, 32], [8, 16, 16]]
    features = {
        "image_embedding": NDArrayData.from_dict(json.loads(json.dumps(warm.image_embedding.to_dict()))),
        "high_resolution_features": warm.high_resolution_features,
    }
    plain = await _ask(provider, photo, points=[[[50, 40]]], **one)
    cached = await _ask(provider, photo, points=[[[50, 40]]], **features, **one)
    assert cached.scores.values == plain.scores.values
    assert cached.masks == plain.masks
    assert plain.mask_logits.shape == [1, 32, 32]
    second = await _ask(
        provider, photo, points=[[[50, 40], [20, 70]]], labels=[[1, 0]], mask_input=plain.mask_logits, **features, **one
    )
    without = await _ask(provider, photo, points=[[[50, 40], [20, 70]]], labels=[[1, 0]], **features, **one)
    assert second.scores.values != without.scores.values  # the mask input counts


async def test_wrong_features_are_refused_and_a_good_request_follows(provider: EdgeProvider, photo: Path) -> None:
    warm = await _ask(provider, photo, return_image_embedding=True)
    good = {"image_embedding": warm.image_embedding, "high_resolution_features": warm.high_resolution_features}
    fine = warm.high_resolution_features
    embed = warm.image_embedding
    bad: list[dict[str, Any]] = [
        {**good, "high_resolution_features": fine[::-1]},
        {**good, "high_resolution_features": fine[:1]},
        {**good, "image_embedding": fine[0]},
        {**good, "image_embedding": NDArrayData(embed.values[:-64], [31, 8, 8])},
        {**good, "image_embedding": NDArrayData([float("inf"), *embed.values[1:]], embed.shape)},
        {"mask_input": NDArrayData([0.0] * 256, [1, 16, 16])},
    ]
    for fields in bad:
        with pytest.raises(InvalidRequestError):
            await _ask(provider, photo, points=[[[5, 5]]], **fields)
        assert (await _ask(provider, photo, points=[[[5, 5]]], **good)).scores.shape == [1, 3]


async def test_the_same_picture_is_encoded_once(provider: EdgeProvider, photo: Path) -> None:
    await _ask(provider, photo, points=[[[5, 5]]])
    await _ask(provider, photo, points=[[[50, 50]]])
    await _ask(provider, photo, image=data_uri(photo.read_bytes()), points=[[[9, 9]]])
    slot: Any = provider._table.get("tiny")
    assert slot.model.predictor.runs == (1, 3)


async def test_metadata_and_server_info(provider: EdgeProvider, photo: Path) -> None:
    result = await provider.image_mask_generation(_request(photo))
    assert result.metadata["model_class"] == "Sam2ImagePredictor"
    assert (result.metadata["device"], result.metadata["backend"]) == ("cpu", "onnxruntime")
    assert result.metadata["precision"] == "fp32"
    info = await provider.get_server_info()
    assert info.gpu_info["model_to_device"] == {"tiny": "cpu"}
    assert info.versions["onnxruntime"]


async def test_loading_a_folder_and_a_packed_file(
    provider: EdgeProvider, tiny_bundle: Path, photo: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "tiny.pxe"
    pack(tiny_bundle, packed)
    await provider.instantiate_model("edge", ModelConfig("folder", _TASK, tiny_bundle, _THREADS))
    await provider.instantiate_model("pixano-edge", ModelConfig("packed", _TASK, packed, _THREADS))
    by_name = [await _ask(provider, photo, model=m, boxes=[[20, 30, 60, 90]]) for m in ("tiny", "folder", "packed")]
    assert by_name[0].masks == by_name[1].masks == by_name[2].masks
    slot: Any = provider._table.get("packed")
    unpacked = slot.model.cleanup
    assert unpacked.is_dir()
    await provider.delete_model("packed")
    assert not unpacked.exists()
    with pytest.raises(ModelNotFoundError):
        await _ask(provider, photo, model="packed")


async def test_a_packed_file_is_bounded(
    provider: EdgeProvider, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "tiny.pxe"
    pack(tiny_bundle, packed)
    monkeypatch.setattr(families, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(InvalidRequestError, match="at most 1000") as caught:
        await provider.instantiate_model("edge", ModelConfig("packed", _TASK, packed))
    assert "pixano-edge bundle unpack --max-bytes" in caught.value.action


def test_an_aborted_load_stops_between_the_sessions(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, opened = Job(), []
    real = runtime.open_session

    def slow_session(*args: Any, **options: Any) -> Any:
        session = real(*args, **options)
        opened.append(session)
        job.cancel()  # the caller's timeout falls into the first opening
        return session

    monkeypatch.setattr(runtime, "open_session", slow_session)
    with pytest.raises(CancelledError):
        families.open_model(tiny_bundle, _TASK, LoadOptions(threads=1), job)
    assert len(opened) == 1
    with pytest.raises(DeviceError, match="closed"):
        opened[0].info()


async def test_half_precision_is_another_model(provider: EdgeProvider, photo: Path) -> None:
    await provider.instantiate_model("edge", ModelConfig("half", _TASK, "tiny", {"precision": "fp16"}))
    result = await provider.image_mask_generation(_request(photo, model="half", points=[[[50, 40]]]))
    assert result.metadata["precision"] == "fp16"


async def test_damaged_bundles_and_missing_devices(
    provider: EdgeProvider, tiny_bundle: Path, photo: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_bundle, damaged)
    graph = max((p for p in damaged.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 0xFF
    graph.write_bytes(content)
    cut = tmp_path / "cut.pxe"
    pack(tiny_bundle, cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    wrong: dict[str, tuple[ModelConfig, type[Exception], str]] = {
        "damaged": (ModelConfig("x", _TASK, damaged), InvalidRequestError, "damaged"),
        "cut": (ModelConfig("x", _TASK, cut), InvalidRequestError, "."),
        "cuda": (ModelConfig("x", _TASK, "tiny", {"device": "cuda:0"}), InvalidRequestError, "cuda"),
        "tensorrt": (ModelConfig("x", _TASK, "tiny", {"backend": "tensorrt"}), InvalidRequestError, "TensorRT"),
        "int4": (ModelConfig("x", _TASK, "tiny", {"precision": "int4"}), InvalidRequestError, "int4"),
        "task": (ModelConfig("x", "video_mask_generation", "tiny"), TaskNotSupportedError, "image_mask_generation"),
    }
    for config, error, message in wrong.values():
        with pytest.raises(error, match=message):
            await provider.instantiate_model("edge", config)
    assert [m.name for m in await provider.list_models()] == _names(provider)
    assert (await _ask(provider, photo, points=[[[5, 5]]])).masks


def _names(provider: EdgeProvider) -> list[str]:
    """Bundles of the store, and the second names of those that track."""
    entries = provider._catalogue.scan()[0]
    return sorted([*entries, *(f"{name}-video" for name, entry in entries.items() if entry.tracks)])


async def test_a_real_photo(provider: EdgeProvider, bedroom: Path) -> None:
    data = await _ask(provider, bedroom / "00000.jpg", boxes=[[300, 100, 700, 500]], multimask_output=False)
    assert data.masks[0][0].size == [540, 960]
