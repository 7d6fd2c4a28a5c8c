"""Inference routes of the v1 protocol."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..provider.seen import EchoedFeatures
from ..provider.types import EdgeMaskGenerationInput, ImageMaskGenerationResult
from . import answers, schemas
from .answers import PiecesResponse, pieces
from .arrays import read_array
from .bodies import read_request_once
from .echoes import Answering, Echoes, is_handle, read_handle
from .state import Server

HASHED_BYTES = 4 << 20
"""Largest body of a mask request that is compared with those under way. Larger ones echo features, for which only the
decoder runs; and what takes long, the encoder, is shared by the content of the image in any case."""


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1/inference")

    @routes.post("/segmentation")
    async def segmentation(request: Request) -> Response:
        wire, digest = await read_request_once(server, request, schemas.SegmentationRequest, HASHED_BYTES)
        answering = server.echoes.answering()
        given = await server.on_thread(mask_input, wire, server.echoes, answering)

        async def compute() -> tuple[ImageMaskGenerationResult, Answering]:
            return await server.provider.image_mask_generation(given, math.inf), answering

        result, sent = await server.once(request, digest, compute, server.settings.segmentation_timeout_s)

        def parts() -> list[bytes]:
            features = sent.arrays(result.data, wire.return_image_embedding)
            return list(pieces(answers.envelope(result, "segmentation", answers.segmentation(result.data, features))))

        return PiecesResponse(await server.on_thread(parts))

    return routes


def mask_input(
    wire: schemas.SegmentationRequest, echoes: Echoes | None = None, answering: Answering | None = None
) -> EdgeMaskGenerationInput:
    """The provider's input; decodes arrays, so it belongs on a thread.

    Args:
        wire: The request.
        echoes: Knows features that were sent before, which are then not decoded.
        answering: Says which features the answer needs.
    """

    def array(value: schemas.WireNDArray | None, what: str):  # type: ignore[no-untyped-def]
        return None if value is None else read_array(value.shape, value.data, what)

    def features() -> tuple[Any, Any]:
        finer = wire.high_resolution_features
        return (
            array(wire.image_embedding, "imageEmbedding"),
            None if finer is None else [array(f, f"highResolutionFeatures[{i}]") for i, f in enumerate(finer)],
        )

    handle = None
    if is_handle(wire.image_embedding):
        handle = read_handle(array(wire.image_embedding, "imageEmbedding"))
    known = None
    if handle is None and echoes is not None:
        known = echoes.recognise(wire.image_embedding, wire.high_resolution_features)
    embedding, finer = features() if handle is None and known is None else (None, None)
    return EdgeMaskGenerationInput(
        image=wire.image,
        model=wire.model,
        image_embedding=embedding,
        high_resolution_features=finer,
        echoed=None if known is None else EchoedFeatures(known, features),
        embedding_handle=handle,
        wants_embedding=None if answering is None else answering.wanted,
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
