"""The graphs of a decoder, written node by node from its weights.

::

    inputs_embeds -> [norm -> qkv -> rotary -> attention over the cache -> out -> + -> norm -> MLP -> +] * layers
                  -> last token -> norm -> lm_head -> logits

Two dialects of one graph, by target (see `engine.contracts.decoder`):

* ``onnx``: attention, rotary embedding and RMS norm are ONNX Runtime's own operators. `GroupQueryAttention` writes the
  cache in place; it learns from `seqlens_k` how many slots are filled, and from the cache's own length how large the
  buffer is, so that no input has to be read by the CPU while a GPU runs.
* ``tensorrt``: operators that TensorRT 10.3 knows. The norm is computed in fp32 in an fp16 graph, since the square of
  an activation above 256 overflows fp16.

From the last layer's attention on, only the last token is computed: a prompt's logits are nobody's business but that
token's.

Written by hand rather than traced: torch's exporter holds a whole model in one protobuf message, which ends at 2 GiB,
and knows none of ONNX Runtime's operators. Architecture: see the contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from pixano_edge.engine.contracts import decoder as contract
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.contracts.decoder import MROPE, ONNX, TENSORRT, DecoderConstants
from pixano_edge.export.decoder.nodes import GraphWriter
from pixano_edge.export.decoder.quantise import ACCURACY_LEVEL, BLOCK, quantise
from pixano_edge.export.decoder.store import WeightStore
from pixano_edge.export.decoder.weights import DecoderWeights, Layer, Linear, Matrix

BLOCKED = {"float32": -1e9, "float16": -6e4}
"""Added to the score of a slot that may not be seen; fp16 ends at 65504."""
INT64_MAX = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Bits:
    """Bits of the quantised weights; 0 leaves them as they are.

    Attributes:
        layers: Of every matrix of the layers.
        head: Of lm_head.
    """

    layers: int = 0
    head: int = 0


INT4 = Bits(layers=4, head=8)
"""See docs/vlm-graphs.md for why the head has 8 bits."""


def build_decoder(
    weights: DecoderWeights, store: WeightStore, precision: str = "fp32", target: str = ONNX, bits: Bits | None = None
) -> onnx.ModelProto:
    """Writes the decoder's graph.

    Args:
        weights: Of the checkpoint.
        store: Takes the matrices.
        precision: ``fp32``, ``fp16`` or ``int4``.
        target: ``onnx`` or ``tensorrt``.
        bits: Of ``int4``; `INT4` if None.
    """
    spec = contract.decoder(weights.constants, contract.CACHE_DTYPES[precision], target)
    chosen = (bits or INT4) if precision == "int4" else Bits()
    kind = _Plain if target == TENSORRT else _Contrib
    return kind(weights, spec, store, "float16" if precision == "fp16" else "float32", chosen).build()


def build_embedding(weights: DecoderWeights, store: WeightStore, precision: str = "fp32") -> onnx.ModelProto:
    """Writes the token embedding's graph; a tied head's matrix is stored once."""
    spec = contract.embed_tokens(weights.constants)
    write = GraphWriter(spec, store, half=weights.fit_half)
    dtype = "float16" if precision == "fp16" else "float32"
    table = write.matrix("embed_tokens.weight", weights.embedding.astype(dtype))
    name = contract.EMBEDS if dtype == "float32" else "rows"
    rows = write.node("Gather", [table, contract.INPUT_IDS], name, axis=0)
    if dtype != "float32":
        write.cast(rows, "float32", contract.EMBEDS)
    return write.finish()


class _Dialect:
    """What both dialects share."""

    def __init__(self, weights: DecoderWeights, spec: GraphSpec, store: WeightStore, dtype: str, bits: Bits) -> None:
        self.weights, self.spec, self.dtype, self.bits = weights, spec, dtype, bits
        self.c: DecoderConstants = weights.constants
        self.write = GraphWriter(spec, store, half=weights.fit_half)

    def build(self) -> onnx.ModelProto:
        write, c = self.write, self.c
        hidden = contract.INPUTS_EMBEDS
        if self.dtype != "float32":
            hidden = write.cast(hidden, self.dtype, "hidden")
        self.prepare()
        pending = ""  # the part of the residual stream that was not added yet
        for index, layer in enumerate(self.weights.layers()):
            name = f"layers.{index}"
            normed, hidden = self.norm(hidden, pending, layer.input_norm, f"{name}.input_norm")
            attended = self.attention(normed, layer, index, f"{name}.attention")
            if index == c.layers - 1:
                attended, hidden = self.last(attended, f"{name}.last"), self.last(hidden, f"{name}.last_hidden")
            out = self.product(attended, layer.out, f"{name}.attention.out")
            normed, hidden = self.norm(hidden, out, layer.post_norm, f"{name}.post_norm")
            pending = self.mlp(normed, layer, f"{name}.mlp")
        normed, _ = self.norm(hidden, pending, self.weights.final_norm, "final_norm")
        row = write.node("Reshape", [normed, write.ints(1, c.hidden_size)], "final_row")
        self.head(row)
        return write.finish()

    def prepare(self) -> None:
        """Writes what all layers use."""
        raise NotImplementedError

    def norm(self, hidden: str, pending: str, scale: Matrix, name: str) -> tuple[str, str]:
        """RMS norm of ``hidden + pending``; returns it and the sum."""
        raise NotImplementedError

    def attention(self, normed: str, layer: Layer, index: int, name: str) -> str:
        """(1, S, heads * head_dim) attended values, before the output projection."""
        raise NotImplementedError

    def silu(self, gate: str, name: str) -> str:
        raise NotImplementedError

    def last(self, value: str, name: str) -> str:
        """The last token of (1, S, channels), as (1, 1, channels)."""
        ints = self.write.ints
        return self.write.node("Slice", [value, ints(-1), ints(INT64_MAX), ints(1), ints(1)], name)

    def product(self, value: str, linear: Linear, name: str) -> str:
        write = self.write
        product = self.matmul(value, linear.weight, name, self.bits.layers)
        if linear.bias is None:
            return product
        bias = write.weight(f"{name}.bias", linear.bias.astype(self.dtype))
        return write.node("Add", [product, bias], f"{name}.biased")

    def matmul(self, value: str, weight: Matrix, name: str, bits: int, output: str = "") -> str:
        write, output = self.write, output or f"{name}.product"
        if not bits:
            return write.node("MatMul", [value, write.matrix(f"{name}.weight", weight.astype(self.dtype))], output)
        packed = quantise(weight, bits)
        codes = write.weight(f"{name}.weight_{bits}bit", packed.codes)
        scales = write.weight(f"{name}.scales", packed.scales.astype(self.dtype))
        rows, columns = packed.shape
        return write.split(
            "MatMulNBits", [value, codes, scales], output, [output], contrib=True,
            K=rows, N=columns, bits=bits, block_size=BLOCK, accuracy_level=ACCURACY_LEVEL,
        )[0]  # fmt: skip

    def head(self, row: str) -> None:
        """Logits of (1, hidden). The matrix is (vocabulary, hidden), as in the embedding that it may be tied to."""
        write, wide = self.write, self.dtype == "float32"
        name = contract.LOGITS if wide else "logits_row"
        if self.bits.head:
            self.matmul(row, np.ascontiguousarray(self.weights.head.T), "lm_head", self.bits.head, name)
        else:
            table = write.matrix("lm_head.weight", self.weights.head.astype(self.dtype))
            write.node("Gemm", [row, table], name, transB=1)
        if not wide:
            write.cast(name, "float32", contract.LOGITS)

    def mlp(self, normed: str, layer: Layer, name: str) -> str:
        write, width = self.write, layer.down.weight.shape[0]
        both = self.product(normed, layer.gate_up, f"{name}.gate_up")
        gate, up = write.split(
            "Split", [both, write.ints(width, width)], f"{name}.split", [f"{name}.gate", f"{name}.up"], axis=-1
        )
        gated = write.node("Mul", [self.silu(gate, name), up], f"{name}.gated")
        return self.product(gated, layer.down, f"{name}.down")

    def mrope_rows(self, tables: Mapping[str, Matrix]) -> dict[str, str]:
        """Cosines and sines of M-RoPE for the S tokens, (S, head_dim / 2) each, by the names of `tables`.

        Half a head's channels are shared out among temporal, height and width positions; each share looks its own
        position up in its own columns of the table.
        """
        write, sections = self.write, self.weights.mrope_section
        rows = {}
        axes = write.split(
            "Split", [contract.POSITION_IDS, write.ints(*[1] * len(sections))], "positions",
            [f"positions.{axis}" for axis in range(len(sections))], axis=0,
        )  # fmt: skip
        flat = [write.node("Squeeze", [a, write.ints(0)], f"{a}.flat") for a in axes]
        for name, table in tables.items():
            parts, start = [], 0
            for axis, width in enumerate(sections):
                columns = np.ascontiguousarray(table[:, start : start + width])
                share = write.weight(f"{name}_table.{axis}", columns.astype(self.dtype))
                parts.append(write.node("Gather", [share, flat[axis]], f"{name}.{axis}", axis=0))
                start += width
            rows[name] = write.node("Concat", parts, f"{name}_rows", axis=1)
        return rows


class _Contrib(_Dialect):
    """With ONNX Runtime's own operators."""

    def prepare(self) -> None:
        write, c = self.write, self.c
        cos, sin = self.weights.rotary_tables()
        if c.rope == MROPE:
            self.rows = self.mrope_rows({"cos": cos, "sin": sin})
            self.first = write.weight("first_position", np.zeros(1, np.int64))
        else:
            self.tables = [
                write.weight(f"{name}_table", table.astype(self.dtype)) for name, table in (("cos", cos), ("sin", sin))
            ]
        length = write.node("Shape", [contract.past_key(0)], "cache_length", start=2, end=3)
        self.length = write.cast(length, "int32", "total_length")

    def norm(self, hidden: str, pending: str, scale: Matrix, name: str) -> tuple[str, str]:
        write = self.write
        gamma = write.weight(f"{name}.scale", scale.astype(self.dtype))
        if not pending:
            return _plain_norm(self, hidden, gamma, name), hidden
        normed, added = f"{name}.normed", f"{name}.sum"
        write.split(
            "SkipSimplifiedLayerNormalization", [pending, hidden, gamma], name, [normed, "", "", added], contrib=True,
            epsilon=self.weights.epsilon,
        )  # fmt: skip
        return normed, added

    def attention(self, normed: str, layer: Layer, index: int, name: str) -> str:
        write, c = self.write, self.c
        qkv = self.product(normed, layer.qkv, f"{name}.qkv")
        if c.rope == MROPE:
            widths = (c.heads * c.head_dim, c.kv_heads * c.head_dim)
            query, key, value = write.split(
                "Split", [qkv, write.ints(widths[0], widths[1], widths[1])], f"{name}.split",
                [f"{name}.query", f"{name}.key", f"{name}.value"], axis=-1,
            )  # fmt: skip
            states = [self._rotate(query, c.heads), self._rotate(key, c.kv_heads), value]
            rotary = ["", ""]
        else:
            states, rotary = [qkv, "", ""], self.tables
        inputs = [
            *states, contract.past_key(index), contract.past_value(index), contract.SEQLENS_K, self.length, *rotary,
        ]  # fmt: skip
        while not inputs[-1]:
            inputs.pop()
        outputs = [f"{name}.attended", contract.present_key(index), contract.present_value(index)]
        write.split(
            "GroupQueryAttention", inputs, name, outputs, contrib=True,
            num_heads=c.heads, kv_num_heads=c.kv_heads, do_rotary=int(c.rope != MROPE), scale=c.head_dim**-0.5,
        )  # fmt: skip
        return outputs[0]

    def _rotate(self, states: str, heads: int) -> str:
        """M-RoPE: the tokens' own rows are a table for positions 0 to S - 1."""
        name = f"{states}.rotated"
        return self.write.split(
            "RotaryEmbedding", [states, self.first, self.rows["cos"], self.rows["sin"]], name, [name], contrib=True,
            num_heads=heads, rotary_embedding_dim=0,
        )[0]  # fmt: skip

    def silu(self, gate: str, name: str) -> str:
        return self.write.split("QuickGelu", [gate], f"{name}.silu", [f"{name}.silu"], contrib=True, alpha=1.0)[0]


class _Plain(_Dialect):
    """With operators that TensorRT 10.3 knows."""

    def prepare(self) -> None:
        write, c = self.write, self.c
        cos, sin = self.weights.rotary_tables()
        if c.rope == MROPE:
            self.rows = self.mrope_rows({"cos": cos, "sin": sin})
        else:
            self.rows = {}
            for name, table in (("cos", cos), ("sin", sin)):
                stored = write.weight(f"{name}_table", table.astype(self.dtype))
                self.rows[name] = write.node("Gather", [stored, contract.CACHE_POSITION], f"{name}_rows", axis=0)
        # A slot is seen by the tokens at it and after it.
        past = write.node("Shape", [contract.past_key(0)], "past_length", start=2, end=3)
        new = write.node("Shape", [contract.CACHE_POSITION], "new_length")
        total = write.node("Add", [past, new], "total_length")
        scalar = write.node("Squeeze", [total, write.ints(0)], "total_slots")
        zero, one = write.weight("zero", np.array(0, np.int64)), write.weight("one", np.array(1, np.int64))
        slots = write.node("Range", [zero, scalar, one], "slots")
        rows = write.cast(contract.CACHE_POSITION, "int64", "positions_64")
        rows = write.node("Unsqueeze", [rows, write.ints(1)], "position_rows")
        hidden = write.node("Greater", [slots, rows], "unseen")
        self.mask = write.node(
            "Where", [hidden, write.scalar(BLOCKED[self.dtype], self.dtype), write.scalar(0, self.dtype)], "mask"
        )

    def norm(self, hidden: str, pending: str, scale: Matrix, name: str) -> tuple[str, str]:
        write = self.write
        if pending:
            hidden = write.node("Add", [hidden, pending], f"{name}.sum")
        return _plain_norm(self, hidden, write.weight(f"{name}.scale", scale.astype(self.dtype)), name), hidden

    def attention(self, normed: str, layer: Layer, index: int, name: str) -> str:
        write, c = self.write, self.c
        qkv = self.product(normed, layer.qkv, f"{name}.qkv")
        states = write.node("Reshape", [qkv, write.ints(1, -1, c.heads + 2 * c.kv_heads, c.head_dim)], f"{name}.heads")
        states = write.node("Transpose", [states], f"{name}.states", perm=[0, 2, 1, 3])
        turning, value = write.split(
            "Split", [states, write.ints(c.heads + c.kv_heads, c.kv_heads)], f"{name}.split",
            [f"{name}.unrotated", f"{name}.value"], axis=1,
        )  # fmt: skip
        rotated = self._rotate(turning, name)
        query, key = write.split(
            "Split", [rotated, write.ints(c.heads, c.kv_heads)], f"{name}.split_rotated",
            [f"{name}.query", f"{name}.key"], axis=1,
        )  # fmt: skip
        keys = write.node("Concat", [contract.past_key(index), key], contract.present_key(index), axis=2)
        values = write.node("Concat", [contract.past_value(index), value], contract.present_value(index), axis=2)
        # Queries of one key head side by side: (kv_heads, group, S, head_dim) against (kv_heads, 1, T, head_dim).
        group = write.ints(c.kv_heads, c.heads // c.kv_heads, -1, c.head_dim)
        single = write.ints(c.kv_heads, 1, -1, c.head_dim)
        query = write.node("Mul", [query, write.scalar(c.head_dim**-0.5, self.dtype)], f"{name}.scaled")
        query = write.node("Reshape", [query, group], f"{name}.grouped")
        keys = write.node("Reshape", [keys, single], f"{name}.keys")
        values = write.node("Reshape", [values, single], f"{name}.values")
        turned = write.node("Transpose", [keys], f"{name}.keys_turned", perm=[0, 1, 3, 2])
        scores = write.node("MatMul", [query, turned], f"{name}.scores")
        scores = write.node("Add", [scores, self.mask], f"{name}.masked")
        shares = write.node("Softmax", [scores], f"{name}.shares", axis=-1)
        mixed = write.node("MatMul", [shares, values], f"{name}.mixed")
        mixed = write.node("Reshape", [mixed, write.ints(1, c.heads, -1, c.head_dim)], f"{name}.mixed_heads")
        mixed = write.node("Transpose", [mixed], f"{name}.mixed_tokens", perm=[0, 2, 1, 3])
        return write.node("Reshape", [mixed, write.ints(1, -1, c.heads * c.head_dim)], f"{name}.attended")

    def _rotate(self, states: str, name: str) -> str:
        """Rotates pairs of channels that lie half a head apart."""
        write, half = self.write, self.c.head_dim // 2
        low, high = write.split(
            "Split", [states, write.ints(half, half)], f"{name}.halves", [f"{name}.low", f"{name}.high"], axis=-1
        )
        cos, sin = self.rows["cos"], self.rows["sin"]
        parts = {}
        for part, op, (first, second) in (("low", "Sub", (low, high)), ("high", "Add", (high, low))):
            straight = write.node("Mul", [first, cos], f"{name}.{part}_cos")
            crossed = write.node("Mul", [second, sin], f"{name}.{part}_sin")
            parts[part] = write.node(op, [straight, crossed], f"{name}.{part}_rotated")
        return write.node("Concat", [parts["low"], parts["high"]], f"{name}.rotated", axis=-1)

    def silu(self, gate: str, name: str) -> str:
        write = self.write
        return write.node("Mul", [gate, write.node("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")


def _plain_norm(dialect: _Dialect, hidden: str, scale: str, name: str) -> str:
    """RMS norm of standard operators, in fp32 but for the product with the scale, as transformers has it."""
    write, half = dialect.write, dialect.dtype != "float32"
    wide = write.cast(hidden, "float32", f"{name}.wide") if half else hidden
    squares = write.node("Mul", [wide, wide], f"{name}.squares")
    mean = write.node("ReduceMean", [squares, write.ints(-1)], f"{name}.mean", keepdims=1)
    safe = write.node("Add", [mean, write.scalar(dialect.weights.epsilon, "float32")], f"{name}.safe")
    root = write.node("Sqrt", [safe], f"{name}.root")
    unit = write.node("Div", [wide, root], f"{name}.unit")
    unit = write.cast(unit, dialect.dtype, f"{name}.narrow") if half else unit
    return write.node("Mul", [unit, scale], f"{name}.normed")
