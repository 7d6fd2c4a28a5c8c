"""Requests of the two older protocols: snake_case, arrays as lists of numbers, prompts of tracking at top level."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..provider.errors import InvalidRequestError
from ..provider.types import (
    ArrayData,
    EdgeMaskGenerationInput,
    ImageZeroShotDetectionInput,
    TextImageConditionalGenerationInput,
    flat_to_array,
)
from ..provider.video_types import EdgeVideoMaskGenerationInput
from .inputs import text_input
from .media import Media

MAX_NEW_TOKENS = 512
"""Of a request for text that does not say: Pixano 0.7 sends null, and its successor this number."""

Count = Annotated[int, Field(ge=0)]


class LegacyModel(BaseModel):
    """Base of the requests; unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore")


class FlatNDArray(LegacyModel):
    """An array as a flat list in C order. The numbers are looked at when they are converted, off the event loop."""

    values: Any
    shape: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)

    def read(self, what: str) -> ArrayData:
        """A new array; raises InvalidRequestError where the values are no numbers or too many or few."""
        if not isinstance(self.values, list):
            raise InvalidRequestError(f"{what} must have a list of values.", "Send back what you received.")
        try:
            with np.errstate(over="ignore"):  # too large for float32 is infinite, which is refused later
                array = flat_to_array(self.values, self.shape)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequestError(f"{what} is malformed: {error}.", "Send back what you received.") from error
        return ArrayData(array.reshape(-1), list(self.shape))


class MaskRequest(LegacyModel):
    """Masks on one image; `mask_input` and `return_logits` came with Pixano 0.7."""

    model: str
    image: str
    image_embedding: FlatNDArray | None = None
    high_resolution_features: list[FlatNDArray] | None = None
    mask_input: FlatNDArray | None = None
    reset_predictor: bool = True
    points: list[list[Annotated[list[int], Field(min_length=2, max_length=2)]]] | None = None
    labels: list[list[int]] | None = None
    boxes: list[Annotated[list[int], Field(min_length=4, max_length=4)]] | None = None
    num_multimask_outputs: int = 3
    multimask_output: bool = True
    return_image_embedding: bool = False
    return_logits: bool = False

    def to_input(self, media: Media, image: bytes | None = None) -> EdgeMaskGenerationInput:
        """The provider's request, of `image` where that was uploaded beside; decodes and converts, so off the loop."""
        finer = self.high_resolution_features
        source: Any = media.decoded(self.image) if image is None else image
        return EdgeMaskGenerationInput(
            image=source,
            model=self.model,
            image_embedding=_array(self.image_embedding, "image_embedding"),
            high_resolution_features=None
            if finer is None
            else [one.read(f"high_resolution_features[{i}]") for i, one in enumerate(finer)],
            reset_predictor=self.reset_predictor,
            points=self.points,
            labels=self.labels,
            boxes=self.boxes,
            num_multimask_outputs=self.num_multimask_outputs,
            multimask_output=self.multimask_output,
            return_image_embedding=self.return_image_embedding,
            mask_input=_array(self.mask_input, "mask_input"),
            return_logits=self.return_logits,
            answer_arrays=True,
        )


class Point(LegacyModel):
    """A point of a keyframe."""

    x: int
    y: int
    label: Literal[0, 1] = 1


class Box(LegacyModel):
    """A box of a keyframe."""

    x: int
    y: int
    width: int
    height: int


class Mask(LegacyModel):
    """A mask of a keyframe, its counts as text or as plain run lengths."""

    size: list[Annotated[int, Field(ge=1)]] = Field(min_length=2, max_length=2)
    counts: str | list[Count]


class Keyframe(LegacyModel):
    """One object marked on one frame."""

    frame_index: Count
    points: list[Point] | None = None
    box: Box | None = None
    mask: Mask | None = None


class Interval(LegacyModel):
    """Frames to track, both included."""

    start_frame: Count
    end_frame: Count
    direction: Literal["forward", "backward"] = "forward"


class TrackingRequest(LegacyModel):
    """Objects through a clip; the last three fields came with Pixano 0.7."""

    model: str
    video: list[str] | str
    objects_ids: list[int] = []
    frame_indexes: list[Count] = []
    points: list[list[Annotated[list[int], Field(min_length=2, max_length=2)]]] | None = None
    labels: list[list[int]] | None = None
    boxes: list[Annotated[list[int], Field(min_length=4, max_length=4)]] | None = None
    propagate: bool | None = True
    interval: Interval | None = None
    keyframes: list[Keyframe] | None = None

    def to_input(self, media: Media, frames: list[bytes] | None = None) -> EdgeVideoMaskGenerationInput:
        """The provider's request, of `frames` where these were uploaded beside; decodes, so off the loop."""
        video: Any = frames
        if frames is None and isinstance(self.video, str):
            video = media.decoded(self.video, "video")
        elif frames is None:
            video = [media.decoded(frame) for frame in self.video]
        return EdgeVideoMaskGenerationInput(
            video=video,
            model=self.model,
            objects_ids=self.objects_ids,
            frame_indexes=self.frame_indexes,
            points=self.points,
            labels=self.labels,
            boxes=self.boxes,
            propagate=self.propagate,
            interval=None if self.interval is None else self.interval.model_dump(),
            keyframes=None if self.keyframes is None else [one.model_dump() for one in self.keyframes],
        )


class DetectionRequest(LegacyModel):
    """Boxes of named classes on one image."""

    model: str
    image: str
    classes: list[str] | str
    box_threshold: float = 0.5
    text_threshold: float = 0.5

    def to_input(self, media: Media) -> ImageZeroShotDetectionInput:
        """The provider's request; decodes, so off the loop."""
        image = media.decoded(self.image)
        return ImageZeroShotDetectionInput(image, self.model, self.classes, self.box_threshold, self.text_threshold)


class TextRequest(LegacyModel):
    """Text about images."""

    model: str
    prompt: str | list[dict[str, Any]]
    images: list[str] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float = Field(default=1.0, ge=0)

    async def to_input(self, media: Media) -> TextImageConditionalGenerationInput:
        """The provider's request, with what URLs name fetched."""
        tokens = MAX_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        request: Any = self.model_copy(update={"max_new_tokens": tokens})  # the fields of a `VlmRequest`
        return await text_input(request, media)


def _array(value: FlatNDArray | None, what: str) -> ArrayData | None:
    return None if value is None else value.read(what)
