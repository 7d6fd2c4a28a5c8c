"""Tracking jobs, and answers that come piece by piece."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from ..errors import EdgeError
from ..provider.video_types import COMPLETED, RUNNING, VideoMaskGenerationJobStatus
from . import answers, inputs, openapi, schemas
from .bodies import read_request
from .errors import api_error, error_body, request_id
from .routes_v1 import fetched_video, read_tracking, read_tracking_upload
from .state import Server
from .streams import NDJSON, SSE, begin, closing

SUBMIT_TIMEOUT_S = 30.0
SUBMIT_AGAIN_S = 10.0
"""Seconds in which an equal request gets the job that was started, unless that failed or was canceled."""

_SUBMIT = {**openapi.answer("JobStatus", 202), **openapi.errors(400, 404, 415, 422, 503)}
_JOB = {**openapi.answer("JobStatus"), **openapi.errors(404)}


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1")

    async def submit(request: Request, given: Any) -> Response:
        status = await submitted(server, request, given)
        return await server.respond(lambda: answers.job(status), 202)

    @routes.post(
        "/inference/tracking/jobs",
        summary="Start a tracking job",
        status_code=202,
        responses=_SUBMIT,
        openapi_extra=openapi.body(schemas.TrackingRequest),
        response_model=None,
    )
    async def submit_json(request: Request) -> Response:
        return await submit(request, await read_tracking(server, request))

    @routes.post(
        "/inference/tracking/jobs/binary",
        summary="Start a tracking job on uploaded frames",
        status_code=202,
        responses=_SUBMIT,
        openapi_extra=openapi.upload(schemas.TrackingRequest, "frames", True),
        response_model=None,
    )
    async def submit_binary(request: Request) -> Response:
        return await submit(request, await read_tracking_upload(server, request))

    @routes.get("/jobs/{job_id}", summary="State of a job, and its result", responses=_JOB, response_model=None)
    async def state(job_id: str) -> Response:
        status = await server.provider.get_video_mask_generation_job(job_id)
        return await server.respond(lambda: answers.job(status))

    @routes.delete("/jobs/{job_id}", summary="Cancel a job", responses=_JOB, response_model=None)
    async def cancel(job_id: str) -> Response:
        status = await server.provider.cancel_video_mask_generation_job(job_id)
        return await server.respond(lambda: answers.job(status))

    @routes.post(
        "/jobs/{job_id}/resume",
        summary="Let a failed job go on",
        responses={**_JOB, **openapi.errors(400, 404, 503)},
        response_model=None,
    )
    async def resume(job_id: str) -> Response:
        status = await server.provider.resume_video_mask_generation_job(job_id)
        return await server.respond(lambda: answers.job(status))

    @routes.get(
        "/jobs/{job_id}/frames",
        summary="Frames of a job as they come",
        responses={**openapi.lines("TrackedFrame", NDJSON, "One frame per line"), **openapi.errors(404, 422)},
        response_model=None,
    )
    async def frames(
        request: Request, job_id: str, start: Annotated[int, Query(alias="from", ge=0, le=1 << 31)] = 0
    ) -> Response:
        return await begin(request, _lines(request, server.provider.watch_job(job_id, start)), NDJSON)

    @routes.post(
        "/inference/tracking/stream",
        summary="Objects through a clip, frame by frame",
        responses={
            **openapi.lines("TrackedFrame", NDJSON, "One frame per line"),
            **openapi.errors(400, 404, 415, 422, 503, 504),
        },
        openapi_extra=openapi.body(schemas.TrackingRequest),
        response_model=None,
    )
    async def tracking_stream(request: Request) -> Response:
        given = await read_tracking(server, request)
        end = time.monotonic() + server.settings.tracking_timeout_s
        given.video = await server.once(
            request, None, lambda: fetched_video(server, given.video), server.settings.tracking_timeout_s
        )
        found = server.provider.stream_video_mask_generation(given, max(0.0, end - time.monotonic()))
        return await begin(request, _lines(request, found), NDJSON)

    @routes.post(
        "/inference/vlm/stream",
        summary="Text about images, as it is written",
        responses={
            **openapi.lines("text, at last usage", SSE, "Server-sent events"),
            **openapi.errors(400, 404, 415, 422, 503, 504),
        },
        openapi_extra=openapi.body(schemas.VlmRequest),
        response_model=None,
    )
    async def vlm_stream(request: Request) -> Response:
        wire = await read_request(server, request, schemas.VlmRequest)
        end = time.monotonic() + server.settings.vlm_timeout_s
        given = await server.once(
            request, None, lambda: inputs.text_input(wire, server.media), server.settings.vlm_timeout_s
        )
        found = server.provider.stream_text_image_conditional_generation(given, max(0.0, end - time.monotonic()))
        return await begin(request, _events(request, found), SSE)

    return routes


async def submitted(server: Server, request: Request, given: Any) -> VideoMaskGenerationJobStatus:
    """A new job, or that of an equal request: a client whose connection broke sends it again, and must not start two.

    Args:
        server: Has the jobs.
        request: Read by one of the functions of `bodies`, which note its digest.
        given: The provider's request; what URLs name is fetched here, in the time of a tracking request.
    """

    async def start() -> VideoMaskGenerationJobStatus:
        given.video = await fetched_video(server, given.video)
        return await server.provider.submit_video_mask_generation_job(given, SUBMIT_TIMEOUT_S)

    def going_on(status: VideoMaskGenerationJobStatus) -> bool:
        return server.provider.job_state(status.job_id) in (RUNNING, COMPLETED)

    digest, timeout = getattr(request.state, "body_digest", None), server.settings.tracking_timeout_s
    begun = await server.once(request, digest, start, timeout, patience=0.0, keep=SUBMIT_AGAIN_S, good=going_on)
    return await server.provider.get_video_mask_generation_job(begun.job_id)


async def _lines(request: Request, frames: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """Frames as lines of JSON. An error after the first line is a line, too: ``{"error": ...}``, and the last."""
    sent = False
    try:
        async with closing(frames):
            async for frame in frames:
                yield answers.dumps(answers.tracked_frame(frame)) + b"\n"
                sent = True
    except EdgeError as error:
        if not sent:
            raise
        yield _error(request, error) + b"\n"


async def _events(request: Request, chunks: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """Pieces of text as server-sent events; the last event has the whole text and the usage, or is the error."""
    sent, output = False, None
    try:
        async with closing(chunks):
            async for chunk in chunks:
                output = chunk.output or output
                if chunk.text:
                    yield b"data: " + answers.dumps({"text": chunk.text}) + b"\n\n"
                    sent = True
    except EdgeError as error:
        if not sent:
            raise
        yield b"data: " + _error(request, error) + b"\n\n"
        return
    if output is not None:
        yield b"data: " + answers.dumps(answers.vlm(output)) + b"\n\n"


def _error(request: Request, error: EdgeError) -> bytes:
    found = api_error(error, request)
    return error_body(found.status, found.message, request_id(request))
