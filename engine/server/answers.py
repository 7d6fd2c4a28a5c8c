"""Answers of the v1 protocol: camelCase envelopes, and JSON written in pieces so that large arrays are never joined."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import orjson
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..provider.types import CompressedRLEData, NDArrayData, UsageInfo
from ..provider.video_types import TrackedFrame, TrackedObject
from .arrays import WireArray, wire_array

CHUNK = 64 << 10
"""Bytes below which pieces of an answer are joined before they are sent."""

CAPABILITIES: Mapping[str, str] = {
    "image_mask_generation": "segmentation",
    "video_mask_generation": "tracking",
    "image_zero_shot_detection": "detection",
    "text_image_conditional_generation": "vlm",
}
"""Task of the provider -> capability on the wire. Any other word makes a model vanish from Pixano's list."""


def dumps(value: Any) -> bytes:
    """JSON as UTF-8; numpy scalars and arrays are numbers and lists."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def pieces(value: Any) -> Iterator[bytes]:
    """JSON of a value that holds `WireArray` in its dicts and lists, in pieces of at most a few hundred KiB each, but
    for parts without arrays, which come as one."""
    if isinstance(value, WireArray):
        yield from value.json()
    elif isinstance(value, dict) and any(_large(item) for item in value.values()):
        start = b"{"
        for key, item in value.items():
            yield start + dumps(key) + b":"
            yield from pieces(item)
            start = b","
        yield b"}"
    elif isinstance(value, list) and any(_large(item) for item in value):
        start = b"["
        for item in value:
            yield start
            yield from pieces(item)
            start = b","
        yield b"]"
    else:
        yield dumps(value)


def _large(value: Any) -> bool:
    if isinstance(value, WireArray):
        return True
    if isinstance(value, dict):
        return any(_large(item) for item in value.values())
    # Lists of arrays are short; lists of frames and rows are long and hold none.
    return isinstance(value, list) and bool(value) and _large(value[0])


def _chunks(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Small pieces joined: each one that is sent costs a system call and wakes the client."""
    small: list[bytes] = []
    size = 0
    for part in parts:
        if size + len(part) > CHUNK and small:
            yield b"".join(small)
            small, size = [], 0
        if len(part) >= CHUNK:
            yield part
        else:
            small.append(part)
            size += len(part)
    if small:
        yield b"".join(small)


class PiecesResponse(Response):
    """A JSON response sent piece by piece, with its length known before.

    Args:
        parts: The body's pieces.
        status_code: HTTP status.
        headers: More headers.
        background: Runs afterwards.
    """

    media_type = "application/json"

    def __init__(
        self,
        parts: Iterable[bytes],
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        background: BackgroundTask | None = None,
    ) -> None:
        self.parts = list(_chunks(parts)) or [b""]
        super().__init__(None, status_code, headers, self.media_type, background)
        self.headers["content-length"] = str(sum(map(len, self.parts)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = len(self.parts) - 1
        for index, part in enumerate(self.parts):
            await send({"type": "http.response.body", "body": part, "more_body": index < last})
        if self.background is not None:
            await self.background()


def iso(moment: datetime | None) -> str:
    """ISO 8601 in UTC; now for None."""
    return (moment or datetime.now(timezone.utc)).astimezone(timezone.utc).isoformat()


def envelope(result: Any, capability: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """What every capability answers.

    Args:
        result: A ``...Result`` of the provider.
        capability: On the wire.
        data: The answer itself.
    """
    return {
        "id": result.id or uuid.uuid4().hex,
        "status": "SUCCESS",
        "timestamp": iso(result.timestamp),
        "processingTime": result.processing_time,
        "metadata": {"capability": capability, **result.metadata},
        "data": data,
    }


def rle(mask: CompressedRLEData) -> dict[str, Any]:
    """A mask, its counts as text."""
    return {"size": list(mask.size), "counts": mask.counts.decode("ascii")}


def segmentation(
    output: Any, features: tuple[WireArray | None, list[WireArray | None] | None] | None = None
) -> dict[str, Any]:
    """Data of a mask answer.

    Args:
        output: The provider's.
        features: Image embedding and finer maps as they are to be sent; None for those of `output`.
    """
    finer: Sequence[NDArrayData] | None = output.high_resolution_features
    embedding, maps = features or (
        wire_array(output.image_embedding),
        None if finer is None else [wire_array(f) for f in finer],
    )
    return {
        "masks": [[rle(mask) for mask in masks] for masks in output.masks],
        "scores": wire_array(output.scores),
        "imageEmbedding": embedding,
        "highResolutionFeatures": maps,
        "maskLogits": wire_array(getattr(output, "mask_logits", None)),
    }


def detection(output: Any) -> dict[str, Any]:
    """Data of a detection answer; these detectors give no masks."""
    return {"boxes": output.boxes, "scores": output.scores, "classes": output.classes, "masks": None}


def tracked_object(found: TrackedObject) -> dict[str, Any]:
    """One object of a frame; the name of its class is ``class``."""
    return {
        "trackId": found.track_id,
        "box": found.box,
        "score": found.score,
        "class": found.class_name,
        "mask": rle(found.mask),
    }


def tracked_frame(frame: TrackedFrame) -> dict[str, Any]:
    """One frame."""
    return {"frameIndex": frame.frame_index, "objects": [tracked_object(o) for o in frame.objects]}


def tracking(output: Any) -> dict[str, Any]:
    """Data of a tracking answer in both forms: frames with objects, and three parallel lists.

    Two generations of clients share the route and read one form each; both ignore what they do not know.
    """
    frames = [tracked_frame(frame) for frame in output.frames]
    return {
        "frames": frames,
        "objectsIds": list(output.objects_ids),
        "frameIndexes": list(output.frame_indexes),
        # The same dicts: a mask is turned into text once.
        "masks": [found["mask"] for frame in frames for found in frame["objects"]],
    }


def usage(value: UsageInfo) -> dict[str, int]:
    """Tokens of one generation."""
    return {
        "promptTokens": value.prompt_tokens,
        "completionTokens": value.completion_tokens,
        "totalTokens": value.total_tokens,
    }


def vlm(output: Any) -> dict[str, Any]:
    """Data of a text answer."""
    return {
        "generatedText": output.generated_text,
        "usage": usage(output.usage),
        "generationConfig": dict(output.generation_config or {}),
    }


def job(status: Any) -> dict[str, Any]:
    """State of a tracking job; `data` in camelCase, since one client keeps it as it comes."""
    return {
        "jobId": status.job_id,
        "status": status.status,
        "detail": status.detail,
        "data": None if status.data is None else tracking(status.data),
        "metadata": {"capability": "tracking", **status.metadata},
        "timestamp": iso(status.timestamp),
        "processingTime": status.processing_time,
    }
