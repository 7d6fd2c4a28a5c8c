"""Contract of Qwen2.5-VL: three graphs and their constants. One vision graph serves images of every size.

Source of the architecture: Bai et al., "Qwen2.5-VL Technical Report" (2025), transformers' ``models/qwen2_5_vl``.

An image is resized so that both sides are multiples of ``patch_size * merge_size``, and cut into patches; squares of
``merge_size`` patches a side become one feature each, a unit. Most layers of the vision encoder attend within windows
of ``window_units`` units a side, the others over the whole image. The graph's first dimension are windows: the function
`window_units` says which unit lies where, and windows at the right and lower edge are filled up with units that `VALID`
marks as absent. So no index enters the graph, and attention within windows is a batch.

In the prompt an image is ``units`` image tokens between the two vision tokens that the chat template writes. Rotary
positions of text count on in all three rows; an image's are (start, start + row, start + column) of its units, and the
text after it goes on at start + max(rows, columns). See `decoder` for the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ContractError
from . import decoder as decoders
from .base import POSITIVE_TRIPLE, TRIPLE, GraphSpec, Kind, TensorSpec, is_whole, read_constants
from .decoder import MROPE, ONNX, DecoderConstants
from .smolvlm import RESAMPLES

FAMILY = "qwen2_5_vl"

VISION_ENCODER = "vision_encoder"

# vision_encoder
PIXEL_VALUES = "pixel_values"
PATCH_POSITIONS = "patch_positions"
VALID = "valid"
FEATURES = "features"

MAX_WINDOWS = 128
"""Most windows of one image; the layers that see all of it compare every patch with every other."""
TYPICAL_WINDOWS = 24
MAX_GRID = 4096
"""Most patches along a side."""
MAX_RATIO = 200
"""Longer side over shorter one; transformers' processor refuses more."""
MAX_PIXELS = 1280 * 28 * 28
"""Most pixels of an image after resizing, whatever the checkpoint's settings allow (1280 features)."""


@dataclass(frozen=True)
class QwenVlConstants:
    """Constants of one checkpoint, stored in the manifest.

    Attributes:
        decoder: Of the language model.
        patch_size: Side of the patches in pixels.
        temporal_patch_size: Frames that a patch takes in; an image is repeated so often.
        merge_size: Patches per side of a unit, which becomes one feature and one image token.
        window_units: Units per side of a window.
        min_pixels: Fewest pixels of an image after resizing.
        max_pixels: Most pixels of an image after resizing.
        resample: Filter of the resize, of `smolvlm.RESAMPLES`.
        rescale: Pixels 0..255 are multiplied by it before `mean` and `std`.
        mean: Per-channel RGB mean after rescaling.
        std: Per-channel RGB standard deviation.
        image_token: Text of the image token.
        image_token_id: Its id.
    """

    decoder: DecoderConstants
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    window_units: int
    min_pixels: int
    max_pixels: int
    resample: str
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_token: str
    image_token_id: int

    def __post_init__(self) -> None:
        problems = []
        sizes = (self.patch_size, self.temporal_patch_size, self.merge_size, self.window_units)
        if min(sizes) < 1:
            problems.append("sizes of patches, units and windows must be above 0")
        elif not self.factor**2 <= self.max_pixels or not self.min_pixels <= self.max_pixels:
            problems.append(f"images of {self.min_pixels} to {self.max_pixels} pixels cannot be cut")
        if not 0 <= self.image_token_id < self.decoder.vocab_size:
            problems.append(f"image token {self.image_token_id} is outside the vocabulary")
        if self.decoder.rope != MROPE:
            problems.append(f"rope '{self.decoder.rope}'")
        if problems:
            raise ContractError(
                f"These Qwen2.5-VL constants cannot be: {'; '.join(problems)}.", "Check the config.json."
            )

    @property
    def factor(self) -> int:
        """Both sides of a resized image are multiples of it, in pixels."""
        return self.patch_size * self.merge_size

    @property
    def patch_channels(self) -> int:
        """Values of one patch: (channel, frame, row, column), flattened in this order."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def units_per_window(self) -> int:
        return self.window_units**2

    @property
    def patches_per_window(self) -> int:
        return self.units_per_window * self.merge_size**2

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QwenVlConstants:
        """Rebuilds the constants from the manifest, where every field must be; there are no defaults.

        Raises:
            ContractError: Unknown or missing keys, wrong types or lengths, values out of range.
        """
        kinds: dict[str, Kind] = dict.fromkeys(cls.__dataclass_fields__, (is_whole, "a whole number, 0 or more"))
        kinds["decoder"] = (lambda v: isinstance(v, Mapping), "the decoder's constants")
        kinds["resample"] = (lambda v: v in RESAMPLES, f"one of {', '.join(RESAMPLES)}")
        kinds["rescale"] = (lambda v: isinstance(v, float) and 0 < v <= 1, "a number above 0, up to 1")
        kinds["mean"] = TRIPLE
        kinds["std"] = POSITIVE_TRIPLE
        kinds["image_token"] = (lambda v: isinstance(v, str) and bool(v), "text")
        known = read_constants("Qwen2.5-VL", values, kinds)
        return cls(**{**known, "decoder": DecoderConstants.from_dict(known["decoder"])})


def window_units(rows: int, columns: int, side: int) -> npt.NDArray[np.int64]:
    """Which unit lies where in the windows of an image.

    Args:
        rows: Units from top to bottom.
        columns: Units from left to right.
        side: Units per side of a window.

    Returns:
        (W, side * side) numbers of units, row by row of the image; -1 where a window reaches beyond it. Windows, and
        units within them, go row by row.
    """
    high, wide = -(-rows // side), -(-columns // side)
    units = np.full((high * side, wide * side), -1, np.int64)
    units[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    return np.ascontiguousarray(units.reshape(high, side, wide, side).swapaxes(1, 2)).reshape(high * wide, side * side)


def vision_encoder(c: QwenVlConstants) -> GraphSpec:
    """The W windows of one image to the features of their units, with the decoder's channels.

    Patches of a unit lie side by side, row by row; units as `window_units` says. `patch_positions` are each patch's row
    and column in the image's grid of patches. `valid` is 1 for patches of the image and 0 for those that fill up, whose
    pixels and positions may be anything finite (0) and whose features mean nothing. At least one patch of every window
    is valid.
    """
    count = c.patches_per_window
    return GraphSpec(
        VISION_ENCODER,
        inputs=(
            TensorSpec(PIXEL_VALUES, "float32", ("W", count, c.patch_channels)),
            TensorSpec(PATCH_POSITIONS, "int32", ("W", count, 2)),
            TensorSpec(VALID, "float32", ("W", count)),
        ),
        outputs=(TensorSpec(FEATURES, "float32", ("W", c.units_per_window, c.decoder.hidden_size)),),
        ranges={"W": (1, TYPICAL_WINDOWS, MAX_WINDOWS)},
    )


def graphs(c: QwenVlConstants, cache_dtype: str = "float32", target: str = ONNX) -> dict[str, GraphSpec]:
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
    return graphs(QwenVlConstants.from_dict(constants), decoders.CACHE_DTYPES[precision], target)
