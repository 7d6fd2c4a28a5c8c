"""Fetching media from URLs: what is refused, what is bounded, and that the judged address is the one connected to."""

from __future__ import annotations

import gzip
import logging
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.provider.errors import InvalidRequestError
from pixano_edge.engine.server import fetch as module
from pixano_edge.engine.server.fetch import FetchPolicy, Resolved, fetch, policy_from_environ

from .web import certificate, raw, says, web

MIB = 1 << 20
LOCAL = FetchPolicy(allow_private_ips=True)


def _ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _resolver(*answers: list[str]) -> tuple[Any, list[str]]:
    """A resolver that gives each of `answers` in turn, and the names that it was asked for."""
    asked: list[str] = []

    def look_up(host: str, port: int) -> list[Resolved]:
        found = answers[min(len(asked), len(answers) - 1)]
        asked.append(host)
        return [(socket.AF_INET6 if ":" in a else socket.AF_INET, (a, port)) for a in found]

    return look_up, asked


def _refusal(url: str, policy: FetchPolicy = LOCAL, max_bytes: int = MIB, kind: str = "image") -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        fetch(url, policy, max_bytes, kind)
    assert caught.value.action
    return caught.value


def test_content_and_request() -> None:
    with web(says(body=b"\x89PNG" * 1000)) as server:
        assert fetch(f"http://127.0.0.1:{server.port}/a%20b.png?x=1#f", LOCAL, 4000, "image") == b"\x89PNG" * 1000
    head = server.heads[0].decode()
    assert head.startswith("GET /a%20b.png?x=1 HTTP/1.1\r\n")
    assert f"Host: 127.0.0.1:{server.port}\r\n" in head
    assert "Accept-Encoding: identity\r\n" in head
    assert "Cookie" not in head
    assert "Authorization" not in head


def test_nothing_is_fetched_where_urls_are_off() -> None:
    with web(says()) as server:
        error = _refusal(f"http://127.0.0.1:{server.port}/", replace(LOCAL, allow_url=False))
    assert "not fetched" in error.message
    assert not server.connections


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "[::ffff:7f00:1]"])
def test_private_addresses_are_refused_by_default(host: str) -> None:
    with web(says()) as server:
        error = _refusal(f"http://{host}:{server.port}/", FetchPolicy())
        assert not server.connections
    assert "not a host that this server can fetch from" in error.message


def test_unknown_and_private_names_read_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def unknown(host: str, port: int) -> list[Resolved]:
        raise socket.gaierror(-2, "Name or service not known")

    caplog.set_level(logging.INFO)
    private, _ = _resolver(["10.11.12.13"])
    empty, _ = _resolver([])
    texts = {str(_refusal("http://box.lan/", FetchPolicy(resolver=r))) for r in (unknown, private, empty)}
    assert len(texts) == 1
    assert "10.11.12.13" not in texts.pop()
    assert "10.11.12.13" in caplog.text


def test_one_private_address_refuses_the_host() -> None:
    look_up, _ = _resolver(["93.184.215.14", "127.0.0.1"])
    _refusal("http://mixed.example/", FetchPolicy(resolver=look_up))


def test_the_judged_address_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that answers with a public address first and with this machine's own afterwards (DNS rebinding)."""
    look_up, asked = _resolver(["93.184.215.14"], ["127.0.0.1"])
    connected: list[Any] = []
    with web(says(body=b"inside")) as server:

        def connect(self: socket.socket, address: Any) -> None:
            connected.append(address)
            raise ConnectionRefusedError

        monkeypatch.setattr(module.socket.socket, "connect", connect)
        _refusal(f"http://rebind.example:{server.port}/", FetchPolicy(resolver=look_up))
        assert connected == [("93.184.215.14", server.port)]
    assert asked == ["rebind.example"]
    assert server.connections == 0


def test_a_name_is_resolved_once_per_request_and_sent_as_the_host() -> None:
    look_up, asked = _resolver(["127.0.0.1"])
    with web(says()) as server:
        policy = FetchPolicy(url_host_allowlist=("media.lan",), resolver=look_up)
        assert fetch(f"http://media.lan:{server.port}/a", policy, MIB, "image") == b"picture"
        assert asked == ["media.lan"]
        assert f"Host: media.lan:{server.port}\r\n".encode() in server.heads[0]
        _refusal(f"http://other.lan:{server.port}/a", policy)
    assert server.connections == 1


def test_a_list_of_hosts_limits_every_request() -> None:
    look_up, asked = _resolver(["127.0.0.1"])
    policy = replace(LOCAL, url_hosts=("*.example.org",), resolver=look_up)
    with web(says()) as server:
        assert fetch(f"http://a.example.org:{server.port}/", policy, MIB, "image") == b"picture"
        assert "does not fetch from 'evil.net'" in _refusal(f"http://evil.net:{server.port}/", policy).message
    assert asked == ["a.example.org"]


def test_ports_of_other_services_are_refused() -> None:
    look_up, asked = _resolver(["93.184.215.14"])
    assert "Port 25" in _refusal("http://mail.example:25/", FetchPolicy(resolver=look_up)).message
    assert not asked


def test_the_next_address_is_tried() -> None:
    with web(says()) as server:
        look_up, _ = _resolver(["127.0.0.2", "127.0.0.1"])  # nothing listens on the first
        assert fetch(f"http://a.lan:{server.port}/", replace(LOCAL, resolver=look_up), MIB, "image") == b"picture"


@pytest.mark.skipif(not _ipv6(), reason="this machine has no IPv6 loopback address")
def test_ipv6() -> None:
    with web(says(), family=socket.AF_INET6) as server:
        assert fetch(f"http://[::1]:{server.port}/", LOCAL, MIB, "image") == b"picture"
        assert f"Host: [::1]:{server.port}\r\n".encode() in server.heads[0]
        _refusal(f"http://[::1]:{server.port}/", FetchPolicy())
    assert server.connections == 1


def test_redirects_are_followed() -> None:
    with web(says(body=b"there")) as end, web(says("302 Found", Location=f"http://127.0.0.1:{end.port}/b?c")) as start:
        assert fetch(f"http://127.0.0.1:{start.port}/a", LOCAL, MIB, "image") == b"there"
    assert end.heads[0].startswith(b"GET /b?c ")


def test_relative_redirects_keep_host_and_port() -> None:
    def answer(connection: socket.socket, head: bytes) -> None:
        path = head.split()[1]
        (says(body=b"c") if path == b"/x/b" else says("307 Temporary Redirect", Location="b"))(connection, head)

    with web(answer) as server:
        assert fetch(f"http://127.0.0.1:{server.port}/x/a", LOCAL, MIB, "image") == b"c"


def test_a_redirect_into_the_private_network_is_refused() -> None:
    """The first host is trusted; what it redirects to is not."""
    look_up, _ = _resolver(["127.0.0.1"])
    with web(says(body=b"secret")) as inside:
        for target in (f"http://127.0.0.1:{inside.port}/", f"http://localhost:{inside.port}/", "file:///etc/passwd"):
            with web(says("302 Found", Location=target)) as start:
                policy = FetchPolicy(url_host_allowlist=("cdn.example",), resolver=look_up)
                error = _refusal(f"http://cdn.example:{start.port}/", policy)
                assert str(inside.port) not in str(error)
        assert inside.connections == 0


def test_too_many_redirects() -> None:
    def loop(connection: socket.socket, head: bytes) -> None:
        says("301 Moved Permanently", Location="/again")(connection, head)

    with web(loop) as server:
        assert "more than 3 times" in _refusal(f"http://127.0.0.1:{server.port}/").message
    assert server.connections == 4
    with web(loop) as server:
        _refusal(f"http://127.0.0.1:{server.port}/", replace(LOCAL, max_redirects=0))
    assert server.connections == 1


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answered 404"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "answered 204"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "answered 302"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: Text/HTML\r\n\r\n<html>", "a page or a text"),
        (b"SSH-2.0-OpenSSH_9\r\n", "malformed"),
        (b"", "malformed"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000 + b"\r\n\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc", "malformed"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "malformed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", "broke off after 3 of 10"),
    ],
)
def test_other_answers(data: bytes, shown: str) -> None:
    with web(raw(data)) as server:
        assert shown in _refusal(f"http://127.0.0.1:{server.port}/").message


def test_no_compressed_answers() -> None:
    bomb = gzip.compress(bytes(10 * MIB))
    with web(says(body=bomb, Content_Encoding="gzip")) as server:
        assert "compressed" in _refusal(f"http://127.0.0.1:{server.port}/").message


def test_the_announced_length_counts_before_anything_is_read() -> None:
    def answer(connection: socket.socket, head: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1048577\r\n\r\n")
        time.sleep(5)

    with web(answer) as server:
        start = time.monotonic()
        assert "more than 1048576 bytes" in _refusal(f"http://127.0.0.1:{server.port}/").message
    assert time.monotonic() - start < 4


def test_exactly_the_limit_passes() -> None:
    with web(says(body=b"x" * 1000)) as server:
        assert len(fetch(f"http://127.0.0.1:{server.port}/", LOCAL, 1000, "image")) == 1000
    with web(raw(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * 1000)) as server:
        assert len(fetch(f"http://127.0.0.1:{server.port}/", LOCAL, 1000, "image")) == 1000


def _endless(start: bytes, piece: bytes, sent: list[int]) -> Any:
    def answer(connection: socket.socket, head: bytes) -> None:
        connection.sendall(start)
        for _ in range(2000):
            connection.sendall(piece)
            sent[0] += len(piece)

    return answer


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7fffffff\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_endless_answers_end(start: bytes) -> None:
    """Without a length, with one huge chunk, and with the chunk length -1, for which http.client reads to the end."""
    sent = [0]
    with web(_endless(start, b"x" * MIB, sent)) as server:
        _refusal(f"http://127.0.0.1:{server.port}/")
    assert sent[0] < 40 * MIB


def test_endless_heads_end() -> None:
    sent = [0]
    with web(_endless(b"HTTP/1.1 100 Continue\r\n", b"\r\nHTTP/1.1 100 Continue\r\n" * 40000, sent)) as server:
        _refusal(f"http://127.0.0.1:{server.port}/")
    assert sent[0] < 40 * MIB


@pytest.mark.parametrize("part", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"])
def test_a_drip_ends_at_the_total_time(part: bytes) -> None:
    """A byte now and then, within the head and within the body: no single wait is long."""

    def answer(connection: socket.socket, head: bytes) -> None:
        connection.sendall(part)
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.1)

    with web(answer) as server:
        start = time.monotonic()
        error = _refusal(f"http://127.0.0.1:{server.port}/", replace(LOCAL, total_timeout_s=0.6, read_timeout_s=5))
    assert "took too long" in error.message
    assert 0.5 < time.monotonic() - start < 3


def test_silence_ends_at_the_read_timeout() -> None:
    with web(lambda connection, head: time.sleep(4)) as server:
        start = time.monotonic()
        error = _refusal(f"http://127.0.0.1:{server.port}/", replace(LOCAL, read_timeout_s=0.3))
    assert "took too long" in error.message
    assert time.monotonic() - start < 3


def test_videos_have_a_time_of_their_own() -> None:
    def answer(connection: socket.socket, head: bytes) -> None:
        time.sleep(0.5)
        says(body=b"clip")(connection, head)

    policy = replace(LOCAL, total_timeout_s=0.2, video_timeout_s=5)
    with web(answer) as server:
        assert fetch(f"http://127.0.0.1:{server.port}/", policy, MIB, "video") == b"clip"
        _refusal(f"http://127.0.0.1:{server.port}/", policy)


def test_a_name_server_that_hangs_is_not_waited_for() -> None:
    release = threading.Event()

    def hang(host: str, port: int) -> list[Resolved]:
        release.wait(5)
        return []

    start = time.monotonic()
    _refusal("http://slow.example/", FetchPolicy(connect_timeout_s=0.2, resolver=hang))
    release.set()
    assert time.monotonic() - start < 3


def test_a_refused_connection() -> None:
    with web(says()) as server:
        port = server.port
    error = _refusal(f"http://127.0.0.1:{port}/")
    assert "could not be fetched" in error.message
    assert "Errno" not in str(error)


def test_tls_checks_the_name_while_pinned_to_the_address(tmp_path: Path) -> None:
    context, trusted = certificate(tmp_path, "images.example")
    look_up, _ = _resolver(["127.0.0.1"])
    policy = replace(LOCAL, resolver=look_up, ca_file=trusted)
    with web(says(body=b"sealed"), tls=context) as server:
        assert fetch(f"https://images.example:{server.port}/", policy, MIB, "image") == b"sealed"
        wrong = _refusal(f"https://other.example:{server.port}/", policy)
        untrusted = _refusal(f"https://images.example:{server.port}/", replace(policy, ca_file=None))
    assert "certificate" in wrong.message
    assert "certificate" in untrusted.message
    assert len(server.heads) == 1


def test_tls_with_an_address(tmp_path: Path) -> None:
    context, trusted = certificate(tmp_path, "127.0.0.1")
    with web(says(body=b"sealed"), tls=context) as server:
        url = f"https://127.0.0.1:{server.port}/"
        assert fetch(url, replace(LOCAL, ca_file=trusted), MIB, "image") == b"sealed"


def test_no_way_back_from_https_to_http(tmp_path: Path) -> None:
    context, trusted = certificate(tmp_path, "127.0.0.1")
    with web(says()) as plain, web(says("302 Found", Location=f"http://127.0.0.1:{plain.port}/"), tls=context) as start:
        error = _refusal(f"https://127.0.0.1:{start.port}/", replace(LOCAL, ca_file=trusted))
    assert "from https:// to http://" in error.message
    assert not plain.connections


def test_a_tls_port_that_speaks_plainly(tmp_path: Path) -> None:
    with web(raw(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as server:
        assert "could not be fetched" in _refusal(f"https://127.0.0.1:{server.port}/").message


def test_the_environment_sets_the_policy() -> None:
    policy = policy_from_environ(
        {
            "PIXANO_INFERENCE_MEDIA_ALLOW_URL": "false",
            "PIXANO_EDGE_MEDIA_ALLOW_URL": "true",
            "PIXANO_INFERENCE_MEDIA_ALLOW_PRIVATE_IPS": "1",
            "PIXANO_INFERENCE_MEDIA_URL_HOST_ALLOWLIST": "pixano, minio.lan",
            "PIXANO_EDGE_MEDIA_URL_HOSTS": '["a.example", "b.example"]',
            "PIXANO_INFERENCE_MEDIA_MAX_REDIRECTS": "0",
            "PIXANO_INFERENCE_MEDIA_CONNECT_TIMEOUT_S": "2.5",
        }
    )
    assert policy == FetchPolicy(
        allow_private_ips=True,
        url_host_allowlist=("pixano", "minio.lan"),
        url_hosts=("a.example", "b.example"),
        max_redirects=0,
        connect_timeout_s=2.5,
    )
    assert policy_from_environ({}) == FetchPolicy()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PIXANO_INFERENCE_MEDIA_ALLOW_URL", "maybe"),
        ("PIXANO_EDGE_MEDIA_MAX_REDIRECTS", "-1"),
        ("PIXANO_EDGE_MEDIA_READ_TIMEOUT_S", "0"),
        ("PIXANO_EDGE_MEDIA_TOTAL_TIMEOUT_S", "nan"),
    ],
)
def test_wrong_settings_are_named(variable: str, value: str) -> None:
    with pytest.raises(InvalidRequestError, match=variable):
        policy_from_environ({variable: value})
