"""Contract of SAM 2 / SAM 2.1 video tracking: three graphs beside those of `contracts.sam2`, and their constants.

One frame of one object is: `sam2.image_encoder` once per frame, `memory_attention` on the object's memory bank (or the
plain embedding on a frame without memory), `track_decoder`, `memory_encoder`. Which memories and pointers enter is host
work (`engine/models`); the graphs see them as stacked tensors.

Source: Ravi et al., "SAM 2" (2024), upstream ``sam2/modeling/sam2_base.py`` and transformers'
``models/sam2_video/modeling_sam2_video.py``, whose `Sam2VideoModel` the graphs are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ContractError
from . import sam2
from .base import GraphSpec, TensorSpec

MEMORY_ATTENTION = "memory_attention"
TRACK_DECODER = "track_decoder"
MEMORY_ENCODER = "memory_encoder"

# memory_attention
MEMORY = "memory"
MEMORY_TIME = "memory_time"
POINTERS = "pointers"
POINTER_TIME = "pointer_time"
TRACKED_EMBED = "tracked_embed"
# track_decoder
SKIP_NO_MEMORY = "skip_no_memory"
MASK_TOKENS = "mask_tokens"
# memory_encoder
MASK_LOGITS = "mask_logits"
BINARIZE = "binarize"
MASK_TOKEN = "mask_token"
POINTER_SCORE_LOGITS = "pointer_score_logits"
MEMORY_FEATURES = "memory_features"
OBJECT_POINTER = "object_pointer"

MAX_OBJECTS = 64
"""Objects in one call; more are split."""
MAX_MEMORIES = 64
"""Memory maps of one object in one call: conditioning frames and recent ones."""
MAX_POINTERS = 128
MAX_ATTENTION = 1 << 28
"""Attention weights of one call, objects times image tokens times keys, that callers of the memory attention stay below
by splitting objects; a single object may have more."""

OCCLUDED_LOGIT = -1024.0
"""Every mask logit of an object that is judged absent (upstream ``NO_OBJ_SCORE``)."""


@dataclass(frozen=True)
class Sam2VideoConstants:
    """Constants of one checkpoint that the tracker on the host follows.

    Attributes:
        memory_dim: Channels of a memory map.
        num_memories: Memory maps of recent frames, the conditioning frame counted as one (upstream ``num_maskmem``).
        max_pointers: Object pointers that enter the attention (``max_obj_ptrs_in_encoder``); also the divisor of their
            temporal code.
        max_cond_frames: Most conditioning frames attended to, the closest ones; -1 for all of them.
        multimask_min_points: Fewest points of a prompt that is answered with the best of three masks.
        multimask_max_points: Most points of such a prompt; a box counts as two.
        multimask_in_sam: Whether three masks are ever asked for.
        multimask_for_tracking: Whether they are asked for on frames without a first prompt.
        mask_kernel: The 4x4 convolution (row by row) and its bias that shrink a mask given as a prompt.
    """

    memory_dim: int
    num_memories: int
    max_pointers: int
    max_cond_frames: int
    multimask_min_points: int
    multimask_max_points: int
    multimask_in_sam: bool
    multimask_for_tracking: bool
    mask_kernel: tuple[float, ...]

    def __post_init__(self) -> None:
        counts = (self.memory_dim, self.num_memories, self.max_pointers)
        if min(counts) < 1 or self.num_memories > MAX_MEMORIES or len(self.mask_kernel) != 17:
            raise ContractError(
                f"The SAM 2 video constants do not fit: {asdict(self)}.",
                "Export the bundle again with this version of pixano-edge.",
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Sam2VideoConstants:
        """Rebuilds the constants from the manifest; raises ContractError on missing, unknown or mistyped ones."""
        kinds: dict[str, type | tuple[type, ...]] = {
            f.name: bool if f.type == "bool" else (list, tuple) if f.name == "mask_kernel" else int for f in fields(cls)
        }
        wrong = sorted(
            (kinds.keys() ^ values.keys())
            | {k for k, v in values.items() if k in kinds and not isinstance(v, kinds[k])}
            | {k for k, v in values.items() if isinstance(v, bool) and kinds.get(k) is int}
        )
        if wrong:
            raise ContractError(
                f"The SAM 2 video constants in the manifest are missing, unknown or of another type: {wrong}.",
                "Export the bundle again with this version of pixano-edge.",
            )
        kernel = tuple(float(x) for x in values["mask_kernel"])
        return cls(**{**values, "mask_kernel": kernel})


def constants_of(constants: Mapping[str, Any]) -> Sam2VideoConstants | None:
    """The constants of tracking in a manifest's constants; None where the bundle does not track.

    Raises:
        ContractError: They are there and do not fit.
    """
    values = constants.get(sam2.VIDEO)
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise ContractError(
            f"The SAM 2 video constants in the manifest are no object: {values!r}.",
            "Export the bundle again with this version of pixano-edge.",
        )
    return Sam2VideoConstants.from_dict(dict(values))


def memory_attention(c: sam2.Sam2Constants, v: Sam2VideoConstants) -> GraphSpec:
    """Conditions one frame's embedding on the memories of B objects, which have equal numbers of them.

    `image_embed` is the image encoder's, the no-memory embedding inside it is taken off again. `memory_time` is the row
    of the temporal table: frames back minus 1, and ``num_memories - 1`` for a conditioning frame. `pointer_time` is
    frames back divided by ``pointers allowed - 1``. Memories are ordered as upstream does; the order does not matter
    to the result beyond rounding.
    """
    d, g = c.hidden_dim, c.embed_size
    return GraphSpec(
        MEMORY_ATTENTION,
        inputs=(
            TensorSpec(sam2.IMAGE_EMBED, "float32", (1, d, g, g)),
            TensorSpec(MEMORY, "float32", ("B", "M", v.memory_dim, g, g)),
            TensorSpec(MEMORY_TIME, "int32", ("B", "M")),
            TensorSpec(POINTERS, "float32", ("B", "K", d)),
            TensorSpec(POINTER_TIME, "float32", ("B", "K")),
        ),
        outputs=(TensorSpec(TRACKED_EMBED, "float32", ("B", d, g, g)),),
        ranges={
            "B": (1, 1, MAX_OBJECTS),
            "M": (1, v.num_memories, MAX_MEMORIES),
            "K": (0, v.max_pointers, MAX_POINTERS),
        },
        profiles=_attention_profiles(c, v),
    )


def _attention_profiles(c: sam2.Sam2Constants, v: Sam2VideoConstants) -> tuple[dict[str, tuple[int, int, int]], ...]:
    """Profiles for B * M objects and memories that `MAX_ATTENTION` allows; none where it allows the whole range.

    Memories are grouped by powers of two, each group with the objects that its smallest number allows; groups that
    allow equally many objects are one.
    """
    most = MAX_ATTENTION // c.embed_size**4
    groups: dict[int, int] = {}  # objects: memories
    memories = 1
    while memories <= MAX_MEMORIES:
        groups[min(MAX_OBJECTS, max(1, most // (memories // 2 + 1)))] = memories
        memories *= 2
    if len(groups) == 1:
        return ()
    return tuple(
        {
            "B": (1, 1 if high >= v.num_memories else max(1, math.isqrt(objects)), objects),
            "M": (1, min(high, v.num_memories), high),
            "K": (0, v.max_pointers, MAX_POINTERS),
        }
        for objects, high in groups.items()
    )


def track_decoder(c: sam2.Sam2Constants) -> GraphSpec:
    """`sam2.mask_decoder` with an embedding for each of the P objects, and the tokens that pointers are made of.

    Where `skip_no_memory` is 1 the embedding is an image encoder's, and the no-memory embedding is taken off again: the
    pointer of a mask given as a prompt is made from plain features.
    """
    image = sam2.mask_decoder(c)
    d, g = c.hidden_dim, c.embed_size
    return GraphSpec(
        TRACK_DECODER,
        inputs=(
            TensorSpec(TRACKED_EMBED, "float32", ("P", d, g, g)),
            *image.inputs[1:],
            TensorSpec(SKIP_NO_MEMORY, "float32", ("P",)),
        ),
        outputs=(*image.outputs, TensorSpec(MASK_TOKENS, "float32", ("P", sam2.NUM_MASKS, d))),
        ranges={**image.ranges, "P": (1, 1, MAX_OBJECTS)},
    )


def memory_encoder(c: sam2.Sam2Constants, v: Sam2VideoConstants) -> GraphSpec:
    """What B objects of one frame leave behind: a memory map and an object pointer each.

    `mask_logits` are the chosen masks, (H, W) from ``mask_size`` to ``image_size``; the graph resizes them to
    ``image_size``, sets them to `OCCLUDED_LOGIT` where `object_score_logits` is not above 0, and applies the sigmoid
    or, where `binarize` is 1, the threshold, then upstream's scale and bias. `mask_token` is the chosen mask's token.
    `pointer_score_logits` is the decoder's object score: the same as `object_score_logits` but for a mask given as a
    prompt. `memory_features` are rounded to bfloat16 as upstream stores them, and float32 here.
    """
    d, g = c.hidden_dim, c.embed_size
    return GraphSpec(
        MEMORY_ENCODER,
        inputs=(
            TensorSpec(sam2.IMAGE_EMBED, "float32", (1, d, g, g)),
            TensorSpec(MASK_LOGITS, "float32", ("B", 1, "H", "W")),
            TensorSpec(sam2.OBJECT_SCORE_LOGITS, "float32", ("B", 1)),
            TensorSpec(BINARIZE, "float32", ("B",)),
            TensorSpec(MASK_TOKEN, "float32", ("B", d)),
            TensorSpec(POINTER_SCORE_LOGITS, "float32", ("B", 1)),
        ),
        outputs=(
            TensorSpec(MEMORY_FEATURES, "float32", ("B", v.memory_dim, g, g)),
            TensorSpec(OBJECT_POINTER, "float32", ("B", d)),
        ),
        ranges={
            "B": (1, 1, MAX_OBJECTS),
            "H": (c.mask_size, c.mask_size, c.image_size),
            "W": (c.mask_size, c.mask_size, c.image_size),
        },
    )


def family_graphs(constants: Mapping[str, Any]) -> dict[str, GraphSpec]:
    """Every graph of a bundle by name, for its manifest's constants: of images, and of tracking where it tracks.

    Raises:
        ContractError: The constants do not fit.
    """
    image, video = sam2.Sam2Constants.from_dict(constants), constants_of(constants)
    return sam2.graphs(image) | (graphs(image, video) if video is not None else {})


def cpu_graphs(constants: Mapping[str, Any]) -> dict[str, GraphSpec]:
    """Graphs by name that a bundle may have once more for ONNX Runtime on a CPU, for its manifest's constants.

    Raises:
        ContractError: The constants do not fit.
    """
    return family_graphs(constants) | sam2.click_graphs(sam2.Sam2Constants.from_dict(constants))


def graphs(c: sam2.Sam2Constants, v: Sam2VideoConstants) -> dict[str, GraphSpec]:
    """The graphs that tracking adds, by name."""
    return {g.name: g for g in (memory_attention(c, v), track_decoder(c), memory_encoder(c, v))}
