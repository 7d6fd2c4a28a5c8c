"""Connections whose requests do not come: closed in time, and only those."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="needs pixano-edge[server]")

from uvicorn.protocols.http.auto import AutoHTTPProtocol  # noqa: E402
from uvicorn.protocols.http.h11_impl import H11Protocol  # noqa: E402

from pixano_edge.engine.server import ServerSettings, create_app  # noqa: E402
from pixano_edge.engine.server.deadlines import with_head_deadline  # noqa: E402
from pixano_edge.engine.server.run import bind, uvicorn_config  # noqa: E402
from tests.engine.provider.fakes import FakeOpener, make_provider, until  # noqa: E402

HEAD_S = 0.5
HEALTH = b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module", params=[AutoHTTPProtocol, H11Protocol], ids=["httptools", "h11"])
def address(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of a server that wants a key, and a head in `HEAD_S`, by either of uvicorn's protocols."""
    provider = make_provider(Path(tmp_path_factory.mktemp("store")), FakeOpener(), media_roots=[])
    settings = ServerSettings(head_timeout_s=HEAD_S, shutdown_timeout_s=1, api_keys=("k" * 16,))
    config = uvicorn_config(create_app(settings, provider), settings)
    if request.param is not AutoHTTPProtocol:
        config.http = with_head_deadline(HEAD_S, request.param)
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive(), 30)
    yield listening.getsockname()
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()
    asyncio.run(provider.close())


def closed_after(connection: socket.socket, trickle: bytes = b"", limit: float = 20.0) -> float:
    """Seconds until the server closes a connection to which `trickle` is sent byte by byte."""
    begun = time.monotonic()
    connection.settimeout(0.05)
    for i in range(int(limit / 0.05)):
        if _closed(connection, trickle[i % len(trickle) : i % len(trickle) + 1] if trickle else b""):
            return time.monotonic() - begun
    raise AssertionError(f"still open after {limit} s")


def _closed(connection: socket.socket, byte: bytes) -> bool:
    try:
        connection.sendall(byte)
        return not connection.recv(65536)
    except TimeoutError:
        return False
    except OSError:  # sent to a closed connection
        return True


def answer(connection: socket.socket) -> bytes:
    """One answer with a stated length."""
    connection.settimeout(20)
    got = b""
    while b"\r\n\r\n" not in got:
        got += connection.recv(65536)
    head, _, body = got.partition(b"\r\n\r\n")
    lengths = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    while len(body) < int(lengths[0]):
        body += connection.recv(65536)
    return head.partition(b"\r\n")[0]


def test_a_connection_that_says_nothing_is_closed(address: Any) -> None:
    with socket.create_connection(address) as connection:
        assert closed_after(connection) > 0.8 * HEAD_S


def test_a_head_that_trickles_is_cut(address: Any) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(HEALTH[:-2])
        assert closed_after(connection, b"X-A: b\r\n") > 0.8 * HEAD_S
    with socket.create_connection(address) as connection:  # the second head of a connection, too
        connection.sendall(HEALTH)
        assert answer(connection).endswith(b"200 OK")
        connection.sendall(HEALTH[:-2])
        assert closed_after(connection, b"X-A: b\r\n") > 0.8 * HEAD_S


def test_a_refused_upload_cannot_trickle_on(address: Any) -> None:
    with socket.create_connection(address) as connection:
        head = b"POST /v1/inference/segmentation HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
        connection.sendall(head)
        assert b" 401 " in answer(connection) + b" "
        closed_after(connection, b"x")


def test_slow_bodies_and_idle_connections_are_not_cut(address: Any) -> None:
    """A body has its own deadlines, and between requests a connection may idle for longer."""
    with socket.create_connection(address) as connection:
        connection.sendall(HEALTH)
        assert answer(connection).endswith(b"200 OK")
        time.sleep(2 * HEAD_S)
        body = b'{"model":"none","image":"data:image/png;base64,AAAA"}'
        head = (
            "POST /v1/inference/segmentation HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"X-API-Key: {'k' * 16}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body[:9])
        time.sleep(2 * HEAD_S)
        connection.sendall(body[9:])
        assert answer(connection).partition(b" ")[2][:3] in (b"404", b"400")
        connection.sendall(HEALTH)
        assert answer(connection).endswith(b"200 OK")


def test_a_request_to_become_a_web_socket_is_an_ordinary_one(address: Any) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
    with socket.create_connection(address) as connection:
        connection.sendall(HEALTH[:-2] + upgrade + b"\r\n")
        assert answer(connection).endswith(b"200 OK")
