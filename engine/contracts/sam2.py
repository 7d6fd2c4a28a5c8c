"""Contract of SAM 2 / SAM 2.1 image segmentation: two graphs and their constants.

Source of the architecture: Ravi et al., "SAM 2: Segment Anything in Images and Videos" (2024), upstream
``sam2/modeling/sam2_base.py`` and ``sam2/sam2_image_predictor.py``, and transformers'
``models/sam2/modeling_sam2.py``. Coordinates inside the graphs are model pixels: ``x * image_size / width``,
before the half-pixel shift, which the mask decoder graph adds itself as upstream does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ContractError
from .base import POSITIVE_TRIPLE, TRIPLE, GraphSpec, Kind, TensorSpec, is_finite, is_whole, read_constants

FAMILY = "sam2"

VIDEO = "video"
"""Key of the manifest's constants that holds those of tracking; absent in a bundle that does not track."""

IMAGE_ENCODER = "image_encoder"
MASK_DECODER = "mask_decoder"
IMAGE_PREPARE = "image_prepare"
MASK_PREPARE = "mask_prepare"
CLICK_DECODER = "click_decoder"

# image_encoder
PIXEL_VALUES = "pixel_values"
IMAGE_EMBED = "image_embed"
HIGH_RES_0 = "high_res_0"
HIGH_RES_1 = "high_res_1"
# mask_decoder
POINT_COORDS = "point_coords"
POINT_LABELS = "point_labels"
MASK_INPUT = "mask_input"
HAS_MASK_INPUT = "has_mask_input"
MASKS = "masks"
IOU_SCORES = "iou_scores"
OBJECT_SCORE_LOGITS = "object_score_logits"
# image_prepare, mask_prepare, click_decoder
PIXELS = "pixels"
PIXEL_KEYS = "pixel_keys"
PIXEL_VALUES_0 = "pixel_values_0"
PIXEL_QUERIES = "pixel_queries"
MASKED = "masked_"
FINE_0 = "fine_0"
FINE_1 = "fine_1"

LABEL_PAD = -1
LABEL_BACKGROUND = 0
LABEL_FOREGROUND = 1
LABEL_BOX_TOP_LEFT = 2
LABEL_BOX_BOTTOM_RIGHT = 3

NUM_MASKS = 4
"""Masks the decoder returns per prompt: index 0 is the single-mask output, 1..3 the multimask outputs."""

MAX_PROMPTS = 256
MAX_POINTS = 64
MAX_CLICK_POINTS = 12
"""Points of a prompt, padding included, up to which `click_decoder` takes fewer operations than `mask_decoder`."""


@dataclass(frozen=True)
class Sam2Constants:
    """Constants of one SAM 2 checkpoint, stored in the manifest.

    Attributes:
        image_size: Side of the square model input in pixels; a multiple of 32.
        hidden_dim: Channels of the image embedding.
        mean: Per-channel RGB mean, on pixels scaled to 0..1.
        std: Per-channel RGB standard deviation.
        mask_threshold: Logits above it are foreground.
        dynamic_multimask_via_stability: Whether a single-mask answer falls back to the best multimask output
            when the single mask is unstable (upstream ``_dynamic_multimask_via_stability``).
        stability_delta: Logit margin of the stability score.
        stability_threshold: Below this stability the fallback is taken.
    """

    image_size: int = 1024
    hidden_dim: int = 256
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    mask_threshold: float = 0.0
    dynamic_multimask_via_stability: bool = True
    stability_delta: float = 0.05
    stability_threshold: float = 0.98

    def __post_init__(self) -> None:
        if self.image_size <= 0 or self.image_size % 32 or self.hidden_dim % 8:
            raise ContractError(
                f"SAM 2 needs image_size divisible by 32 and hidden_dim by 8, got {self.image_size} "
                f"and {self.hidden_dim}.",
                "Check the checkpoint's config.json.",
            )

    @property
    def embed_size(self) -> int:
        """Side of the image embedding grid."""
        return self.image_size // 16

    @property
    def mask_size(self) -> int:
        """Side of the low-resolution mask logits and of the mask input."""
        return self.image_size // 4

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sam2Constants:
        """Rebuilds the constants from the manifest, where every field must be; there are no defaults.

        What a bundle that tracks adds under `VIDEO` is another contract's (`sam2_video.constants_of`).

        Raises:
            ContractError: Unknown or missing keys, wrong types or lengths, values that are not finite or out of range.
        """
        kinds: dict[str, Kind] = {
            "image_size": (_whole, "a whole number above 0"),
            "hidden_dim": (_whole, "a whole number above 0"),
            "mean": TRIPLE,
            "std": POSITIVE_TRIPLE,
            "mask_threshold": (is_finite, "a finite number"),
            "dynamic_multimask_via_stability": (lambda v: isinstance(v, bool), "true or false"),
            "stability_delta": (lambda v: is_finite(v) and v >= 0, "a finite number, 0 or more"),
            "stability_threshold": (is_finite, "a finite number"),
        }
        values = {k: v for k, v in values.items() if k != VIDEO}
        return cls(**read_constants("SAM 2", values, kinds))


def _whole(value: Any) -> bool:
    return is_whole(value) and value > 0


def image_encoder(c: Sam2Constants) -> GraphSpec:
    """Normalised pixels to features; batch 1. `image_embed` already holds the no-memory embedding."""
    d, s = c.hidden_dim, c.image_size
    return GraphSpec(
        IMAGE_ENCODER,
        inputs=(TensorSpec(PIXEL_VALUES, "float32", (1, 3, s, s)),),
        outputs=_features(d, s),
    )


def mask_decoder(c: Sam2Constants) -> GraphSpec:
    """P prompts on one image to four masks each.

    `point_coords` holds model pixels, `point_labels` the codes ``LABEL_*``. The caller appends the padding
    point; a box is two corner points. `mask_input` is used per prompt where `has_mask_input` is 1.
    `masks` are unthresholded logits at ``mask_size``.
    """
    m = c.mask_size
    return GraphSpec(
        MASK_DECODER,
        inputs=(
            *_features(c.hidden_dim, c.image_size),
            TensorSpec(POINT_COORDS, "float32", ("P", "N", 2)),
            TensorSpec(POINT_LABELS, "int32", ("P", "N")),
            TensorSpec(MASK_INPUT, "float32", ("P", 1, m, m)),
            TensorSpec(HAS_MASK_INPUT, "float32", ("P",)),
        ),
        outputs=(
            TensorSpec(MASKS, "float32", ("P", NUM_MASKS, m, m)),
            TensorSpec(IOU_SCORES, "float32", ("P", NUM_MASKS)),
            TensorSpec(OBJECT_SCORE_LOGITS, "float32", ("P", 1)),
        ),
        ranges={"P": (1, 1, MAX_PROMPTS), "N": (1, 2, MAX_POINTS)},
    )


def image_prepare(c: Sam2Constants) -> GraphSpec:
    """What clicks on one image share, from its features: `click_decoder`'s inputs without a mask prompt."""
    return GraphSpec(
        IMAGE_PREPARE,
        inputs=_features(c.hidden_dim, c.image_size),
        outputs=(*_prepared(c), *_fine(c)),
    )


def mask_prepare(c: Sam2Constants) -> GraphSpec:
    """What one mask prompt changes in it: the same tensors with `MASKED` before their names."""
    m, prepared = c.mask_size, _prepared(c)
    return GraphSpec(
        MASK_PREPARE,
        inputs=(*prepared, TensorSpec(MASK_INPUT, "float32", (1, 1, m, m))),
        outputs=tuple(TensorSpec(MASKED + t.name, t.dtype, t.dims) for t in prepared),
    )


def click_decoder(c: Sam2Constants) -> GraphSpec:
    """P prompts on what was prepared to four masks each; points and answers as in `mask_decoder`."""
    plain = mask_decoder(c)
    return GraphSpec(
        CLICK_DECODER,
        inputs=(*_prepared(c), *_fine(c), plain.tensor(POINT_COORDS), plain.tensor(POINT_LABELS)),
        outputs=plain.outputs,
        ranges={"P": (1, 1, MAX_PROMPTS), "N": (1, 2, MAX_CLICK_POINTS)},
    )


def click_graphs(c: Sam2Constants) -> dict[str, GraphSpec]:
    """`mask_decoder` once more, in three graphs for ONNX Runtime on a CPU, by name."""
    return {g.name: g for g in (image_prepare(c), mask_prepare(c), click_decoder(c))}


def graphs(c: Sam2Constants) -> dict[str, GraphSpec]:
    """Every graph that a bundle of the family must have, by name."""
    return {g.name: g for g in (image_encoder(c), mask_decoder(c))}


def _prepared(c: Sam2Constants) -> tuple[TensorSpec, ...]:
    """Of L = G * G pixels: features with the dense prompt, and what the first layer's attentions make of them."""
    d, cells = c.hidden_dim, c.embed_size**2
    return (
        TensorSpec(PIXELS, "float32", (1, cells, d)),
        TensorSpec(PIXEL_KEYS, "float32", (1, d // 2, cells)),
        TensorSpec(PIXEL_VALUES_0, "float32", (1, cells, d // 2)),
        TensorSpec(PIXEL_QUERIES, "float32", (1, cells, d // 2)),
    )


def _fine(c: Sam2Constants) -> tuple[TensorSpec, ...]:
    """`high_res_0` and `high_res_1` by cell of the grid above, with the biases of what they are added to."""
    d, cells = c.hidden_dim, c.embed_size**2
    return (
        TensorSpec(FINE_0, "float32", (1, 4 * cells, d // 2)),
        TensorSpec(FINE_1, "float32", (1, cells, d)),
    )


def _features(d: int, s: int) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(IMAGE_EMBED, "float32", (1, d, s // 16, s // 16)),
        TensorSpec(HIGH_RES_0, "float32", (1, d // 8, s // 4, s // 4)),
        TensorSpec(HIGH_RES_1, "float32", (1, d // 4, s // 8, s // 8)),
    )
