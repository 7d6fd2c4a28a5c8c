"""Requests of the v1 protocol: camelCase or snake_case, unknown keys ignored; large texts are passed on, not copied."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

T = TypeVar("T")

Many = Annotated[list[T], Field(fail_fast=True)]
"""A list whose first wrong element is the only one reported: a million of them would make an answer of 100 MB."""

Size = Annotated[int, Field(ge=1)]
Positive = Annotated[int, Field(ge=0)]


def _absent(value: Any) -> Any:
    """An empty list is an absent one."""
    return None if isinstance(value, list) and not value else value


class WireModel(BaseModel):
    """Base of all."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")


class WireNDArray(WireModel):
    """A float32 array: little-endian, C order, as base64. `dtype` is not looked at."""

    shape: Many[Size] = Field(min_length=1, max_length=32)
    dtype: str = "float32"
    data: str


class WireRLE(WireModel):
    """A COCO mask: `size` is [height, width], `counts` compressed text or plain run lengths."""

    size: list[Size] = Field(min_length=2, max_length=2)
    counts: str | Many[Positive]


class SegmentationRequest(WireModel):
    """Masks on one image."""

    model: str
    image: str
    image_embedding: WireNDArray | None = None
    high_resolution_features: Many[WireNDArray] | None = None
    mask_input: WireNDArray | None = None
    reset_predictor: bool = True
    points: Many[Many[Annotated[list[int], Field(min_length=2, max_length=2)]]] | None = None
    labels: Many[Many[int]] | None = None
    boxes: Many[Annotated[list[int], Field(min_length=4, max_length=4)]] | None = None
    num_multimask_outputs: int = 3
    multimask_output: bool = True
    return_image_embedding: bool = False
    return_logits: bool = False


class DetectionRequest(WireModel):
    """Boxes of named classes on one image."""

    model: str
    image: str
    classes: Many[str] | str | None = None
    box_threshold: float = 0.5
    text_threshold: float = 0.5


class WirePoint(WireModel):
    """A point of a keyframe: 1 the object, 0 background."""

    x: int
    y: int
    label: Literal[0, 1]


class WireBox(WireModel):
    """A box of a keyframe."""

    x: int
    y: int
    width: int
    height: int


class WirePrompts(WireModel):
    """What marks an object: points, a box, both; or a mask."""

    points: Annotated[Many[WirePoint] | None, BeforeValidator(_absent)] = None
    box: WireBox | None = None
    mask: WireRLE | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> WirePrompts:
        given = self.points is not None or self.box is not None
        if self.mask is not None and given:
            raise ValueError("a mask excludes points and box")
        if self.mask is None and not given:
            raise ValueError("one of points, box and mask is needed")
        return self


class WireKeyframe(WireModel):
    """One object marked on one frame."""

    frame_index: Positive
    prompts: WirePrompts


class WireInterval(WireModel):
    """Frames to track, both included."""

    start_frame: Positive
    end_frame: Positive
    direction: Literal["forward", "backward"] = "forward"


class TrackingRequest(WireModel):
    """Objects through a clip."""

    model: str
    video: Many[str] | str
    objects_ids: Many[int] = []
    frame_indexes: Many[Positive] = []
    propagate: bool | None = None
    interval: WireInterval | None = None
    keyframes: Many[WireKeyframe] = []
    classes: Many[str] | str | None = None
    box_threshold: float | None = None

    @model_validator(mode="after")
    def _match(self) -> TrackingRequest:
        if len(set(self.objects_ids)) != len(self.objects_ids):
            raise ValueError("objectsIds has an id twice")
        if len(self.keyframes) != len(self.objects_ids):
            raise ValueError(
                f"there are {len(self.keyframes)} keyframes and {len(self.objects_ids)} objectsIds: send one of each "
                "per object"
            )
        return self


class VlmRequest(WireModel):
    """Text about images."""

    model: str
    prompt: str | Many[dict[str, Any]]
    images: Many[str] | None = None
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(default=1.0, ge=0)


class EmbeddingRequest(WireModel):
    """Vectors of images or of texts."""

    model: str
    image: Many[str] | str | None = None
    text: Many[str] | str | None = None
    normalize: bool = True

    @model_validator(mode="after")
    def _one(self) -> EmbeddingRequest:
        if (self.image is None) == (self.text is None):
            raise ValueError("give either image or text")
        return self


class NerRequest(WireModel):
    """Names in a text."""

    model: str
    text: str


class DeployRequest(WireModel):
    """A model to load; see docs/server.md for what the names mean here."""

    name: str | None = None
    model_class: str
    model_params: dict[str, Any] = {}
    deployment: dict[str, Any] = {}
