"""Who gets in: keys, pages of other origins, the address that is bound, and bodies that are too large or too slow."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.provider.callers import caller
from pixano_edge.engine.server import ServerSettings, create_app
from pixano_edge.engine.server.auth import AuthMiddleware, Keys
from pixano_edge.engine.server.limits import BodyLimitMiddleware
from tests.engine.provider.fakes import data_uri, png

CLICK = {"model": "alpha", "image": data_uri(png(161, 97))}
SEGMENT = "/v1/inference/segmentation"

GUARDED = (
    ("POST", SEGMENT),
    ("POST", f"{SEGMENT}/binary"),
    ("POST", "/v1/inference/tracking/jobs"),
    ("POST", "/v1/inference/tracking/stream"),
    ("GET", "/v1/models"),
    ("POST", "/v1/models"),
    ("DELETE", "/v1/models/alpha"),
    ("GET", "/v1/models/alpha/stats"),
    ("GET", "/v1/jobs/job-1"),
    ("DELETE", "/v1/jobs/job-1"),
    ("GET", "/v1/jobs/job-1/frames"),
    ("POST", "/v1/jobs/job-1/resume"),
    ("GET", "/app/models/"),
    ("POST", "/tasks/image/mask_generation/"),
    ("POST", "/inference/segmentation/"),
    ("GET", "/no/such/path"),
)


async def test_every_route_but_the_open_ones_asks_for_a_key(connect: Callable[..., Any]) -> None:
    client = connect(api_keys=("first", "second"))
    for method, path in GUARDED:
        missing = await client.request(method, path)
        assert (missing.status_code, missing.headers["WWW-Authenticate"]) == (401, "Bearer"), path
        assert missing.json()["error"]["code"] == "unauthorized"
        wrong = await client.request(method, path, headers={"X-API-Key": "firs"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (403, "forbidden"), path
    for name in ("health", "ready", "metrics", "info"):
        for path in (f"/{name}", f"/v1/{name}"):
            assert (await client.get(path)).status_code == 200, path
    for path in ("/v1/info/../models", "//v1/models", "/v1/infox", "/v1/health/", "/V1/HEALTH"):
        assert (await client.get(path)).status_code == 401, path
    documented = {
        (method.upper(), path.replace("{name}", "alpha").replace("{job_id}", "job-1"))
        for path, item in (await client.get("/openapi.json")).json()["paths"].items()
        for method in item
    }
    for method, path in documented:
        if path.split("/")[2] not in ("health", "ready", "metrics", "info"):
            assert (await client.request(method, path)).status_code == 401, path


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": "first"},
        {"X-API-Key": "second"},
        {"Authorization": "Bearer second"},
        {"Authorization": "bearer  first "},
    ],
)
async def test_each_key_opens_in_either_header(connect: Callable[..., Any], headers: dict[str, str]) -> None:
    client = connect(api_keys=("first", "second"))
    assert (await client.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": "Basic Zmlyc3Q6"}, {"Authorization": "first"}, {"Authorization": "Bearer "}, {"X-API-Key": " "}],
)
async def test_what_is_no_key_counts_as_none(connect: Callable[..., Any], headers: dict[str, str]) -> None:
    assert (await connect(api_keys=("first",)).get("/v1/models", headers=headers)).status_code == 401


def test_all_keys_are_compared_whatever_the_first_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(len(a)) or real(a, b))
    keys = Keys(["a", "longer key", "c"])
    assert keys.accept(b"a")
    assert not keys.accept(b"longer")
    assert compared == [32] * 6  # digests of one length, none left out


async def test_a_wrong_key_reads_no_body() -> None:
    read = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        read.append(await receive())

    async def receive() -> Any:
        raise AssertionError("the body was read")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": SEGMENT, "headers": [(b"x-api-key", b"no")]}
    await AuthMiddleware(app, Keys(["yes"]))(scope, receive, send)
    assert sent[0]["status"] == 403
    assert read == []


async def test_callers_are_told_apart_by_key(connect: Callable[..., Any], provider: Any, monkeypatch: Any) -> None:
    seen = []
    real = provider.list_models

    async def noted(*args: Any) -> Any:
        seen.append(caller())
        return await real(*args)

    monkeypatch.setattr(provider, "list_models", noted)
    client = connect(api_keys=("first", "second"))
    for key in ("first", "second", "first"):
        await client.get("/v1/models", headers={"X-API-Key": key})
    assert seen[0] == seen[2] != seen[1]
    assert "first" not in seen[0]


@pytest.mark.parametrize(
    ("host", "settings", "allowed"),
    [
        ("127.0.0.1", {}, True),
        ("localhost", {}, True),
        ("::1", {}, True),
        ("127.3.4.5", {}, True),
        ("0.0.0.0", {}, False),
        ("::", {}, False),
        ("192.168.1.5", {}, False),
        ("box.example", {}, False),
        ("", {}, False),
        ("0.0.0.0", {"api_keys": ("k",)}, True),
        ("0.0.0.0", {"allow_anonymous": True}, True),
    ],
)
def test_binding_beyond_loopback_needs_a_key(host: str, settings: dict[str, Any], allowed: bool) -> None:
    found = ServerSettings(host=host, **settings)
    if allowed:
        found.check_bind()
    else:
        with pytest.raises(EdgeError, match="without an API key"):
            found.check_bind()


@pytest.mark.parametrize(
    ("origin", "host", "settings", "allowed"),
    [
        (None, "127.0.0.1:7463", {}, True),
        ("http://127.0.0.1:7463", "127.0.0.1:7463", {}, True),
        ("http://localhost:7463", "localhost:7463", {}, True),
        ("https://evil.example", "127.0.0.1:7463", {}, False),
        ("null", "127.0.0.1:7463", {}, False),
        ("http://127.0.0.1:8000", "127.0.0.1:7463", {}, False),
        ("http://evil.example:7463", "evil.example:7463", {}, False),  # a name that resolves to 127.0.0.1
        ("http://box.lan:7463", "box.lan:7463", {"host": "0.0.0.0", "api_keys": ("k",)}, True),
        ("https://labels.lan", "127.0.0.1:7463", {"cors_allow_origins": ("https://labels.lan",)}, True),
        ("https://other.lan", "127.0.0.1:7463", {"cors_allow_origins": ("https://labels.lan",)}, False),
        ("https://other.lan", "127.0.0.1:7463", {"cors_allow_origins": ("*",)}, True),
        ("http://[", "127.0.0.1:7463", {}, False),
    ],
)
async def test_pages_of_other_origins_are_refused(
    connect: Callable[..., Any], origin: str | None, host: str, settings: dict[str, Any], allowed: bool
) -> None:
    headers = {"Host": host, "X-API-Key": "k", **({"Origin": origin} if origin else {})}
    answer = await connect(**settings).post(SEGMENT, json=CLICK, headers=headers)
    assert answer.status_code == (200 if allowed else 403), answer.text


@pytest.mark.parametrize(
    ("host", "settings", "allowed"),
    [
        ("127.0.0.1:7463", {}, True),
        ("localhost", {}, True),
        ("LOCALHOST:1", {}, True),
        ("[::1]:7463", {}, True),
        ("127.3.4.5:80", {"host": "127.3.4.5"}, True),
        ("", {}, True),  # no browser
        ("evil.example:7463", {}, False),  # a name that resolves to 127.0.0.1
        ("127.0.0.1.evil.example", {}, False),
        ("localhost.evil.example", {}, False),
        ("user@127.0.0.1@evil.example", {}, False),
        ("[", {}, False),
        ("10.0.0.5", {}, False),
        ("labels.lan", {"cors_allow_origins": ("https://labels.lan",)}, True),
        ("labels.lan:8443", {"cors_allow_origins": ("https://labels.lan",)}, True),
        ("other.lan", {"cors_allow_origins": ("https://labels.lan",)}, False),
        ("box.lan", {"api_keys": ("k",)}, True),  # a proxy on this machine
        ("box.lan", {"host": "0.0.0.0", "allow_anonymous": True}, True),
    ],
)
@pytest.mark.parametrize("path", ["/v1/info", "/v1/models", "/", "/v1/jobs/job-1", "/app/models/"])
async def test_without_keys_loopback_goes_by_its_own_names(
    connect: Callable[..., Any], path: str, host: str, settings: dict[str, Any], allowed: bool
) -> None:
    answer = await connect(**settings).get(path, headers={"Host": host, "X-API-Key": "k"})
    assert (answer.status_code != 403) is allowed, answer.text


async def test_allowed_origins_get_cors_headers_and_preflight_needs_no_key(connect: Callable[..., Any]) -> None:
    client = connect(api_keys=("k",), cors_allow_origins=("https://labels.lan",))
    asked = {"Origin": "https://labels.lan", "Access-Control-Request-Method": "POST"}
    preflight = await client.options(SEGMENT, headers={**asked, "Access-Control-Request-Headers": "x-api-key"})
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://labels.lan"
    refused = await client.post(SEGMENT, json=CLICK, headers={"Origin": "https://labels.lan"})
    assert refused.status_code == 401
    assert refused.headers["Access-Control-Allow-Origin"] == "https://labels.lan"


async def test_warnings_are_shown_to_holders_of_a_key_alone(connect: Callable[..., Any]) -> None:
    for keys, headers, shown in (
        ((), {}, True),
        (("k",), {}, False),
        (("k",), {"X-API-Key": "wrong"}, False),
        (("k",), {"X-API-Key": "k"}, True),
        (("k",), {"Authorization": "Bearer k"}, True),
    ):
        client = connect(api_keys=keys)
        client._transport.app.state.server.warnings.append("/home/somebody is full")
        for path in ("/info", "/v1/info"):
            answer = await client.get(path, headers=headers)
            assert answer.status_code == 200
            assert ("/home/somebody is full" in answer.json()["warnings"]) is shown, (keys, headers)
            assert shown or "somebody" not in answer.text


@pytest.mark.parametrize(
    ("settings", "managed"),
    [
        ({}, True),
        ({"host": "0.0.0.0", "api_keys": ("k",)}, True),
        ({"host": "0.0.0.0", "allow_anonymous": True}, False),
        ({"host": "0.0.0.0", "allow_anonymous": True, "manage_models": True}, True),
        ({"manage_models": False}, False),
        ({"api_keys": ("k",), "manage_models": False}, False),
    ],
)
async def test_who_may_load_and_unload_models(
    connect: Callable[..., Any], settings: dict[str, Any], managed: bool
) -> None:
    client = connect(**settings, headers={"X-API-Key": "k"})
    wish = {"name": "alpha", "modelClass": "Sam2ImagePredictor", "modelParams": {}}
    loaded = await client.post("/v1/models", json=wish)
    assert loaded.status_code == (201 if managed else 403), loaded.text
    gone = await client.delete("/v1/models/alpha")
    assert gone.status_code == (200 if managed else 403), gone.text
    assert managed or loaded.json()["error"]["code"] == "forbidden"
    assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(("keys", "warned"), [(("x" * 15, "y" * 16), 1), (("y" * 16,), 0), ((), 0)])
async def test_short_keys_are_warned_about_at_start(
    provider: Any, caplog: pytest.LogCaptureFixture, keys: tuple[str, ...], warned: int
) -> None:
    app = create_app(ServerSettings(api_keys=keys), provider)
    async with app.router.lifespan_context(app):
        pass
    found = [record.getMessage() for record in caplog.records if "API key" in record.getMessage()]
    assert found == ["1 API key(s) have fewer than 16 characters and may be guessed"] * warned


async def test_json_routes_take_json_alone(client: Any) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        refused = await client.post(SEGMENT, content=json.dumps(CLICK), headers={"Content-Type": kind})
        assert refused.status_code == 415
    for kind in ("application/json; charset=utf-8", "application/vnd.pixano+json"):
        taken = await client.post(SEGMENT, content=json.dumps(CLICK), headers={"Content-Type": kind})
        assert taken.status_code == 200


async def test_a_body_at_the_limit_is_taken_and_one_byte_more_is_not(connect: Callable[..., Any]) -> None:
    body = json.dumps(CLICK).encode()
    kind = {"Content-Type": "application/json"}
    assert (
        await connect(max_request_body_bytes=len(body)).post(SEGMENT, content=body, headers=kind)
    ).status_code == 200
    refused = await connect(max_request_body_bytes=len(body) - 1).post(SEGMENT, content=body, headers=kind)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "payload_too_large")
    assert refused.headers["X-Request-ID"] == refused.json()["error"]["requestId"]

    async def chunks() -> Any:
        for start in range(0, len(body), 7):
            yield body[start : start + 7]

    assert (
        await connect(max_request_body_bytes=len(body)).post(SEGMENT, content=chunks(), headers=kind)
    ).status_code == 200
    upload = {"files": {"image": png(161, 97)}, "data": {"metadata": '{"model":"alpha"}'}}
    assert (await connect(max_request_body_bytes=100).post(f"{SEGMENT}/binary", **upload)).status_code == 413


async def test_a_refused_body_is_answered_first_and_then_drained() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("it was let through")

    events: list[str] = []
    chunks = [{"type": "http.request", "body": b"x" * 60, "more_body": more} for more in (True, True, False)]

    async def receive() -> Any:
        events.append("read")
        return chunks.pop(0)

    async def send(message: Any) -> None:
        events.append(message["type"].rpartition(".")[2])

    limit = BodyLimitMiddleware(app, 100)
    scope = {"type": "http", "path": "/", "headers": [(b"content-length", b"180")]}
    await limit(scope, receive, send)
    assert events == ["start", "body", "read", "read", "read", "body"]
    # A client that asks before it sends is not made to send.
    events.clear()
    await limit({**scope, "headers": [*scope["headers"], (b"expect", b"100-continue")]}, receive, send)
    assert events == ["start", "body", "body"]


async def test_a_body_that_stops_coming_is_given_up(connect: Callable[..., Any]) -> None:
    async def stalled() -> Any:
        yield b'{"model":'
        await asyncio.sleep(5)
        yield b'"alpha"}'

    client = connect(body_timeout_s=0.1)
    answer = await client.post(SEGMENT, content=stalled(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 408
