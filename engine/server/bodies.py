"""Request bodies: read with the limit counted, parsed off the event loop where they are large, checked by a schema."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from .errors import ApiError, validation_message

if TYPE_CHECKING:
    from .state import Server

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

SMALL = 32 << 10
"""Bytes that are parsed on the event loop: handing them to a thread would take longer."""

MAX_ERRORS = 100
"""Errors of one request that are told one by one."""

LARGE = 1 << 20
"""Bytes from which pydantic's parser is used: 5 ms for the 23 MB of a click that echoes features, orjson takes 22."""

METADATA_BYTES = 32 << 20
"""Most that the JSON part of an upload may have."""
MAX_FILES = 100_000
"""Frames of one upload; the limit of the body comes first."""
SPOOL_BYTES = 4 << 20
"""Larger files of an upload wait on disk."""


def parse_json(body: bytes | bytearray) -> Any:
    """A JSON document.

    Raises:
        ApiError: 422; says where, not what.
    """
    try:
        if len(body) > LARGE:
            return from_json(body, allow_inf_nan=False, cache_strings="none")
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        message = [{"type": "json_invalid", "loc": ["body", error.pos], "msg": f"JSON decode error: {error.msg}"}]
        raise ApiError(422, message) from None
    except ValueError as error:
        message = [{"type": "json_invalid", "loc": ["body"], "msg": f"JSON decode error: {str(error)[:200]}"}]
        raise ApiError(422, message) from None


def validated(model: type[M], value: Any) -> M:
    """A document as the request that it should be.

    Raises:
        ApiError: 422 with pydantic's errors, without the input.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        if error.error_count() > MAX_ERRORS:
            message = f"{error.error_count()} values do not fit the schema of {model.__name__}"
            raise ApiError(422, [{"type": "too_many_errors", "loc": ["body"], "msg": message}]) from None
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise ApiError(422, validation_message({**e, "loc": ("body", *e["loc"])} for e in found)) from None


async def stream(server: Server, request: Request) -> AsyncIterator[bytes]:
    """The body as it comes; ends with 408 when nothing comes for long, or not all of it in time."""
    end = time.monotonic() + server.settings.body_total_timeout_s
    chunks = request.stream().__aiter__()
    while True:
        try:
            chunk = await asyncio.wait_for(
                chunks.__anext__(), min(server.settings.body_timeout_s, max(0.0, end - time.monotonic()))
            )
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError:
            raise ApiError(
                408, "The rest of the request's body did not come in time.", {"Connection": "close"}
            ) from None
        yield chunk


async def read_body(server: Server, request: Request) -> bytes | bytearray:
    """The whole body."""
    body = bytearray()
    async for chunk in stream(server, request):
        body += chunk
    return body


def _check_json(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A page in a browser can send other types to any server without asking it first.
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"This route takes 'Content-Type: application/json', not '{kind[:60]}'.")


async def read_request(
    server: Server,
    request: Request,
    model: type[M],
    convert: Callable[[M], T] | None = None,
    hashed_bytes: int | None = None,
) -> Any:
    """The body as a request, or as what `convert` makes of it, on a thread where the body is large.

    Its digest is noted in the request's state, for `Server.answered`.

    Args:
        server: Has the threads.
        request: As it came.
        model: What the JSON is.
        convert: Makes more of it.
        hashed_bytes: Largest body that is compared with those under way; None for any.

    Raises:
        ApiError: 408, 415, or 422.
    """
    _check_json(request)
    body = await read_body(server, request)

    def read() -> Any:
        if hashed_bytes is None or len(body) <= hashed_bytes:
            request.state.body_digest = hashlib.sha256(body).digest()
        wire = validated(model, parse_json(body))
        return wire if convert is None else convert(wire)

    return read() if len(body) <= SMALL else await server.on_thread(read)


async def read_upload(
    server: Server, request: Request, model: type[M], part: str, field: str | None = None
) -> tuple[M, list[bytes]]:
    """A request sent as ``multipart/form-data``: its JSON in the part `metadata`, text or a file, and files.

    Args:
        server: Has the threads.
        request: As it came.
        model: What the JSON is.
        part: Name of the files' parts.
        field: Of the JSON, what the files stand for; None for `part`.

    Returns:
        The request, with nothing in `field`, and the files in their order.

    Raises:
        ApiError: 400 where a part is missing or damaged, 408, 422 where the JSON is not such a request.
    """
    form = await _read_form(server, request)
    try:
        metadata = form.get("metadata")
        if isinstance(metadata, UploadFile):
            content = await metadata.read(METADATA_BYTES + 1)
        else:
            content = (metadata or "").encode()
        if not content or len(content) > METADATA_BYTES:
            raise ApiError(400, "Send the request without its media as JSON in the part 'metadata', of 32 MiB at most.")
        files = [await file.read() for file in form.getlist(part) if isinstance(file, UploadFile)]
        if not files:
            raise ApiError(400, f"Send the media as files in parts called '{part}'.")
    finally:
        await form.close()

    def read() -> M:
        digest = hashlib.sha256(content)
        for file in files:
            digest.update(hashlib.sha256(file).digest())
        request.state.body_digest = digest.digest()
        try:
            value = parse_json(content)
        except ApiError as error:
            raise ApiError(400, f"The part 'metadata' is not JSON: {error.message[0]['msg']}.") from None
        if isinstance(value, dict):
            value[field or part] = "" if part == "image" else []  # the files stand for it
        return validated(model, value)

    return await server.on_thread(read), files


class _Parser(MultiPartParser):
    spool_max_size = SPOOL_BYTES


async def _read_form(server: Server, request: Request) -> FormData:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise ApiError(400, "This route takes 'multipart/form-data' with a part 'metadata' and the files.")
    parser = _Parser(
        request.headers,
        stream(server, request),  # type: ignore[arg-type]  # any asynchronous iterator does
        max_files=MAX_FILES,
        max_fields=16,
        max_part_size=METADATA_BYTES,
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, f"The body is not a multipart form: {error.message}") from None
    except (KeyError, LookupError, UnicodeDecodeError) as error:  # no boundary, an unknown charset, broken names
        raise ApiError(400, f"The body is not a multipart form: {type(error).__name__}.") from None
