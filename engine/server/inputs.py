"""Requests of the wire as the provider's inputs. The functions decode base64, so they belong on a thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..provider.seen import EchoedFeatures
from ..provider.types import (
    ArrayData,
    EdgeMaskGenerationInput,
    ImageZeroShotDetectionInput,
    TextImageConditionalGenerationInput,
)
from ..provider.video_types import EdgeVideoMaskGenerationInput
from . import schemas
from .arrays import read_array
from .echoes import is_handle, read_handle
from .media import is_url

if TYPE_CHECKING:
    from .echoes import Answering, Echoes
    from .fetch import Allowance
    from .media import Media


def _array(value: schemas.WireNDArray | None, what: str) -> ArrayData | None:
    return None if value is None else read_array(value.shape, value.data, what)


def mask_input(
    wire: schemas.SegmentationRequest,
    media: Media,
    image: bytes | None = None,
    echoes: Echoes | None = None,
    answering: Answering | None = None,
) -> EdgeMaskGenerationInput:
    """Masks.

    Args:
        wire: The request.
        media: Reads its image.
        image: Uploaded beside the request.
        echoes: Knows features that were sent before, which are then not decoded.
        answering: Says which features the answer needs.
    """

    def features() -> tuple[Any, Any]:
        finer = wire.high_resolution_features
        return (
            _array(wire.image_embedding, "imageEmbedding"),
            None if finer is None else [_array(f, f"highResolutionFeatures[{i}]") for i, f in enumerate(finer)],
        )

    handle = read_handle(_array(wire.image_embedding, "imageEmbedding")) if is_handle(wire.image_embedding) else None
    known = None
    if handle is None and echoes is not None:
        known = echoes.recognise(wire.image_embedding, wire.high_resolution_features)
    embedding, finer = features() if handle is None and known is None else (None, None)
    source: Any = media.decoded(wire.image) if image is None else image
    return EdgeMaskGenerationInput(
        image=source,
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
        mask_input=_array(wire.mask_input, "maskInput"),
        return_logits=wire.return_logits,
        answer_arrays=True,
    )


def detection_input(
    wire: schemas.DetectionRequest, media: Media, image: bytes | None = None
) -> ImageZeroShotDetectionInput:
    """Boxes."""
    source: Any = media.decoded(wire.image) if image is None else image
    return ImageZeroShotDetectionInput(
        image=source,
        model=wire.model,
        classes=wire.classes,  # type: ignore[arg-type]  # None is refused by models that need classes
        box_threshold=wire.box_threshold,
        text_threshold=wire.text_threshold,
    )


def tracking_input(
    wire: schemas.TrackingRequest, media: Media, frames: list[bytes] | None = None
) -> EdgeVideoMaskGenerationInput:
    """Objects through a clip; of `frames` where these were uploaded beside the request."""
    video: Any = frames
    if video is None and isinstance(wire.video, str):
        video = media.decoded(wire.video, "video")
    elif video is None:
        video = [media.decoded(frame) for frame in wire.video]
    return EdgeVideoMaskGenerationInput(
        video=video,
        model=wire.model,
        objects_ids=wire.objects_ids,
        frame_indexes=wire.frame_indexes,
        propagate=wire.propagate,
        interval=None if wire.interval is None else wire.interval.model_dump(),
        keyframes=[{"frame_index": k.frame_index, **k.prompts.model_dump()} for k in wire.keyframes],
    )


async def text_input(
    wire: schemas.VlmRequest, media: Media, images: list[bytes] | None = None
) -> TextImageConditionalGenerationInput:
    """Text about images; URLs, also those within messages, are fetched."""
    allowance = media.allowance()
    given: Any = images if images is not None else list(wire.images or []) or None
    if given is not None:
        given = await media.fetched_all(given, allowance=allowance)
    prompt = wire.prompt
    if isinstance(prompt, list):
        prompt = [await _message(message, media, allowance) for message in prompt]
    return TextImageConditionalGenerationInput(
        model=wire.model,
        prompt=prompt,
        images=given,
        max_new_tokens=wire.max_new_tokens,
        temperature=wire.temperature,
    )


async def _message(message: dict[str, Any], media: Media, allowance: Allowance) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = []
    for part in content:
        image = part.get("image_url") if isinstance(part, dict) else None
        url = image.get("url") if isinstance(image, dict) else image
        if is_url(url):
            part = {**part, "image_url": {"url": await media.fetched(url, allowance=allowance)}}
        parts.append(part)
    return {**message, "content": parts}
