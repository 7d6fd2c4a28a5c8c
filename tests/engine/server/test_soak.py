"""A server under everything at once: good clicks, jobs, cancels, hang-ups, broken bodies, wrong keys, large uploads.

It must neither grow, nor get stuck, nor answer wrongly. Ten minutes of it are a slow test, twenty seconds are not.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import random
import signal
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.benchmarks.serving import JOBS, SEGMENTATION, Client, ServerProcess, click_body

KEY = "a-key-for-the-soak-test"
HEADERS = {"X-API-Key": KEY}
LIMIT = 3 << 20
POINTS = [(480, 270), (200, 400), (700, 150)]
PATIENCE = 120.0
"""Seconds of one answer on a busy machine; whatever takes longer is stuck."""


class Soak:
    """What the workers share."""

    def __init__(self, server: ServerProcess, images: list[str]) -> None:
        self.server = server
        self.images = images
        self.stop = threading.Event()
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.wrong: list[str] = []
        self.jobs: set[str] = set()
        self.rss: list[tuple[float, int]] = []
        self.truth = {(i, p): self.mask(self.client(), i, p) for i in range(len(images)) for p in POINTS}

    def client(self, **headers: str) -> Client:
        return Client(self.server.port, PATIENCE, {**HEADERS, **headers})

    def mask(self, client: Client, image: int, point: tuple[int, int], **fields: Any) -> str:
        status, answer, _ = client.post(SEGMENTATION, click_body("sam2-demo", self.images[image], *point, **fields))
        self.statuses["click", status] += 1
        if status != 200:
            return f"status {status}"
        data: dict[str, Any] = json.loads(answer)["data"]
        return str(data["masks"][0][0]["counts"])

    def run(self, workers: list[Callable[[Soak, random.Random], None]], seconds: float) -> None:
        threads = [threading.Thread(target=self._loop, args=(w, i)) for i, w in enumerate(workers)]
        for thread in threads:
            thread.start()
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            time.sleep(min(1.0, seconds / 40))
            self.rss.append((time.monotonic() - begun, self.server.rss()))
        self.stop.set()
        for thread in threads:
            thread.join(2 * PATIENCE)
            assert not thread.is_alive(), "a client waits for ever"

    def _loop(self, worker: Callable[[Soak, random.Random], None], number: int) -> None:
        rng = random.Random(number)
        while not self.stop.is_set():
            try:
                worker(self, rng)
            except Exception as error:  # noqa: BLE001 (shown by the test)
                self.wrong.append(f"{worker.__name__}: {error!r}")
            time.sleep(rng.uniform(0, 0.05))


def click(soak: Soak, rng: random.Random) -> None:
    """Several on one connection, some asking for features and sending them back."""
    with soak.client() as client:
        for _ in range(4):
            image, point = rng.randrange(len(soak.images)), rng.choice(POINTS)
            fields: dict[str, Any] = {}
            if rng.random() < 0.3:
                body = click_body("sam2-demo", soak.images[image], *point, returnImageEmbedding=True)
                status, answer, _ = client.post(SEGMENTATION, body)
                soak.statuses["features", status] += 1
                if status != 200:
                    continue
                data = json.loads(answer)["data"]
                fields = {key: data[key] for key in ("imageEmbedding", "highResolutionFeatures")}
            found = soak.mask(client, image, point, **fields)
            if found not in (soak.truth[image, point], "status 503"):
                soak.wrong.append(f"mask of {image} at {point}: {found[:80]}")


def detect(soak: Soak, rng: random.Random) -> None:
    request = {"model": "owlv2-demo", "image": soak.images[0], "classes": ["red circle", "blue star"]}
    with soak.client() as client:
        status, _, _ = client.post("/v1/inference/detection", json.dumps(request).encode())
    soak.statuses["detect", status] += 1


def hang_up(soak: Soak, rng: random.Random) -> None:
    """Leaves in the middle of the head, of the body, of the work, or of the answer."""
    image = rng.choice(soak.images)
    body = click_body("sam2-demo", image, rng.randrange(900), rng.randrange(500), returnImageEmbedding=True)
    head = (
        f"POST {SEGMENTATION} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    sent = (head + body)[: rng.choice((10, len(head), len(head) + len(body) // 2, len(head) + len(body)))]
    with socket.create_connection(("127.0.0.1", soak.server.port), timeout=PATIENCE) as connection:
        connection.sendall(sent)
        time.sleep(rng.choice((0.0, 0.01, 0.2)))
        if rng.random() < 0.3:
            connection.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                connection.recv(100)
    soak.statuses["hang-up", 0] += 1


BROKEN: list[bytes] = [
    b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b'{"model": 3}',
    b'{"model": "sam2-demo", "image": "data:image/png;base64,AAAA"}',
    b'{"model": "sam2-demo", "image": "/etc/passwd"}', b'{"model": "nobody", "image": "x"}', b"[" * 5000,
    json.dumps({"model": "sam2-demo", "image": "x", "points": "x" * 5000}).encode(),
    json.dumps({"model": "sam2-demo", "image": "x", "maskInput": {"shape": [1], "data": "????"}}).encode(),
]  # fmt: skip


def broken(soak: Soak, rng: random.Random) -> None:
    with soak.client() as client:
        status, answer, _ = client.post(rng.choice((SEGMENTATION, JOBS, "/v1/inference/detection")), rng.choice(BROKEN))
    soak.statuses["broken", status] += 1
    if not 400 <= status < 500:
        soak.wrong.append(f"a broken body was answered {status}: {answer[:80]!r}")


def locked_out(soak: Soak, rng: random.Random) -> None:
    headers = rng.choice(({"X-API-Key": "wrong"}, {"X-API-Key": ""}, {"X-API-Key": "", "Authorization": "Bearer no"}))
    with soak.client(**headers) as client:
        status, _, _ = client.post(SEGMENTATION, click_body("sam2-demo", soak.images[0], 1, 1))
    soak.statuses["wrong key", status] += 1
    if status not in (401, 403):
        soak.wrong.append(f"a wrong key was answered {status}")


def oversized(soak: Soak, rng: random.Random) -> None:
    body = b" " * (LIMIT + rng.randrange(1, 1 << 20))
    connection = http.client.HTTPConnection("127.0.0.1", soak.server.port, timeout=PATIENCE)
    try:
        headers = {**HEADERS, "Content-Type": "application/json"}
        if rng.random() < 0.5:
            chunks = (body[i : i + 65536] for i in range(0, len(body), 65536))
            connection.request("POST", SEGMENTATION, chunks, headers, encode_chunked=True)
        else:
            connection.request("POST", SEGMENTATION, body, headers)
        status = connection.getresponse().status
    except (BrokenPipeError, ConnectionResetError):
        status = 413  # it closed the door while we were still talking
    finally:
        connection.close()
    soak.statuses["oversized", status] += 1
    if status != 413:
        soak.wrong.append(f"a body that is too large was answered {status}")


def track(soak: Soak, rng: random.Random) -> None:
    """A job that is canceled, or waited for."""
    keyframe = {"frameIndex": 0, "prompts": {"points": [{"x": rng.randrange(900), "y": 200, "label": 1}]}}
    request = {
        "model": "sam2-demo-video", "video": [rng.choice(soak.images) for _ in range(5)], "objectsIds": [1],
        "frameIndexes": [0], "keyframes": [keyframe],
    }  # fmt: skip
    with soak.client() as client:
        status, answer, _ = client.post(JOBS, json.dumps(request).encode())
        soak.statuses["submit", status] += 1
        if status != 202:
            return
        job_id = json.loads(answer)["jobId"]
        soak.jobs.add(job_id)
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, 0.5))
            status, answer = client.delete(f"/v1/jobs/{job_id}")
            state = json.loads(answer)["status"]
            if status != 200 or state not in ("canceled", "completed"):
                soak.wrong.append(f"a canceled job is {state} ({status})")
            return
        end = time.monotonic() + PATIENCE
        while (found := json.loads(client.get(f"/v1/jobs/{job_id}")[1]))["status"] == "running":
            if time.monotonic() > end:
                soak.wrong.append(f"job {job_id} is stuck: {found['metadata']}")
                return
            time.sleep(0.1)
        if found["status"] != "completed" or len(found["data"]["frames"]) != 5:
            soak.wrong.append(f"a job ended {found['status']}: {found['detail']}")


WORKERS = [click, click, hang_up, broken, locked_out, oversized, track, track, detect]


def _soak(folder: Path, bedroom: Path, seconds: float, growth: float) -> None:
    images = [
        "data:image/jpeg;base64," + base64.b64encode((bedroom / f"{i:05d}.jpg").read_bytes()).decode() for i in range(3)
    ]
    environ = {
        "PIXANO_EDGE_API_KEYS": KEY, "PIXANO_EDGE_THREADS": "1", "PIXANO_EDGE_DEVICE": "cpu",
        "PIXANO_EDGE_MAX_REQUEST_BODY_BYTES": str(LIMIT), "PIXANO_EDGE_ECHO_MB": "8", "PIXANO_EDGE_CACHE_MB": "16",
        "PIXANO_EDGE_SHUTDOWN_TIMEOUT_S": "20",
    }  # fmt: skip
    options = ("--demo", "--jobs", str(folder / "jobs.sqlite"))
    with ServerProcess(folder / "store", environ, options) as server:
        soak = Soak(server, images)
        track(soak, random.Random(9))  # loads what tracks, so that it does not count as growth
        detect(soak, random.Random(0))
        soak.run(WORKERS, seconds)
        assert soak.wrong == []
        counts = {kind: sum(n for (k, _), n in soak.statuses.items() if k == kind) for kind, _ in soak.statuses}
        rss = [f"{t:.0f}s {b >> 20} MiB" for t, b in soak.rss[:: max(1, len(soak.rss) // 12)]]
        print(dict(soak.statuses), rss)  # noqa: T201 (figures of the run, with -s)
        assert all(counts.get(kind, 0) for kind in ("click", "hang-up", "broken", "wrong key", "oversized", "submit"))
        # Only a full queue may be 503, and tells when to come back; nothing else is the server's fault.
        assert {status for _, status in soak.statuses if status >= 500} <= {503}
        with soak.client() as client:
            end = time.monotonic() + PATIENCE
            for job_id in soak.jobs:
                while json.loads(client.get(f"/v1/jobs/{job_id}")[1]).get("status") == "running":
                    assert time.monotonic() < end, "a job is stuck"
                    time.sleep(0.1)
            for (image, point), mask in soak.truth.items():
                assert soak.mask(client, image, point) == mask
            assert client.get("/v1/ready")[0] == 200
        middle = statistics.median(b for t, b in soak.rss if 0.35 * seconds <= t <= 0.55 * seconds)
        last = statistics.median(b for t, b in soak.rss if t >= 0.85 * seconds)
        assert last <= growth * middle, f"grew from {middle / 2**20:.0f} to {last / 2**20:.0f} MiB: {soak.rss}"
        _, found, trace = server.log().partition("Traceback")
        assert not found, trace[:4000]
        process = server.process
    # uvicorn ends in order, then hands the signal on; a process that hung would have been killed (-9).
    assert process.returncode in (0, -signal.SIGTERM)


def test_twenty_seconds_of_everything(tmp_path: Path, bedroom: Path, demo_bundle: Path) -> None:
    _soak(tmp_path, bedroom, 20, 1.15)


@pytest.mark.slow
def test_ten_minutes_of_everything(tmp_path: Path, bedroom: Path, demo_bundle: Path) -> None:
    """Memory within 5 %: caches, allocators and the interpreter's own pools are full by then."""
    _soak(tmp_path, bedroom, 600, 1.05)
