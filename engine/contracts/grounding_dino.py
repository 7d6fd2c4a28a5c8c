"""Contract of Grounding DINO: two graphs and their constants.

Source of the architecture: Liu et al., "Grounding DINO: Marrying DINO with Grounded Pre-Training for Open-Set Object
Detection" (2023), and transformers' ``models/grounding_dino``. A list of classes becomes one caption ("a cat. a remote
control."); text features depend on it alone and are kept by the engine. One image at a time, without padding, so no
pixel mask; the caption's masks and position ids are made outside the graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ContractError
from .base import POSITIVE_TRIPLE, TRIPLE, GraphSpec, Kind, TensorSpec, is_whole, read_constants

FAMILY = "grounding-dino"

TEXT_ENCODER = "text_encoder"
DETECTOR = "detector"

# text_encoder
INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
TEXT_SELF_ATTENTION_MASK = "text_self_attention_mask"
TEXT_FEATURES = "text_features"
# detector
PIXEL_VALUES = "pixel_values"
LOGITS = "logits"
BOXES = "boxes"
SELECTION_SCORES = "selection_scores"

TOKENIZER = "tokenizer.json"
"""Name of the bundle's tokeniser file."""

MIN_TOKENS = 4
"""Shortest caption: start, one token, dot, end."""
TYPICAL_TOKENS = 24
TOP_K_LIMIT = 3840
"""TensorRT's TopK takes fewer."""


@dataclass(frozen=True)
class GroundingDinoConstants:
    """Constants of one Grounding DINO checkpoint, stored in the manifest.

    Attributes:
        shortest_edge: The image's shorter side is resized to it, in pixels.
        longest_edge: Unless the longer side would then exceed this.
        mean: Per-channel RGB mean, on pixels scaled to 0..1.
        std: Per-channel RGB standard deviation.
        hidden_dim: Channels of text and image features.
        num_queries: Boxes per image.
        num_levels: Feature maps, each half the size of the one before.
        first_stride: Pixels per side of a place of the finest map, an even number.
        max_text_len: Most tokens of a caption, start and end included.
        start_token: Id of ``[CLS]``.
        end_token: Id of ``[SEP]``.
        dot_token: Id of ``.``, which ends each class.
        question_token: Id of ``?``, which splits a caption like the dot.
    """

    shortest_edge: int = 800
    longest_edge: int = 1333
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    hidden_dim: int = 256
    num_queries: int = 900
    num_levels: int = 4
    first_stride: int = 8
    max_text_len: int = 256
    start_token: int = 101
    end_token: int = 102
    dot_token: int = 1012
    question_token: int = 1029

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.shortest_edge <= self.longest_edge:
            problems.append(f"edges {self.shortest_edge} and {self.longest_edge} do not fit together")
        elif self.first_stride < 2 or self.first_stride % 2:
            problems.append(f"a finest stride of {self.first_stride} pixels is not an even number")
        elif self.places(self.shortest_edge, self.shortest_edge) < self.num_queries:
            problems.append(f"{self.num_queries} queries need an image of more than {self.shortest_edge} pixels a side")
        if not 0 < self.num_queries < TOP_K_LIMIT:
            problems.append(f"{self.num_queries} queries are not from 1 to {TOP_K_LIMIT - 1}")
        if self.max_text_len < MIN_TOKENS:
            problems.append(f"a caption of {self.max_text_len} tokens holds no class")
        if problems:
            raise ContractError(
                f"These Grounding DINO constants cannot be: {'; '.join(problems)}.",
                "Check the checkpoint's config.json and preprocessor_config.json.",
            )

    @property
    def special_tokens(self) -> tuple[int, int, int, int]:
        """Ids that split a caption into phrases."""
        return self.start_token, self.end_token, self.dot_token, self.question_token

    def places(self, height: int, width: int) -> int:
        """Places of all feature maps of an image of this size, among which the queries are chosen."""
        half = self.first_stride // 2
        count, rows, columns = 0, -(-height // half), -(-width // half)
        for _ in range(self.num_levels):
            rows, columns = -(-rows // 2), -(-columns // 2)
            count += rows * columns
        return count

    @property
    def min_edge(self) -> int:
        """Shortest side, beside one of `shortest_edge`, whose feature maps have a place for every query."""
        edge = self.first_stride
        while self.places(edge, self.shortest_edge) < self.num_queries:
            edge += self.first_stride
        return min(edge, self.shortest_edge)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GroundingDinoConstants:
        """Rebuilds the constants from the manifest, where every field must be; there are no defaults.

        Raises:
            ContractError: Unknown or missing keys, wrong types or lengths, values out of range.
        """
        whole = (is_whole, "a whole number, 0 or more")
        kinds: dict[str, Kind] = dict.fromkeys(cls.__dataclass_fields__, whole)
        kinds["mean"] = TRIPLE
        kinds["std"] = POSITIVE_TRIPLE
        return cls(**read_constants("Grounding DINO", values, kinds))


def text_encoder(c: GroundingDinoConstants) -> GraphSpec:
    """A caption of T tokens to its features; batch 1, no padding.

    `text_self_attention_mask` is 1 where the token of the row looks at that of the column, 0 elsewhere: tokens see
    their own phrase only. `position_ids` count from the start of each phrase.
    """
    return GraphSpec(
        TEXT_ENCODER,
        inputs=(
            TensorSpec(INPUT_IDS, "int32", (1, "T")),
            TensorSpec(POSITION_IDS, "int32", (1, "T")),
            TensorSpec(TEXT_SELF_ATTENTION_MASK, "float32", (1, "T", "T")),
        ),
        outputs=(TensorSpec(TEXT_FEATURES, "float32", (1, "T", c.hidden_dim)),),
        ranges={"T": _tokens(c)},
    )


def detector(c: GroundingDinoConstants) -> GraphSpec:
    """One image and text features to a logit per query and token, and a box per query.

    `pixel_values` is any image of the family's resize, unpadded. `logits` covers the caption's own tokens: upstream's
    padding with minus infinity up to `max_text_len` is left out. `boxes` are centre x, centre y, width and height in
    0..1 of the image. Queries are in the order of their selection score, which `selection_scores` holds: where two of
    them nearly tie, another runtime may swap the two queries, and then both answer from another place. Two profiles:
    wide and tall images.
    """
    low, short, long = c.min_edge, c.shortest_edge, c.longest_edge
    usual = min(long, round(short * 4 / 3))
    tokens = _tokens(c)
    return GraphSpec(
        DETECTOR,
        inputs=(
            TensorSpec(PIXEL_VALUES, "float32", (1, 3, "H", "W")),
            TensorSpec(TEXT_FEATURES, "float32", (1, "T", c.hidden_dim)),
            TensorSpec(POSITION_IDS, "int32", (1, "T")),
            TensorSpec(TEXT_SELF_ATTENTION_MASK, "float32", (1, "T", "T")),
        ),
        outputs=(
            TensorSpec(LOGITS, "float32", (1, c.num_queries, "T")),
            TensorSpec(BOXES, "float32", (1, c.num_queries, 4)),
            TensorSpec(SELECTION_SCORES, "float32", (1, c.num_queries)),
        ),
        ranges={"H": (low, short, long), "W": (low, usual, long), "T": tokens},
        profiles=(
            {"H": (low, short, short), "W": (short, usual, long), "T": tokens},
            {"H": (short, usual, long), "W": (low, short, short), "T": tokens},
        ),
    )


def graphs(c: GroundingDinoConstants) -> dict[str, GraphSpec]:
    """Every graph of the family, by name."""
    return {g.name: g for g in (text_encoder(c), detector(c))}


def family_graphs(values: Mapping[str, Any]) -> dict[str, GraphSpec]:
    """Every graph of a bundle, by name, from the manifest's constants.

    Raises:
        ContractError: See `GroundingDinoConstants.from_dict`.
    """
    return graphs(GroundingDinoConstants.from_dict(values))


def _tokens(c: GroundingDinoConstants) -> tuple[int, int, int]:
    return MIN_TOKENS, min(TYPICAL_TOKENS, c.max_text_len), c.max_text_len
