"""Inference routes of the v1 protocol, as JSON and as multipart uploads."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..provider.errors import TaskNotSupportedError
from ..provider.types import (
    ImageMaskGenerationResult,
    ImageZeroShotDetectionResult,
    TextImageConditionalGenerationResult,
    VideoMaskGenerationResult,
)
from . import answers, inputs, openapi, schemas
from .bodies import read_request, read_upload
from .echoes import Answering
from .errors import ApiError
from .state import Server

HASHED_BYTES = 4 << 20
"""Largest body of a mask request that is compared with those under way. Larger ones echo features, for which only the
decoder runs; and what takes long, the encoder, is shared by the content of the image in any case."""

_ERRORS = openapi.errors(400, 404, 415, 422, 503, 504)


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1/inference")

    def post(path: str, summary: str, answer: str | None, body: dict[str, Any]) -> Callable[[Any], Any]:
        found = {} if answer is None else openapi.answer(answer)
        return routes.post(
            path, summary=summary, responses={**found, **_ERRORS}, openapi_extra=body, response_model=None
        )

    # URLs are fetched within the work, so that it is over with its waiter's patience, and done once for equal requests.
    # The time limit is the waiter's; the work has none of its own, so that whoever asks again can join it.

    async def segment(request: Request, given: Any, sent: Answering) -> Response:
        asked = given.return_image_embedding

        async def compute() -> tuple[ImageMaskGenerationResult, Answering]:
            given.image = await server.media.fetched(given.image)
            return await server.provider.image_mask_generation(given, math.inf), sent

        timeout = server.settings.segmentation_timeout_s
        result, known = await server.answered(request, "segmentation", compute, timeout)

        def body() -> dict[str, Any]:
            data = answers.segmentation(result.data, known.arrays(result.data, asked))
            return answers.envelope(result, "segmentation", data)

        return await server.respond(body)

    async def detect(request: Request, given: Any) -> Response:
        async def compute() -> ImageZeroShotDetectionResult:
            given.image = await server.media.fetched(given.image)
            return await server.provider.image_zero_shot_detection(given, math.inf)

        result = await server.answered(request, "detection", compute, server.settings.detection_timeout_s)
        return await server.respond(lambda: answers.envelope(result, "detection", answers.detection(result.data)))

    async def track(request: Request, given: Any) -> Response:
        async def compute() -> VideoMaskGenerationResult:
            given.video = await fetched_video(server, given.video)
            return await server.provider.video_mask_generation(given, math.inf)

        result = await server.answered(request, "tracking", compute, server.settings.tracking_timeout_s)
        return await server.respond(lambda: answers.envelope(result, "tracking", answers.tracking(result.data)))

    async def describe(request: Request, wire: Any, images: list[bytes] | None = None) -> Response:
        async def compute() -> TextImageConditionalGenerationResult:
            given = await inputs.text_input(wire, server.media, images)
            return await server.provider.text_image_conditional_generation(given, math.inf)

        result = await server.answered(request, "vlm", compute, server.settings.vlm_timeout_s)
        return await server.respond(lambda: answers.envelope(result, "vlm", answers.vlm(result.data)))

    @post("/segmentation", "Masks on one image", "SegmentationAnswer", openapi.body(schemas.SegmentationRequest))
    async def segmentation(request: Request) -> Response:
        sent = server.echoes.answering()
        convert = partial(inputs.mask_input, media=server.media, echoes=server.echoes, answering=sent)
        given = await read_request(server, request, schemas.SegmentationRequest, convert, HASHED_BYTES)
        return await segment(request, given, sent)

    @post(
        "/segmentation/binary",
        "Masks on one uploaded image",
        "SegmentationAnswer",
        openapi.upload(schemas.SegmentationRequest, "image", False),
    )
    async def segmentation_binary(request: Request) -> Response:
        wire, image = await one_image(server, request, schemas.SegmentationRequest)
        sent = server.echoes.answering()
        given = await server.on_thread(inputs.mask_input, wire, server.media, image, server.echoes, sent)
        return await segment(request, given, sent)

    @post("/detection", "Boxes of named classes", "DetectionAnswer", openapi.body(schemas.DetectionRequest))
    async def detection(request: Request) -> Response:
        convert = partial(inputs.detection_input, media=server.media)
        return await detect(request, await read_request(server, request, schemas.DetectionRequest, convert))

    @post(
        "/detection/binary",
        "Boxes on one uploaded image",
        "DetectionAnswer",
        openapi.upload(schemas.DetectionRequest, "image", False),
    )
    async def detection_binary(request: Request) -> Response:
        wire, image = await one_image(server, request, schemas.DetectionRequest)
        return await detect(request, inputs.detection_input(wire, server.media, image))

    @post("/tracking", "Objects through a clip", "TrackingAnswer", openapi.body(schemas.TrackingRequest))
    async def tracking(request: Request) -> Response:
        return await track(request, await read_tracking(server, request))

    @post(
        "/tracking/binary",
        "Objects through uploaded frames",
        "TrackingAnswer",
        openapi.upload(schemas.TrackingRequest, "frames", True),
    )
    async def tracking_binary(request: Request) -> Response:
        return await track(request, await read_tracking_upload(server, request))

    @post("/vlm", "Text about images", "VlmAnswer", openapi.body(schemas.VlmRequest))
    async def vlm(request: Request) -> Response:
        wire = await read_request(server, request, schemas.VlmRequest)
        return await describe(request, wire)

    @post(
        "/vlm/binary",
        "Text about uploaded images",
        "VlmAnswer",
        openapi.upload(schemas.VlmRequest, "images", True),
    )
    async def vlm_binary(request: Request) -> Response:
        wire, images = await read_upload(server, request, schemas.VlmRequest, "images")
        return await describe(request, wire, images)

    @post("/embedding", "Not there: no model of this server embeds", None, openapi.body(schemas.EmbeddingRequest))
    async def embedding(request: Request) -> Response:
        return await absent(await read_request(server, request, schemas.EmbeddingRequest))

    @post(
        "/embedding/binary",
        "Not there: no model of this server embeds",
        None,
        openapi.upload(schemas.EmbeddingRequest, "image", False),
    )
    async def embedding_binary(request: Request) -> Response:
        wire, _ = await one_image(server, request, schemas.EmbeddingRequest)
        return await absent(wire)

    @post("/ner", "Not there: no model of this server reads names", None, openapi.body(schemas.NerRequest))
    async def ner(request: Request) -> Response:
        return await absent(await read_request(server, request, schemas.NerRequest))

    async def absent(wire: schemas.EmbeddingRequest | schemas.NerRequest) -> Response:
        await server.check_model(wire.model)
        what = "embed images or texts" if isinstance(wire, schemas.EmbeddingRequest) else "find names in texts"
        raise TaskNotSupportedError(
            f"Model '{wire.model}' does not {what}, nor does any that this version runs.",
            "Use a server with such a model for this; GET /v1/models says what this one does.",
        )

    return routes


async def one_image(server: Server, request: Request, model: Any) -> tuple[Any, bytes]:
    """A request with one uploaded image; raises ApiError 400 for several."""
    wire, files = await read_upload(server, request, model, "image")
    if len(files) != 1:
        raise ApiError(400, f"Send one file as 'image', not {len(files)}.")
    return wire, files[0]


async def read_tracking(server: Server, request: Request) -> Any:
    """A tracking request sent as JSON."""
    convert = partial(inputs.tracking_input, media=server.media)
    return await read_request(server, request, schemas.TrackingRequest, convert)


async def read_tracking_upload(server: Server, request: Request) -> Any:
    """A tracking request with its frames as files."""
    wire, frames = await read_upload(server, request, schemas.TrackingRequest, "frames", "video")
    return inputs.tracking_input(wire, server.media, frames)


async def fetched_video(server: Server, video: Any) -> Any:
    """The clip with what URLs name."""
    if isinstance(video, str):
        return await server.media.fetched(video, "video")
    return await server.media.fetched_all(video) if isinstance(video, list) else video
