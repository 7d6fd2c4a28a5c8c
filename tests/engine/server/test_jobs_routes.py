"""Jobs and streams over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.provider import EdgeProvider
from pixano_edge.engine.provider.errors import InferenceError
from pixano_edge.engine.provider.text_types import TextChunk
from pixano_edge.engine.provider.types import TextImageConditionalGenerationOutput, UsageInfo
from pixano_edge.engine.server import schemas_out
from tests.engine.provider.fakes import FakeOpener, add_bundle, data_uri, png, until
from tests.engine.server.test_traps import clip, ended

V1 = "/v1/inference"


def lines(answer: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_a_job_from_start_to_end(client: Any) -> None:
    job = (await client.post(f"{V1}/tracking/jobs", json=clip(4))).json()
    schemas_out.JobStatus.model_validate(job)
    done = schemas_out.JobStatus.model_validate(await ended(client, job["jobId"]))
    assert done.data is not None
    assert [f.frame_index for f in done.data.frames] == [0, 1, 2, 3]
    assert (done.metadata["frames_done"], done.metadata["frames_total"], done.metadata["progress"]) == (4, 4, 1.0)
    sync = (await client.post(f"{V1}/tracking", json=clip(4))).json()
    assert sync["data"] == done.data.model_dump(by_alias=True)
    frames = await client.get(f"/v1/jobs/{job['jobId']}/frames")
    assert frames.headers["Content-Type"].startswith("application/x-ndjson")
    assert lines(frames) == sync["data"]["frames"]
    assert lines(await client.get(f"/v1/jobs/{job['jobId']}/frames?from=3")) == sync["data"]["frames"][3:]
    assert (await client.get(f"/v1/jobs/{job['jobId']}/frames?from=9")).text == ""


@pytest.mark.parametrize("job_id", ["job-0", "..", "%2e%2e%2fetc", "x" * 3000, "job-%00", "'; drop table jobs --"])
async def test_unknown_jobs_are_404(client: Any, job_id: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/frames"), ("POST", "/resume")):
        answer = await client.request(method, f"/v1/jobs/{job_id}{path}")
        assert answer.status_code in (404, 405), (method, path, answer.text)
    assert (await client.get("/v1/jobs/job-0/frames?from=-1")).status_code == 422
    assert (await client.get("/v1/jobs/job-0/frames?from=x")).status_code == 422


async def test_a_request_that_is_no_job_makes_none(client: Any, provider: EdgeProvider) -> None:
    for body, status in (
        (clip(model="nobody"), 404),
        (clip(model="find"), 400),
        (clip(keyframes=[]), 422),
        (clip(objectsIds=[7, 7]), 422),
        (clip(objectsIds=[], keyframes=[]), 400),
    ):
        for path in ("tracking", "tracking/jobs", "tracking/stream"):
            assert (await client.post(f"{V1}/{path}", json=body)).status_code == status, body
    assert (await provider.job_counts())["running"] == 0


async def test_frames_come_as_they_are_made(client: Any, opener: FakeOpener) -> None:
    await client.post(f"{V1}/tracking", json=clip())
    model = opener.videos[0]
    model.gate.clear()
    model.hold_at = ("frame", 2)
    model.reached.clear()
    job = (await client.post(f"{V1}/tracking/jobs", json=clip(4))).json()
    await asyncio.to_thread(until, model.reached.is_set)
    state = (await client.get(f"/v1/jobs/{job['jobId']}")).json()
    assert (state["status"], state["metadata"]["frames_done"], state["data"]) == ("running", 2, None)
    watching = asyncio.ensure_future(client.get(f"/v1/jobs/{job['jobId']}/frames?from=1"))
    await asyncio.sleep(0.1)
    model.gate.set()
    assert [f["frameIndex"] for f in lines(await watching)] == [1, 2, 3]


async def test_a_stream_of_frames_and_its_failure(client: Any, opener: FakeOpener) -> None:
    sync = (await client.post(f"{V1}/tracking", json=clip())).json()["data"]
    streamed = await client.post(f"{V1}/tracking/stream", json=clip())
    assert lines(streamed) == sync["frames"]
    for frame in lines(streamed):
        schemas_out.TrackedFrame.model_validate(frame)
    broken = clip(video=[*clip()["video"][:2], data_uri(b"no image")])
    found = lines(await client.post(f"{V1}/tracking/stream", json=broken))
    assert [f.get("frameIndex") for f in found[:-1]] == [0, 1]
    assert found[-1]["error"]["code"] == "bad_request"
    assert found[-1]["error"]["message"].startswith("Frame 2:")
    job = (await client.post(f"{V1}/tracking/jobs", json=broken)).json()
    await ended(client, job["jobId"])
    found = lines(await client.get(f"/v1/jobs/{job['jobId']}/frames"))
    assert "error" in found[-1]
    assert len(found) == 3


async def test_leaving_a_stream_stops_its_work(client: Any, opener: FakeOpener) -> None:
    from starlette.types import Message

    app = client._transport.app
    await client.post(f"{V1}/tracking", json=clip())
    model = opener.videos[0]
    model.steps.clear()
    model.seconds = 0.02
    body = json.dumps(clip(200)).encode()
    gone = asyncio.Event()
    given = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        for message in given:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message.get("body", b"").count(b"frameIndex"):
            gone.set()

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": f"{V1}/tracking/stream", "raw_path": b"", "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1),
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), 20)
    await asyncio.sleep(0.1)
    done = len(model.steps)
    await asyncio.sleep(0.2)
    assert len(model.steps) == done < 100
    assert all(tracker.closed for tracker in model.trackers)


async def test_text_comes_in_pieces(client: Any, provider: EdgeProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    output = TextImageConditionalGenerationOutput("A cat.", UsageInfo(7, 3, 10), {})

    async def stream(input_data: Any, timeout: float) -> AsyncIterator[TextChunk]:
        if input_data.prompt == "early":
            raise InferenceError("It broke.", "Try again.")
        yield TextChunk("A ")
        if input_data.prompt == "late":
            raise InferenceError("It broke.", "Try again.")
        yield TextChunk("cat.")
        yield TextChunk("", output, {"model_name": "vlm"})

    monkeypatch.setattr(provider, "stream_text_image_conditional_generation", stream, raising=False)
    body = {"model": "vlm", "prompt": "What?", "maxNewTokens": 5}
    answer = await client.post(f"{V1}/vlm/stream", json=body)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    events = [json.loads(block.removeprefix("data: ")) for block in answer.text.strip().split("\n\n")]
    assert events[:2] == [{"text": "A "}, {"text": "cat."}]
    assert events[2]["generatedText"] == "A cat."
    assert events[2]["usage"] == {"promptTokens": 7, "completionTokens": 3, "totalTokens": 10}
    early = await client.post(f"{V1}/vlm/stream", json={**body, "prompt": "early"})
    assert (early.status_code, early.json()["error"]["message"]) == (500, "Inference error.")
    late = await client.post(f"{V1}/vlm/stream", json={**body, "prompt": "late"})
    assert late.text.startswith('data: {"text":"A "}\n\ndata: {"error":')


async def test_a_model_writes_over_http(client: Any, tmp_path: Path) -> None:
    add_bundle(tmp_path, "talk", family="smolvlm")
    models = {m["name"]: m for m in (await client.get("/v1/models")).json()}
    assert (models["talk"]["capability"], models["talk"]["interface"]["images"]["min"]) == ("vlm", 0)
    body = {"model": "talk", "prompt": "one two three", "images": [data_uri(png(9, 7))], "maxNewTokens": 50}
    whole = (await client.post(f"{V1}/vlm", json=body)).json()
    data = schemas_out.VlmAnswer.model_validate(whole).data
    assert data.generated_text.endswith("one two three")
    assert data.usage.total_tokens == data.usage.prompt_tokens + data.usage.completion_tokens
    streamed = await client.post(f"{V1}/vlm/stream", json=body)
    events = [json.loads(block.removeprefix("data: ")) for block in streamed.text.strip().split("\n\n")]
    assert "".join(event["text"] for event in events[:-1]) == events[-1]["generatedText"] == data.generated_text
    assert len(events) > 1
    parts = {"metadata": json.dumps({k: v for k, v in body.items() if k != "images"})}
    uploaded = await client.post(f"{V1}/vlm/binary", data=parts, files=[("images", png(9, 7))])
    assert uploaded.json()["data"]["generatedText"] == data.generated_text
    assert (await client.post(f"{V1}/vlm", json={**body, "model": "alpha"})).status_code == 400
