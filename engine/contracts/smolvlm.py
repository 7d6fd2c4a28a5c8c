"""Contract of SmolVLM, SmolVLM2 and Idefics3: three graphs and their constants.

An image becomes square tiles and, where it was split, a reduced copy of the whole; each tile becomes L features, which
take the places of L image tokens in the prompt. Source of the architecture: Laurençon et al., "Building and better
understanding vision-language models" (Idefics3, 2024), Marafioti et al., "SmolVLM" (2025), transformers'
``models/idefics3`` and ``models/smolvlm``.

The text around the tiles of one image (R rows, C columns of tiles, L image tokens each), by transformers'
``processing_idefics3.py``:

* split: for each row the tiles ``fake row_r_col_c image*L`` from left to right, then a line break; after the last row
  another line break and ``fake global image*L fake``, the global copy being the last tile;
* not split (R = C = 0): ``fake global image*L fake``.

Rows and columns count from 1 in `SmolVlmConstants.tile_token`. The graphs take full square tiles alone: transformers'
image processors resize to whole tiles, so a padded one appears only between images of a batch, which are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ContractError
from . import decoder as decoders
from .base import POSITIVE_TRIPLE, TRIPLE, GraphSpec, Kind, TensorSpec, is_whole, read_constants
from .decoder import DEFAULT_ROPE, ONNX, DecoderConstants

FAMILY = "smolvlm"
"""Idefics3, SmolVLM and SmolVLM2; they differ in nothing that the graphs or the engine see."""

VISION_ENCODER = "vision_encoder"

# vision_encoder
PIXEL_VALUES = "pixel_values"
FEATURES = "features"

MAX_TILES = 64
"""Most tiles of one run of the vision encoder; more take several runs."""
TYPICAL_TILES = 1
RESAMPLES = ("nearest", "lanczos", "bilinear", "bicubic")
"""Names of PIL's filters 0 to 3, as a processor's ``resample`` numbers them."""
MAX_SIDE = 4096
"""transformers' processor never resizes to more than this, whatever `longest_edge` says."""


@dataclass(frozen=True)
class SmolVlmConstants:
    """Constants of one checkpoint, stored in the manifest.

    Attributes:
        decoder: Of the language model.
        image_size: Side of a tile in pixels.
        patch_size: Side of the patches.
        scale_factor: Patches per side that pixel shuffle joins into one feature.
        image_seq_len: L, features and image tokens per tile: ``(image_size // patch_size / scale_factor) ** 2``.
        longest_edge: The image's longer side is resized to it first, whether it was longer or shorter.
        split: Whether images are split into tiles at all; False: one tile, squeezed to a square.
        resample: Filter of every resize, of `RESAMPLES`.
        rescale: Pixels 0..255 are multiplied by it before `mean` and `std`.
        mean: Per-channel RGB mean after rescaling.
        std: Per-channel RGB standard deviation.
        image_token: Text of the image token.
        image_token_id: Its id.
        fake_token: Text of the token around images.
        global_token: Text of the token before the reduced copy of the whole.
        tile_token: Text of the token before a tile, with ``{row}`` and ``{col}``.
    """

    decoder: DecoderConstants
    image_size: int
    patch_size: int
    scale_factor: int
    image_seq_len: int
    longest_edge: int
    split: bool
    resample: str
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_token: str
    image_token_id: int
    fake_token: str
    global_token: str
    tile_token: str = "<row_{row}_col_{col}>"

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.patch_size <= self.image_size:
            problems.append(f"patches of {self.patch_size} do not fit into a tile of {self.image_size} pixels")
        elif self.scale_factor < 1 or self.grid % self.scale_factor:
            problems.append(f"{self.grid} patches per side cannot be joined {self.scale_factor} by {self.scale_factor}")
        elif self.image_seq_len != (self.grid // self.scale_factor) ** 2:
            expected = (self.grid // self.scale_factor) ** 2
            problems.append(f"{self.image_seq_len} image tokens per tile, where the graph gives {expected} features")
        if not 0 <= self.image_token_id < self.decoder.vocab_size:
            problems.append(f"image token {self.image_token_id} is outside the vocabulary")
        if self.longest_edge < 1:
            problems.append(f"images cannot be resized to {self.longest_edge} pixels")
        if self.decoder.rope != DEFAULT_ROPE:
            problems.append(f"rope '{self.decoder.rope}'")
        if problems:
            raise ContractError(f"These SmolVLM constants cannot be: {'; '.join(problems)}.", "Check the config.json.")

    @property
    def grid(self) -> int:
        """Patches per side of a tile."""
        return self.image_size // self.patch_size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SmolVlmConstants:
        """Rebuilds the constants from the manifest, where every field must be; there are no defaults.

        Raises:
            ContractError: Unknown or missing keys, wrong types or lengths, values out of range.
        """
        kinds: dict[str, Kind] = dict.fromkeys(cls.__dataclass_fields__, (is_whole, "a whole number, 0 or more"))
        kinds["decoder"] = (lambda v: isinstance(v, Mapping), "the decoder's constants")
        kinds["split"] = (lambda v: isinstance(v, bool), "true or false")
        kinds["resample"] = (lambda v: v in RESAMPLES, f"one of {', '.join(RESAMPLES)}")
        kinds["rescale"] = (lambda v: isinstance(v, float) and 0 < v <= 1, "a number above 0, up to 1")
        kinds["mean"] = TRIPLE
        kinds["std"] = POSITIVE_TRIPLE
        for key in ("image_token", "fake_token", "global_token"):
            kinds[key] = (lambda v: isinstance(v, str) and bool(v), "text")
        kinds["tile_token"] = (
            lambda v: isinstance(v, str) and "{row}" in v and "{col}" in v,
            "text with {row} and {col}",
        )
        known = read_constants("SmolVLM", values, kinds)
        return cls(**{**known, "decoder": DecoderConstants.from_dict(known["decoder"])})


def vision_encoder(c: SmolVlmConstants) -> GraphSpec:
    """T normalised tiles to L features each, with the decoder's channels: encoder, pixel shuffle and connector."""
    return GraphSpec(
        VISION_ENCODER,
        inputs=(TensorSpec(PIXEL_VALUES, "float32", ("T", 3, c.image_size, c.image_size)),),
        outputs=(TensorSpec(FEATURES, "float32", ("T", c.image_seq_len, c.decoder.hidden_size)),),
        ranges={"T": (1, TYPICAL_TILES, MAX_TILES)},
    )


def graphs(c: SmolVlmConstants, cache_dtype: str = "float32", target: str = ONNX) -> dict[str, GraphSpec]:
    """Every graph of the family, by name; the decoder's differs by precision and target, see `contracts.decoder`."""
    return {
        g.name: g
        for g in (
            vision_encoder(c),
            decoders.embed_tokens(c.decoder),
            decoders.decoder(c.decoder, cache_dtype, target),
        )
    }


def family_graphs(constants: Mapping[str, Any], precision: str = "fp32", target: str = ONNX) -> dict[str, GraphSpec]:
    """Every graph that a manifest's constants describe, as variants of a precision and target have it.

    Raises:
        ContractError: The constants do not fit.
    """
    return graphs(SmolVlmConstants.from_dict(constants), decoders.CACHE_DTYPES[precision], target)
