"""The list of models, loading and unloading, and what each has done."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..bundle import BundleStore
from . import openapi, schemas
from .answers import CAPABILITIES, dumps
from .bodies import read_request
from .errors import ApiError
from .models import BundlePaths, deploy, model_entries, read_config
from .state import Server


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1/models")
    roots = (BundleStore(server.settings.store).root, *server.settings.bundle_roots)
    allowed = BundlePaths(roots, server.provider.stored)

    def check_managed() -> None:
        if not server.settings.models_managed:
            raise ApiError(403, "Clients load and unload no models here. Set manage_models if they should.")

    @routes.get("", summary="Models that requests may name", responses=openapi.answer("Models"), response_model=None)
    async def models() -> Response:
        return Response(dumps(await model_entries(server)), media_type="application/json")

    @routes.post(
        "",
        summary="Load a bundle",
        status_code=201,
        responses={**openapi.answer("Model", 201), **openapi.errors(400, 403, 404, 409, 415, 422)},
        openapi_extra=openapi.body(schemas.DeployRequest),
        response_model=None,
    )
    async def load(request: Request) -> Response:
        check_managed()
        wire: schemas.DeployRequest = await read_request(server, request, schemas.DeployRequest)
        entry = await deploy(server, await server.on_thread(read_config, wire, allowed))
        return Response(dumps(entry), 201, media_type="application/json")

    @routes.delete(
        "/{name}",
        summary="Unload a model",
        responses={**openapi.answer("Deleted"), **openapi.errors(403, 404)},
        response_model=None,
    )
    async def unload(name: str) -> dict[str, str]:
        check_managed()
        await server.provider.delete_model(name)
        return {"status": "deleted", "model": name}

    @routes.get(
        "/{name}/stats",
        summary="What a model has done",
        responses={**openapi.answer("ModelStats"), **openapi.errors(404)},
        response_model=None,
    )
    async def stats(name: str) -> dict[str, Any]:
        await server.check_model(name)
        info = next(one for one in await server.provider.list_models() if one.name == name)
        count, total = server.stats.totals(name)
        return {
            "model_name": name,
            "capability": CAPABILITIES[info.task],
            "model_class": info.model_class or "",
            "request_count": count,
            "total_processing_time": total,
            "avg_processing_time": total / count if count else 0.0,
        }

    return routes
