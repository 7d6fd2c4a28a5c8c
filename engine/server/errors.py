"""Errors on the wire: ``{"error": {"code", "message", "requestId"}}``, and which error becomes which status.

Why a full queue is 503: Pixano's clients try 502, 503 and 504 again, after 0.5 and 1 s. A request that was refused for
a full queue has cost nothing, so trying it again costs nothing either, and a short burst passes unseen. Nothing that
was computed, and nothing that will fail again, answers with one of these but a timeout, whose work is cancelled.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import Response

from ..errors import EdgeError
from ..provider.errors import JobEndedError, JobStoreError, OutOfMemoryError
from ..provider.statuses import code_of, status_of
from .answers import dumps

log = logging.getLogger("pixano_edge.server")

RETRY_AFTER_S = 1

HIDDEN = "Inference error."
"""What a client reads of a fault of the server; the log has it with the request's id."""

TOLD = (OutOfMemoryError, JobStoreError, JobEndedError)
"""Faults with the status 500 that a client reads in full: it can act on them (a smaller image, fewer prompts, the job
again later), and their messages are made of numbers, names of models and devices, and the system's words for a full
disk. All other messages are for who runs the server: they quote libraries, and may hold paths of this machine."""


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: Text, or the list of a validation.
        headers: More headers.
    """

    def __init__(self, status: int, message: Any, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


def request_id(request: Any) -> str | None:
    """The id of a request, from its scope."""
    found = getattr(request, "scope", request).get("state", {}).get("request_id")
    return None if found is None else str(found)


def error_body(status: int, message: Any, identity: str | None) -> bytes:
    """The envelope."""
    return dumps({"error": {"code": code_of(status), "message": message, "requestId": identity}})


def error_response(
    status: int, message: Any, identity: str | None, headers: Mapping[str, str] | None = None
) -> Response:
    """The envelope as a response."""
    return Response(error_body(status, message, identity), status, dict(headers or {}), "application/json")


def api_error(error: EdgeError, request: Any) -> ApiError:
    """An error of the engine as an answer; faults of the server are logged, and hidden but for those of `TOLD`."""
    status = status_of(error)
    if status >= 500:
        log.warning("%s", error, extra={"request_id": request_id(request), "error": type(error).__name__})
    hidden = status == 500 and not isinstance(error, TOLD)
    return ApiError(
        status, HIDDEN if hidden else str(error), {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    )


def validation_message(errors: Any) -> list[dict[str, Any]]:
    """Pydantic's errors without what the client sent, which may be megabytes, or bytes."""
    return [{"type": e["type"], "loc": list(e["loc"]), "msg": str(e["msg"])} for e in errors]


async def on_api_error(request: Request, error: Any) -> Response:
    """Handler of `ApiError`."""
    return error_response(error.status, error.message, request_id(request), error.headers)


async def on_edge_error(request: Request, error: Any) -> Response:
    """Handler of `EdgeError`."""
    found = api_error(error, request)
    return error_response(found.status, found.message, request_id(request), found.headers)


async def on_http_error(request: Request, error: Any) -> Response:
    """Handler of FastAPI's own HTTPException (unknown paths keep Starlette's ``{"detail": ...}``)."""
    return error_response(error.status_code, error.detail, request_id(request), error.headers)


async def on_validation_error(request: Request, error: Any) -> Response:
    """Handler of FastAPI's validation of paths and queries."""
    return error_response(422, validation_message(error.errors()), request_id(request))


HANDLERS: dict[Any, Any] = {
    ApiError: on_api_error,
    EdgeError: on_edge_error,
    HTTPException: on_http_error,
    RequestValidationError: on_validation_error,
}
