"""Health, readiness, metrics, and what the box is. Answered without a key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..errors import EdgeError
from ..provider.states import DEPLOYING, RUNNING
from . import openapi
from .answers import CAPABILITIES, dumps
from .auth import Keys, given_key
from .metrics import CONTENT_TYPE
from .models import model_entries
from .state import Server

F = TypeVar("F", bound=Callable[..., Any])


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    keys = Keys(server.settings.api_keys)

    def trusted(request: Request) -> bool:
        """Whether warnings are shown: they may hold paths of this machine."""
        return not keys or keys.accept(given_key(dict(request.scope["headers"])) or b"")

    def get(name: str, summary: str, responses: dict[int | str, Any]) -> Callable[[F], F]:
        """Registers a route with and without the version."""

        def register(handler: F) -> F:
            routes.get(f"/v1/{name}", summary=summary, responses=responses, response_model=None)(handler)
            routes.get(f"/{name}", include_in_schema=False, response_model=None)(handler)
            return handler

        return register

    @get("health", "Whether the process answers", openapi.answer("Health"))
    async def health() -> dict[str, str]:
        return {"status": "healthy"}

    @get("ready", "Whether every model can answer now", {**openapi.answer("Ready"), **openapi.answer("Ready", 503)})
    async def ready() -> Response:
        models = {entry["name"]: entry["status"] for entry in await model_entries(server)}
        models.update(dict.fromkeys(server.starting, DEPLOYING))
        is_ready = not server.stopping and DEPLOYING not in models.values()
        body = {
            "ready": is_ready,
            "models": models,
            "models_loaded": sum(state.status == RUNNING for state in server.provider.model_states()),
            "version": openapi.VERSION,
        }
        return Response(dumps(body), 200 if is_ready else 503, media_type="application/json")

    @get("metrics", "Metrics for Prometheus", openapi.TEXT)
    async def metrics() -> Response:
        snapshot = server.metrics.snapshot
        snapshot.models = server.provider.model_states()
        try:
            snapshot.memory = (await server.provider.get_server_info()).gpu_info.get("memory", [])
            snapshot.jobs = await server.provider.job_counts()
        except EdgeError:  # the provider is closing: what is known otherwise still counts
            snapshot.memory, snapshot.jobs = [], {}
        return Response(await server.on_thread(server.metrics.text), media_type=CONTENT_TYPE)

    @get("info", "What this box is and does", openapi.answer("Info"))
    async def info(request: Request) -> Response:
        found = await server.provider.get_server_info()
        entries = await model_entries(server)
        body = {
            "appName": found.app_name,
            "appVersion": found.app_version,
            "appDescription": found.app_description,
            "numCpus": found.num_cpus,
            "numGpus": found.num_gpus,
            "numNodes": found.num_nodes,
            "gpusUsed": float(len(found.gpus_used)),
            "models": [entry["name"] for entry in entries],
            "modelsStatus": {entry["name"]: entry["status"] for entry in entries},
            "modelsToTask": found.models_to_task,
            "modelsToCapability": {n: CAPABILITIES[t] for n, t in found.models_to_task.items() if t in CAPABILITIES},
            "modelsLoaded": found.models_loaded,
            "ready": found.ready and not server.starting,
            "gpuInfo": found.gpu_info,
            "versions": found.versions,
            "warnings": [*found.warnings, *server.warnings] if trusted(request) else [],
            "jobs": [_public(job) for job in found.jobs],
            "latency": server.stats.latency(),
        }
        return Response(await server.on_thread(dumps, body), media_type="application/json")

    return routes


def _public(job: dict[str, Any]) -> dict[str, Any]:
    """A job without its id, with which anybody could read or cancel it: this route asks for no key."""
    return {key: value for key, value in job.items() if key != "job_id"}
