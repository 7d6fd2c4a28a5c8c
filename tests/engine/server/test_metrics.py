"""Metrics and logs: what they count, and what clients cannot write into them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pixano_edge.engine.server import logs
from tests.engine.provider.fakes import data_uri, png
from tests.engine.server.test_traps import clip, ended

CLICK = {"model": "alpha", "image": data_uri(png(161, 97)), "boxes": [[1, 1, 9, 9]]}
SEGMENT = "/v1/inference/segmentation"


async def read(client: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of the exposition, by name and labels."""
    answer = await client.get("/v1/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(found: dict[Any, float], name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


async def test_requests_models_stages_and_jobs_are_counted(client: Any) -> None:
    for _ in range(2):
        await client.post(SEGMENT, json=CLICK)
    await client.post(SEGMENT, json={**CLICK, "model": "nobody"})
    job = (await client.post("/v1/inference/tracking/jobs", json=clip())).json()
    await ended(client, job["jobId"])
    await client.get("/v1/jobs/job-1")
    await client.get("/no/such/path")
    found = await read(client)
    total = "pixano_inference_requests_total"
    assert value(found, total, method="POST", path=SEGMENT, status="200") == 2
    assert value(found, total, method="POST", path=SEGMENT, status="404") == 1
    assert value(found, total, method="GET", path="/v1/jobs/{job_id}", status="404") == 1
    assert value(found, total, method="GET", path="other", status="404") == 1
    assert value(found, "pixano_inference_request_duration_seconds_count", method="POST", path=SEGMENT) == 3
    assert value(found, "pixano_inference_requests_in_progress", method="GET") == 1  # this one
    assert value(found, "pixano_edge_inference_seconds_count", model="alpha", capability="segmentation") == 2
    assert value(found, "pixano_edge_inference_errors_total", capability="segmentation", status="404") == 1
    for stage, count in (("queue", 2), ("decode_image", 2), ("decode_masks", 2), ("pack", 2), ("load", 2)):
        assert value(found, "pixano_edge_stage_seconds_count", model="alpha", stage=stage) == count, stage
    assert value(found, "pixano_edge_stage_seconds_count", model="alpha", stage="track") >= 3
    assert value(found, "pixano_edge_jobs", state="completed") == 1
    assert value(found, "pixano_edge_jobs", state="running") == 0
    assert value(found, "pixano_edge_queue_waiting", model="alpha") == 0
    assert value(found, "pixano_edge_queue_depth", model="alpha") == 32
    assert value(found, "pixano_edge_model_loaded", model="alpha", device="cpu") == 1
    assert value(found, "pixano_edge_device_memory_bytes", device="cpu", kind="budget") > 0
    assert value(found, "process_resident_memory_bytes") > 0


async def test_the_cache_of_embeddings_is_counted(demo: Any) -> None:
    before = await read(demo)
    image = data_uri(png(64, 48, (200, 10, 90)))
    for x in (10, 20, 30):
        await demo.post(SEGMENT, json={"model": "sam2-demo", "image": image, "points": [[[x, 20]]], "labels": [[1]]})
    found = await read(demo)
    for name, more in (("hits", 2), ("misses", 1)):
        key = (f"pixano_edge_cache_{name}_total", (("model", "sam2-demo"),))
        assert found[key] - before.get(key, 0) == more
    assert value(found, "pixano_edge_stage_seconds_count", model="sam2-demo", stage="encode") == 1
    assert value(found, "pixano_edge_stage_seconds_count", model="sam2-demo", stage="cached_features") == 2
    assert value(found, "pixano_edge_cache_bytes", model="sam2-demo") > 0


async def test_clients_cannot_add_labels(client: Any) -> None:
    async def wild(start: int) -> dict[Any, float]:
        for i in range(start, start + 10):
            await client.get(f"/x{i}")
            await client.request(f"METHOD{i}", "/v1/models")
            await client.post(SEGMENT, json={**CLICK, "model": f"m{i}"})
        return await read(client)

    first = await wild(0)
    assert set(await wild(100)) == set(first) | set(await read(client))
    assert not [key for key in await wild(200) if "METHOD" in str(key) or "m10" in str(key)]
    assert len(await read(client)) - len(first) <= 24  # the series of this route itself


@pytest.fixture
def written(client: Any) -> Iterator[io.StringIO]:
    """What the logs wrote, in the form that the test chose."""
    stream = io.StringIO()
    before = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).level) for name in logs.NAMES}
    yield stream
    for name, (handlers, level) in before.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, True
        logger.setLevel(level)


async def test_json_logs_have_one_object_per_request(client: Any, written: io.StringIO) -> None:
    logs.configure("info", True, written)
    await client.post(SEGMENT, json=CLICK, headers={"X-Request-ID": "abc"})
    await client.get("/v1/health")  # probes are for the debug level
    entries = [json.loads(line) for line in written.getvalue().splitlines()]
    (entry,) = [one for one in entries if one["logger"].endswith("access")]
    assert (entry["request_id"], entry["method"], entry["path"], entry["status"]) == ("abc", "POST", SEGMENT, 200)
    assert entry["ms"] > 0


async def test_a_failure_is_logged_with_its_id_and_traceback_and_not_shown(
    client: Any, written: io.StringIO, monkeypatch: pytest.MonkeyPatch, provider: Any
) -> None:
    logs.configure("info", True, written)

    async def broken(*_: Any) -> Any:
        raise RuntimeError("the reason")

    monkeypatch.setattr(provider, "list_models", broken)
    answer = await client.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "Inference error.")
    entries = [json.loads(line) for line in written.getvalue().splitlines()]
    (entry,) = [one for one in entries if "traceback" in one]
    assert entry["request_id"] == answer.json()["error"]["requestId"]
    assert "the reason" in entry["traceback"]


async def test_a_path_cannot_write_a_line_of_its_own(client: Any, written: io.StringIO) -> None:
    logs.configure("debug", False, written)
    await client.get("/x%0a2026-01-01 00:00:00.000 info    forged%1b[31m")
    lines = [line for line in written.getvalue().splitlines() if "forged" in line]
    assert len(lines) == 1
    assert not lines[0].startswith("2026-01-01 00:00")
    assert "\x1b" not in lines[0]


async def test_keys_are_not_logged(connect: Any, written: io.StringIO) -> None:
    logs.configure("debug", True, written)
    client = connect(api_keys=("sesame",))
    for headers in ({"X-API-Key": "sesame"}, {"X-API-Key": "wrong-sesame"}, {"Authorization": "Bearer sesame"}):
        await client.get("/v1/models", headers=headers)
    assert "request" in written.getvalue()
    assert "sesame" not in written.getvalue()
