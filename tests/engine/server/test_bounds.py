"""Bounds over a whole request and over all requests: URLs, bytes of bodies, and the time a body may take."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.server.limits import BodyLimitMiddleware
from tests.engine.provider.fakes import add_bundle, data_uri, png, until

from .web import says, web

IMAGE = png(40, 30)
SEGMENT = "/v1/inference/segmentation"
CLICK = {"model": "alpha", "points": [[[5, 7]]], "labels": [[1]], "multimaskOutput": False}
CLIP = {"model": "alpha-video", "objects_ids": [1], "frame_indexes": [0], "boxes": [[2, 2, 9, 9]]}
FETCHING = {"media_allow_url": True, "media_allow_private_ips": True}


def clip(video: Any) -> dict[str, Any]:
    prompt = {"frameIndex": 0, "prompts": {"box": {"x": 2, "y": 2, "width": 9, "height": 9}}}
    return {"model": "alpha-video", "video": video, "objectsIds": [1], "frameIndexes": [0], "keyframes": [prompt]}


async def test_one_request_fetches_so_many_urls_and_bytes(connect: Callable[..., Any]) -> None:
    with web(says(body=IMAGE)) as server:
        urls = [f"http://127.0.0.1:{server.port}/{index}.png" for index in range(3)]
        for settings, named in (
            ({"media_max_urls": 2}, "more than 2 URLs"),
            ({"media_max_fetched_bytes": 3 * len(IMAGE) - 1}, f"more than {3 * len(IMAGE) - 1} bytes together"),
            ({"media_max_urls": 3, "media_max_fetched_bytes": 3 * len(IMAGE)}, ""),
        ):
            before = len(server.heads)
            answer = await connect(**FETCHING, **settings).post("/v1/inference/tracking", json=clip(urls))
            assert answer.status_code == (400 if named else 200), answer.text
            assert named in answer.text
            if "URLs" in named:
                assert len(server.heads) == before, "counted before any is asked"


async def test_urls_within_messages_are_fetched(tmp_path: Path, connect: Callable[..., Any]) -> None:
    add_bundle(tmp_path, "smol", family="smolvlm")
    with web(says(body=IMAGE)) as server:
        part = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{server.port}/a.png"}}
        content = [part, {"type": "text", "text": "what is it"}]
        body = {"model": "smol", "prompt": [{"role": "user", "content": content}], "maxNewTokens": 9}
        answer = await connect(**FETCHING).post("/v1/inference/vlm", json=body)
    assert answer.json()["data"]["generatedText"] == "1 images: what is it", answer.text


async def test_urls_of_text_and_messages_count_together(connect: Callable[..., Any]) -> None:
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}]}
    body = {"model": "find", "prompt": [message], "images": ["http://127.0.0.1:9/b.png"], "maxNewTokens": 3}
    for path in ("/v1/inference/vlm", "/v1/inference/vlm/stream"):
        answer = await connect(**FETCHING, media_max_urls=1).post(path, json={**body, "images": body["images"] * 2})
        assert "more than 1 URLs" in answer.text
        answer = await connect(media_max_urls=1).post(path, json=body)
        assert (answer.status_code, "not fetched" in answer.text) == (400, True)


@pytest.mark.parametrize(
    ("path", "setting"),
    [
        (SEGMENT, "segmentation_timeout_s"),
        ("/inference/segmentation/", "segmentation_timeout_s"),
        ("/v1/inference/detection", "detection_timeout_s"),
        ("/v1/inference/tracking", "tracking_timeout_s"),
        ("/v1/inference/tracking/stream", "tracking_timeout_s"),
        ("/v1/inference/tracking/jobs", "tracking_timeout_s"),
        ("/inference/tracking/jobs/", "tracking_timeout_s"),
        ("/v1/inference/vlm", "vlm_timeout_s"),
        ("/v1/inference/vlm/stream", "vlm_timeout_s"),
    ],
)
async def test_fetching_counts_in_the_time_of_a_request(connect: Callable[..., Any], path: str, setting: str) -> None:
    gate = threading.Event()

    def stalls(connection: Any, _: bytes) -> None:
        gate.wait(10)

    with web(stalls) as server:
        url = f"http://127.0.0.1:{server.port}/a.png"
        body: dict[str, Any] = {**CLICK, "image": url, "classes": ["cat"]}
        if "tracking" in path:
            body = clip([url]) if path.startswith("/v1") else {**CLIP, "video": [url]}
        elif "vlm" in path:
            body = {"model": "find", "prompt": "What?", "images": [url], "maxNewTokens": 3}
        try:
            answer = await connect(**FETCHING, **{setting: 0.2}).post(path, json=body)
            assert answer.status_code == 504, answer.text
        finally:
            gate.set()


async def test_a_fetch_ends_when_nobody_waits_for_it(connect: Callable[..., Any]) -> None:
    sent, over = [], threading.Event()

    def trickles(connection: Any, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
        try:
            for _ in range(500):
                connection.sendall(b"x" * 20)
                sent.append(20)
                time.sleep(0.01)
        except OSError:
            over.set()

    with web(trickles) as server:
        client = connect(**FETCHING, media_max_image_bytes=10000)
        media = client._transport.app.state.server.media
        fetching = asyncio.ensure_future(media.fetched(f"http://127.0.0.1:{server.port}/a.png"))
        await asyncio.to_thread(until, lambda: len(sent) > 5)
        fetching.cancel()
        assert await asyncio.to_thread(over.wait, 5)
        assert sum(sent) < 8000


def body_scope(length: int | None) -> dict[str, Any]:
    return {"type": "http", "path": "/", "headers": [] if length is None else [(b"content-length", b"%d" % length)]}


@pytest.mark.parametrize("stated", [True, False])
async def test_bodies_without_room_are_refused_at_once_and_room_comes_back(stated: bool) -> None:
    """Of 100 bytes two bodies of 60 have room; a third has none until one of them is answered."""
    gate, read = asyncio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        read.append(scope)
        await gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    limit = BodyLimitMiddleware(app, 60, 120)

    async def ask(size: int) -> dict[str, Any]:
        chunks = [{"type": "http.request", "body": b"x" * (size // 2), "more_body": more} for more in (True, False)]
        sent: list[Any] = []

        async def receive() -> Any:
            return chunks.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        await limit(body_scope(size if stated else None), receive, send)
        return {"status": sent[0]["status"], "headers": dict(sent[0]["headers"]), "body": sent[-2:]}

    first = [asyncio.ensure_future(ask(60)) for _ in range(2)]
    while len(read) < 2:
        await asyncio.sleep(0)
    refused = await asyncio.wait_for(ask(2), 5)
    assert (refused["status"], refused["headers"][b"retry-after"]) == (503, b"1")
    assert len(read) == 2
    # Of a body without a stated length the first bytes have no room already.
    assert (await asyncio.wait_for(ask(62), 5))["status"] == (413 if stated else 503)
    nothing = asyncio.ensure_future(ask(0))  # what has no body needs no room
    while len(read) < 3:
        await asyncio.sleep(0)
    gate.set()
    assert [(await one)["status"] for one in (*first, nothing)] == [200] * 3
    assert (await ask(60))["status"] == 200
    assert limit._held == 0


async def test_room_comes_back_from_a_client_that_left() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise ConnectionError

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    limit = BodyLimitMiddleware(app, 60, 60)
    for _ in range(3):
        with pytest.raises(ConnectionError):
            await limit(body_scope(60), receive, None)  # type: ignore[arg-type]


async def test_a_body_that_trickles_is_given_up(connect: Callable[..., Any]) -> None:
    async def trickle(start: bytes) -> Any:
        yield start
        for _ in range(200):
            await asyncio.sleep(0.02)
            yield b"a"

    begun = time.monotonic()
    client = connect(body_timeout_s=1.0, body_total_timeout_s=0.2)
    part = b'--x\r\nContent-Disposition: form-data; name="metadata"\r\n\r\n'
    for path, kind, start in (
        (SEGMENT, "application/json", b'{"model":"'),
        (f"{SEGMENT}/binary", "multipart/form-data; boundary=x", part),
    ):
        answer = await client.post(path, content=trickle(start), headers={"Content-Type": kind})
        assert answer.status_code == 408, answer.text
    assert time.monotonic() - begun < 3


async def test_an_older_client_that_submits_again_gets_the_same_job(connect: Callable[..., Any]) -> None:
    client = connect()
    path, body = "/inference/tracking/jobs/", {**CLIP, "video": [data_uri(IMAGE)]}
    first, again, other = [
        (await client.post(path, json={**body, "frame_indexes": indexes})).json() for indexes in ([0], [0], [])
    ]
    assert first["job_id"] == again["job_id"] != other.get("job_id")
    jobs = [await client.post(f"{path}binary", **upload(body)) for _ in range(2)]
    assert jobs[0].json()["job_id"] == jobs[1].json()["job_id"] != first["job_id"]


def upload(body: dict[str, Any]) -> dict[str, Any]:
    metadata = json.dumps({key: value for key, value in body.items() if key != "video"})
    return {"files": {"frames": IMAGE}, "data": {"metadata": metadata}}
