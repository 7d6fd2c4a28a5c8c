"""Pixano 0.8's provider for an inference server, which the release has, against ours."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pixano.inference as pixano
import pytest

from tests.clients.material import Clip, Photo, iou


@pytest.fixture
async def provider(url: str) -> AsyncIterator[Any]:
    provider = await pixano.PixanoInferenceProvider.connect(url, api_key="not asked for")
    yield provider
    await provider.close()


async def test_list_and_info(provider: Any) -> None:
    """Trap 7: capabilities, or every model vanishes."""
    tasks = {m.name: m.task for m in await provider.list_models()}
    assert tasks["sam2-demo"] == "image_mask_generation"
    assert tasks["sam2-demo-video"] == "video_mask_generation"
    assert tasks["owlv2-demo"] == "detection"
    found = await provider.list_models(task=pixano.InferenceTask.DETECTION)
    assert [m.name for m in found] == ["grounding-dino-demo", "owlv2-demo"]
    assert found[0].status
    info = await provider.get_server_info()
    assert info.models_to_task == tasks
    assert info.version != "unknown"


async def test_warm_up_and_clicks_as_the_page_sends_them(provider: Any, photo: Photo) -> None:
    """First no prompt at all; then clicks that send features and the last answer's logits back as they came."""
    one = {"model": "sam2-demo", "image": photo.png, "num_multimask_outputs": 1, "multimask_output": False}
    warm = (
        await provider.image_mask_generation(pixano.ImageMaskGenerationInput(**one, return_image_embedding=True))
    ).data
    assert warm.image_embedding is not None
    assert warm.high_resolution_features
    features = {
        "image_embedding": warm.image_embedding,
        "high_resolution_features": warm.high_resolution_features,
        "reset_predictor": True,
        "return_logits": True,
    }
    first = await provider.image_mask_generation(
        pixano.ImageMaskGenerationInput(**one, **features, points=[[photo.click]], labels=[[1]])
    )
    assert first.status == "SUCCESS"
    assert first.data.image_embedding is None
    mask, score = first.data.masks[0][0], first.data.scores.values[0]
    assert iou(mask, photo.truth) > 0.7
    assert 0 < score <= 1
    assert first.data.mask_logits.shape[0] == 1
    points = [[photo.click, [photo.click[0] + 6, photo.click[1] + 6]]]
    second = await provider.image_mask_generation(
        pixano.ImageMaskGenerationInput(
            **one, **features, points=points, labels=[[1, 1]], mask_input=first.data.mask_logits
        )
    )
    assert iou(second.data.masks[0][0], photo.truth) > 0.7
    box = await provider.image_mask_generation(pixano.ImageMaskGenerationInput(**one, **features, boxes=[photo.box]))
    assert iou(box.data.masks[0][0], photo.truth) > 0.7
    # The same click without the features gives the same mask.
    plain = await provider.image_mask_generation(
        pixano.ImageMaskGenerationInput(**one, points=[[photo.click]], labels=[[1]])
    )
    assert plain.data.masks == first.data.masks


def tracking(clip: Clip, **more: Any) -> Any:
    """What the page sends: one object, one keyframe, and the older fields filled as well."""
    x, y = clip.click
    return pixano.VideoMaskGenerationInput(
        video=clip.frames,
        model="sam2-demo-video",
        objects_ids=[0],
        frame_indexes=[0],
        points=[[clip.click]],
        labels=[[1]],
        propagate=True,
        keyframes=[{"frame_index": 0, "points": [{"x": x, "y": y, "label": 1}], "box": None}],
        **more,
    )


async def finished(provider: Any, job: Any) -> Any:
    for _ in range(600):
        status = await provider.get_video_mask_generation_job(job.job_id)
        if status.status != "running":
            return status
        await asyncio.sleep(0.05)
    raise AssertionError("the job did not end")


async def test_tracking_job_with_keyframes(provider: Any, clip: Clip) -> None:
    """Traps 1 to 3: a job in the wrong form is completed without a mask."""
    interval = {"start_frame": 0, "end_frame": len(clip.frames) - 1, "direction": "forward"}
    job = await provider.submit_video_mask_generation_job(tracking(clip, interval=interval))
    done = await finished(provider, job)
    assert done.status == "completed", done.detail
    assert done.data.frame_indexes == list(range(len(clip.frames)))
    assert np.mean([iou(m, t) for m, t in zip(done.data.masks, clip.truth)]) > 0.6
    assert (await provider.cancel_video_mask_generation_job(job.job_id)).status == "completed"


async def test_tracking_sync(provider: Any, clip: Clip) -> None:
    result = await provider.video_mask_generation(tracking(clip))
    assert result.status == "SUCCESS"
    assert len(result.data.masks) == len(clip.frames)
    assert np.mean([iou(m, t) for m, t in zip(result.data.masks, clip.truth)]) > 0.6


async def test_cancelled_job(provider: Any, clip: Clip) -> None:
    request = tracking(clip)
    request.video = clip.frames * 40
    job = await provider.submit_video_mask_generation_job(request)
    await provider.cancel_video_mask_generation_job(job.job_id)
    assert (await finished(provider, job)).status == "canceled"


async def test_detection(provider: Any, photo: Photo) -> None:
    ask = {"image": photo.uri, "model": "owlv2-demo", "classes": [photo.words], "box_threshold": 0.1}
    data = (await provider.detection(pixano.DetectionInput(**ask))).data
    assert np.abs(np.array(data.boxes[0]) - photo.box).max() < 40
    assert set(data.classes) == {photo.words}


async def test_vlm(provider: Any, photo: Photo) -> None:
    """The answer of a model for text, and of another one an error that Pixano's routes pass on."""
    model, other = await provider.list_models(task=pixano.InferenceTask.VLM)
    assert {model.name, other.name} == {"smolvlm-demo", "tiny-vlm"}
    uri = f"data:image/png;base64,{base64.b64encode(photo.png).decode()}"
    ask = {"prompt": "What is this?", "images": [uri], "max_new_tokens": 4, "temperature": 0.0}
    data = (await provider.vlm(pixano.VLMInput(model=model.name, **ask))).data
    assert 1 <= data.usage.completion_tokens <= 4
    assert data.usage.prompt_tokens > 4
    assert isinstance(data.generated_text, str)
    with pytest.raises(pixano.InferenceRequestError) as refused:
        await provider.vlm(pixano.VLMInput(model="sam2-demo", **ask))
    assert (refused.value.status_code, refused.value.code) == (400, "bad_request")


async def test_errors_keep_their_status(provider: Any, photo: Photo) -> None:
    for change, status in (({"model": "nobody"}, 404), ({"model": "owlv2-demo"}, 400), ({"image": "AAAA"}, 400)):
        ask = {"model": "sam2-demo", "image": photo.png, **change}
        with pytest.raises(pixano.InferenceRequestError) as refused:
            await provider.image_mask_generation(pixano.ImageMaskGenerationInput(**ask))
        assert refused.value.status_code == status
        assert refused.value.request_id
