"""Models over HTTP: list, readiness, loading, unloading, counters, and what may be loaded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.provider import EdgeProvider
from pixano_edge.engine.provider.errors import OutOfMemoryError
from pixano_edge.engine.server import ServerSettings, create_app, schemas_out, state
from tests.engine.provider.fakes import FakeOpener, add_bundle, data_uri, make_provider, png
from tests.engine.server.conftest import asgi

CLICK = {"model": "alpha", "image": data_uri(png(161, 97))}


async def test_loading_and_unloading(client: Any, opener: FakeOpener) -> None:
    body = {"name": "mine", "modelClass": "Sam2ImagePredictor", "modelParams": {"path": "alpha", "cacheMb": 8}}
    made = await client.post("/v1/models", json=body)
    assert made.status_code == 201
    entry = schemas_out.Model.model_validate(made.json())
    assert (entry.name, entry.capability, entry.status, entry.loaded) == ("mine", "segmentation", "RUNNING", True)
    again = await client.post("/v1/models", json=body)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
    assert "mine" in {m["name"] for m in (await client.get("/v1/models")).json()}
    gone = await client.delete("/v1/models/mine")
    assert (gone.status_code, gone.json()) == (200, {"status": "deleted", "model": "mine"})
    assert (await client.delete("/v1/models/mine")).status_code == 404
    assert opener.opened[0].closed


async def test_the_name_may_come_from_the_path(client: Any) -> None:
    body = {"model_class": "Sam2VideoModel", "model_params": {"path": "alpha"}, "deployment": {"maxReplicas": 4}}
    made = await client.post("/v1/models", json=body)
    assert (made.status_code, made.json()["name"], made.json()["capability"]) == (201, "alpha", "tracking")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"modelClass": "Sam3"}, 422),
        ({"modelClass": "Owlv2Detector"}, 422),
        ({"modelParams": {"path": "alpha", "dtype": "fp16"}}, 422),
        ({"modelParams": {"path": "alpha", "threads": 0}}, 422),
        ({"modelParams": {"path": 5}}, 422),
        ({"modelParams": {"path": "nobody"}}, 404),
        ({"name": "../evil"}, 422),
        ({"name": None, "modelParams": {}}, 422),
        ({"name": "nobody", "modelParams": {}}, 404),
        ({"modelParams": {"path": "/etc"}}, 422),
        ({"modelParams": {"path": "/no/such/folder"}}, 422),
        ({"modelParams": {"path": "../.."}}, 422),
        ({"modelParams": {"path": "~"}}, 422),
        ({"modelParams": {"path": "facebook/sam2.1-hiera-tiny"}}, 422),
        ({"modelParams": []}, 422),
    ],
)
async def test_what_cannot_be_loaded_is_refused(client: Any, change: dict[str, Any], status: int) -> None:
    body = {"name": "mine", "modelClass": "Sam2ImagePredictor", "modelParams": {"path": "alpha"}, **change}
    answer = await client.post("/v1/models", json=body)
    assert answer.status_code == status, answer.text


async def test_bundles_by_path_lie_below_the_allowed_folders(
    provider: EdgeProvider, tmp_path_factory: pytest.TempPathFactory
) -> None:
    allowed, other = tmp_path_factory.mktemp("allowed"), tmp_path_factory.mktemp("other")
    add_bundle(allowed, "inside")
    add_bundle(other, "outside")
    (allowed / "link").symlink_to(other / "outside")
    async with asgi(create_app(ServerSettings(bundle_roots=(allowed,)), provider)) as client:
        paths = ((allowed / "inside", 201), (other / "outside", 422), (allowed / "link", 422), (allowed / "..", 422))
        for path, status in paths:
            body = {"name": "mine", "modelClass": "Sam2ImagePredictor", "modelParams": {"path": str(path)}}
            answer = await client.post("/v1/models", json=body)
            assert answer.status_code == status, (path, answer.text)
            if status == 422:
                assert "bundle_roots" in answer.text


async def test_no_room_is_409(client: Any, opener: FakeOpener) -> None:
    opener.error = OutOfMemoryError("No room.", "Unload a model.")
    body = {"name": "mine", "modelClass": "Sam2ImagePredictor", "modelParams": {"path": "alpha"}}
    answer = await client.post("/v1/models", json=body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (409, "No room. Unload a model.")


async def test_readiness_follows_loading(client: Any, opener: FakeOpener) -> None:
    assert (await client.get("/v1/ready")).json()["ready"] is True
    opener.gate.clear()
    request = asyncio.ensure_future(client.post("/v1/inference/segmentation", json=CLICK))
    for _ in range(200):
        ready = await client.get("/ready")
        if ready.status_code == 503:
            break
        await asyncio.sleep(0.01)
    body = ready.json()  # the same shape, no error envelope
    assert (body["ready"], body["models"]["alpha"], body["models"]["find"]) == (False, "DEPLOYING", "RUNNING")
    assert body["models_loaded"] == 0
    opener.gate.set()
    assert (await request).status_code == 200
    ready = await client.get("/v1/ready")
    assert (ready.status_code, ready.json()["models_loaded"]) == (200, 1)
    loaded = {m["name"]: m["loaded"] for m in (await client.get("/v1/models")).json()}
    assert loaded == {"alpha": True, "alpha-video": False, "find": False}


async def test_models_are_loaded_at_start(tmp_path: Path, opener: FakeOpener) -> None:
    add_bundle(tmp_path, "alpha", tracks=True)
    provider = make_provider(tmp_path, opener)
    app = create_app(ServerSettings(preload=("alpha-video", "nobody")), provider)
    opener.gate.clear()
    async with app.router.lifespan_context(app), asgi(app) as client:
        ready = await client.get("/v1/ready")
        assert (ready.status_code, ready.json()["models"]["alpha-video"]) == (503, "DEPLOYING")
        opener.gate.set()
        for _ in range(200):
            if (await client.get("/v1/ready")).status_code == 200:
                break
            await asyncio.sleep(0.01)
        loaded = {m["name"]: m["loaded"] for m in (await client.get("/v1/models")).json()}
        assert loaded == {"alpha": True, "alpha-video": True}
        (warning,) = [w for w in (await client.get("/v1/info")).json()["warnings"] if "nobody" in w]
        assert "did not load at start" in warning
    await provider.close()


@pytest.mark.parametrize(
    ("device", "gpus", "together"),
    [("auto", (), 2), ("auto", ("cuda:0",), 1), ("cpu", ("cuda:0",), 2), ("cuda:0", (), 1)],
)
async def test_two_models_are_loaded_at_a_time_without_a_gpu(
    tmp_path: Path,
    opener: FakeOpener,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    gpus: tuple[str, ...],
    together: int,
) -> None:
    names = ("alpha", "nobody", "beta", "gamma")
    for name in ("alpha", "beta", "gamma"):
        add_bundle(tmp_path, name)
    monkeypatch.setattr(state, "auto_gpus", lambda: gpus)
    provider = make_provider(tmp_path, opener)
    app = create_app(ServerSettings(preload=names, device=device), provider)
    opener.gate.clear()
    async with app.router.lifespan_context(app), asgi(app) as client:
        for _ in range(2000):
            if len(provider._table.slots()) >= together:
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # in which one too many would show
        assert [slot.name for slot in provider._table.slots()] == ["alpha", "beta"][:together]
        opener.gate.set()
        for _ in range(2000):
            if (await client.get("/v1/ready")).status_code == 200:
                break
            await asyncio.sleep(0.01)
        assert {slot.name for slot in provider._table.slots()} == {"alpha", "beta", "gamma"}
    await provider.close()


async def test_a_start_that_fails_otherwise_is_told(
    tmp_path: Path, opener: FakeOpener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise OSError("a library is gone")

    monkeypatch.setattr(state, "load_codecs", broken)
    provider = make_provider(tmp_path, opener)
    app = create_app(ServerSettings(preload=("alpha",)), provider)
    async with app.router.lifespan_context(app), asgi(app) as client:
        for _ in range(2000):
            told = [w for w in (await client.get("/v1/info")).json()["warnings"] if "a library is gone" in w]
            if told:
                break
            await asyncio.sleep(0.01)
        assert told == ["Loading at start ended early: OSError: a library is gone"]
        assert (await client.get("/v1/ready")).status_code == 200
    assert "loading at start ended early" in caplog.text
    await provider.close()


async def test_stats(client: Any) -> None:
    empty = (await client.get("/v1/models/alpha/stats")).json()
    assert (empty["request_count"], empty["avg_processing_time"]) == (0, 0.0)
    for _ in range(3):
        await client.post("/v1/inference/segmentation", json=CLICK)
    await client.post("/v1/inference/segmentation", json={**CLICK, "image": "x"})
    found = schemas_out.ModelStats.model_validate((await client.get("/v1/models/alpha/stats")).json())
    assert (found.request_count, found.capability, found.model_class) == (3, "segmentation", "Sam2ImagePredictor")
    assert found.avg_processing_time == pytest.approx(found.total_processing_time / 3)
    assert (await client.get("/v1/models/nobody/stats")).status_code == 404
    (latency,) = (await client.get("/v1/info")).json()["latency"]
    assert (latency["model"], latency["count"]) == ("alpha", 3)
    assert 0 < latency["p50Ms"] <= latency["p99Ms"]


async def test_info_says_what_the_box_is(client: Any) -> None:
    found = schemas_out.Info.model_validate((await client.get("/info")).json())
    assert (found.app_name, found.num_nodes, found.gpus_used) == ("Pixano Edge", 1, 0.0)
    assert found.models_to_capability == {"alpha": "segmentation", "alpha-video": "tracking", "find": "detection"}
    assert found.gpu_info["memory"]


async def test_what_the_open_route_tells_of_jobs_is_not_their_id(client: Any, opener: FakeOpener) -> None:
    from tests.engine.server.test_traps import clip

    opener.gate.clear()
    job = (await client.post("/v1/inference/tracking/jobs", json=clip())).json()
    info = await client.get("/v1/info")
    assert [j["model"] for j in info.json()["jobs"]] == ["alpha"]
    assert job["jobId"] not in info.text
