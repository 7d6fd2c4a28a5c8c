"""Contract of OWLv2 and OWL-ViT: two graphs and their constants.

Source of the architecture: Minderer et al., "Simple Open-Vocabulary Object Detection with Vision Transformers" (2022)
and "Scaling Open-Vocabulary Object Detection" (2023), upstream ``scenic/projects/owl_vit``, and transformers'
``models/owlv2`` and ``models/owlvit``. Every image token answers with one box and one class embedding; a class is a
text embedding, so text features depend on the class names alone. Scores are cosines, shifted and scaled per box:
``sigmoid((cosine + logit_shift) * logit_scale)``, computed on the host for any number of classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ContractError
from .base import POSITIVE_TRIPLE, TRIPLE, GraphSpec, Kind, TensorSpec, is_whole, read_constants

OWLV2 = "owlv2"
OWLVIT = "owlvit"
FAMILIES = (OWLV2, OWLVIT)

IMAGE_ENCODER = "image_encoder"
TEXT_ENCODER = "text_encoder"

# image_encoder
PIXEL_VALUES = "pixel_values"
BOXES = "boxes"
CLASS_EMBEDS = "class_embeds"
LOGIT_SHIFT = "logit_shift"
LOGIT_SCALE = "logit_scale"
OBJECTNESS = "objectness"
# text_encoder
INPUT_IDS = "input_ids"
TEXT_EMBEDS = "text_embeds"

TOKENIZER = "tokenizer.json"
"""Name of the bundle's tokeniser file."""

CHUNK = 64
"""Most class names of one run of the text encoder; longer lists take several runs."""
TYPICAL_CLASSES = 8

PADDED_SQUARE = "padded-square"
BICUBIC_SQUARE = "bicubic-square"
RESIZES = {OWLV2: PADDED_SQUARE, OWLVIT: BICUBIC_SQUARE}
"""How each family makes its square input; see `Preprocess.resize` in the manifest."""


@dataclass(frozen=True)
class OwlConstants:
    """Constants of one checkpoint, stored in the manifest.

    Attributes:
        family: ``owlv2`` or ``owlvit``: which resize, which scale of the boxes, objectness or not.
        image_size: Side of the square model input in pixels.
        patch_size: Side of the patches, one box each.
        embed_dim: Channels of class and text embeddings.
        mean: Per-channel RGB mean, on pixels scaled to 0..1.
        std: Per-channel RGB standard deviation.
        max_tokens: Tokens of a class name, start and end included; shorter ones are padded to it.
        pad_token: Id of the padding.
        end_token: Id of the end of text, where the text is pooled; the largest id of the vocabulary.
    """

    family: str = OWLV2
    image_size: int = 960
    patch_size: int = 16
    embed_dim: int = 512
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    max_tokens: int = 16
    pad_token: int = 0
    end_token: int = 49407

    def __post_init__(self) -> None:
        problems = []
        if self.family not in FAMILIES:
            problems.append(f"'{self.family}' is none of {', '.join(FAMILIES)}")
        if not 0 < self.patch_size <= self.image_size:
            problems.append(f"patches of {self.patch_size} do not fit into an image of {self.image_size} pixels")
        if self.max_tokens < 3:
            problems.append(f"{self.max_tokens} tokens hold no class name")
        if problems:
            raise ContractError(f"These OWL constants cannot be: {'; '.join(problems)}.", "Check the config.json.")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def queries(self) -> int:
        """Boxes per image."""
        return self.grid * self.grid

    @property
    def objectness(self) -> bool:
        """Whether each box has a score of its own for being an object at all."""
        return self.family == OWLV2

    @property
    def resize(self) -> str:
        return RESIZES[self.family]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OwlConstants:
        """Rebuilds the constants from the manifest, where every field must be; there are no defaults.

        Raises:
            ContractError: Unknown or missing keys, wrong types or lengths, values out of range.
        """
        kinds: dict[str, Kind] = dict.fromkeys(cls.__dataclass_fields__, (is_whole, "a whole number, 0 or more"))
        kinds["family"] = (lambda v: v in FAMILIES, f"one of {', '.join(FAMILIES)}")
        kinds["embed_dim"] = (lambda v: is_whole(v) and v > 0, "a whole number above 0")
        kinds["mean"] = TRIPLE
        kinds["std"] = POSITIVE_TRIPLE
        return cls(**read_constants("OWL", values, kinds))


def image_encoder(c: OwlConstants) -> GraphSpec:
    """Normalised pixels to Q boxes and what is needed to score them; batch 1, no text.

    `boxes` are centre x, centre y, width and height in 0..1 of the square input. `class_embeds` are not normalised:
    the choice of an embedding from an example image looks at their lengths. `logit_scale` is positive. `objectness`
    are logits, of OWLv2 alone.
    """
    q = c.queries
    outputs: tuple[TensorSpec, ...] = (
        TensorSpec(BOXES, "float32", (1, q, 4)),
        TensorSpec(CLASS_EMBEDS, "float32", (1, q, c.embed_dim)),
        TensorSpec(LOGIT_SHIFT, "float32", (1, q, 1)),
        TensorSpec(LOGIT_SCALE, "float32", (1, q, 1)),
    )
    if c.objectness:
        outputs = (*outputs, TensorSpec(OBJECTNESS, "float32", (1, q)))
    return GraphSpec(
        IMAGE_ENCODER,
        inputs=(TensorSpec(PIXEL_VALUES, "float32", (1, 3, c.image_size, c.image_size)),),
        outputs=outputs,
    )


def text_encoder(c: OwlConstants) -> GraphSpec:
    """C class names to unit vectors.

    There is no attention mask: a token sees those before it and the text is pooled at its first end token, so that
    what comes after, the padding, has no influence.
    """
    return GraphSpec(
        TEXT_ENCODER,
        inputs=(TensorSpec(INPUT_IDS, "int32", ("C", c.max_tokens)),),
        outputs=(TensorSpec(TEXT_EMBEDS, "float32", ("C", c.embed_dim)),),
        ranges={"C": (1, TYPICAL_CLASSES, CHUNK)},
    )


def graphs(c: OwlConstants) -> dict[str, GraphSpec]:
    """Every graph of the family, by name."""
    return {g.name: g for g in (image_encoder(c), text_encoder(c))}


def family_graphs(constants: Mapping[str, Any]) -> dict[str, GraphSpec]:
    """Every graph that a manifest's constants describe; raises ContractError when they do not fit."""
    return graphs(OwlConstants.from_dict(constants))
