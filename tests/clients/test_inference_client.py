"""The clients that Pixano's authors publish, against a running server: every capability, sync, as job, and binary."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from pixano_edge.engine.provider import (
    EdgeMaskGenerationInput,
    EdgeVideoMaskGenerationInput,
    TextImageConditionalGenerationInput,
)
from tests.clients.conftest import VLM, Live
from tests.clients.kits import MODULES, Kit
from tests.clients.material import Clip, Photo, iou


@pytest.fixture(params=MODULES)
def kit(request: pytest.FixtureRequest) -> Kit:
    return Kit(request.param)


@pytest.fixture
async def client(kit: Kit, live: Live) -> AsyncIterator[Any]:
    async with kit.PixanoInferenceClient(live.url, api_key="not asked for") as client:
        yield client


def same(found: Any, own: Any) -> bool:
    """Whether run lengths of a client and of the provider are the same."""
    return list(found.size) == list(own.size) and found.counts == own.counts


def tracking_rows(kit: Kit, output: Any) -> list[tuple[int, int, Any]]:
    """(object, frame, mask) of either form of tracking answer."""
    if kit.flat:
        return list(zip(output.objects_ids, output.frame_indexes, output.masks))
    return [(found.track_id, frame.frame_index, found.mask) for frame in output.frames for found in frame.objects]


async def own_rows(live: Live, **ask: Any) -> list[tuple[int, int, Any]]:
    output = (await live.provider.video_mask_generation(EdgeVideoMaskGenerationInput(**ask))).data
    return list(zip(output.objects_ids, output.frame_indexes, output.masks))


def compare(found: list[tuple[int, int, Any]], own: list[tuple[int, int, Any]]) -> None:
    assert [row[:2] for row in found] == [row[:2] for row in own]
    assert all(same(a[2], b[2]) for a, b in zip(found, own))


async def test_service(client: Any) -> None:
    assert (await client.health())["status"] == "healthy"
    assert (await client.ready())["ready"] is True
    info = await client.info()
    assert info["appVersion"]
    assert isinstance(info["numGpus"], int)


async def test_models(client: Any) -> None:
    models = {m.name: m for m in await client.list_models()}
    assert models["sam2-demo"].capability == "segmentation"
    assert models["sam2-demo-video"].capability == "tracking"
    assert models["owlv2-demo"].capability == "detection"
    assert models["sam2-demo"].model_class == "Sam2ImagePredictor"


async def test_interfaces_are_published(live: Live) -> None:
    async with Kit("pixano-inference 0.7.1").PixanoInferenceClient(live.url) as client:
        found = {m.name: m.interface for m in await client.list_models()}
    assert found["sam2-demo"].prompts == ["points", "box", "mask"]
    assert found["sam2-demo"].embeddings
    assert found["sam2-demo-video"].interval
    assert "mask" in found["sam2-demo-video"].outputs
    assert found["owlv2-demo"].classes == "open"


@pytest.mark.parametrize(
    "prompt",
    [
        {"points": "click", "labels": [[1]]},
        {"boxes": "box", "multimask_output": False},
        {"points": "click", "labels": [[1]], "boxes": "box"},
        {},
    ],
    ids=["click", "box", "both", "none"],
)
async def test_segmentation(kit: Kit, client: Any, live: Live, photo: Photo, prompt: Any) -> None:
    values = {"click": [[photo.click]], "box": [photo.box]}
    ask = {key: values.get(value, value) if isinstance(value, str) else value for key, value in prompt.items()}
    ask = {"image": photo.uri, "model": "sam2-demo", **ask}
    answer = await client.segmentation(kit.SegmentationRequest(**ask))
    assert answer.status == "SUCCESS"
    assert answer.metadata["capability"] == "segmentation"
    own = (await live.provider.image_mask_generation(EdgeMaskGenerationInput(**ask))).data
    count = 1 if "multimask_output" in ask else 3
    assert [len(masks) for masks in answer.data.masks] == [count]
    assert all(same(a, b) for a, b in zip(answer.data.masks[0], own.masks[0]))
    assert np.array_equal(answer.data.scores.to_numpy(), own.scores.to_array())
    best = answer.data.masks[0][int(answer.data.scores.to_numpy()[0].argmax())]
    assert not prompt or iou(best, photo.truth) > 0.7


async def test_clicks_that_build_on_each_other(kit: Kit, client: Any, photo: Photo) -> None:
    """Features and logits back and forth; the second click without features gives the same mask."""
    first = await client.segmentation(
        kit.SegmentationRequest(
            image=photo.uri,
            model="sam2-demo",
            points=[[photo.click]],
            labels=[[1]],
            multimask_output=False,
            return_image_embedding=True,
            return_logits=True,
        )
    )
    ask = {
        "image": photo.uri,
        "model": "sam2-demo",
        "points": [[photo.click, [photo.click[0], photo.click[1] + 8]]],
        "labels": [[1, 0]],
        "mask_input": first.data.mask_logits,
        "multimask_output": False,
    }
    with_features = await client.segmentation(
        kit.SegmentationRequest(
            **ask,
            image_embedding=first.data.image_embedding,
            high_resolution_features=first.data.high_resolution_features,
        )
    )
    without = await client.segmentation(kit.SegmentationRequest(**ask))
    assert with_features.data.masks == without.data.masks
    assert with_features.data.scores == without.data.scores
    assert with_features.data.image_embedding is None
    assert with_features.data.mask_logits is None


async def test_detection(kit: Kit, client: Any, photo: Photo) -> None:
    ask = {"image": photo.uri, "model": "owlv2-demo", "classes": [photo.words, "nothing"], "box_threshold": 0.1}
    answer = await client.detection(kit.DetectionRequest(**ask))
    data = answer.data
    assert data.boxes
    assert len(data.boxes) == len(data.scores) == len(data.classes)
    best = data.boxes[data.classes.index(photo.words)]
    assert np.abs(np.array(best) - photo.box).max() < 40
    assert data.masks is None


async def test_tracking(kit: Kit, client: Any, live: Live, clip: Clip) -> None:
    x, y = clip.click
    point = kit.TrackingPointPrompt(x=x, y=y, label=1)
    request = kit.TrackingRequestV1(
        model="sam2-demo-video",
        video=clip.uris,
        objects_ids=[7],
        frame_indexes=[0],
        keyframes=[kit.keyframe(0, points=[point])],
    )
    answer = await client.tracking(request)
    found = tracking_rows(kit, answer.data)
    own = {"video": clip.frames, "model": "sam2-demo-video", "objects_ids": [7], "frame_indexes": [0]}
    compare(found, await own_rows(live, **own, points=[[clip.click]]))
    assert np.mean([iou(mask, truth) for (_, _, mask), truth in zip(found, clip.truth)]) > 0.6


async def test_tracking_backwards_in_an_interval(kit: Kit, client: Any, live: Live, clip: Clip) -> None:
    last = len(clip.frames) - 1
    rows, columns = np.nonzero(clip.truth[last])
    x1, y1, x2, y2 = (int(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    box = kit.TrackingBoxPrompt(x=x1, y=y1, width=x2 - x1, height=y2 - y1)
    request = kit.TrackingRequestV1(
        model="sam2-demo-video",
        video=clip.uris,
        objects_ids=[3],
        frame_indexes=[last],
        interval=kit.TrackingInterval(start_frame=last, end_frame=2, direction="backward"),
        keyframes=[kit.keyframe(last, box=box)],
    )
    found = tracking_rows(kit, (await client.tracking(request)).data)
    assert [frame for _, frame, _ in found] == list(range(last, 1, -1))
    own = {"video": clip.frames, "model": "sam2-demo-video", "objects_ids": [3], "frame_indexes": [last]}
    compare(
        found, await own_rows(live, **own, boxes=[[x1, y1, x2, y2]], interval={"start_frame": last, "end_frame": 2})
    )


async def test_tracking_of_a_mask_and_prompted_frames_only(kit: Kit, client: Any, clip: Clip) -> None:
    from pixano_edge.engine.models.rle import encode_rle

    encoded = encode_rle(clip.truth[1])
    mask = kit.CompressedRLE(size=list(encoded["size"]), counts=encoded["counts"])
    request = kit.TrackingRequestV1(
        model="sam2-demo-video",
        video=clip.uris,
        objects_ids=[0],
        frame_indexes=[1],
        propagate=False,
        keyframes=[kit.keyframe(1, mask=mask)],
    )
    ((identity, frame, found),) = tracking_rows(kit, (await client.tracking(request)).data)
    assert (identity, frame) == (0, 1)
    assert iou(found, clip.truth[1]) > 0.9


async def test_tracking_job(kit: Kit, client: Any, live: Live, clip: Clip) -> None:
    """Traps 2 and 3: states and keys that both clients understand."""
    request = kit.TrackingRequestV1(
        model="sam2-demo-video",
        video=clip.uris,
        objects_ids=[1],
        frame_indexes=[0],
        keyframes=[kit.keyframe(0, points=[kit.TrackingPointPrompt(x=clip.click[0], y=clip.click[1], label=1)])],
    )
    job = await client.submit_tracking_job(request)
    assert job.status in ("running", "completed")
    done = await client.wait_for_job(job.job_id, poll_interval=0.05, timeout=60)
    assert done.status == "completed"
    assert done.metadata["frames_done"] == len(clip.frames)
    data = done.data
    if isinstance(data, dict):  # one client passes on what it got
        output = kit.TrackingOutput.model_validate(data)
        assert len(data["objectsIds"]) == len(data["frameIndexes"]) == len(data["masks"])
    else:
        output = data
    own = {"video": clip.frames, "model": "sam2-demo-video", "objects_ids": [1], "frame_indexes": [0]}
    compare(tracking_rows(kit, output), await own_rows(live, **own, points=[[clip.click]]))
    assert (await client.cancel_job(job.job_id)).status == "completed"


async def test_cancelled_job(kit: Kit, client: Any, clip: Clip) -> None:
    request = kit.TrackingRequestV1(
        model="sam2-demo-video",
        video=clip.uris * 40,
        objects_ids=[1],
        frame_indexes=[0],
        keyframes=[kit.keyframe(0, points=[kit.TrackingPointPrompt(x=5, y=5, label=1)])],
    )
    job = await client.submit_tracking_job(request)
    await client.cancel_job(job.job_id)
    done = await client.wait_for_job(job.job_id, poll_interval=0.05, timeout=30)
    assert done.status == "canceled"
    assert done.data is None


async def test_failed_job_says_why(kit: Kit, client: Any, clip: Clip) -> None:
    request = kit.TrackingRequestV1(
        model="sam2-demo-video",
        video=[clip.uris[0], "data:image/png;base64,AAAA"],
        objects_ids=[1],
        frame_indexes=[0],
        keyframes=[kit.keyframe(0, points=[kit.TrackingPointPrompt(x=5, y=5, label=1)])],
    )
    job = await client.submit_tracking_job(request)
    done = await client.wait_for_job(job.job_id, poll_interval=0.05, timeout=30)
    assert done.status == "failed"
    assert "rame 1" in done.detail


async def test_vlm(kit: Kit, client: Any, photo: Photo, live: Live) -> None:
    ask = {"prompt": "What is this?", "images": [photo.uri], "max_new_tokens": 6, "temperature": 0.0}
    assert [m.name for m in await client.list_models() if m.capability == "vlm"] == ["smolvlm-demo", VLM]
    data = (await client.vlm(kit.VLMRequest(model=VLM, **ask))).data
    direct = (
        await live.provider.text_image_conditional_generation(TextImageConditionalGenerationInput(VLM, **ask))
    ).data
    assert data.generated_text == direct.generated_text
    assert (data.usage.prompt_tokens, data.usage.completion_tokens) == (
        direct.usage.prompt_tokens,
        direct.usage.completion_tokens,
    )
    assert data.usage.total_tokens == data.usage.prompt_tokens + data.usage.completion_tokens
    parts = [{"type": "image_url", "image_url": {"url": photo.uri}}, {"type": "text", "text": "What is this?"}]
    messages = {**ask, "prompt": [{"role": "user", "content": parts}], "images": None}
    assert (await client.vlm(kit.VLMRequest(model=VLM, **messages))).data.generated_text == data.generated_text
    with pytest.raises(kit.PixanoInferenceError) as refused:
        await client.vlm(kit.VLMRequest(model="sam2-demo", **ask))
    assert (refused.value.status_code, refused.value.code) == (400, "bad_request")


async def test_capabilities_without_a_model(kit: Kit, client: Any, photo: Photo) -> None:
    for call, request in (
        (client.embedding, kit.EmbeddingRequest(model="sam2-demo", text="a cat")),
        (client.ner, kit.NERRequest(model="sam2-demo", text="a cat")),
    ):
        with pytest.raises(kit.PixanoInferenceError) as refused:
            await call(request)
        assert (refused.value.status_code, refused.value.code) == (400, "bad_request")


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "nobody"}, 404, "not_found"),
        ({"model": "owlv2-demo"}, 400, "bad_request"),
        ({"image": "AAAA"}, 400, "bad_request"),
        ({"num_multimask_outputs": 2}, 400, "bad_request"),
    ],
)
async def test_errors(kit: Kit, client: Any, photo: Photo, change: Any, status: int, code: str) -> None:
    ask = {"image": photo.uri, "model": "sam2-demo", "points": [[photo.click]], "labels": [[1]], **change}
    with pytest.raises(kit.PixanoInferenceError) as refused:
        await client.segmentation(kit.SegmentationRequest(**ask))
    error = refused.value
    assert (error.status_code, error.code) == (status, code)
    assert error.request_id


async def test_unknown_job(kit: Kit, client: Any) -> None:
    for call in (client.get_job, client.cancel_job):
        with pytest.raises(kit.PixanoInferenceError) as refused:
            await call("job-0")
        assert (refused.value.status_code, refused.value.code) == (404, "not_found")


async def test_sync_client(kit: Kit, live: Live, photo: Photo) -> None:
    def ask() -> Any:
        with kit.SyncPixanoInferenceClient(live.url) as client:
            assert client.ready()["ready"]
            request = kit.SegmentationRequest(image=photo.uri, model="sam2-demo", boxes=[photo.box])
            return client.segmentation(request)

    answer = await asyncio.to_thread(ask)
    assert max(iou(mask, photo.truth) for mask in answer.data.masks[0]) > 0.7


async def test_binary_forms(kit: Kit, client: Any, live: Live, photo: Photo, clip: Clip) -> None:
    """What the clients have no call for, read with their response models; each equals the JSON form."""
    seg = {"model": "sam2-demo", "boxes": [photo.box]}
    det = {"model": "owlv2-demo", "classes": [photo.words], "box_threshold": 0.1}
    track = {
        "model": "sam2-demo-video",
        "objectsIds": [1],
        "frameIndexes": [0],
        "keyframes": [{"frameIndex": 0, "prompts": {"points": [{"x": clip.click[0], "y": clip.click[1], "label": 1}]}}],
    }
    frames = [("frames", (f"{i}.png", frame, "image/png")) for i, frame in enumerate(clip.frames)]
    async with httpx.AsyncClient(base_url=live.url, timeout=60) as http:
        answer = await http.post(
            "/v1/inference/segmentation/binary",
            data={"metadata": json.dumps(seg)},
            files={"image": ("i.png", photo.png, "image/png")},
        )
        by_json = await client.segmentation(kit.SegmentationRequest(**seg, image=photo.uri))
        assert kit.SegmentationResponse.model_validate(answer.json()).data == by_json.data
        answer = await http.post(
            "/v1/inference/detection/binary",
            files={"metadata": ("m.json", json.dumps(det)), "image": ("i.png", photo.png)},
        )
        by_json = await client.detection(kit.DetectionRequest(**det, image=photo.uri))
        assert kit.DetectionResponse.model_validate(answer.json()).data == by_json.data
        form = {"data": {"metadata": json.dumps(track)}, "files": frames}
        answer = await http.post("/v1/inference/tracking/binary", **form)
        by_json = await client.tracking(kit.TrackingRequestV1.model_validate({**track, "video": clip.uris}))
        assert kit.TrackingResponse.model_validate(answer.json()).data == by_json.data
        answer = await http.post("/v1/inference/tracking/jobs/binary", **form)
        assert answer.status_code == 202
    done = await client.wait_for_job(answer.json()["jobId"], poll_interval=0.05, timeout=60)
    output = kit.TrackingOutput.model_validate(done.data) if isinstance(done.data, dict) else done.data
    assert output == by_json.data
