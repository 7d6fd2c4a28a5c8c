"""Inference routes of the v1 protocol."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..provider.types import EdgeMaskGenerationInput
from . import answers, schemas
from .arrays import read_array
from .bodies import read_request
from .state import Server, until_gone


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1/inference")

    @routes.post("/segmentation")
    async def segmentation(request: Request) -> Response:
        wire = await read_request(server, request, schemas.SegmentationRequest)
        given = await server.on_thread(mask_input, wire)
        timeout = server.settings.segmentation_timeout_s
        result = await until_gone(request, server.provider.image_mask_generation(given, timeout))
        return await server.respond(answers.envelope(result, "segmentation", answers.segmentation(result.data)))

    return routes


def mask_input(wire: schemas.SegmentationRequest) -> EdgeMaskGenerationInput:
    """The provider's input; decodes arrays, so it belongs on a thread."""

    def array(value: schemas.WireNDArray | None, what: str):  # type: ignore[no-untyped-def]
        return None if value is None else read_array(value.shape, value.data, what)

    finer = wire.high_resolution_features
    return EdgeMaskGenerationInput(
        image=wire.image,
        model=wire.model,
        image_embedding=array(wire.image_embedding, "imageEmbedding"),
        high_resolution_features=None
        if finer is None
        else [array(f, f"highResolutionFeatures[{i}]") for i, f in enumerate(finer)],
        reset_predictor=wire.reset_predictor,
        points=wire.points,
        labels=wire.labels,
        boxes=wire.boxes,
        num_multimask_outputs=wire.num_multimask_outputs,
        multimask_output=wire.multimask_output,
        return_image_embedding=wire.return_image_embedding,
        mask_input=array(wire.mask_input, "maskInput"),
        return_logits=wire.return_logits,
        answer_arrays=True,
    )
