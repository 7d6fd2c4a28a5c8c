"""The protocol of Pixano 0.7 and what both older ones share, over plain HTTP; its own client runs in test_pixano.py."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pixano_edge.engine.server import ServerSettings, create_app
from pixano_edge.engine.server.answers import pieces
from pixano_edge.engine.server.legacy import FlatArray
from tests.clients.conftest import Live
from tests.clients.material import Clip, Photo, iou

MASK, TASKS_MASK = "/inference/segmentation/", "/tasks/image/mask_generation/"


@pytest.fixture
async def http_client(live: Live) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
        yield client


def test_every_number_comes_back_as_the_same_float32() -> None:
    """All magnitudes, subnormals and signed zeros; in few digits, or a client's second request outgrows the limit."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, np.uint64).astype(np.uint32).view(np.float32)
    values = np.concatenate([bits[np.isfinite(bits)], np.float32([0.0, -0.0, 1e-45, 3.4028235e38])])
    text = b"".join(pieces({"a": [FlatArray(values[None])]}))
    (back,) = json.loads(text)["a"]
    assert back["shape"] == [1, len(values)]
    assert np.array_equal(np.asarray(back["values"], np.float32).view(np.uint32), values.view(np.uint32))
    typical = rng.standard_normal(10_000).astype(np.float32)
    sent = json.dumps(json.loads(b"".join(FlatArray(typical).json())))  # as a client sends it again
    assert len(sent) < 14.5 * len(typical)


async def test_the_two_forms_agree(http_client: httpx.AsyncClient, photo: Photo) -> None:
    ask = {"model": "sam2-demo", "boxes": [photo.box], "multimask_output": False, "return_logits": True}
    by_json = (await http_client.post(MASK, json={**ask, "image": photo.uri})).json()
    files = {"metadata": ("metadata.json", json.dumps(ask), "application/json"), "image": ("image.bin", photo.png)}
    by_form = (await http_client.post("/inference/segmentation/binary", files=files)).json()
    assert by_form["data"] == by_json["data"]
    assert iou(by_json["data"]["masks"][0][0], photo.truth) > 0.7
    assert set(by_json) == {"id", "status", "timestamp", "processing_time", "metadata", "data"}
    older = (await http_client.post(TASKS_MASK, json={**ask, "image": photo.uri})).json()
    assert older["data"] == by_json["data"]


async def test_job(http_client: httpx.AsyncClient, clip: Clip) -> None:
    ask = {"model": "sam2-demo-video", "objects_ids": [0], "frame_indexes": [0], "points": [[clip.click]]}
    submitted = await http_client.post("/inference/tracking/jobs/", json={**ask, "video": clip.uris[:2]})
    assert submitted.status_code == 200  # not 202 as in /v1
    job = submitted.json()
    while job["status"] == "running":
        job = (await http_client.get(f"/inference/tracking/jobs/{job['job_id']}")).json()
    assert job["status"] == "completed"
    assert job["data"]["frame_indexes"] == [0, 1]
    assert set(job["data"]) == {"objects_ids", "frame_indexes", "masks"}
    again = await http_client.delete(f"/inference/tracking/jobs/{job['job_id']}")
    assert again.json()["data"] == job["data"]


@pytest.mark.parametrize(
    ("method", "path", "slash"),
    [
        ("POST", "/inference/segmentation/", True),
        ("POST", "/inference/segmentation/binary", False),
        ("POST", "/inference/tracking/", True),
        ("POST", "/inference/tracking/binary", False),
        ("POST", "/inference/tracking/jobs/", True),
        ("POST", "/inference/tracking/jobs/binary", False),
        ("GET", "/inference/tracking/jobs/job-0", False),
        ("DELETE", "/inference/tracking/jobs/job-0", False),
        ("POST", "/inference/detection/", True),
        ("POST", "/inference/vlm/", True),
    ],
)
async def test_trap_14_paths_are_mounted_exactly(
    http_client: httpx.AsyncClient, method: str, path: str, slash: bool
) -> None:
    answer = await http_client.request(method, path)
    assert answer.status_code in (400, 404, 422)
    assert answer.json()["detail"] != "Not Found"  # from the route, not from the router
    other = await http_client.request(method, path.rstrip("/") if slash else path + "/")
    assert other.status_code in (404, 405)
    assert other.json()["detail"] in ("Not Found", "Method Not Allowed")


@pytest.mark.parametrize(
    ("files", "status"),
    [
        ({"metadata": (None, '{"model": "sam2-demo"}')}, 400),
        ({"image": ("i.png", b"png")}, 400),
        ({"metadata": (None, "{"), "image": ("i.png", b"png")}, 400),
        ({"metadata": (None, "[]"), "image": ("i.png", b"png")}, 422),
        ({"metadata": (None, '{"points": []}'), "image": ("i.png", b"\xff\x00" * 100)}, 422),
        ({"metadata": (None, '{"model": "sam2-demo"}'), "image": ("i.png", b"\xff\x00" * 100)}, 400),
    ],
)
async def test_trap_17_broken_uploads(http_client: httpx.AsyncClient, files: Any, status: int) -> None:
    answer = await http_client.post("/inference/segmentation/binary", files=files)
    assert answer.status_code == status, answer.text
    assert answer.json()["detail"]
    assert b"\xff" not in answer.content
    assert len(answer.content) < 2000


@pytest.mark.parametrize(
    "array",
    [
        {"values": [1.0] * 3, "shape": [2, 2]},
        {"values": [None], "shape": [1]},
        {"values": [[1.0]], "shape": [1]},
        {"values": "1", "shape": [1]},
        {"values": {"0": 1}, "shape": [1]},
        {"values": [1e39], "shape": [1]},
        {"values": [1.0], "shape": [1 << 40, 1 << 40]},
        {"values": [], "shape": [0]},
        {"values": [1.0], "shape": []},
        [1.0],
    ],
)
async def test_broken_arrays(http_client: httpx.AsyncClient, photo: Photo, array: Any) -> None:
    ask = {"model": "sam2-demo", "image": photo.uri, "mask_input": array}
    answer = await http_client.post(MASK, json=ask)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["detail"]


async def test_keys_are_asked_for(tmp_path: Path) -> None:
    """The older clients cannot send one; with one a request goes through."""
    app = create_app(ServerSettings(store=tmp_path, api_keys=["k" * 32]))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        for method, path in (("GET", "/app/models/"), ("GET", "/app/settings/"), ("POST", MASK), ("POST", TASKS_MASK)):
            assert (await client.request(method, path, json={})).status_code == 401
            known = await client.request(method, path, json={}, headers={"X-API-Key": "k" * 32})
            assert known.status_code in (200, 422)
    await app.state.server.close()


@pytest.fixture
def photo_url(photo: Photo) -> Iterator[str]:
    """The photo on a server of this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(photo.png)))
            self.end_headers()
            self.wfile.write(photo.png)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/photo.png"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", [MASK, TASKS_MASK])
async def test_addresses_are_fetched_where_allowed(live: Live, photo: Photo, photo_url: str, path: str) -> None:
    """The seed sends the address of an image that its data set has on the web; never one within a private network,
    unless allowed."""
    ask = {"model": "sam2-demo", "image": photo_url, "boxes": [photo.box], "multimask_output": False}
    for settings in ({}, {"media_allow_url": True}):
        app = create_app(ServerSettings(**settings), live.provider)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            refused = await client.post(path, json=ask)
        await app.state.server.close()
        assert refused.status_code == 400, refused.text
    app = create_app(ServerSettings(media_allow_url=True, media_allow_private_ips=True), live.provider)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
        answer = await client.post(path, json=ask)
    await app.state.server.close()
    assert answer.status_code == 200, answer.text
    assert iou(answer.json()["data"]["masks"][0][0], photo.truth) > 0.7
