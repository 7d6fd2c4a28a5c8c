"""The protocol of Pixano 0.7: ``/inference/...`` with JSON, multipart uploads and tracking jobs.

Its clients read ``/app/...`` of `legacy_tasks`, too. The binary routes and those of one job end without a slash.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from . import legacy
from . import legacy_schemas as schemas
from .bodies import read_request, read_upload
from .errors import ApiError
from .routes_jobs import submitted
from .state import Server


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/inference", route_class=legacy.LegacyRoute, include_in_schema=False)

    @routes.post("/segmentation/")
    async def segmentation(request: Request) -> Response:
        return await legacy.answer_masks(server, request, await read_request(server, request, schemas.MaskRequest))

    @routes.post("/segmentation/binary")
    async def segmentation_binary(request: Request) -> Response:
        wire, images = await read_upload(server, request, schemas.MaskRequest, "image")
        if len(images) != 1:
            raise ApiError(400, "Send one file as 'image'.")
        return await legacy.answer_masks(server, request, wire, images[0])

    @routes.post("/tracking/")
    async def tracking(request: Request) -> Response:
        wire = await read_request(server, request, schemas.TrackingRequest)
        return await legacy.answer_tracking(server, request, wire)

    @routes.post("/tracking/binary")
    async def tracking_binary(request: Request) -> Response:
        wire, frames = await read_upload(server, request, schemas.TrackingRequest, "frames", "video")
        return await legacy.answer_tracking(server, request, wire, frames)

    @routes.post("/tracking/jobs/")
    async def submit_job(request: Request) -> Response:
        wire = await read_request(server, request, schemas.TrackingRequest)
        return await submit(request, wire, None)

    @routes.post("/tracking/jobs/binary")
    async def submit_job_binary(request: Request) -> Response:
        return await submit(request, *await read_upload(server, request, schemas.TrackingRequest, "frames", "video"))

    @routes.get("/tracking/jobs/{job_id}")
    async def get_job(job_id: str) -> Response:
        return await server.respond(job(await server.provider.get_video_mask_generation_job(job_id)))

    @routes.delete("/tracking/jobs/{job_id}")
    async def cancel_job(job_id: str) -> Response:
        return await server.respond(job(await server.provider.cancel_video_mask_generation_job(job_id)))

    @routes.post("/detection/")
    async def detection(request: Request) -> Response:
        wire = await read_request(server, request, schemas.DetectionRequest)
        return await legacy.answer_boxes(server, request, wire)

    @routes.post("/vlm/")
    async def vlm(request: Request) -> Response:
        return await legacy.answer_text(server, request, await read_request(server, request, schemas.TextRequest))

    async def submit(request: Request, wire: schemas.TrackingRequest, frames: list[bytes] | None) -> Response:
        given = await server.on_thread(wire.to_input, server.media, frames)
        return await server.respond(job(await submitted(server, request, given)))

    return routes


def job(status: Any) -> dict[str, Any]:
    """State of a tracking job."""
    return {
        "job_id": status.job_id,
        "status": status.status,
        "detail": status.detail,
        "data": None if status.data is None else legacy.rows(status.data),
        "metadata": dict(status.metadata),
        "timestamp": legacy.naive(status.timestamp),
        "processing_time": status.processing_time,
    }
