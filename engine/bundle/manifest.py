"""The manifest: what a bundle holds, where it came from, and how well it matches its original."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .names import MANIFEST_NAME as MANIFEST_NAME
from .names import NAME_PATTERN as NAME_PATTERN
from .names import PRECISIONS as PRECISIONS
from .names import Precision as Precision

SCHEMA_VERSION = 2
SINCE_2 = ("calibrations", "cpu_graphs")
"""Fields of `Manifest` that version 2 has; bundles with none of them are written as 1, which older versions read."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Model):
    """One file of the bundle, checked at opening."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Source(_Model):
    """Where the weights came from."""

    checkpoint: str
    """Hub id or file name as given at export (never a full local path)."""
    format: Literal["transformers", "sam2-pt"]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 over the weight file's bytes (or over the sorted per-file hashes when sharded)."""
    architecture: str
    """For example ``sam2.1-hiera-tiny``."""


class Licence(_Model):
    """Licence of the weights, recorded at export and printed."""

    spdx: str
    """SPDX identifier, or ``unknown``."""
    text: str = ""
    """Where the identifier was read from, or what the user should check."""


class GraphVariant(_Model):
    """One file of one graph."""

    file: str
    precision: Precision
    opset: int
    target: Literal["onnx", "tensorrt"] = "onnx"
    """``onnx``: any back end that reads ONNX; ``tensorrt``: changed for TensorRT only."""
    nodes: int
    parameters: int
    weight_bytes: int | None = None
    """Bytes of the weights once loaded, where the file does not hold them like that: they lie in another graph's file,
    or in a narrower type. None: as the file's size says."""
    onnxruntime_only: bool = False
    """Has operators of ONNX Runtime's own, or belongs to a variant with such: nothing is built from it."""


class Graph(_Model):
    """One graph of the family's contract, in one or more variants keyed by name (``fp32``, ``fp16``, ...)."""

    variants: dict[str, GraphVariant]


class GraphMemory(_Model):
    """Memory of one variant of one graph, measured at export."""

    graph: str
    variant: str
    session_bytes: int = Field(ge=0)
    """What the open graph takes: its weights as the back end keeps them (packed, widened), and its nodes."""
    activation_bytes: int = Field(ge=0)
    """What intermediate tensors take at their most; inputs, outputs and weights are not in it."""
    sizes: dict[str, int]
    """Of the dynamic dimensions while it was measured."""
    measured_with: str
    """For example ``onnxruntime 1.32.0, CPUExecutionProvider``."""


class TensorParity(_Model):
    """One output compared with PyTorch: worst case over the parity inputs."""

    graph: str
    tensor: str
    variant: str
    max_abs: float
    max_rel: float
    """max |difference| / max |reference|."""


class MaskParity(_Model):
    """Whole pipeline compared with PyTorch on the parity photos."""

    variant: str
    prompts: int
    images: int
    mean_iou: float
    """Pixels whose reference logit lies within the tensors' tolerance of the threshold count as equal."""
    min_iou: float


class ClipParity(_Model):
    """A short clip tracked by the engine, compared with PyTorch's video predictor frame by frame."""

    variant: str
    frames: int
    """Answers compared; a frame that is tracked again after a correction counts again."""
    objects: int
    shown: int
    """Of PyTorch's masks, how many are not empty; empty ones agree easily."""
    mean_iou: float
    """As in `MaskParity`, with twice the tolerance."""
    min_iou: float


class DetectionParity(_Model):
    """Final detections of the whole pipeline compared with PyTorch's model and processor on the parity photos."""

    variant: str
    images: int
    classes: int
    """Asked for in all."""
    boxes: int
    """PyTorch's, over all images."""
    unmatched: int
    """Boxes of either side without a partner of the same class."""
    max_box: float
    """Largest distance of a corner of a matched pair, in pixels of the original image."""
    max_score: float
    """Largest difference of the scores of a matched pair."""


class GenerationParity(_Model):
    """Greedy answers of the exported graphs compared with PyTorch's `generate`, token by token."""

    variant: str
    prompts: int
    tokens: int
    """Of PyTorch's answers, over all prompts."""
    equal: int
    """Tokens that the exported graphs choose too, each after PyTorch's tokens before it."""
    ties: int
    """Of the others, those where PyTorch's two best logits lie within twice the bar of fp32's error."""
    max_rel: float
    """Largest error of the logits at any step, relative to the largest logit."""


class ParityReport(_Model):
    """Figures taken at export against the PyTorch original on the same weights."""

    reference: str
    """For example ``transformers 5.23.0 Sam2Model, torch 2.13.0, fp32, cpu``."""
    inputs: list[str]
    """What was compared on (names, not paths)."""
    tensors: list[TensorParity]
    masks: list[MaskParity]
    clips: list[ClipParity] = []
    """Empty for a bundle that does not track."""
    detections: list[DetectionParity] = []
    """Of a detector."""
    generations: list[GenerationParity] = []
    """Of a model that answers in text."""
    tolerance: dict[str, float]
    passed: bool


class CalibrationEntry(_Model):
    """A variant that was made by calibration, and the budget that it met."""

    variant: str
    """Its key in `Graph.variants`; calibrated for several metrics, it has an entry for each."""
    graphs: list[str]
    """Graphs that ran when it was judged, one at least."""
    metric: str
    """For example ``mask_iou``: agreement with the answers of fp32, 1 is perfect."""
    budget: float = Field(gt=0, le=1)
    """Lowest mean that was asked for."""
    held_out: float = Field(ge=0, le=1)
    """Mean on held-out data, at least `budget`."""
    worst: float = Field(ge=0, le=1)
    """Of the lowest held-out sample."""
    held_out_samples: int = Field(ge=1)
    golden: float | None = Field(default=None, ge=0, le=1)
    """Lowest mean agreement with PyTorch, of golden pictures and golden clip, on the CPU that published it; None where
    it was not measured."""
    data: str
    """Name of the folder or file (no path)."""
    data_digest: str = ""
    """SHA-256 over the contents of the files used, hexadecimal."""
    calibration_samples: int = Field(ge=1)
    method: str
    """For example ``auto, smoothing 0.5, 23 of 25 blocks``."""
    created: datetime
    tools: dict[str, str]
    """Versions of what calibrated and judged it."""
    report: str | None = None
    """File inside the bundle with every figure, as JSON."""


class GoldenSample(_Model):
    """Inputs and PyTorch outputs stored in the bundle, so that a box without torch can check itself."""

    name: str
    image: str
    """Image file inside the bundle."""
    tensors: str
    """``.npz`` file inside the bundle: prompts and reference outputs (see the family's model file)."""


class Preprocess(_Model):
    """How an image becomes the model input."""

    resize: Literal[
        "antialias-bilinear-square", "padded-square", "bicubic-square", "shortest-edge", "tiles", "patches"
    ] = "antialias-bilinear-square"
    """``padded-square``: black below or on the right, then resized (OWLv2); ``bicubic-square``: OWL-ViT;
    ``shortest-edge``: aspect ratio kept (Grounding DINO); ``tiles``: see the contract of SmolVLM;
    ``patches``: see that of Qwen2.5-VL."""
    image_size: int
    """Side of the model input or of a tile, or the input's shortest edge; of ``patches``, what both sides are whole
    multiples of."""
    longest_edge: int | None = None
    """Of ``shortest-edge``: what the other one may be at most. Of ``tiles``: what the longer one is resized to."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channel_order: Literal["RGB"] = "RGB"


class Postprocess(_Model):
    """How logits become masks."""

    resize: Literal["bilinear"] = "bilinear"
    mask_threshold: float = 0.0


class Manifest(_Model):
    """Everything a bundle says about itself; stored as ``manifest.json``."""

    schema_version: int
    name: str = Field(pattern=f"^{NAME_PATTERN}$")
    family: str
    created: datetime
    source: Source
    licence: Licence
    tools: dict[str, str]
    """Versions of the tools that made the bundle."""
    constants: dict[str, Any]
    """Checked by the family's contract (`engine/contracts`)."""
    preprocess: Preprocess
    postprocess: Postprocess
    graphs: dict[str, Graph]
    cpu_graphs: dict[str, GraphVariant] = {}
    """In fp32, for ONNX Runtime's own CPU provider alone: other forms of the graphs of the same names, with operators
    of its own, and graphs that stand for another one together. Empty where there are none; since version 2."""
    memory: list[GraphMemory] = []
    """Empty in bundles made before it was measured, or on systems that do not tell."""
    parity: ParityReport | None
    golden: list[GoldenSample]
    golden_clip: GoldenSample | None = None
    """Of a bundle that tracks: a clip cut out of `image`, with prompts and reference outputs."""
    calibrations: list[CalibrationEntry] = []
    """Of the variants that calibration added; since version 2."""
    files: dict[str, FileEntry]
    """Every file but the manifest itself, by POSIX path relative to the bundle."""
    notes: list[str] = []
