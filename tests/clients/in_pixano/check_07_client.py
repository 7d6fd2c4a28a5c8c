"""Pixano 0.7.2: its provider for an inference server against ours, and `EdgeProvider` in its registry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pixano.inference as pixano
import pytest

from pixano_edge.engine.provider.pixano import PixanoEdgeProvider
from tests.clients.material import Clip, Photo, iou


@pytest.fixture(params=["server", "edge"])
async def provider(request: pytest.FixtureRequest, url: str) -> AsyncIterator[Any]:
    assert hasattr(pixano.InferenceTask, "SEGMENTATION"), "this is not Pixano 0.7"
    if request.param == "server":
        provider = await pixano.PixanoInferenceProvider.connect(url)
    else:
        provider = pixano.get_provider("edge", url=url)
        assert isinstance(provider, PixanoEdgeProvider)
    yield provider
    await provider.close()


async def test_list_and_info(provider: Any) -> None:
    capabilities = {m.name: m.capability for m in await provider.list_models()}
    assert capabilities["sam2-demo"] == "segmentation"
    assert capabilities["sam2-demo-video"] == "tracking"
    found = await provider.list_models(task=pixano.InferenceTask.DETECTION)
    assert [m.name for m in found] == ["grounding-dino-demo", "owlv2-demo"]
    info = await provider.get_server_info()
    assert info.models_to_capability == capabilities
    assert info.app_name == "Pixano Edge"
    assert pixano.InferenceTask.TRACKING in (await provider.get_capabilities()).tasks


@pytest.mark.parametrize("binary", [True, False])
async def test_clicks(provider: Any, photo: Photo, binary: bool) -> None:
    """Bytes go to the binary route, text to the one for JSON."""
    one = {"image": photo.png if binary else photo.uri, "model": "sam2-demo", "multimask_output": False}
    warm = (await provider.segmentation(pixano.SegmentationInput(**one, return_image_embedding=True))).data
    features = {
        "image_embedding": warm.image_embedding,
        "high_resolution_features": warm.high_resolution_features,
        "return_logits": True,
    }
    click = {"points": [[photo.click]], "labels": [[1]]}
    first = await provider.segmentation(pixano.SegmentationInput(**one, **features, **click))
    assert first.status == "SUCCESS"
    assert iou(first.data.masks[0][0], photo.truth) > 0.7
    plain = await provider.segmentation(pixano.SegmentationInput(**one, **click))
    assert plain.data.masks == first.data.masks
    assert plain.data.scores == first.data.scores
    again = pixano.SegmentationInput(**one, boxes=[photo.box], mask_input=first.data.mask_logits)
    assert iou((await provider.segmentation(again)).data.masks[0][0], photo.truth) > 0.7


@pytest.mark.parametrize("binary", [True, False])
async def test_tracking(provider: Any, clip: Clip, binary: bool) -> None:
    x, y = clip.click
    ask: dict[str, Any] = {
        "video": clip.frames if binary else clip.uris,
        "model": "sam2-demo-video",
        "objects_ids": [5],
        "frame_indexes": [0],
        "interval": {"start_frame": 0, "end_frame": len(clip.frames) - 1, "direction": "forward"},
    }
    flat = await provider.tracking(pixano.TrackingInput(**ask, points=[[clip.click]], labels=[[1]]))
    assert flat.status == "SUCCESS"
    assert flat.data.objects_ids == [5] * len(clip.frames)
    assert np.mean([iou(m, t) for m, t in zip(flat.data.masks, clip.truth)]) > 0.6
    keyframes = [{"frame_index": 0, "points": [{"x": x, "y": y, "label": 1}], "box": None}]
    job = await provider.submit_tracking_job(pixano.TrackingInput(**ask, keyframes=keyframes))
    for _ in range(600):
        if job.status != "running":
            break
        await asyncio.sleep(0.05)
        job = await provider.get_tracking_job(job.job_id)
    assert job.status == "completed", job.detail
    assert job.data.masks == flat.data.masks
    assert job.data.frame_indexes == flat.data.frame_indexes
    assert (await provider.cancel_tracking_job(job.job_id)).status == "completed"


async def test_detection(provider: Any, photo: Photo) -> None:
    ask = {"image": photo.uri, "model": "owlv2-demo", "classes": photo.words, "box_threshold": 0.1}
    data = (await provider.detection(pixano.DetectionInput(**ask))).data
    assert np.abs(np.array(data.boxes[0]) - photo.box).max() < 40


async def test_vlm(provider: Any, photo: Photo) -> None:
    model, other = await provider.list_models(task=pixano.InferenceTask.VLM)
    assert {model.name, other.name} == {"smolvlm-demo", "tiny-vlm"}
    ask = {"prompt": "What is this?", "images": [photo.uri], "temperature": 0.0}
    answer = await provider.vlm(pixano.VLMInput(model=model.name, **ask, max_new_tokens=4))
    assert 1 <= answer.data.usage.completion_tokens <= 4
    with pytest.raises(pixano.InferenceError):
        await provider.vlm(pixano.VLMInput(model="sam2-demo", **ask))  # without a number of tokens: sends null


async def test_errors(provider: Any, photo: Photo) -> None:
    with pytest.raises(pixano.InferenceError, match="nobody"):
        await provider.segmentation(pixano.SegmentationInput(image=photo.png, model="nobody"))
    with pytest.raises(pixano.InferenceError):
        await provider.get_tracking_job("job-0")
