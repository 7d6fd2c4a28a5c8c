"""Health, readiness, what the box is, and its models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from .answers import CAPABILITIES, dumps
from .state import Server

RUNNING = "RUNNING"


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.get("/health")
    @routes.get("/v1/health")
    async def health() -> dict[str, str]:
        return {"status": "healthy"}

    @routes.get("/ready")
    @routes.get("/v1/ready")
    async def ready() -> Response:
        models = await model_entries(server)
        info = await server.provider.get_server_info()
        states = {m["name"]: m["status"] for m in models}
        is_ready = all(state == RUNNING for state in states.values())
        body = {"ready": is_ready, "models": states, "models_loaded": info.models_loaded, "version": info.version}
        return Response(dumps(body), 200 if is_ready else 503, media_type="application/json")

    @routes.get("/info")
    @routes.get("/v1/info")
    async def info() -> dict[str, Any]:
        found = await server.provider.get_server_info()
        models = await model_entries(server)
        return {
            "appName": found.app_name,
            "appVersion": found.app_version,
            "numCpus": found.num_cpus,
            "numGpus": found.num_gpus,
            "numNodes": found.num_nodes,
            "gpusUsed": float(len(found.gpus_used)),
            "models": [m["name"] for m in models],
            "modelsStatus": {m["name"]: m["status"] for m in models},
        }

    @routes.get("/v1/models")
    async def models() -> list[dict[str, Any]]:
        return await model_entries(server)

    return routes


async def model_entries(server: Server) -> list[dict[str, Any]]:
    """The list of models as the protocol has it; loads nothing."""
    return [
        {
            "name": info.name,
            "capability": CAPABILITIES[info.task],
            "modelClass": info.model_class,
            "modelPath": info.model_path,
            "status": RUNNING,
            "interface": None,
        }
        for info in await server.provider.list_models()
    ]
