"""The inference routes of v1: JSON and uploads, what each answers, and how each fails."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.errors import CancelledError
from pixano_edge.engine.models.rle import decode_rle
from pixano_edge.engine.provider import EdgeProvider
from pixano_edge.engine.provider.errors import InferenceError, OutOfMemoryError
from pixano_edge.engine.provider.types import (
    TextImageConditionalGenerationOutput,
    TextImageConditionalGenerationResult,
    UsageInfo,
)
from pixano_edge.engine.server import schemas_out
from tests.engine.provider.fakes import FakeOpener, data_uri, png, until
from tests.engine.server.test_traps import clip

V1 = "/v1/inference"
IMAGE = png(161, 97)
URI = data_uri(IMAGE)
CLICK = {"model": "alpha", "image": URI, "points": [[[3, 4]]], "labels": [[1]]}


async def test_masks_with_embeddings_there_and_back(client: Any, opener: FakeOpener) -> None:
    warm = {"model": "alpha", "image": URI, "multimaskOutput": False, "returnImageEmbedding": True}
    answer = (await client.post(f"{V1}/segmentation", json=warm)).json()
    data = schemas_out.SegmentationAnswer.model_validate(answer).data
    assert data.image_embedding.shape == [32, 8, 8]
    assert [f.shape for f in data.high_resolution_features] == [[4, 32, 32], [8, 16, 16]]
    assert (data.mask_logits, len(data.masks), len(data.masks[0])) == (None, 1, 1)
    echo = {k: answer["data"][k] for k in ("imageEmbedding", "highResolutionFeatures")}
    await client.post(f"{V1}/segmentation", json={**CLICK, **echo})
    assert opener.opened[0].encoded == 1
    for half in (
        {"imageEmbedding": echo["imageEmbedding"]},
        {"highResolutionFeatures": echo["highResolutionFeatures"]},
    ):
        refused = await client.post(f"{V1}/segmentation", json={**CLICK, **half})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_request")


@pytest.mark.parametrize(
    ("array", "status"),
    [
        ({"shape": [1, 32, 32], "data": base64.b64encode(bytes(4096)).decode()}, 200),
        ({"shape": [32, 32], "dtype": "float64", "data": base64.b64encode(bytes(4096)).decode()}, 200),
        ({"shape": [1, 32, 32], "data": base64.b64encode(bytes(4092)).decode()}, 400),
        ({"shape": [1, 32, 32], "data": base64.b64encode(bytes(4096)).decode()[:-4] + "A=A="}, 400),
        ({"shape": [1, 32, 32], "data": base64.b64encode(np.full(1024, np.nan, "<f4").tobytes()).decode()}, 400),
        ({"shape": [3, 3], "data": base64.b64encode(bytes(36)).decode()}, 400),
        ({"shape": [1 << 40, 1 << 40], "data": ""}, 400),
        ({"shape": [], "data": ""}, 422),
        ({"shape": [0, 32], "data": ""}, 422),
        ({"shape": [32, 32]}, 422),
    ],
)
async def test_arrays_of_requests_are_checked(client: Any, array: dict[str, Any], status: int) -> None:
    answer = await client.post(f"{V1}/segmentation", json={**CLICK, "maskInput": array})
    assert answer.status_code == status, answer.text


async def test_uploads_answer_as_json_does(client: Any) -> None:
    metadata = {k: v for k, v in CLICK.items() if k != "image"}
    plain = (await client.post(f"{V1}/segmentation", json=CLICK)).json()["data"]
    as_text = await client.post(
        f"{V1}/segmentation/binary", data={"metadata": json.dumps(metadata)}, files={"image": IMAGE}
    )
    as_file = await client.post(
        f"{V1}/segmentation/binary",
        files={
            "metadata": ("m.json", json.dumps(metadata), "application/json"),
            "image": ("a.png", IMAGE, "image/png"),
        },
    )
    assert as_text.json()["data"] == as_file.json()["data"] == plain
    boxes = {"model": "find", "classes": ["cat"]}
    answer = await client.post(f"{V1}/detection/binary", data={"metadata": json.dumps(boxes)}, files={"image": IMAGE})
    assert answer.json()["data"] == (await client.post(f"{V1}/detection", json={**boxes, "image": URI})).json()["data"]
    request = clip()
    frames = [("frames", (f"{i}.png", png(161, 97, (i, 0, 0)), "image/png")) for i in range(3)]
    metadata = {"metadata": json.dumps({k: v for k, v in request.items() if k != "video"})}
    answer = await client.post(f"{V1}/tracking/binary", data=metadata, files=frames)
    assert answer.json()["data"] == (await client.post(f"{V1}/tracking", json=request)).json()["data"]
    job = await client.post(f"{V1}/tracking/jobs/binary", data=metadata, files=frames)
    assert job.status_code == 202
    assert job.json()["status"] in ("running", "completed")  # a fast machine is through already


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ({"files": {"image": IMAGE}}, 400),
        ({"data": {"metadata": '{"model":"alpha"}'}, "files": {"picture": IMAGE}}, 400),
        ({"data": {"metadata": "{"}, "files": {"image": IMAGE}}, 400),
        ({"files": {"metadata": b"\xff\xfe", "image": IMAGE}}, 400),
        ({"data": {"metadata": "[]"}, "files": {"image": IMAGE}}, 422),
        ({"data": {"metadata": "{}"}, "files": {"image": IMAGE}}, 422),
        ({"data": {"metadata": '{"model":"alpha"}'}, "files": [("image", IMAGE), ("image", IMAGE)]}, 400),
        ({"data": {"metadata": '{"model":"alpha"}'}, "files": {"image": b"no image"}}, 400),
        ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data; boundary=y"}}, 400),
        ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}, 400),
        ({"json": CLICK}, 400),
    ],
)
async def test_damaged_uploads_are_refused(client: Any, parts: dict[str, Any], status: int) -> None:
    answer = await client.post(f"{V1}/segmentation/binary", **parts)
    assert answer.status_code == status, answer.text
    assert b"IHDR" not in answer.content


async def test_boxes(client: Any) -> None:
    request = {"model": "find", "image": URI, "classes": "cat. dog."}
    answer = (await client.post(f"{V1}/detection", json=request)).json()
    data = schemas_out.DetectionAnswer.model_validate(answer).data
    assert set(data.classes) <= {"cat", "dog"}
    assert len(data.boxes) == len(data.scores) == len(data.classes) > 0
    for bad in ({"classes": None}, {"classes": []}, {"boxThreshold": 2}):
        refused = await client.post(f"{V1}/detection", json={**request, **bad})
        assert refused.status_code == 400, bad


async def test_what_no_model_does_is_said(client: Any) -> None:
    for path, body in (("embedding", {"model": "alpha", "image": URI}), ("ner", {"model": "alpha", "text": "Ada"})):
        refused = await client.post(f"{V1}/{path}", json=body)
        assert refused.status_code == 400
        assert "GET /v1/models" in refused.json()["error"]["message"]
        assert (await client.post(f"{V1}/{path}", json={**body, "model": "nobody"})).status_code == 404
    for bad in ({"model": "alpha"}, {"model": "alpha", "image": URI, "text": "both"}):
        assert (await client.post(f"{V1}/embedding", json=bad)).status_code == 422
    uploaded = {"data": {"metadata": '{"model":"alpha"}'}, "files": {"image": IMAGE}}
    assert (await client.post(f"{V1}/embedding/binary", **uploaded)).status_code == 400


async def test_text_about_images(client: Any, provider: EdgeProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    async def generate(input_data: Any, timeout: float) -> Any:
        given.append(input_data)
        output = TextImageConditionalGenerationOutput("A cat.", UsageInfo(7, 3, 10), {"temperature": 0.0})
        metadata = {"model_name": "vlm", "model_class": "SmolVlm"}
        return TextImageConditionalGenerationResult(output, None, 0.5, metadata)  # type: ignore[arg-type]

    monkeypatch.setattr(provider, "text_image_conditional_generation", generate)
    body = {"model": "vlm", "prompt": "What?", "images": [URI], "maxNewTokens": 5, "temperature": 0}
    answer = (await client.post(f"{V1}/vlm", json=body)).json()
    data = schemas_out.VlmAnswer.model_validate(answer).data
    assert (data.generated_text, data.usage.total_tokens) == ("A cat.", 10)
    assert (given[0].prompt, given[0].images, given[0].max_new_tokens) == ("What?", [URI], 5)
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URI}}]}]
    await client.post(f"{V1}/vlm", json={"model": "vlm", "prompt": messages, "maxNewTokens": 5, "images": []})
    assert (given[1].prompt, given[1].images) == (messages, None)
    upload = {"metadata": json.dumps({"model": "vlm", "prompt": "x", "maxNewTokens": 1})}
    await client.post(f"{V1}/vlm/binary", data=upload, files=[("images", IMAGE), ("images", IMAGE)])
    assert given[2].images == [IMAGE, IMAGE]
    assert (await client.post(f"{V1}/vlm", json={"model": "vlm", "prompt": "no limit"})).status_code == 422
    outside = {**body, "images": ["http://127.0.0.1/a.png"]}
    assert (await client.post(f"{V1}/vlm", json=outside)).status_code == 400


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "nobody"}, 404),
        ({"model": "find"}, 400),
        ({"image": "/etc/passwd"}, 400),
        ({"image": "../../etc/passwd"}, 400),
        ({"image": "file:///etc/passwd"}, 400),
        ({"image": "s3://bucket/a.png"}, 400),
        ({"image": "http://127.0.0.1:1/a.png"}, 400),
        ({"image": "https://example.org/a.png"}, 400),
        ({"image": "data:image/png;base64,%%%"}, 400),
        ({"image": "data:text/plain;base64,AAAA"}, 400),
        ({"image": "data:image/png;base64,"}, 400),
        ({"image": ""}, 400),
        ({"image": 5}, 422),
        ({"points": [[[1.5, 2]]]}, 422),
        ({"points": [[[1, 2, 3]]]}, 422),
        ({"labels": [[1], [1]]}, 400),
        ({"boxes": [[1, 1, 1, 1]]}, 400),
        ({"numMultimaskOutputs": 2}, 400),
        ({"numMultimaskOutputs": 2, "multimaskOutput": False}, 200),
        ({"points": [[[1.0, 2]]]}, 200),
        ({"resetPredictor": False}, 200),
        ({"labels": None}, 200),
        ({"unknown": {"a": 1}}, 200),
    ],
)
async def test_requests_are_judged(client: Any, change: dict[str, Any], status: int) -> None:
    answer = await client.post(f"{V1}/segmentation", json={**CLICK, **change})
    assert answer.status_code == status, answer.text
    assert "root:" not in answer.text
    if status != 200:
        error = answer.json()["error"]
        assert error["requestId"] == answer.headers["X-Request-ID"]
        assert error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"[]", b'"text"', b"null", b'{"model":', b"[" * 5000, b'{"a":' * 2000, b'{"model":1e999}'],
)
async def test_what_is_no_request_is_422(client: Any, body: bytes) -> None:
    answer = await client.post(f"{V1}/segmentation", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "validation_error")


@pytest.mark.parametrize("wrong", [{"points": [[["x", 1]] * 50_000]}, {"labels": [["x"]] * 50_000}, {"model": None}])
@pytest.mark.parametrize("path", [f"{V1}/segmentation", "/tasks/image/mask_generation/"])
async def test_many_mistakes_make_a_short_answer(client: Any, path: str, wrong: dict[str, Any]) -> None:
    answer = await client.post(path, json={**CLICK, **wrong})
    assert answer.status_code == 422
    assert len(answer.content) < 2000


async def test_request_ids_are_echoed_where_they_are_plain(client: Any) -> None:
    assert (await client.get("/v1/health", headers={"X-Request-ID": "abc-1"})).headers["X-Request-ID"] == "abc-1"
    for bad in ("a b", "x" * 200, "<script>", ""):
        found = (await client.get("/v1/health", headers={"X-Request-ID": bad})).headers["X-Request-ID"]
        assert found != bad
        assert len(found) == 32
    missing = await client.get("/no/such/path")
    assert missing.status_code == 404
    assert missing.headers["X-Request-ID"]
    assert (await client.delete("/v1/health")).status_code == 405


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (OutOfMemoryError("No room.", "Use a smaller image."), 500, "No room. Use a smaller image."),
        (InferenceError("The back end failed at /secret.", "See the log."), 500, "Inference error."),
        (RuntimeError("secret /home/path"), 500, "Inference error."),
        (CancelledError("gone"), 404, None),
    ],
)
async def test_failures_inside_say_no_more_than_they_should(
    client: Any,
    opener: FakeOpener,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: int,
    shown: str | None,
) -> None:
    await client.post(f"{V1}/segmentation", json=CLICK)

    def fail() -> None:
        raise error

    opener.opened[0].on_predict = fail
    answer = await client.post(f"{V1}/segmentation", json={**CLICK, "points": [[[9, 9]]]})
    assert answer.status_code == status
    assert "Traceback" not in answer.text
    assert "secret" not in answer.text
    if shown is not None:
        assert answer.json()["error"]["message"] == shown
        identity = answer.json()["error"]["requestId"]
        logged = [record for record in caplog.records if getattr(record, "request_id", None) == identity]
        assert any(str(error) in f"{record.getMessage()} {record.exc_text}" for record in logged)
        older = await client.post("/inference/segmentation/", json={**CLICK, "points": [[[11, 9]]]})
        assert "secret" not in older.text


async def test_a_slow_answer_is_504_and_its_work_is_stopped(connect: Any, opener: FakeOpener) -> None:
    client = connect(segmentation_timeout_s=0.3)
    opener.gate.clear()
    answer = await client.post(f"{V1}/segmentation", json=CLICK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    opener.gate.set()
    await asyncio.sleep(0.2)
    assert all(not one.predicted for one in opener.opened)


async def test_a_client_that_leaves_takes_its_work_along(client: Any, opener: FakeOpener) -> None:
    await client.post(f"{V1}/segmentation", json=CLICK)
    predictor = opener.opened[0]
    predictor.predicted.clear()
    predictor.entered.clear()
    predictor.gate.clear()
    first = asyncio.ensure_future(client.post(f"{V1}/segmentation", json={**CLICK, "boxes": [[1, 1, 5, 5]]}))
    await asyncio.to_thread(until, predictor.entered.is_set)
    second = asyncio.ensure_future(client.post(f"{V1}/segmentation", json={**CLICK, "boxes": [[2, 2, 6, 6]]}))
    await asyncio.sleep(0.2)
    second.cancel()  # it waits in the queue
    await asyncio.gather(second, return_exceptions=True)
    await asyncio.sleep(0.1)
    predictor.gate.set()
    assert (await first).status_code == 200
    await asyncio.sleep(0.1)
    assert len(predictor.predicted) == 1


async def test_real_masks_and_boxes(demo: Any) -> None:
    from pixano_edge.engine.cli.demo import demo_folder, read_pictures

    path, objects = read_pictures(demo_folder())[0]
    uri = data_uri(Path(path).read_bytes())
    for one in objects[:2]:
        request = {"model": "sam2-demo", "image": uri, "boxes": [[round(v) for v in one.box]], "multimaskOutput": False}
        answer = (await demo.post(f"{V1}/segmentation", json=request)).json()
        mask = decode_rle(schemas_out.SegmentationAnswer.model_validate(answer).data.masks[0][0].model_dump())
        overlap = (mask & one.truth).sum() / (mask | one.truth).sum()
        assert overlap > 0.8, one.name
    names = sorted({one.name for one in objects})
    found = (await demo.post(f"{V1}/detection", json={"model": "owlv2-demo", "image": uri, "classes": names})).json()
    assert set(schemas_out.DetectionAnswer.model_validate(found).data.classes) <= set(names)
