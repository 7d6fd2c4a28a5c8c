"""The OpenAPI document, and requests made up from it: nothing that fits or misses it may break the server."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs pixano-edge[test]")
schemathesis = pytest.importorskip("schemathesis", reason="needs pixano-edge[test]")

from hypothesis import HealthCheck, Phase, settings  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance  # noqa: E402

from pixano_edge.engine.server import ServerSettings, create_app  # noqa: E402
from pixano_edge.engine.server import schemas as requests  # noqa: E402
from tests.engine.provider.fakes import FakeOpener, add_bundle, make_provider  # noqa: E402

V1 = "/v1/inference"
ROUTES = {
    *((f"/v1/{name}", "get") for name in ("health", "ready", "metrics", "info", "models")),
    *((f"{V1}/{name}", "post") for name in ("segmentation", "detection", "tracking", "vlm", "embedding", "ner")),
    *((f"{V1}/{name}/binary", "post") for name in ("segmentation", "detection", "tracking", "vlm", "embedding")),
    *((f"{V1}/{name}/stream", "post") for name in ("tracking", "vlm")),
    (f"{V1}/tracking/jobs", "post"),
    (f"{V1}/tracking/jobs/binary", "post"),
    ("/v1/jobs/{job_id}", "get"),
    ("/v1/jobs/{job_id}", "delete"),
    ("/v1/jobs/{job_id}/frames", "get"),
    ("/v1/jobs/{job_id}/resume", "post"),
    ("/v1/models", "post"),
    ("/v1/models/{name}", "delete"),
    ("/v1/models/{name}/stats", "get"),
}
EXAMPLES = int(os.environ.get("PIXANO_EDGE_FUZZ_EXAMPLES", "400"))


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An application over fakes, which answer in no time."""
    import asyncio

    root = tmp_path_factory.mktemp("store")
    add_bundle(root, "alpha", tracks=True)
    add_bundle(root, "find", family="owlv2")
    provider = make_provider(root, FakeOpener(), media_roots=[])
    found = create_app(ServerSettings(store=root, cors_allow_origins=("http://testserver",)), provider)
    yield found
    asyncio.run(found.state.server.close())
    asyncio.run(provider.close())


def test_the_document_describes_every_route(app: Any) -> None:
    document = app.openapi()
    assert {(path, method) for path, item in document["paths"].items() for method in item} == ROUTES
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert operation["summary"], path
            if method == "post" and not path.endswith("/resume"):
                assert operation["requestBody"]["required"], path
    schemas = document["components"]["schemas"]
    assert set(schemas["SegmentationRequest"]["properties"]) >= {"imageEmbedding", "numMultimaskOutputs"}
    assert schemas["TrackedObject"]["properties"]["class"]
    assert set(schemas["VlmRequest"]["required"]) == {"model", "prompt", "maxNewTokens"}


def test_every_reference_of_the_document_leads_somewhere(app: Any) -> None:
    document = app.openapi()

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for item in value.values():
                yield from references(item)
        elif isinstance(value, list):
            for item in value:
                yield from references(item)

    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(references(document)) <= known


def test_keys_are_part_of_the_document_where_they_are_asked_for(tmp_path: Path) -> None:
    guarded = create_app(ServerSettings(api_keys=("k",)), make_provider(tmp_path, FakeOpener())).openapi()
    assert guarded["paths"]["/v1/models"]["get"]["security"]
    assert "security" not in guarded["paths"]["/v1/health"]["get"]


def _fuzz(app: Any, examples: int, paths: Collection[str] | None = None) -> int:
    """Sends made-up requests, half of them against the schema, to all paths or some; returns how many."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    sent = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if paths is not None and operation.path not in paths:
            continue

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.explicit, Phase.generate),
        )
        def check(case: Any) -> None:
            nonlocal sent
            sent += 1
            _known_model(case)
            response = case.call()
            case.validate_response(
                response, checks=(not_a_server_error, status_code_conformance, response_schema_conformance)
            )

        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            try:
                strategy = operation.as_strategy(generation_mode=mode)
            except Exception:  # an operation without parameters has no wrong ones
                if mode is schemathesis.GenerationMode.POSITIVE:
                    raise
                continue
            _given(strategy, check)
    return sent


def _given(strategy: Any, check: Any) -> None:
    from hypothesis import given
    from hypothesis.errors import Unsatisfiable

    try:
        given(case=strategy)(check)()
    except Unsatisfiable:  # no wrong request to this route exists
        return


def _known_model(case: Any) -> None:
    """Names a model that exists in every other request, so that more than the name is looked at."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and len(case.body["model"]) % 2 == 0:
        path = case.operation.path
        case.body["model"] = "find" if "detection" in path else "alpha-video" if "tracking" in path else "alpha"


def test_made_up_requests_break_nothing(app: Any) -> None:
    paths = (f"{V1}/segmentation", f"{V1}/tracking/jobs", f"{V1}/detection/binary", "/v1/models", "/v1/jobs/{job_id}")
    assert _fuzz(app, 3, paths) > 20


@pytest.mark.slow  # minutes: hundreds of requests per route
def test_many_made_up_requests_break_nothing(app: Any) -> None:
    assert _fuzz(app, EXAMPLES) > 20 * EXAMPLES


def test_every_request_is_in_the_document(app: Any) -> None:
    known = app.openapi()["components"]["schemas"]
    for model in (requests.SegmentationRequest, requests.TrackingRequest, requests.DeployRequest):
        assert model.__name__ in known
