"""Answers of the v1 protocol as schemas: for the OpenAPI document and for tests. The routes write JSON themselves."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from .schemas import Size, WireNDArray

D = TypeVar("D")


class Answer(BaseModel):
    """Base of answers in camelCase, complete and without other keys."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid")


class Plain(BaseModel):
    """Base of answers whose keys are as the fields are called."""

    model_config = ConfigDict(extra="forbid")


class ErrorBody(Answer):
    """What went wrong. `message` is a list for requests that do not fit their schema."""

    code: str
    message: str | list[dict[str, Any]]
    request_id: str | None


class Error(Plain):
    """An error."""

    error: ErrorBody


class Health(Plain):
    """The process answers."""

    status: Literal["healthy"]


class Ready(Plain):
    """Whether every model can answer now."""

    ready: bool
    models: dict[str, str]
    models_loaded: int
    version: str


class Info(Answer):
    """What the box is."""

    app_name: str
    app_version: str
    app_description: str
    num_cpus: int | None
    num_gpus: int
    num_nodes: int
    gpus_used: float
    models: list[str]
    models_status: dict[str, str]
    models_to_task: dict[str, str]
    models_to_capability: dict[str, str]
    models_loaded: int
    ready: bool
    gpu_info: dict[str, Any]
    versions: dict[str, str]
    warnings: list[str]
    jobs: list[dict[str, Any]]
    latency: list[dict[str, Any]]


class Model(Answer):
    """A model that requests may name."""

    name: str
    capability: Literal["segmentation", "tracking", "detection", "vlm"]
    model_class: str
    model_path: str | None
    status: Literal["NOT_STARTED", "DEPLOYING", "RUNNING", "DEPLOY_FAILED", "UNHEALTHY", "DELETING"]
    interface: dict[str, Any] | None
    loaded: bool


class Deleted(Plain):
    """A model was unloaded."""

    status: Literal["deleted"]
    model: str


class ModelStats(Plain):
    """What a model has done; times in seconds."""

    model_name: str
    capability: str
    model_class: str
    request_count: int
    total_processing_time: float
    avg_processing_time: float


class RLE(Plain):
    """A COCO mask: `size` is [height, width]."""

    size: list[Size] = Field(min_length=2, max_length=2)
    counts: str


class SegmentationData(Answer):
    """Masks [prompt][mask] and scores [P, M]."""

    masks: list[list[RLE]]
    scores: WireNDArray
    image_embedding: WireNDArray | None
    high_resolution_features: list[WireNDArray] | None
    mask_logits: WireNDArray | None


class DetectionData(Answer):
    """Boxes xyxy in whole pixels, best score first."""

    boxes: list[list[int]]
    scores: list[float]
    classes: list[str]
    masks: list[RLE] | None


class TrackedObject(Answer):
    """One object on one frame."""

    track_id: int
    box: list[float] | None
    score: float | None
    class_name: str | None = Field(alias="class")
    mask: RLE | None


class TrackedFrame(Answer):
    """All objects of one frame."""

    frame_index: int
    objects: list[TrackedObject]


class TrackingData(Answer):
    """The same rows twice: as frames, and as three parallel lists."""

    frames: list[TrackedFrame]
    objects_ids: list[int]
    frame_indexes: list[int]
    masks: list[RLE]


class Usage(Answer):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class VlmData(Answer):
    """Text."""

    generated_text: str
    usage: Usage
    generation_config: dict[str, Any]


class Envelope(Answer, Generic[D]):
    """What every capability answers."""

    id: str
    status: Literal["SUCCESS"]
    timestamp: datetime
    processing_time: float
    metadata: dict[str, Any]
    data: D


class SegmentationAnswer(Envelope[SegmentationData]):
    """Masks."""


class DetectionAnswer(Envelope[DetectionData]):
    """Boxes."""


class TrackingAnswer(Envelope[TrackingData]):
    """Objects through a clip."""


class VlmAnswer(Envelope[VlmData]):
    """Text about images."""


class JobStatus(Answer):
    """A tracking job; `data` once it is completed."""

    job_id: str
    status: Literal["running", "completed", "failed", "canceled"]
    detail: str | None
    data: TrackingData | None
    metadata: dict[str, Any]
    timestamp: datetime
    processing_time: float


ANSWERS: tuple[type[BaseModel], ...] = (
    Error,
    Health,
    Ready,
    Info,
    Model,
    Deleted,
    ModelStats,
    SegmentationAnswer,
    DetectionAnswer,
    TrackingAnswer,
    VlmAnswer,
    JobStatus,
    TrackedFrame,
)
