"""The seed-era Pixano's calls, made by a stand-in for its provider."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from pixano_edge.engine.provider import EdgeMaskGenerationInput, EdgeVideoMaskGenerationInput
from tests.clients.conftest import VLM, Live
from tests.clients.material import Clip, Photo, iou
from tests.clients.seed import SeedError, SeedProvider

MASK = "/tasks/image/mask_generation/"
POSTS = (
    MASK,
    "/tasks/video/mask_generation/",
    "/tasks/image/zero_shot_detection/",
    "/tasks/multimodal/text-image/conditional_generation/",
)


@pytest.fixture
async def seed(live: Live) -> AsyncIterator[SeedProvider]:
    provider = SeedProvider(live.url)
    yield provider
    await provider.close()


@pytest.mark.parametrize("first", ["/health", "/ready", "/nowhere"])
async def test_connect(seed: SeedProvider, first: str) -> None:
    await seed.connect(first)


async def test_models_carry_the_long_task_names(seed: SeedProvider) -> None:
    """Trap 7, the other way round: here a capability would make every model vanish."""
    assert {m.name: m.task for m in await seed.list_models()} == {
        "grounding-dino-demo": "image_zero_shot_detection",
        "owlv2-demo": "image_zero_shot_detection",
        "sam2-demo": "image_mask_generation",
        "sam2-demo-video": "video_mask_generation",
        "smolvlm-demo": "text_image_conditional_generation",
        VLM: "text_image_conditional_generation",
    }
    assert [m.name for m in await seed.list_models("video_mask_generation")] == ["sam2-demo-video"]


async def test_server_info(seed: SeedProvider) -> None:
    info = await seed.get_server_info()
    assert info.ready is True
    assert info.models_to_task["sam2-demo"] == "image_mask_generation"
    assert isinstance(info.gpu_info, dict)
    assert isinstance(info.gpus_used, list)


async def test_mask_of_a_click_as_the_helper_asks_for_it(seed: SeedProvider, live: Live, photo: Photo) -> None:
    ask: dict[str, Any] = {
        "image": photo.uri,
        "model": "sam2-demo",
        "points": [[photo.click]],
        "labels": [[1]],
        "num_multimask_outputs": 1,
        "multimask_output": False,
    }
    result = await seed.image_mask_generation(**ask)
    assert result.status == "SUCCESS"
    mask, score = result.data["masks"][0][0], result.data["scores"]["values"][0]
    assert mask["size"] == list(photo.truth.shape)
    assert photo.truth.shape[0] != photo.truth.shape[1]
    assert iou(mask, photo.truth) > 0.7
    own = (await live.provider.image_mask_generation(EdgeMaskGenerationInput(**ask))).data
    assert mask == own.masks[0][0].to_dict()
    assert np.float32(score) == np.float32(own.scores.values[0])


async def test_features_come_back_bit_for_bit(seed: SeedProvider, live: Live, photo: Photo) -> None:
    """Trap 4: arrays are lists of numbers here. A second click with them gives what the first gives without."""
    ask: dict[str, Any] = {"image": photo.uri, "model": "sam2-demo", "boxes": [photo.box]}
    first = (await seed.image_mask_generation(**ask, return_image_embedding=True)).data
    own = EdgeMaskGenerationInput(**ask, return_image_embedding=True)
    reference = (await live.provider.image_mask_generation(own)).data.image_embedding
    assert first["image_embedding"]["shape"] == reference.shape
    assert np.array_equal(np.asarray(first["image_embedding"]["values"], np.float32), reference.values)
    assert len(first["high_resolution_features"]) == 2
    features = {key: first[key] for key in ("image_embedding", "high_resolution_features")}
    second = (await seed.image_mask_generation(**ask, **features)).data
    assert second["masks"] == first["masks"]
    assert second["scores"] == first["scores"]
    assert second["image_embedding"] is None


async def test_video_as_the_helper_asks_for_it(seed: SeedProvider, live: Live, clip: Clip) -> None:
    """Ids and frames for the whole clip, one prompt: the surplus is left out."""
    ask: dict[str, Any] = {
        "video": clip.uris,
        "model": "sam2-demo-video",
        "objects_ids": list(range(len(clip.frames))),
        "frame_indexes": list(range(len(clip.frames))),
        "points": [[clip.click]],
        "labels": [[1]],
    }
    result = await seed.video_mask_generation(**ask)
    assert result.status == "SUCCESS"  # upper case, or the helper drops the answer
    assert result.data["objects_ids"] == [0] * len(clip.frames)
    assert result.data["frame_indexes"] == list(range(len(clip.frames)))
    assert np.mean([iou(m, t) for m, t in zip(result.data["masks"], clip.truth)]) > 0.6
    own = (await live.provider.video_mask_generation(EdgeVideoMaskGenerationInput(**ask))).data
    assert result.data["masks"] == [mask.to_dict() for mask in own.masks]


async def test_detection(seed: SeedProvider, photo: Photo) -> None:
    ask = {"image": photo.uri, "model": "owlv2-demo", "classes": [photo.words], "box_threshold": 0.1}
    data = (await seed.image_zero_shot_detection(**ask)).data
    assert data["boxes"]
    assert set(data["classes"]) == {photo.words}
    assert np.abs(np.array(data["boxes"][0]) - photo.box).max() < 40
    assert data["scores"] == sorted(data["scores"], reverse=True)


async def test_text(seed: SeedProvider, photo: Photo) -> None:
    models = await seed.list_models("text_image_conditional_generation")
    ask = {"prompt": "What is this?", "images": [photo.uri], "max_new_tokens": 4, "temperature": 0.0}
    if models:
        data = (await seed.text_image_conditional_generation(model=models[0].name, **ask)).data
        usage = data["usage"]
        assert isinstance(data["generated_text"], str)
        assert usage["completion_tokens"] <= 4
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    else:
        with pytest.raises(SeedError) as refused:
            await seed.text_image_conditional_generation(model="sam2-demo", **ask)
        assert refused.value.status == 400


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "nobody"}, 404),
        ({"model": "owlv2-demo"}, 400),
        ({"image": "AAAA"}, 400),
        ({"image": "data:image/png;base64,AAAA"}, 400),
        ({"points": [[[1.5, 2]]]}, 422),
        ({"points": [[[1, 2, 3]]]}, 422),
        ({"image_embedding": {"values": [1.0], "shape": [2]}, "high_resolution_features": []}, 400),
        ({"image_embedding": {"values": ["x"], "shape": [1]}}, 400),
    ],
)
async def test_errors_are_a_detail(seed: SeedProvider, photo: Photo, change: Any, status: int) -> None:
    ask = {"image": photo.uri, "model": "sam2-demo", "points": [[photo.click]], "labels": [[1]]}
    with pytest.raises(SeedError) as refused:
        await seed.image_mask_generation(**{**ask, **change})
    assert refused.value.status == status
    assert photo.uri[:60] not in str(refused.value)


@pytest.mark.parametrize("path", POSTS)
async def test_bodies_that_are_no_requests(live: Live, path: str) -> None:
    async with httpx.AsyncClient(base_url=live.url) as client:
        for body in (b"", b"{", b"[]", b"{}", b'{"model": 3}', b"\xff", b"[" * 100_000):
            answer = await client.post(path, content=body)
            assert answer.status_code == 422, body[:10]
            assert answer.json()["detail"]


@pytest.mark.parametrize("path", [*POSTS, "/app/models/", "/app/settings/"])
async def test_trap_14_no_redirect_to_another_slash(live: Live, path: str) -> None:
    async with httpx.AsyncClient(base_url=live.url) as client:
        method = "GET" if path.startswith("/app") else "POST"
        assert (await client.request(method, path, content=b"{}")).status_code in (200, 422)
        assert (await client.request(method, path.rstrip("/"), content=b"{}")).status_code == 404


async def test_many_at_once(seed: SeedProvider, photo: Photo) -> None:
    ask = {"image": photo.uri, "model": "sam2-demo", "points": [[photo.click]], "labels": [[1]]}
    answers = await asyncio.gather(*(seed.image_mask_generation(**ask) for _ in range(4)))
    assert all(answer.data == answers[0].data for answer in answers)
