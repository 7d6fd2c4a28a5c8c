"""The OpenAPI document: bodies are read by hand, for speed and for limits, so they are described by hand, too."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ..libraries import engine_versions
from . import schemas, schemas_out

VERSION = engine_versions()["pixano-edge"]

_REQUESTS: tuple[type[BaseModel], ...] = (
    schemas.SegmentationRequest,
    schemas.DetectionRequest,
    schemas.TrackingRequest,
    schemas.VlmRequest,
    schemas.EmbeddingRequest,
    schemas.NerRequest,
    schemas.DeployRequest,
)
_REASONS = {
    400: "The request is well-formed, and cannot be answered: the image, the prompts, or what the model does",
    401: "No API key",
    403: "A wrong API key, or a web page of another origin",
    404: "No such model or job",
    408: "The rest of the body did not come",
    409: "The model is there already, or there is no room for it",
    413: "The body is larger than the limit",
    415: "Not the content type of this route",
    422: "The request does not fit the schema",
    500: "The server's own fault",
    503: "Too many requests wait; nothing was computed, so trying again is free",
    504: "It took longer than the limit; the work was stopped",
}

TEXT: dict[int | str, Any] = {200: {"description": "Text", "content": {"text/plain": {"schema": {"type": "string"}}}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def answer(name: str, status: int = 200) -> dict[int | str, Any]:
    """A JSON answer, by the name of its schema."""
    schema = {"type": "array", "items": _ref("Model")} if name == "Models" else _ref(name)
    return {status: {"description": "Answer", "content": {"application/json": {"schema": schema}}}}


def lines(name: str, kind: str, description: str) -> dict[int | str, Any]:
    """An answer that comes piece by piece; `name` is the schema of a piece."""
    return {200: {"description": f"{description} (each: {name})", "content": {kind: {"schema": {"type": "string"}}}}}


def errors(*statuses: int) -> dict[int | str, Any]:
    """Errors of a route, with those that every guarded route has."""
    return {
        status: {"description": _REASONS[status], "content": {"application/json": {"schema": _ref("Error")}}}
        for status in sorted({401, 403, 408, 413, 500, *statuses})
    }


def body(model: type[BaseModel]) -> dict[str, Any]:
    """A JSON body."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _ref(model.__name__)}}}}


def upload(model: type[BaseModel], part: str, many: bool) -> dict[str, Any]:
    """A multipart body: the request as JSON text, and files."""
    file: dict[str, Any] = {"type": "string", "format": "binary"}
    properties = {
        "metadata": {"type": "string", "description": f"JSON of {model.__name__} without the media"},
        part: {"type": "array", "items": file, "minItems": 1} if many else file,
    }
    schema = {"type": "object", "properties": properties, "required": ["metadata", part]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def install(app: FastAPI, guarded: bool) -> None:
    """Has `app.openapi` answer the whole document.

    Args:
        app: The application.
        guarded: Whether it asks for keys.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes, description=app.description)
            _, requests = models_json_schema(
                [(model, "validation") for model in _REQUESTS], ref_template="#/components/schemas/{model}"
            )
            _, answers = models_json_schema(
                [(model, "serialization") for model in schemas_out.ANSWERS],
                ref_template="#/components/schemas/{model}",
            )
            for item in found["paths"].values():
                for operation in item.values():
                    # FastAPI's own, for paths that any text fits.
                    if "HTTPValidationError" in str(operation["responses"].get("422")):
                        del operation["responses"]["422"]
            components = found.setdefault("components", {})
            components["schemas"] = {**requests["$defs"], **answers["$defs"]}
            if guarded:
                components["securitySchemes"] = {
                    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                    "bearer": {"type": "http", "scheme": "bearer"},
                }
                for path, item in found["paths"].items():
                    if path.startswith(("/v1/inference", "/v1/jobs", "/v1/models")):
                        for operation in item.values():
                            operation["security"] = [{"key": []}, {"bearer": []}]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
