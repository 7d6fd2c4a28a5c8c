"""What the two older protocols share: snake_case JSON, arrays as lists of numbers, errors as ``{"detail": ...}``.

Their routes end with a slash and are mounted exactly so: their clients follow no redirect. An API key is asked for as
everywhere, though these clients cannot send one.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from ..errors import EdgeError
from ..provider.types import NDArrayData
from .answers import dumps, rle
from .arrays import WireArray
from .errors import ApiError, api_error
from .legacy_schemas import DetectionRequest, MaskRequest, TextRequest, TrackingRequest
from .routes_v1 import fetched_video
from .state import Server

_STEP = 1 << 15
"""Numbers written at a time."""


class LegacyRoute(APIRoute):
    """A route whose errors are ``{"detail": ...}``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with its errors answered."""
        handle = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return await handle(request)
            except EdgeError as error:
                found = api_error(error, request)
            except ApiError as error:
                found = error
            return Response(dumps({"detail": found.message}), found.status, found.headers, "application/json")

        return answered


class FlatArray(WireArray):
    """An array to be sent as ``{"values": [...], "shape": [...]}``, each number in the fewest digits that give the
    same float32 back: a client that sends an embedding again as Python floats stays below the limit of a body."""

    def json(self) -> Iterator[bytes]:
        """Its JSON in pieces."""
        yield b'{"values":'
        flat = self.array.reshape(-1)
        start = b"["
        for begin in range(0, len(flat), _STEP):
            yield start + dumps(flat[begin : begin + _STEP])[1:-1]
            start = b","
        yield (b"[]" if start == b"[" else b"]") + b',"shape":' + dumps(list(self.array.shape)) + b"}"


def flat(value: NDArrayData | None) -> FlatArray | None:
    """An array of an answer."""
    return None if value is None else FlatArray(np.ascontiguousarray(value.to_array(), np.float32))


def naive(moment: datetime | None) -> str:
    """ISO 8601 in UTC without saying so; now for None."""
    return (moment or datetime.now(timezone.utc)).astimezone(timezone.utc).replace(tzinfo=None).isoformat()


def envelope(result: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """What every task answers."""
    return {
        "id": result.id or uuid.uuid4().hex,
        "status": "SUCCESS",
        "timestamp": naive(result.timestamp),
        "processing_time": result.processing_time,
        "metadata": dict(result.metadata),
        "data": data,
    }


def masks(output: Any) -> dict[str, Any]:
    """Data of a mask answer."""
    finer = output.high_resolution_features
    return {
        "masks": [[rle(mask) for mask in prompt] for prompt in output.masks],
        "scores": flat(output.scores),
        "image_embedding": flat(output.image_embedding),
        "high_resolution_features": None if finer is None else [flat(one) for one in finer],
        "mask_logits": flat(getattr(output, "mask_logits", None)),
    }


def rows(output: Any) -> dict[str, Any]:
    """Data of a tracking answer: one row per frame and object."""
    return {
        "objects_ids": list(output.objects_ids),
        "frame_indexes": list(output.frame_indexes),
        "masks": [rle(mask) for mask in output.masks],
    }


def boxes(output: Any) -> dict[str, Any]:
    """Data of a detection answer."""
    return {"boxes": output.boxes, "scores": output.scores, "classes": output.classes}


def text(output: Any) -> dict[str, Any]:
    """Data of a text answer."""
    usage = output.usage
    return {
        "generated_text": output.generated_text,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        },
        "generation_config": dict(output.generation_config or {}),
    }


async def answer_masks(server: Server, request: Request, wire: MaskRequest, image: bytes | None = None) -> Response:
    """Masks, of `image` where that was uploaded beside the request."""
    given = await server.on_thread(wire.to_input, server.media, image)

    async def compute() -> Any:
        given.image = await server.media.fetched(given.image)
        return await server.provider.image_mask_generation(given, math.inf)

    result = await server.answered(request, "segmentation", compute, server.settings.segmentation_timeout_s)
    return await server.respond(lambda: envelope(result, masks(result.data)))


async def answer_tracking(
    server: Server, request: Request, wire: TrackingRequest, frames: list[bytes] | None = None
) -> Response:
    """Objects through a clip, of `frames` where these were uploaded beside the request."""
    given = await server.on_thread(wire.to_input, server.media, frames)

    async def compute() -> Any:
        given.video = await fetched_video(server, given.video)
        return await server.provider.video_mask_generation(given, math.inf)

    result = await server.answered(request, "tracking", compute, server.settings.tracking_timeout_s)
    return await server.respond(lambda: envelope(result, rows(result.data)))


async def answer_boxes(server: Server, request: Request, wire: DetectionRequest) -> Response:
    """Boxes of named classes."""
    given = await server.on_thread(wire.to_input, server.media)

    async def compute() -> Any:
        given.image = await server.media.fetched(given.image)
        return await server.provider.image_zero_shot_detection(given, math.inf)

    result = await server.answered(request, "detection", compute, server.settings.detection_timeout_s)
    return await server.respond(lambda: envelope(result, boxes(result.data)))


async def answer_text(server: Server, request: Request, wire: TextRequest) -> Response:
    """Text about images."""

    async def compute() -> Any:
        given = await wire.to_input(server.media)
        return await server.provider.text_image_conditional_generation(given, math.inf)

    result = await server.answered(request, "vlm", compute, server.settings.vlm_timeout_s)
    return await server.respond(lambda: envelope(result, text(result.data)))
