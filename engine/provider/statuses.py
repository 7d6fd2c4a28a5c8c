"""Which HTTP status and code an error of the engine has, on every wire and in Pixano's own errors."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import EdgeError
from .errors import (
    InferenceTimeoutError,
    InvalidRequestError,
    JobNotFoundError,
    ModelBusyError,
    ModelNotFoundError,
    ProviderNotFoundError,
    TaskNotSupportedError,
)

CODES: Mapping[int, str] = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    409: "conflict",
    413: "payload_too_large",
    422: "validation_error",
    500: "internal_error",
    503: "unavailable",
    504: "timeout",
}
"""Status -> code, as Pixano's inference server names them."""

_STATUS: tuple[tuple[type[EdgeError], int], ...] = (
    (InvalidRequestError, 400),
    (ModelNotFoundError, 404),
    (JobNotFoundError, 404),
    (TaskNotSupportedError, 400),
    (ProviderNotFoundError, 400),
    (ModelBusyError, 503),
    (InferenceTimeoutError, 504),
)


def status_of(error: EdgeError) -> int:
    """HTTP status of an error; 500 for what is the server's own fault."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def code_of(status: int) -> str:
    """The code that goes with a status."""
    return CODES.get(status, "error")
