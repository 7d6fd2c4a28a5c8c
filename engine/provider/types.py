"""Data that a provider takes and returns: Pixano's seed-era provider interface, re-declared in our own words.

Field names, order and defaults follow the interface so that positional and keyword use both work; nothing here
validates (the provider does, and raises). Two names are ours: `EdgeMaskGenerationInput` and
`EdgeMaskGenerationOutput` add the mask-prompt and logits fields that newer Pixano versions send and read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

# Elements converted per step between arrays and lists: such a step holds Python's global lock, and an image
# embedding has millions of elements, so a single step would stop every other thread for 0.1 s.
_STEP = 1 << 15


class InferenceTask(str, Enum):
    """What a model can be asked to do."""

    MASK_GENERATION = "image_mask_generation"
    VIDEO_MASK_GENERATION = "video_mask_generation"
    OBJECT_DETECTION = "image_zero_shot_detection"
    TEXT_GENERATION = "text_image_conditional_generation"


@dataclass
class ServerInfo:
    """State of the server behind a provider: the fields of both seed revisions, all with defaults.

    Use keywords; the last three fields are additions of Pixano Edge.

    Attributes:
        version: Version of Pixano Edge.
        models_loaded: Models in memory now.
        num_gpus: CUDA devices that this process can see.
        gpu_info: ``devices`` (list of dicts, memory in bytes), ``reason`` (why there is none, or None),
            ``model_to_device`` (loaded model -> device name), ``warm_up`` (loaded model -> seconds that it ran before
            its first request, or None), ``placement`` (model -> why it is there, with several GPUs),
            ``memory_total``/``memory_available`` of the host, ``memory`` (per device: budget, reserved and used bytes,
            what is free, and each model's share, see `MemoryBudget.snapshot`) and ``unloaded`` (models that made room
            for others, and why).
        models: Every model that a request may name, loaded or not.
        models_to_task: Model name -> task.
        ready: Whether requests are accepted.
        app_name: Product name.
        app_version: Same as `version`.
        app_description: One line.
        num_cpus: Logical CPUs that this process may use.
        num_nodes: Machines; always 1.
        gpus_used: Indices of the devices that hold a model.
        gpu_to_model: Device index as text -> model names, comma separated.
        versions: Versions of Pixano Edge, Python and the libraries that compute.
        warnings: Fallbacks and faults that the administrator should know of.
        jobs: Tracking under way, one dict each, JSON-ready: ``job_id`` (None for a request that somebody waits for),
            ``model``, ``frames_done``, ``frames_total`` (None until the clip is open), ``progress`` (0 to 1, or None)
            and ``seconds`` since it was asked for.
    """

    version: str = ""
    models_loaded: int = 0
    num_gpus: int = 0
    gpu_info: dict[str, Any] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    models_to_task: dict[str, str] = field(default_factory=dict)
    ready: bool = False
    app_name: str = ""
    app_version: str = ""
    app_description: str = ""
    num_cpus: int | None = None
    num_nodes: int = 0
    gpus_used: list[int] = field(default_factory=list)
    gpu_to_model: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class ModelConfig:
    """What to load and how; see `EdgeProvider.instantiate_model` for the accepted keys."""

    name: str
    task: str
    path: Path | str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    processor_config: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; `path` becomes text."""
        values = asdict(self)
        values["path"] = None if self.path is None else str(self.path)
        return values


@dataclass
class ModelInfo:
    """One model that requests may name; `status` is one of the words of `states`, None where nobody tells."""

    name: str
    task: str
    model_path: str | None = None
    model_class: str | None = None
    provider: str | None = None
    status: str | None = None


@dataclass
class ProviderCapabilities:
    """What a provider can do. `max_image_size` is a side in pixels: a square image of that side is accepted."""

    tasks: list[InferenceTask]
    supports_batching: bool = False
    supports_streaming: bool = False
    max_image_size: int | None = None


@dataclass
class CompressedRLEData:
    """A binary mask as COCO compressed run lengths: column-major, `size` is ``[height, width]``."""

    size: list[int]
    counts: bytes

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CompressedRLEData:
        """Reads the JSON form, where `counts` is text."""
        counts = data["counts"]
        return cls(size=list(data["size"]), counts=counts.encode("ascii") if isinstance(counts, str) else counts)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, `counts` as text."""
        return {"size": list(self.size), "counts": self.counts.decode("ascii")}


@dataclass
class NDArrayData:
    """A float array as a flat list in C order and its shape."""

    values: list[float]
    shape: list[int]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> NDArrayData:
        """Reads ``{"values": [...], "shape": [...]}``."""
        return cls(values=data["values"], shape=list(data["shape"]))

    def to_dict(self) -> dict[str, Any]:
        """``{"values": [...], "shape": [...]}``; `values` is the same list, not a copy."""
        return {"values": self.values, "shape": list(self.shape)}

    @classmethod
    def from_array(cls, array: npt.NDArray[Any]) -> NDArrayData:
        """Copies an array of any shape."""
        flat = np.ascontiguousarray(array).reshape(-1)
        values: list[float] = []
        for start in range(0, flat.size, _STEP):
            values.extend(flat[start : start + _STEP].tolist())
        return cls(values=values, shape=list(array.shape))

    def to_array(self) -> npt.NDArray[np.float32]:
        """A new float32 array of `shape`.

        Raises:
            ValueError: `values` is not flat and numeric, or its length is not the product of `shape`.
        """
        return flat_to_array(self.values, self.shape)


@dataclass
class ArrayData(NDArrayData):
    """`NDArrayData` whose `values` is a flat, C-contiguous float32 array instead of a list: for callers that pass
    arrays on, such as a server. A request with `answer_arrays` is answered with them."""

    values: npt.NDArray[np.float32]  # type: ignore[assignment]

    @classmethod
    def from_array(cls, array: npt.NDArray[Any]) -> ArrayData:
        """Keeps a C-contiguous float32 array as it is, which must not change any more; copies others."""
        flat: npt.NDArray[np.float32] = np.ascontiguousarray(array, np.float32).reshape(-1)
        return cls(values=flat, shape=list(array.shape))

    def to_array(self) -> npt.NDArray[np.float32]:
        """The same memory with `shape`; raises ValueError where they do not fit."""
        found: npt.NDArray[np.float32] = self.values.reshape(self.shape)
        return found


def flat_to_array(values: Any, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Flat numbers (list or array) in C order to a new float32 array; raises ValueError where they do not fit."""
    dims = tuple(int(d) for d in shape)
    size = int(np.prod(dims, dtype=np.int64)) if dims else 1
    if any(d < 0 for d in dims) or len(values) != size:
        raise ValueError(f"{len(values)} values do not fill shape {list(dims)}")
    out = np.empty(size, np.float32)
    try:
        for start in range(0, size, _STEP):
            out[start : start + _STEP] = values[start : start + _STEP]
    except TypeError as error:
        raise ValueError(f"values must be numbers: {error}") from error
    return cast("npt.NDArray[np.float32]", out.reshape(dims))


@dataclass
class ImageMaskGenerationInput:
    """One image, P prompts on it; coordinates in pixels of the decoded image, before any EXIF rotation.

    Attributes:
        image: ``data:`` URI or path (see `EdgeProvider` for what is allowed).
        model: Model name.
        image_embedding: ``[C, G, G]`` from an earlier answer; goes together with `high_resolution_features`.
        high_resolution_features: The two finer feature maps of the same answer.
        reset_predictor: Taken for compatibility; Pixano Edge keeps no hidden state between requests.
        points: Per prompt, points ``[x, y]``.
        labels: Per prompt and point, 1 foreground, 0 background; foreground when absent.
        boxes: Per prompt ``[x1, y1, x2, y2]``.
        num_multimask_outputs: Must be 3 with `multimask_output`; ignored without.
        multimask_output: Three masks per prompt instead of one.
        return_image_embedding: Send the features back for the next request on this image.
    """

    image: str
    model: str
    image_embedding: NDArrayData | None = None
    high_resolution_features: list[NDArrayData] | None = None
    reset_predictor: bool = True
    points: list[list[list[int]]] | None = None
    labels: list[list[int]] | None = None
    boxes: list[list[int]] | None = None
    num_multimask_outputs: int = 3
    multimask_output: bool = True
    return_image_embedding: bool = False


@dataclass
class EdgeMaskGenerationInput(ImageMaskGenerationInput):
    """`ImageMaskGenerationInput` with the fields of Pixano 0.8.

    Attributes:
        mask_input: Low-resolution logits of an earlier answer: ``[m, m]``, ``[1, m, m]``, ``[P, 1, m, m]``.
        return_logits: Send low-resolution logits back.
        answer_arrays: Answer with `ArrayData`; an addition of Pixano Edge, as all that follow.
        echoed: Features that a server knows to be its own, instead of `image_embedding`; see `seen.EchoedFeatures`.
        embedding_handle: What stands for features, instead of them; see `seen.handle_of`.
        wants_embedding: Whether the features of a key are to be in the answer; None for always.
    """

    mask_input: NDArrayData | None = None
    return_logits: bool = False
    answer_arrays: bool = False
    echoed: Any = None
    embedding_handle: bytes | None = None
    wants_embedding: Callable[[Any], bool] | None = None


@dataclass
class ImageMaskGenerationOutput:
    """Masks ``[prompt][mask]`` at the image's size and scores ``[P, M]``, in the model's order."""

    masks: list[list[CompressedRLEData]]
    scores: NDArrayData
    image_embedding: NDArrayData | None = None
    high_resolution_features: list[NDArrayData] | None = None


@dataclass
class EdgeMaskGenerationOutput(ImageMaskGenerationOutput):
    """`ImageMaskGenerationOutput` with logits: ``[M, m, m]`` for one prompt, else ``[P, M, m, m]``.

    `embedding_key` is what the features depend on (`EmbeddingKey`); None when the request brought its own.
    """

    mask_logits: NDArrayData | None = None
    embedding_key: Any = None


@dataclass
class VideoMaskGenerationInput:
    """Frames and prompts for tracking; first dimension of the prompts is the object.

    `EdgeVideoMaskGenerationInput` adds what newer Pixano versions send, and says what the fields mean.
    """

    video: list[str] | list[bytes] | list[str | bytes] | str | bytes
    model: str
    objects_ids: list[int]
    frame_indexes: list[int]
    points: list[list[list[int]]] | None = None
    labels: list[list[int]] | None = None
    boxes: list[list[int]] | None = None


@dataclass
class VideoMaskGenerationOutput:
    """Three parallel lists with one row per (frame, object)."""

    objects_ids: list[int]
    frame_indexes: list[int]
    masks: list[CompressedRLEData]


@dataclass
class ImageZeroShotDetectionInput:
    """An image and the class names to look for."""

    image: str
    model: str
    classes: list[str] | str
    box_threshold: float = 0.5
    text_threshold: float = 0.5


@dataclass
class ImageZeroShotDetectionOutput:
    """Boxes ``[x1, y1, x2, y2]`` in pixels with score and class name."""

    boxes: list[list[int]]
    scores: list[float]
    classes: list[str]


@dataclass
class UsageInfo:
    """Tokens of one text generation."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass
class TextImageConditionalGenerationInput:
    """A prompt (text or chat messages) and images."""

    model: str
    prompt: str | list[dict[str, Any]]
    images: list[str | Path] | None = None
    max_new_tokens: int = 100
    temperature: float = 1.0


@dataclass
class TextImageConditionalGenerationOutput:
    """Generated text without the prompt."""

    generated_text: str
    usage: UsageInfo
    generation_config: dict[str, Any] = field(default_factory=dict)


@dataclass
class ImageMaskGenerationResult:
    """Answer to an image mask request; `processing_time` in seconds."""

    data: ImageMaskGenerationOutput
    timestamp: datetime
    processing_time: float
    metadata: dict[str, Any]
    id: str = ""
    status: str = "SUCCESS"


@dataclass
class VideoMaskGenerationResult:
    """Answer to a tracking request; here `status` comes second and has no default."""

    data: VideoMaskGenerationOutput
    status: str
    timestamp: datetime
    processing_time: float
    metadata: dict[str, Any]
    id: str = ""


@dataclass
class ImageZeroShotDetectionResult:
    """Answer to a detection request; `processing_time` in seconds."""

    data: ImageZeroShotDetectionOutput
    timestamp: datetime
    processing_time: float
    metadata: dict[str, Any]
    id: str = ""
    status: str = "SUCCESS"


@dataclass
class TextImageConditionalGenerationResult:
    """Answer to a text request; `processing_time` in seconds."""

    data: TextImageConditionalGenerationOutput
    timestamp: datetime
    processing_time: float
    metadata: dict[str, Any]
    id: str = ""
    status: str = "SUCCESS"
