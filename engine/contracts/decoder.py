"""Contract of a causal language decoder with a KV cache: one graph that serves prefill and single steps, any family.

One graph, not two: no node looks at whether a prompt or a single token comes in, so a second file would hold the same
nodes, and a second session its own packed copy of the weights (docs/vlm-graphs.md has the figures).

The graph exists for two targets, which differ in how the cache is kept:

``onnx``
    The cache is one buffer per tensor, ``(1, kv_heads, C, head_dim)`` with C slots chosen when it is allocated. It is
    bound as ``past_*`` **and** as the ``present_*`` of the same layer; the graph writes the S new slots in place and
    leaves the others alone, so nothing is copied or moved per token. What lies beyond the written slots is never read.
    Bound to different buffers, ``present_*`` is a full copy with the new slots added. ``seqlens_k`` is P + S - 1, where
    P slots are filled and S tokens come in: the last filled slot after this run. P is any number, so that a prompt may
    be continued after a prefix that is in the cache already, and S any number from 1.
``tensorrt``
    Plain operators, whose output cannot be its input: ``past_*`` has exactly the P filled slots (P may be 0),
    ``present_*`` the P + S slots afterwards. The caller keeps two buffers and alternates. ``cache_position`` are the
    slots of the S tokens, P to P + S - 1.

Rotary embedding: with ``rope == "default"`` a token's position is its slot. With ``rope == "mrope"`` (Qwen2-VL:
temporal, height, width; Wang et al., "Qwen2-VL", 2024) positions are an input of three rows and differ from the slot
after an image. Keys are stored rotated.

Architecture: Touvron et al., "LLaMA" (2023), grouped heads from Ainslie et al., "GQA" (2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ContractError
from .base import GraphSpec, Kind, TensorSpec, is_whole, read_constants

DECODER = "decoder"
EMBED_TOKENS = "embed_tokens"

# embed_tokens
INPUT_IDS = "input_ids"
EMBEDS = "embeds"
# decoder
INPUTS_EMBEDS = "inputs_embeds"
SEQLENS_K = "seqlens_k"
CACHE_POSITION = "cache_position"
POSITION_IDS = "position_ids"
LOGITS = "logits"

TOKENIZER = "tokenizer.json"
"""Name of the bundle's tokeniser file (the `tokenizers` library's format)."""
CHAT_TEMPLATE = "chat_template.jinja"
"""Name of the bundle's chat template file."""

ONNX = "onnx"
TENSORRT = "tensorrt"

DEFAULT_ROPE = "default"
MROPE = "mrope"
ROPES = (DEFAULT_ROPE, MROPE)
MROPE_AXES = 3
"""Rows of `POSITION_IDS`: temporal, height, width."""

TYPICAL_PROMPT = 256
TYPICAL_CACHE = 1024
CACHE_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "float32", "int8": "float32", "int4": "float32"}
"""Element type of the cache by the variant's precision. int4 has 4-bit weights and computes in fp32."""


def past_key(layer: int) -> str:
    return f"past_key.{layer}"


def past_value(layer: int) -> str:
    return f"past_value.{layer}"


def present_key(layer: int) -> str:
    return f"present_key.{layer}"


def present_value(layer: int) -> str:
    return f"present_value.{layer}"


@dataclass(frozen=True)
class DecoderConstants:
    """Constants of one decoder, part of its family's constants in the manifest.

    Attributes:
        layers: Decoder layers; each has a key and a value cache.
        heads: Query heads.
        kv_heads: Key and value heads; `heads` is a multiple.
        head_dim: Channels per head, even.
        hidden_size: Channels of `EMBEDS` and `INPUTS_EMBEDS`.
        vocab_size: Width of `LOGITS`; token ids are below it.
        max_length: Most tokens of prompt and answer together; longest cache.
        rope: ``default`` or ``mrope``.
        eos_ids: Tokens that end an answer, at least one.
        bos_id: Token that starts a text, or -1: none.
        pad_id: Padding, or -1: none.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_length: int
    rope: str
    eos_ids: tuple[int, ...]
    bos_id: int = -1
    pad_id: int = -1

    def __post_init__(self) -> None:
        problems = []
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            problems.append(f"{self.heads} heads cannot share {self.kv_heads} key heads")
        if self.head_dim % 2 or self.head_dim < 2:
            problems.append(f"heads of {self.head_dim} channels cannot be rotated in pairs")
        if min(self.layers, self.hidden_size, self.vocab_size, self.max_length) < 1:
            problems.append("layers, hidden_size, vocab_size and max_length must be above 0")
        if not self.eos_ids or not all(0 <= i < self.vocab_size for i in self.eos_ids):
            problems.append(f"eos_ids {list(self.eos_ids)} are not tokens of a vocabulary of {self.vocab_size}")
        if self.rope not in ROPES:
            problems.append(f"rope '{self.rope}' is none of {', '.join(ROPES)}")
        if problems:
            raise ContractError(f"These decoder constants cannot be: {'; '.join(problems)}.", "Check the config.json.")

    @property
    def cache_names(self) -> tuple[tuple[str, str], ...]:
        """Pairs of past and present tensor names, in graph order: key and value of layer 0, of layer 1, ..."""
        return tuple(
            pair
            for layer in range(self.layers)
            for pair in (
                (past_key(layer), present_key(layer)),
                (past_value(layer), present_value(layer)),
            )
        )

    def cache_shape(self, slots: int) -> tuple[int, int, int, int]:
        """Shape of one cache tensor with this many slots."""
        return (1, self.kv_heads, slots, self.head_dim)

    def cache_bytes(self, slots: int, dtype: str = "float32") -> int:
        """Bytes of all cache tensors together."""
        size = {"float32": 4, "float16": 2}[dtype]
        return 2 * self.layers * self.kv_heads * slots * self.head_dim * size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderConstants:
        """Rebuilds the constants from the manifest, where every field must be.

        Raises:
            ContractError: Unknown or missing keys, wrong types, values out of range.
        """
        if not isinstance(values, Mapping):
            raise ContractError(f"The decoder constants are {type(values).__name__}.", "Export the bundle again.")
        kinds: dict[str, Kind] = dict.fromkeys(cls.__dataclass_fields__, (is_whole, "a whole number, 0 or more"))
        kinds["rope"] = (lambda v: v in ROPES, f"one of {', '.join(ROPES)}")
        kinds["eos_ids"] = (lambda v: isinstance(v, list | tuple) and all(map(is_whole, v)), "a list of token ids")
        for key in ("bos_id", "pad_id"):
            kinds[key] = (lambda v: is_whole(v) or v == -1, "a token id, or -1")
        return cls(**read_constants("decoder", values, kinds))


def embed_tokens(c: DecoderConstants) -> GraphSpec:
    """S token ids to their embeddings. Image tokens get some embedding too; the caller writes features over it."""
    return GraphSpec(
        EMBED_TOKENS,
        inputs=(TensorSpec(INPUT_IDS, "int32", (1, "S")),),
        outputs=(TensorSpec(EMBEDS, "float32", (1, "S", c.hidden_size)),),
        ranges={"S": (1, TYPICAL_PROMPT, c.max_length)},
    )


def decoder(c: DecoderConstants, cache_dtype: str = "float32", target: str = ONNX) -> GraphSpec:
    """S embeddings, of a prompt or of one token, to the logits of the last of them, and the cache; see the module.

    Dynamic dimensions: S tokens of this run; ``onnx``: C slots of the cache, S <= C; ``tensorrt``: P filled slots
    before, T = P + S after.

    Args:
        c: Of the family.
        cache_dtype: Element type of the cache, by `CACHE_DTYPES`. Every other tensor keeps its type.
        target: ``onnx`` or ``tensorrt``.
    """
    plain = target == TENSORRT
    inputs = [TensorSpec(INPUTS_EMBEDS, "float32", (1, "S", c.hidden_size))]
    inputs.append(TensorSpec(CACHE_POSITION, "int32", ("S",)) if plain else TensorSpec(SEQLENS_K, "int32", (1,)))
    if c.rope == MROPE:
        inputs.append(TensorSpec(POSITION_IDS, "int32", (MROPE_AXES, "S")))
    before, after = ("P", "T") if plain else ("C", "C")
    outputs = [TensorSpec(LOGITS, "float32", (1, c.vocab_size))]
    for past, present in c.cache_names:
        inputs.append(TensorSpec(past, cache_dtype, (1, c.kv_heads, before, c.head_dim)))
        outputs.append(TensorSpec(present, cache_dtype, (1, c.kv_heads, after, c.head_dim)))
    prompt, cache, longest = min(TYPICAL_PROMPT, c.max_length), min(TYPICAL_CACHE, c.max_length), c.max_length
    if not plain:
        ranges = {"S": (1, prompt, longest), "C": (1, cache, longest)}
        return GraphSpec(DECODER, tuple(inputs), tuple(outputs), ranges)
    return GraphSpec(
        DECODER,
        tuple(inputs),
        tuple(outputs),
        ranges={"S": (1, prompt, longest), "P": (0, 0, longest - 1), "T": (1, prompt, longest)},
        profiles=(
            {"S": (1, 1, 1), "P": (1, cache // 2, longest - 1)},  # a step
            {"S": (1, prompt, longest), "P": (0, 0, longest - 1)},  # a prompt, perhaps after a prefix
        ),
    )
