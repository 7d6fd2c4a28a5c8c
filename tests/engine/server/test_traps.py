"""The twenty traps of Pixano's protocols, one test each, by the numbers of the contract (docs/server.md lists them)."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixano_edge.engine.models.rle import decode_rle, encode_rle
from pixano_edge.engine.provider import EdgeProvider, VideoMaskGenerationResult
from pixano_edge.engine.server import schemas_out
from pixano_edge.engine.server.answers import tracking
from tests.engine.provider.fakes import FakeOpener, data_uri, png, until

SEGMENT = "/v1/inference/segmentation"
TRACK = "/v1/inference/tracking"
WIDE = data_uri(png(161, 97))
STATES = {"NOT_STARTED", "DEPLOYING", "RUNNING", "DEPLOY_FAILED", "UNHEALTHY", "DELETING"}


def clip(frames: int = 3, **changes: Any) -> dict[str, Any]:
    """A tracking request: object 7 by a box, object 9 by a point, both on the first frame."""
    keyframes = [
        {"frameIndex": 0, "prompts": {"box": {"x": 10, "y": 20, "width": 30, "height": 5}}},
        {"frameIndex": 0, "prompts": {"points": [{"x": 100, "y": 50, "label": 1}]}},
    ]
    request = {
        "model": "alpha-video",
        "video": [data_uri(png(161, 97, (i, 0, 0))) for i in range(frames)],
        "objectsIds": [7, 9],
        "frameIndexes": [0, 0],
        "keyframes": keyframes,
    }
    return {**request, **changes}


async def ended(client: Any, job_id: str) -> dict[str, Any]:
    """A job's last state."""
    for _ in range(2000):
        status = (await client.get(f"/v1/jobs/{job_id}")).json()
        if status["status"] != "running":
            return status
        await asyncio.sleep(0.01)
    raise AssertionError("the job did not end")


async def test_trap_01_tracking_answers_hold_both_shapes(client: Any) -> None:
    data = (await client.post(TRACK, json=clip())).json()["data"]
    assert set(data) == {"frames", "objectsIds", "frameIndexes", "masks"}
    rows = [(f["frameIndex"], o["trackId"], o["mask"]) for f in data["frames"] for o in f["objects"]]
    assert [(f, o) for f, o, _ in rows] == [(0, 7), (0, 9), (1, 7), (1, 9), (2, 7), (2, 9)]
    assert data["frameIndexes"] == [f for f, _, _ in rows]
    assert data["objectsIds"] == [o for _, o, _ in rows]
    assert data["masks"] == [m for _, _, m in rows]
    assert all(o["mask"] is not None for f in data["frames"] for o in f["objects"])
    job = await client.post(f"{TRACK}/jobs", json=clip())
    assert set((await ended(client, job.json()["jobId"]))["data"]) == set(data)


async def test_trap_02_the_data_of_a_job_is_camel_case(client: Any) -> None:
    job = (await client.post(f"{TRACK}/jobs", json=clip())).json()
    done = await ended(client, job["jobId"])
    assert done["status"] == "completed"
    assert done["data"]["objectsIds"] == [7, 9, 7, 9, 7, 9]
    assert done["data"]["frameIndexes"] == [0, 0, 1, 1, 2, 2]
    assert not [key for key in done["data"] if "_" in key]


async def test_trap_03_jobs_know_four_states_and_are_submitted_with_202(client: Any, opener: FakeOpener) -> None:
    opener.gate.clear()  # the model does not even load
    begun = await client.post(f"{TRACK}/jobs", json=clip())
    assert (begun.status_code, begun.json()["status"], begun.json()["data"]) == (202, "running", None)
    path = f"/v1/jobs/{begun.json()['jobId']}"
    assert (await client.get(path)).json()["status"] == "running"
    stopped = await client.delete(path)
    assert (stopped.status_code, stopped.json()["status"], stopped.json()["detail"]) == (
        200,
        "canceled",
        "Job canceled.",
    )
    assert (await client.delete(path)).json() | {"processingTime": 0} == stopped.json() | {"processingTime": 0}
    opener.gate.set()
    failed = await client.post(f"{TRACK}/jobs", json=clip(video=[WIDE, data_uri(b"no image")]))
    found = await ended(client, failed.json()["jobId"])
    assert (found["status"], found["data"]) == ("failed", None)
    assert found["detail"].startswith("Frame 1:")


async def test_trap_04_arrays_are_base64_in_v1_and_lists_in_the_older_protocols(client: Any) -> None:
    click = {"model": "alpha", "image": WIDE, "points": [[[3, 4]]], "labels": [[1]], "return_logits": True}
    data = (await client.post(SEGMENT, json=click)).json()["data"]
    scores = np.frombuffer(base64.b64decode(data["scores"]["data"]), "<f4").reshape(data["scores"]["shape"])
    assert scores.tolist() == [[np.float32(0.2), np.float32(0.9), np.float32(0.5)]]
    assert data["scores"]["dtype"] == "float32"
    assert data["maskLogits"]["shape"] == [3, 32, 32]
    old = (await client.post("/tasks/image/mask_generation/", json=click)).json()["data"]
    assert old["scores"]["shape"] == [1, 3]
    assert np.float32(old["scores"]["values"]).tolist() == scores.reshape(-1).tolist()
    flat = (await client.post(SEGMENT, json={**click, "maskInput": {"shape": [0], "data": ""}})).json()["error"]
    assert flat["code"] == "validation_error"  # an empty dimension is refused, and never sent:
    assert all(side >= 1 for array in (data["scores"], data["maskLogits"]) for side in array["shape"])


async def test_trap_05_the_class_of_a_tracked_object_is_called_class(client: Any) -> None:
    data = (await client.post(TRACK, json=clip())).json()["data"]
    assert set(data["frames"][0]["objects"][0]) == {"trackId", "box", "score", "class", "mask"}
    output = schemas_out.TrackingData.model_validate(data)
    assert output.frames[0].objects[0].class_name is None


async def test_trap_06_answers_are_camel_case_and_requests_may_be_snake_case(client: Any) -> None:
    camel = {"model": "alpha", "image": WIDE, "multimaskOutput": False, "returnLogits": True, "boxes": [[1, 2, 9, 8]]}
    snake = {"model": "alpha", "image": WIDE, "multimask_output": False, "return_logits": True, "boxes": [[1, 2, 9, 8]]}
    first, second = [(await client.post(SEGMENT, json=body)).json() for body in (camel, snake)]
    assert first["data"] == second["data"]
    assert set(first) == {"id", "status", "timestamp", "processingTime", "metadata", "data"}
    assert {"model_name", "capability", "model_class"} <= set(first["metadata"])
    ready = (await client.get("/v1/ready")).json()
    assert "models_loaded" in ready
    assert "modelsStatus" in (await client.get("/v1/info")).json()


async def test_trap_07_models_are_listed_by_capability_and_for_the_older_protocols_by_task(client: Any) -> None:
    models = {m["name"]: m for m in (await client.get("/v1/models")).json()}
    assert {name: m["capability"] for name, m in models.items()} == {
        "alpha": "segmentation",
        "alpha-video": "tracking",
        "find": "detection",
    }
    for model in models.values():
        assert model["status"] in STATES
        assert model["interface"]["capability"] == model["capability"]
        schemas_out.Model.model_validate(model)
    old = {m["name"]: m["task"] for m in (await client.get("/app/models/")).json()}
    assert old == {
        "alpha": "image_mask_generation",
        "alpha-video": "video_mask_generation",
        "find": "image_zero_shot_detection",
    }


async def test_trap_08_what_is_asked_again_is_computed_once_and_work_ends_with_the_client(
    client: Any, opener: FakeOpener
) -> None:
    click = {"model": "alpha", "image": WIDE, "points": [[[3, 4]]], "labels": [[1]]}
    await client.post(SEGMENT, json=click)
    predictor = opener.opened[0]
    predictor.gate.clear()
    predictor.predicted.clear()
    attempts = [asyncio.ensure_future(client.post(SEGMENT, json=click)) for _ in range(3)]
    await asyncio.to_thread(until, predictor.entered.is_set)
    await asyncio.sleep(0.3)
    predictor.gate.set()
    answers = [(await attempt).json()["data"] for attempt in attempts]
    assert answers[0] == answers[1] == answers[2]
    assert len(predictor.predicted) == 1
    # A permanent failure is none of the statuses that are tried again.
    for body in ({**click, "model": "nobody"}, {**click, "model": "find"}, {**click, "image": data_uri(b"?")}):
        assert (await client.post(SEGMENT, json=body)).status_code in (400, 404)


async def test_trap_08_a_full_queue_costs_nothing_and_says_when_to_come_back(
    provider: EdgeProvider, opener: FakeOpener, tmp_path: Path
) -> None:
    from pixano_edge.engine.server import ServerSettings, create_app
    from tests.engine.provider.fakes import make_provider
    from tests.engine.server.conftest import asgi

    small = make_provider(tmp_path, opener, queue_depth=1)
    async with asgi(create_app(ServerSettings(), small)) as client:
        click = {"model": "alpha", "image": WIDE}
        await client.post(SEGMENT, json=click)
        predictor = opener.opened[0]
        predictor.gate.clear()
        predictor.entered.clear()
        predictor.predicted.clear()
        first = asyncio.ensure_future(client.post(SEGMENT, json={**click, "boxes": [[1, 1, 5, 5]]}))
        await asyncio.to_thread(until, predictor.entered.is_set)
        refused = await client.post(SEGMENT, json={**click, "boxes": [[2, 2, 6, 6]]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert refused.headers["Retry-After"] == "1"
        predictor.gate.set()
        assert (await first).status_code == 200
        assert len(predictor.predicted) == 1
    await small.close()


async def test_trap_09_frame_indexes_are_those_of_the_frames_that_were_sent(client: Any) -> None:
    request = clip(5, interval={"startFrame": 3, "endFrame": 1, "direction": "backward"})
    for keyframe in request["keyframes"]:
        keyframe["frameIndex"] = 3
    data = (await client.post(TRACK, json=request)).json()["data"]
    assert data["frameIndexes"] == [3, 3, 2, 2, 1, 1]
    assert max(data["frameIndexes"]) < 5


async def test_trap_10_the_status_is_success_and_the_time_is_iso(client: Any) -> None:
    answer = (await client.post(SEGMENT, json={"model": "alpha", "image": WIDE})).json()
    assert answer["status"] == "SUCCESS"
    assert datetime.fromisoformat(answer["timestamp"]).utcoffset().total_seconds() == 0
    job = (await client.post(f"{TRACK}/jobs", json=clip())).json()
    assert datetime.fromisoformat(job["timestamp"]).tzinfo is not None
    await ended(client, job["jobId"])


async def test_trap_11_the_seed_result_of_a_video_has_its_status_second() -> None:
    assert list(VideoMaskGenerationResult.__dataclass_fields__)[:2] == ["data", "status"]
    with pytest.raises(TypeError):
        VideoMaskGenerationResult(tracking, timestamp=datetime.now(), processing_time=0.0, metadata={})  # type: ignore


async def test_trap_12_a_client_without_a_key_is_told_that_it_needs_one(connect: Any) -> None:
    client = connect(api_keys=("secret",))
    assert (await client.get("/v1/ready")).status_code == 200  # what Pixano's command asks before it connects: nothing
    refused = await client.get("/v1/models")
    assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert "API key" in refused.json()["error"]["message"]


async def test_trap_13_pixels_are_counted_on_the_header_and_bodies_before_they_are_read(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")  # 400 megapixels in 50 KB
    client = connect(max_request_body_bytes=200_000)
    decoded = []
    monkeypatch.setattr("pixano_edge.engine.models.images._to_rgb", lambda *a: decoded.append(a))
    refused = await client.post(SEGMENT, json={"model": "alpha", "image": data_uri(bomb.getvalue())})
    assert (refused.status_code, decoded) == (400, [])
    assert "pixels" in refused.json()["error"]["message"]
    long = await client.post(SEGMENT, content=b"x" * 200_001)
    assert (long.status_code, long.json()["error"]["code"]) == (413, "payload_too_large")

    async def endless() -> Any:
        for _ in range(30):
            yield b"x" * 10_000

    chunked = await client.post(SEGMENT, content=endless(), headers={"Content-Type": "application/json"})
    assert chunked.status_code == 413


async def test_trap_14_paths_are_exact_and_nothing_redirects(client: Any) -> None:
    click = {"model": "alpha", "image": WIDE}
    for path, status in ((SEGMENT, 200), (f"{SEGMENT}/", 404), ("/tasks/image/mask_generation/", 200)):
        assert (await client.post(path, json=click)).status_code == status, path
    for path, status in (("/v1/models", 200), ("/v1/models/", 404), ("/app/models/", 200), ("/app/models", 404)):
        assert (await client.get(path)).status_code == status, path


async def test_trap_15_listing_models_is_cheap_and_loads_nothing(client: Any, opener: FakeOpener) -> None:
    await client.get("/v1/models")
    times = []
    for _ in range(30):
        begun = time.perf_counter()
        assert (await client.get("/v1/models")).status_code == 200
        times.append(time.perf_counter() - begun)
    assert opener.tasks == []
    assert sorted(times)[3] < 0.05  # about 1 ms on a quiet machine


async def test_trap_16_empty_points_beside_a_mask_are_none(client: Any) -> None:
    mask = np.zeros((97, 161), bool)
    mask[5:20, 30:90] = True
    encoded = encode_rle(mask)
    rle = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
    keyframe = {"frameIndex": 0, "prompts": {"points": [], "box": None, "mask": rle}}
    answer = await client.post(TRACK, json=clip(objectsIds=[1], frameIndexes=[0], keyframes=[keyframe]))
    assert answer.status_code == 200
    assert np.array_equal(decode_rle(answer.json()["data"]["masks"][0]), mask)
    for prompts in ({"points": []}, {"mask": rle, "box": {"x": 1, "y": 1, "width": 2, "height": 2}}, {}):
        bad = clip(objectsIds=[1], frameIndexes=[0], keyframes=[{"frameIndex": 0, "prompts": prompts}])
        assert (await client.post(TRACK, json=bad)).status_code == 422
    bad = clip(objectsIds=[1], keyframes=[{"frameIndex": 0, "prompts": {"points": [{"x": 1, "y": 1, "label": 2}]}}])
    assert (await client.post(TRACK, json=bad)).status_code == 422


async def test_trap_17_a_refused_upload_does_not_come_back(client: Any) -> None:
    image = png(161, 97)
    metadata = json.dumps({"model": "alpha", "points": "SECRET-INPUT"})
    refused = await client.post(f"{SEGMENT}/binary", data={"metadata": metadata}, files={"image": ("a.png", image)})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "validation_error")
    assert b"SECRET-INPUT" not in refused.content
    assert len(refused.content) < 500
    assert [e["loc"][:2] for e in refused.json()["error"]["message"]] == [["body", "points"]]


async def test_trap_18_masks_lie_as_the_image_lies(client: Any) -> None:
    box = [100, 10, 150, 30]
    click = {"model": "alpha", "image": WIDE, "boxes": [box], "multimaskOutput": False}
    (mask,) = (await client.post(SEGMENT, json=click)).json()["data"]["masks"][0]
    assert mask["size"] == [97, 161]
    expected = np.zeros((97, 161), bool)
    expected[10:30, 100:150] = True
    assert np.array_equal(decode_rle(mask), expected)


async def test_trap_19_no_image_is_turned_by_its_exif_tag(client: Any) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (161, 97)).save(buffer, "JPEG", exif=exif)
    click = {"model": "alpha", "image": data_uri(buffer.getvalue(), "jpeg"), "boxes": [[100, 10, 150, 30]]}
    answer = await client.post(SEGMENT, json=click)
    assert answer.json()["data"]["masks"][0][0]["size"] == [97, 161]


async def test_trap_20_bytes_that_are_no_text_are_refused_in_json_and_taken_as_an_upload(client: Any) -> None:
    image = png(161, 97)
    body = b'{"model":"alpha","image":"' + image + b'"}'
    refused = await client.post(SEGMENT, content=body, headers={"Content-Type": "application/json"})
    assert refused.status_code == 422
    assert image not in refused.content
    bare = {"model": "alpha", "image": base64.b64encode(image).decode()}  # without "data:" it is a path, and refused
    assert (await client.post(SEGMENT, json=bare)).status_code == 400
    taken = await client.post(f"{SEGMENT}/binary", data={"metadata": '{"model":"alpha"}'}, files={"image": image})
    assert taken.status_code == 200


def test_every_trap_has_its_test() -> None:
    names = [name for name in globals() if name.startswith("test_trap_")]
    assert {int(name[10:12]) for name in names} == set(range(1, 21))
