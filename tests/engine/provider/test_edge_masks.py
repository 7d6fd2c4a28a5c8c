"""Mask requests against a fake predictor: shapes, order, refusals, timeouts, and the event loop left free."""

from __future__ import annotations

import asyncio
from datetime import timezone
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixano_edge.engine.models.rle import decode_rle
from pixano_edge.engine.provider import (
    EdgeMaskGenerationInput,
    EdgeProvider,
    ImageMaskGenerationInput,
    InferenceError,
    InferenceTimeoutError,
    InvalidRequestError,
    ModelBusyError,
    ModelNotFoundError,
    NDArrayData,
)
from pixano_edge.engine.provider import segmentation as segmentation_module

from .fakes import SCORES, SIDE, FakeOpener, data_uri, make_provider, png

_WIDTH, _HEIGHT = 161, 97  # not square, so that swapped axes show
_IMAGE = data_uri(png(_WIDTH, _HEIGHT))


def _request(**fields: Any) -> EdgeMaskGenerationInput:
    return EdgeMaskGenerationInput(**{"image": _IMAGE, "model": "alpha", **fields})


async def _ask(provider: EdgeProvider, **fields: Any) -> Any:
    return (await provider.image_mask_generation(input_data=_request(**fields), timeout=20)).data


def _mask(rle: Any) -> np.ndarray:
    return decode_rle({"size": rle.size, "counts": rle.counts})


async def test_one_answer(provider: EdgeProvider) -> None:
    request = ImageMaskGenerationInput(image=_IMAGE, model="alpha", boxes=[[10, 20, 40, 70]])
    result = await provider.image_mask_generation(request)
    assert (result.status, result.metadata["model_name"], result.metadata["device"]) == ("SUCCESS", "alpha", "cpu")
    assert result.id
    assert result.timestamp.tzinfo is timezone.utc
    assert 0 < result.processing_time < 20
    (masks,) = result.data.masks
    assert len(masks) == 3
    assert type(masks[0].counts) is bytes
    assert masks[0].size == [_HEIGHT, _WIDTH]
    expected = np.zeros((_HEIGHT, _WIDTH), bool)
    expected[20:70, 10:40] = True
    np.testing.assert_array_equal(_mask(masks[0]), expected)
    assert result.data.scores.shape == [1, 3]
    np.testing.assert_allclose(result.data.scores.values, SCORES, rtol=1e-6)  # model order, not sorted
    assert result.data.image_embedding is None
    assert result.data.high_resolution_features is None
    assert result.data.mask_logits is None


async def test_many_prompts_keep_their_order(
    provider: EdgeProvider, opener: FakeOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = [[i, i, i + 5, i + 3] for i in range(7)]
    whole = await _ask(provider, boxes=boxes, return_logits=True)
    # In groups of two, as with large photos.
    monkeypatch.setattr(segmentation_module, "_MASK_PIXELS", 2 * 3 * _WIDTH * _HEIGHT)
    parts = await _ask(provider, boxes=boxes, return_logits=True)
    assert [len(group) for group in opener.opened[0].predicted] == [7, 2, 2, 2, 1]
    assert parts.masks == whole.masks
    assert parts.scores.shape == [7, 3]
    for (x1, y1, x2, y2), masks in zip(boxes, whole.masks):
        assert _mask(masks[2])[y1:y2, x1:x2].all()
        assert _mask(masks[2]).sum() == 15


async def test_no_prompt_is_the_warm_up_of_pixanos_page(provider: EdgeProvider) -> None:
    data = await _ask(provider, multimask_output=False, num_multimask_outputs=1, return_image_embedding=True)
    assert [len(m) for m in data.masks] == [1]
    assert data.scores.shape == [1, 1]
    assert data.image_embedding.shape == [32, 8, 8]
    assert [h.shape for h in data.high_resolution_features] == [[4, 32, 32], [8, 16, 16]]
    assert data.image_embedding.values[0] == 20.0


async def test_embeddings_sent_back_skip_the_encoder(provider: EdgeProvider, opener: FakeOpener) -> None:
    first = await _ask(provider, return_image_embedding=True)
    first.image_embedding.values[0] = 99.0
    again = await _ask(
        provider,
        image_embedding=first.image_embedding,
        high_resolution_features=first.high_resolution_features,
        return_image_embedding=True,
        return_logits=True,
        reset_predictor=False,
    )
    assert opener.opened[0].encoded == 1
    assert again.image_embedding.values[0] == 99.0
    assert again.mask_logits.values[0] == 99.0  # they are what was used
    await _ask(provider)
    assert opener.opened[0].encoded == 2  # and they were not kept for others


async def test_logits_there_and_back(provider: EdgeProvider, opener: FakeOpener) -> None:
    one = await _ask(provider, points=[[[1, 1]]], return_logits=True)
    assert one.mask_logits.shape == [3, SIDE, SIDE]
    single = await _ask(
        provider, points=[[[1, 1]]], return_logits=True, multimask_output=False, mask_input=one.mask_logits
    )
    assert single.mask_logits.shape == [1, SIDE, SIDE]
    sent = opener.opened[0].predicted[-1][0].mask_input
    assert sent is not None
    # the second mask scored best, and its logits are one above the first's
    assert sent[0, 0] == one.mask_logits.values[0] + 1
    two = await _ask(provider, points=[[[1, 1]], [[2, 2]]], return_logits=True)
    assert two.mask_logits.shape == [2, 3, SIDE, SIDE]


async def test_foreign_dataclasses_do(provider: EdgeProvider) -> None:
    """Requests of other Pixano versions: bytes as image, more or fewer fields."""
    request: Any = SimpleNamespace(image=png(_WIDTH, _HEIGHT), model="alpha", points=[[[5, 6]]], frobnicate=1)
    result = await provider.image_mask_generation(request)
    assert _mask(result.data.masks[0][0])[6, 5]


_NAN = float("nan")
_EMBED = NDArrayData.from_array(np.zeros((32, 8, 8), np.float32))
_FINE = [NDArrayData.from_array(np.zeros(s, np.float32)) for s in ((4, 32, 32), (8, 16, 16))]
_BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no image": ({"image": data_uri(b"")}, InvalidRequestError, "0 bytes"),
    "truncated": ({"image": data_uri(png(64, 64)[:-30])}, InvalidRequestError, "truncated or damaged"),
    "no image file": ({"image": data_uri(b"hello")}, InvalidRequestError, "not an image"),
    "12000x9000": ({"image": data_uri(png(12000, 9000, 0, "1"))}, InvalidRequestError, "12000x9000"),
    "bad base64": ({"image": "data:image/png;base64,@@"}, InvalidRequestError, "base64"),
    "not an image uri": ({"image": "data:text/html;base64,QQ=="}, InvalidRequestError, "data URI"),
    "url": ({"image": "https://example.org/a.png"}, InvalidRequestError, "not fetched"),
    "bare base64": ({"image": _IMAGE.partition(",")[2]}, InvalidRequestError, "bare base64"),
    "none": ({"image": None}, InvalidRequestError, "NoneType"),
    "labels not matching": ({"points": [[[1, 1], [2, 2]]], "labels": [[1]]}, InvalidRequestError, "label"),
    "labels of nothing": ({"labels": [[1]]}, InvalidRequestError, "label"),
    "lists not matching": ({"points": [[[1, 1]]], "boxes": [[0, 0, 1, 1]] * 2}, InvalidRequestError, "disagree"),
    "label 2": ({"points": [[[1, 1]]], "labels": [[2]]}, InvalidRequestError, "labels must be"),
    "far outside": ({"points": [[[5000, 5]]]}, InvalidRequestError, "outside"),
    "nan": ({"points": [[[_NAN, 5]]]}, InvalidRequestError, "NaN"),
    "text": ({"points": [[["a", 5]]]}, InvalidRequestError, "numbers"),
    "nesting": ({"points": [[1, 2]]}, InvalidRequestError, "shape"),
    "box of three": ({"boxes": [[1, 2, 3]]}, InvalidRequestError, "box"),
    "box swapped": ({"boxes": [[30, 30, 10, 10]]}, InvalidRequestError, "no area"),
    "box nan": ({"boxes": [[0, 0, _NAN, 1]]}, InvalidRequestError, "NaN"),
    "mask size": ({"mask_input": _EMBED}, InvalidRequestError, "mask_input"),
    "embedding alone": ({"image_embedding": _EMBED}, InvalidRequestError, "together"),
    "fine alone": ({"high_resolution_features": _FINE}, InvalidRequestError, "together"),
    "embedding shape": (
        {"image_embedding": _FINE[0], "high_resolution_features": _FINE}, InvalidRequestError, "embedding",
    ),
    "fine swapped": (
        {"image_embedding": _EMBED, "high_resolution_features": _FINE[::-1]}, InvalidRequestError, "embedding",
    ),
    "embedding values": (
        {"image_embedding": NDArrayData([1.0], [32, 8, 8]), "high_resolution_features": _FINE},
        InvalidRequestError, "do not fill",
    ),
    "four masks": ({"num_multimask_outputs": 4}, InvalidRequestError, "must be 3"),
    "unknown model": ({"model": "gamma"}, ModelNotFoundError, "Known: alpha, beta"),
    "path as model": ({"model": "../alpha"}, ModelNotFoundError, "Known: alpha, beta"),
    "hub id as model": ({"model": "facebook/sam2.1-hiera-tiny"}, ModelNotFoundError, "Known: alpha, beta"),
    "no model": ({"model": None}, InvalidRequestError, "name of a model"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(_BAD))
async def test_bad_input_gets_one_clear_error_and_the_provider_goes_on(provider: EdgeProvider, case: str) -> None:
    fields, error, message = _BAD[case]
    with pytest.raises(error, match=message) as caught:
        await _ask(provider, **fields)
    assert type(caught.value) is error
    assert caught.value.action  # type: ignore[attr-defined]
    assert len(str(caught.value)) < 500
    good = await _ask(provider, boxes=[[10, 20, 40, 70]])
    assert _mask(good.masks[0][0]).sum() == 30 * 50


async def test_bad_prompts_cost_no_encoder_run(provider: EdgeProvider, opener: FakeOpener) -> None:
    with pytest.raises(InvalidRequestError):
        await _ask(provider, points=[[[_NAN, 5]]])
    assert opener.opened[0].encoded == 0


@pytest.mark.parametrize(
    "content",
    [
        png(1, 1),
        png(30, 20, (1, 2, 3, 4), "CMYK", "TIFF"),
        png(30, 20, 7, "L"),
        png(30, 20, (1, 2, 3, 128), "RGBA"),
        png(30, 20, 40000, "I;16"),
    ],
    ids=["1x1", "cmyk", "gray", "alpha", "16 bit"],
)
async def test_unusual_images_are_answered_at_their_size(provider: EdgeProvider, content: bytes) -> None:
    data = await _ask(provider, image=content)
    assert data.masks[0][0].size in ([20, 30], [1, 1])


async def test_exif_rotation_is_not_applied(provider: EdgeProvider) -> None:
    import io

    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40)).save(buffer, "JPEG", exif=exif)
    assert (await _ask(provider, image=data_uri(buffer.getvalue(), "jpeg"))).masks[0][0].size == [40, 60]


async def test_points_just_outside_are_passed_on(provider: EdgeProvider) -> None:
    assert (await _ask(provider, boxes=[[-5, -5, 170, 100]])).scores.shape == [1, 3]


async def test_the_event_loop_stays_free(provider: EdgeProvider, opener: FakeOpener) -> None:
    await provider.instantiate_model("edge", _config())
    predictor = opener.opened[0]
    predictor.gate.clear()
    request = asyncio.create_task(provider.image_mask_generation(_request()))
    # Only this coroutine opens the gate, so a call that blocked the loop would never get past it.
    for _ in range(40):
        await asyncio.sleep(0.005)
    assert predictor.entered.is_set()
    assert not request.done()
    assert (await provider.list_models())[0].name == "alpha"
    predictor.gate.set()
    await request


async def test_timeout_and_the_answer_after_it(provider: EdgeProvider, opener: FakeOpener) -> None:
    await provider.instantiate_model("edge", _config())
    predictor = opener.opened[0]
    predictor.gate.clear()
    with pytest.raises(InferenceTimeoutError, match=r"'alpha' took longer than 0\.05 s"):
        await provider.image_mask_generation(_request(boxes=[[0, 0, 5, 5]]), timeout=0.05)
    later = asyncio.create_task(provider.image_mask_generation(_request(boxes=[[10, 20, 40, 70]])))
    await asyncio.sleep(0.02)
    predictor.gate.set()
    # The abandoned request's mask must not turn up here.
    assert _mask((await later).data.masks[0][0]).sum() == 30 * 50


async def test_a_request_that_times_out_in_the_queue_never_runs(provider: EdgeProvider, opener: FakeOpener) -> None:
    await provider.instantiate_model("edge", _config())
    predictor = opener.opened[0]
    predictor.gate.clear()
    first = asyncio.create_task(provider.image_mask_generation(_request()))
    await asyncio.to_thread(predictor.entered.wait, 10)
    with pytest.raises(InferenceTimeoutError):
        await provider.image_mask_generation(_request(), timeout=0.02)
    predictor.gate.set()
    await first
    await _ask(provider)
    assert len(predictor.predicted) == 2


async def test_cancelling_a_request(provider: EdgeProvider, opener: FakeOpener) -> None:
    await provider.instantiate_model("edge", _config())
    predictor = opener.opened[0]
    predictor.gate.clear()
    task = asyncio.create_task(provider.image_mask_generation(_request()))
    await asyncio.to_thread(predictor.entered.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    predictor.gate.set()
    assert (await _ask(provider)).masks


@pytest.mark.parametrize("timeout", [_NAN, -1, "soon"])
async def test_timeouts_that_are_none(provider: EdgeProvider, timeout: Any) -> None:
    with pytest.raises(InvalidRequestError, match="timeout"):
        await provider.image_mask_generation(_request(), timeout=timeout)


async def test_a_full_queue_answers_at_once(root: Any, opener: FakeOpener) -> None:
    provider = make_provider(root, opener, queue_depth=2)
    await provider.instantiate_model("edge", _config())
    opener.opened[0].gate.clear()
    waiting = [asyncio.create_task(provider.image_mask_generation(_request())) for _ in range(2)]
    await asyncio.to_thread(opener.opened[0].entered.wait, 10)
    await asyncio.sleep(0.02)
    with pytest.raises(ModelBusyError, match="2 requests wait"):
        await provider.image_mask_generation(_request())
    opener.opened[0].gate.set()
    await asyncio.gather(*waiting)
    await provider.close()


async def test_out_of_memory_is_an_inference_error(provider: EdgeProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(segmentation_module, "decode_image", exhausted)
    with pytest.raises(InferenceError, match="memory"):
        await _ask(provider)


async def test_all_of_a_models_work_is_on_one_thread(provider: EdgeProvider, opener: FakeOpener) -> None:
    await asyncio.gather(*(_ask(provider) for _ in range(8)))
    assert opener.opened[0].threads == {"pixano-edge-alpha_0"}


def _config() -> Any:
    from pixano_edge.engine.provider import ModelConfig

    return ModelConfig("alpha", "image_mask_generation")


async def test_a_request_without_an_image_attribute(provider: EdgeProvider) -> None:
    """Requests are read by attribute, so any class may come along."""
    with pytest.raises(InvalidRequestError, match="image must be") as caught:
        await provider.image_mask_generation(SimpleNamespace(model="alpha", points=[[[1, 2]]]))  # type: ignore[arg-type]
    assert caught.value.action
    with pytest.raises(InvalidRequestError, match="model must be"):
        await provider.image_mask_generation(SimpleNamespace())  # type: ignore[arg-type]


async def test_texts_are_no_coordinates(provider: EdgeProvider) -> None:
    for fields in ({"points": [[["1", "2"]]]}, {"boxes": [["1", "2", "30", "40"]]}):
        with pytest.raises(InvalidRequestError, match="not numbers"):
            await _ask(provider, **fields)
