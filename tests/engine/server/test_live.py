"""A real server on a real socket: addresses, hang-ups, large answers, URLs, and the command from start to SIGTERM."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="needs pixano-edge[test]")
uvicorn = pytest.importorskip("uvicorn", reason="needs pixano-edge[server]")

from pixano_edge.engine.bundle import DEMO_NAMES  # noqa: E402
from pixano_edge.engine.cli.serve import offered  # noqa: E402
from pixano_edge.engine.errors import EdgeError  # noqa: E402
from pixano_edge.engine.server import ServerSettings, create_app  # noqa: E402
from pixano_edge.engine.server.run import bind, serve, url_of, uvicorn_config  # noqa: E402
from tests.engine.provider.fakes import FakeOpener, add_bundle, data_uri, make_provider, png, until  # noqa: E402
from tests.engine.server.test_traps import clip  # noqa: E402

SEGMENT = "/v1/inference/segmentation"
CLICK = {"model": "alpha", "image": data_uri(png(161, 97)), "boxes": [[1, 1, 9, 9]]}
ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of an application on a free port."""
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn_config(app, ServerSettings(shutdown_timeout_s=5)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive(), 30)
    try:
        yield url_of(listening)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def opener() -> FakeOpener:
    return FakeOpener()


@pytest.fixture
def live(tmp_path: Path, opener: FakeOpener) -> Iterator[Any]:
    """A client of a running server over fakes."""
    import asyncio

    add_bundle(tmp_path, "alpha", tracks=True)
    provider = make_provider(tmp_path, opener, media_roots=[])
    with running(create_app(ServerSettings(), provider)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
        for held in (*opener.opened, *opener.videos):
            held.gate.set()
    asyncio.run(provider.close())


def test_a_real_client_gets_real_answers(live: Any) -> None:
    answer = live.post(SEGMENT, json={**CLICK, "returnImageEmbedding": True})
    assert answer.status_code == 200
    assert int(answer.headers["Content-Length"]) == len(answer.content)
    assert "server" not in answer.headers
    with live.stream("POST", "/v1/inference/tracking/stream", json=clip(5)) as streamed:
        assert [json.loads(line)["frameIndex"] for line in streamed.iter_lines()] == [0, 1, 2, 3, 4]


def test_hanging_up_cancels_what_waits(live: Any, opener: FakeOpener) -> None:
    live.post(SEGMENT, json=CLICK)
    predictor = opener.opened[0]
    predictor.predicted.clear()
    predictor.entered.clear()
    predictor.gate.clear()

    def post(body: dict[str, Any], timeout: float) -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.base_url}{SEGMENT}", json=body, timeout=timeout)

    first = threading.Thread(target=post, args=({**CLICK, "boxes": [[1, 1, 5, 5]]}, 1.5))
    first.start()
    until(predictor.entered.is_set)
    post({**CLICK, "boxes": [[2, 2, 6, 6]]}, 0.3)  # it waits in the queue behind the first, and leaves
    first.join()
    until(lambda: 'status="499"' in live.get("/metrics").text)
    predictor.gate.set()
    time.sleep(0.2)
    assert len(predictor.predicted) == 1


def test_an_upload_above_the_limit_reads_its_answer(tmp_path: Path) -> None:
    app = create_app(ServerSettings(max_request_body_bytes=100_000), make_provider(tmp_path, FakeOpener()))
    with running(app) as url:
        big = b"x" * 8_000_000
        assert httpx.post(f"{url}{SEGMENT}", content=big, timeout=60).status_code == 413
        chunks = (big[i : i + 65536] for i in range(0, len(big), 65536))
        assert httpx.post(f"{url}{SEGMENT}", content=chunks, timeout=60).status_code == 413
        # curl asks before it sends as much
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as connection:
            head = (
                f"POST {SEGMENT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8000000\r\nExpect: 100-continue\r\n\r\n"
            )
            connection.sendall(head.encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_broken_http_does_not_hurt(live: Any) -> None:
    address = (live.base_url.host, live.base_url.port)
    for junk in (
        b"\x00\xff" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    ):
        with socket.create_connection(address) as connection:
            connection.sendall(junk)
            connection.settimeout(5)
            connection.recv(1000)
    with socket.create_connection(address) as connection:
        connection.sendall(f"POST {SEGMENT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{{".encode())
    assert live.get("/v1/health").status_code == 200


def test_images_are_fetched_where_that_is_allowed(tmp_path: Path, opener: FakeOpener) -> None:
    import asyncio
    import http.server

    class Files(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = png(161, 97) if self.path == "/a.png" else b"no image"
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Silent."""

    add_bundle(tmp_path, "alpha", tracks=True)
    provider = make_provider(tmp_path, opener, media_roots=[])
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{web.server_port}/a.png"
    try:
        for settings, status in (
            ({}, 400),
            ({"media_allow_url": True}, 400),  # a private address
            ({"media_allow_url": True, "media_allow_private_ips": True}, 200),
        ):
            with running(create_app(ServerSettings(**settings), provider)) as url:
                answer = httpx.post(f"{url}{SEGMENT}", json={**CLICK, "image": address}, timeout=60)
                assert answer.status_code == status, answer.text
        assert answer.json()["data"]["masks"][0][0]["size"] == [97, 161]
        with running(create_app(ServerSettings(**settings), provider)) as url:
            tracked = httpx.post(f"{url}/v1/inference/tracking", json=clip(2, video=[address, address]), timeout=60)
            assert tracked.json()["data"]["frameIndexes"] == [0, 0, 1, 1]
    finally:
        web.shutdown()
        asyncio.run(provider.close())


def test_a_port_that_is_taken_and_an_address_of_elsewhere_are_said() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EdgeError, match=f"port {port}"):
            serve(ServerSettings(port=port))
    with pytest.raises(EdgeError, match="Cannot listen"):
        bind("192.0.2.1", 0)
    with pytest.raises(EdgeError, match="without an API key"):
        serve(ServerSettings(host="0.0.0.0"))


def test_a_model_to_load_at_start_must_be_there(tmp_path: Path) -> None:
    assert offered(ServerSettings(store=tmp_path, demo=True, preload=("sam2-demo-video",))) == sorted(DEMO_NAMES)
    assert offered(ServerSettings(store=tmp_path)) == []
    with pytest.raises(EdgeError, match="no model 'sam2-demo'"):
        offered(ServerSettings(store=tmp_path, preload=("sam2-demo",)))


@contextmanager
def command(tmp_path: Path, *options: str) -> Iterator[tuple[Any, str]]:
    """`pixano-edge serve` as a process, and its address."""
    code = "from pixano_edge.engine.cli.serve import app; app()"
    env = {**os.environ, "PIXANO_EDGE_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1", "PIXANO_EDGE_API_KEYS": "k1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--port", "0", "--demo", "--threads", "1", *options],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        found = re.search(rf"serves {', '.join(sorted(DEMO_NAMES))} on (http://127\.0\.0\.1:\d+)", line)
        if not found:
            process.kill()  # else reading on would wait for ever
        assert found, line + process.stdout.read()
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


def test_ready_says_503_before_the_listener_closes(tmp_path: Path, opener: FakeOpener) -> None:
    import asyncio

    from pixano_edge.engine.server.run import DrainingServer, bind, uvicorn_config

    provider = make_provider(tmp_path, opener, media_roots=[])
    settings = ServerSettings(shutdown_delay_s=1.5)
    app = create_app(settings, provider)
    listening = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = DrainingServer(uvicorn_config(app, settings), app.state.server.leave, settings.shutdown_delay_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        assert httpx.get(f"{url}/v1/ready").status_code == 200
        server.should_exit = True  # what the signal does
        until(lambda: httpx.get(f"{url}/v1/ready").status_code == 503)
        assert httpx.get(f"{url}/v1/models").status_code == 200, "served on"
        thread.join(10)
        assert not thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
    finally:
        server.force_exit = server.should_exit = True
        thread.join(10)
        asyncio.run(provider.close())


def test_the_command_serves_and_finishes_what_it_began(tmp_path: Path) -> None:
    with command(tmp_path, "--log-json") as (process, url):
        with httpx.Client(base_url=url, headers={"X-API-Key": "k1"}, timeout=60) as client:
            names = {m["name"] for m in client.get("/v1/models").json()}
            assert names == {*DEMO_NAMES, "sam2-demo-video"}
            assert httpx.get(f"{url}/v1/models").status_code == 401
            request = {"model": "sam2-demo", "image": data_uri(png(161, 97)), "points": [[[50, 50]]]}
            answers: list[Any] = []
            worker = threading.Thread(target=lambda: answers.append(client.post(SEGMENT, json=request)))
            worker.start()
            busy = 'pixano_inference_requests_in_progress{method="POST"} 1.0'
            until(lambda: answers or busy in httpx.get(f"{url}/metrics").text, 30)
            process.send_signal(signal.SIGTERM)
            worker.join(60)
            assert answers[0].status_code == 200
        rest, _ = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGTERM)
        entries = [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
        assert [e["status"] for e in entries if e.get("path") == SEGMENT] == [200]
        assert "Traceback" not in rest
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
    assert (tmp_path / "jobs.sqlite").is_file()
