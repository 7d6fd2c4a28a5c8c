"""Pixano 0.8's own application: its routes connect to our server and to the provider ``edge`` within the process.

Only the dataset is a stand-in: it answers with the bytes of one photo or clip.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pixano.api.routers import inference as routes
from pixano.api.settings import Settings, get_settings

from pixano_edge.engine.provider import EdgeProvider
from pixano_edge.engine.provider.pixano import register
from tests.clients.material import Clip, Photo, iou


@pytest.fixture(scope="module", params=["pixano-inference", "edge"])
def app(request: pytest.FixtureRequest, url: str, photo: Photo, clip: Clip) -> Iterator[Any]:
    """A client of Pixano's routes, connected."""
    register(settings={"threads": 1})
    dataset = SimpleNamespace(
        get_view_binary=lambda table, view: (photo.png, "image/png"),
        get_temporal_view_batch=lambda table, record_id, view_name, start_frame, batch_size: [
            (start_frame + i, frame, "image/png") for i, frame in enumerate(clip.frames[:batch_size])
        ],
    )
    settings = Settings()
    app = FastAPI()
    app.include_router(routes.router)
    app.dependency_overrides[get_settings] = lambda: settings
    with pytest.MonkeyPatch.context() as patch, TestClient(app) as client:
        patch.setattr(routes, "_get_dataset", lambda dataset_id, settings: dataset)
        answer = client.post("/inference/connect", params={"provider_type": request.param, "url": url})
        assert answer.status_code == 200, answer.text
        name = answer.json()["provider"]
        assert client.get("/inference/connected").json()["providers"][name]["url"] == url
        client.provider = settings.inference_providers[name]  # type: ignore[attr-defined]
        yield client
        client.portal.call(client.provider.close)  # type: ignore[union-attr, attr-defined]


def test_models(app: Any) -> None:
    models = app.get("/inference/models/list", params={"task": "image_mask_generation"}).json()
    assert [m["name"] for m in models] == ["sam2-demo"]
    assert app.get("/inference/models/server-info").json()["models_to_task"]["owlv2-demo"] == "detection"


def test_warm_up_and_clicks(app: Any, photo: Photo) -> None:
    ask: dict[str, Any] = {"model": "sam2-demo", "dataset_id": "d", "view_id": "v"}
    warm = app.post("/inference/image_mask_generation", json={**ask, "return_image_embedding": True})
    assert warm.status_code == 200, warm.text
    data = warm.json()["data"]
    assert data["image_embedding"]
    assert data["high_resolution_features"]
    features = {key: data[key] for key in ("image_embedding", "high_resolution_features")}
    click = {**ask, **features, "points": [[photo.click]], "labels": [[1]], "return_logits": True}
    first = app.post("/inference/image_mask_generation", json=click).json()["data"]
    assert iou(first["masks"][0][0], photo.truth) > 0.7
    assert first["scores"]["values"][0] > 0
    again = {**click, "mask_input": first["mask_logits"], "boxes": [photo.box], "points": None, "labels": None}
    second = app.post("/inference/image_mask_generation", json=again).json()["data"]
    assert iou(second["masks"][0][0], photo.truth) > 0.7


def test_tracking_job_in_a_window(app: Any, clip: Clip) -> None:
    """Trap 9: the routes take relative frame indexes and make them absolute."""
    start = 100
    x, y = clip.click
    body = {
        "model": "sam2-demo-video",
        "dataset_id": "d",
        "record_id": "r",
        "view_name": "v",
        "start_frame_index": start,
        "frame_count": len(clip.frames),
        "objects_ids": [0],
        "prompt_frame_indexes": [start],
        "interval": {"start_frame": start, "end_frame": start + len(clip.frames) - 1},
        "keyframes": [{"frame_index": start, "points": [{"x": x, "y": y, "label": 1}], "box": None}],
    }
    status = app.post("/inference/video_mask_generation/jobs", json=body).json()
    deadline = time.monotonic() + 60
    while status["status"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
        status = app.get(f"/inference/video_mask_generation/jobs/{status['job_id']}").json()
    assert status["status"] == "completed", status["detail"]
    assert status["data"]["frame_indexes"] == [start + i for i in range(len(clip.frames))]
    assert np.mean([iou(m, t) for m, t in zip(status["data"]["masks"], clip.truth)]) > 0.6


def test_mask_keyframe_with_empty_points(app: Any, clip: Clip) -> None:
    """Trap 16: the page fills points with [] and box with null beside a mask."""
    from pixano_edge.engine.models.rle import encode_rle

    encoded = encode_rle(clip.truth[0])
    mask = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
    body = {
        "model": "sam2-demo-video",
        "dataset_id": "d",
        "record_id": "r",
        "view_name": "v",
        "start_frame_index": 0,
        "frame_count": 3,
        "objects_ids": [0],
        "keyframes": [{"frame_index": 0, "points": [], "box": None, "mask": mask}],
    }
    answer = app.post("/inference/video_mask_generation", json=body)
    assert answer.status_code == 200, answer.text
    assert iou(answer.json()["data"]["masks"][0], clip.truth[0]) > 0.9


def test_detection(app: Any, photo: Photo) -> None:
    body = {"model": "owlv2-demo", "image": photo.uri, "classes": [photo.words], "box_threshold": 0.1}
    data = app.post("/inference/detection", json=body).json()["data"]
    assert np.abs(np.array(data["boxes"][0]) - photo.box).max() < 40


def test_vlm(app: Any) -> None:
    model, _ = app.get("/inference/models/list", params={"task": "vlm"}).json()
    body = {"prompt": "Hello", "dataset_id": "d", "image_ids": ["v"], "max_new_tokens": 4, "temperature": 0}
    answer = app.post("/inference/vlm", json={**body, "model": model["name"]})
    assert answer.status_code == 200
    assert 1 <= answer.json()["data"]["usage"]["completion_tokens"] <= 4
    answer = app.post("/inference/vlm", json={**body, "model": "sam2-demo"})
    assert answer.status_code == 400
    assert answer.json()["detail"]


def test_errors_keep_their_status(app: Any) -> None:
    """An error of any other kind than Pixano's own would be answered with 500."""
    ask = {"dataset_id": "d", "view_id": "v"}
    assert app.post("/inference/image_mask_generation", json={**ask, "model": "nobody"}).status_code == 404
    wrong = {**ask, "model": "sam2-demo", "points": [[[1, 2]]], "labels": [[1], [1]]}
    assert app.post("/inference/image_mask_generation", json=wrong).status_code == 400
    body = {"model": "nobody", "image": "AAAA", "classes": ["x"]}
    assert app.post("/inference/detection", json=body).status_code == 404
    assert app.post("/inference/embedding", json={"model": "sam2-demo", "text": "x"}).status_code == 400


def test_the_provider_is_both(app: Any) -> None:
    from pixano.inference import InferenceProvider, get_provider, is_provider_registered

    assert is_provider_registered("edge")
    provider = get_provider("edge", url="http://localhost:1", api_key="k")
    assert isinstance(provider, InferenceProvider)
    assert isinstance(provider, EdgeProvider)
    assert provider.name == "edge"
