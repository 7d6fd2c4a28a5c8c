"""The protocol of the seed-era Pixano: ``/tasks/...``, and ``/app/...``, which Pixano 0.7 reads as well."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from . import legacy
from . import legacy_schemas as schemas
from .answers import CAPABILITIES, dumps
from .bodies import read_request
from .state import Server


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter(route_class=legacy.LegacyRoute, include_in_schema=False)

    @routes.get("/app/settings/")
    async def app_settings() -> Response:
        return Response(dumps(await settings_of(server)), media_type="application/json")

    @routes.get("/app/models/")
    async def app_models() -> Response:
        return Response(dumps(await models_of(server)), media_type="application/json")

    @routes.post("/tasks/image/mask_generation/")
    async def mask_generation(request: Request) -> Response:
        return await legacy.answer_masks(server, request, await read_request(server, request, schemas.MaskRequest))

    @routes.post("/tasks/video/mask_generation/")
    async def video_mask_generation(request: Request) -> Response:
        wire = await read_request(server, request, schemas.TrackingRequest)
        return await legacy.answer_tracking(server, request, wire)

    @routes.post("/tasks/image/zero_shot_detection/")
    async def zero_shot_detection(request: Request) -> Response:
        wire = await read_request(server, request, schemas.DetectionRequest)
        return await legacy.answer_boxes(server, request, wire)

    @routes.post("/tasks/multimodal/text-image/conditional_generation/")
    async def conditional_generation(request: Request) -> Response:
        return await legacy.answer_text(server, request, await read_request(server, request, schemas.TextRequest))

    return routes


async def settings_of(server: Server) -> dict[str, Any]:
    """What the server is, as every older client reads it; ``gpus_used`` is a list of indices, as the seed had it."""
    info = await server.provider.get_server_info()
    return {
        "app_name": info.app_name,
        "app_version": info.app_version,
        "app_description": info.app_description,
        "num_cpus": info.num_cpus,
        "num_gpus": info.num_gpus,
        "num_nodes": info.num_nodes,
        "gpus_used": info.gpus_used,
        "gpu_to_model": info.gpu_to_model,
        "models": info.models,
        "models_to_task": info.models_to_task,
        "models_to_capability": {name: CAPABILITIES[task] for name, task in info.models_to_task.items()},
        "version": info.version,
        "models_loaded": info.models_loaded,
        "gpu_info": info.gpu_info,
        "ready": info.ready,
    }


async def models_of(server: Server) -> list[dict[str, Any]]:
    """The models, with the task by its long name for the seed and the capability for Pixano 0.7; loads nothing."""
    return [
        {
            "name": info.name,
            "task": info.task,
            "capability": CAPABILITIES[info.task],
            "model_path": info.model_path,
            "model_class": info.model_class,
            "provider": info.provider,
        }
        for info in await server.provider.list_models()
    ]
