"""Request bodies: read with the limit counted, parsed off the event loop where they are large, validated by a schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError

from .errors import ApiError, validation_message

if TYPE_CHECKING:
    from .state import Server

M = TypeVar("M", bound=BaseModel)

SMALL = 256 << 10
"""Bytes that are parsed on the event loop: handing them to a thread would take longer."""


def parse_json(body: bytes | bytearray | memoryview) -> Any:
    """A JSON document.

    Raises:
        ApiError: 422; says where, not what.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        message = [{"type": "json_invalid", "loc": ["body", error.pos], "msg": f"JSON decode error: {error.msg}"}]
        raise ApiError(422, message) from None


def validated(model: type[M], value: Any) -> M:
    """A document as the request that it should be.

    Raises:
        ApiError: 422 with pydantic's errors, without the input.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise ApiError(422, validation_message({**e, "loc": ("body", *e["loc"])} for e in found)) from None
    except RecursionError:
        raise ApiError(
            422, [{"type": "recursion", "loc": ["body"], "msg": "The document is nested too deep"}]
        ) from None


async def read_body(request: Request) -> bytearray:
    """The whole body."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
    return body


async def read_json(server: Server, request: Request) -> Any:
    """The body as JSON."""
    body = await read_body(request)
    if len(body) <= SMALL:
        return parse_json(body)
    return await server.on_thread(parse_json, body)


async def read_request(server: Server, request: Request, model: type[M]) -> M:
    """The body as a request."""
    return validated(model, await read_json(server, request))
