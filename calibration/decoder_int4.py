"""A bundle's decoder with weights in 4 bits that suit what it is asked: the variant ``int4``, from the fp32 graph.

Same nodes and formats as the exporter's ``int4`` (`export/decoder/graph.py`): `MatMulNBits` in blocks of 32, symmetric,
lm_head in 8 bits, everything else fp32. No torch, no checkpoint: a box makes it from its own bundle and pictures.

AWQ's factors are undone without a node, by what is in front of a matrix::

    norm's scale          -> qkv, gate_up       divided by the factors
    value columns of qkv  -> out                through attention, which mixes tokens but not channels
    up columns of gate_up -> down               silu(gate) * up

Dividing a column of a matrix divides its blocks' scales, whatever its codes are, so no choice depends on a later one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, helper, numpy_helper

from pixano_edge.calibration.grams import Pair
from pixano_edge.calibration.weight_only import AUTO, RTN, Fitted, Floats, choose
from pixano_edge.engine.contracts.decoder import DecoderConstants
from pixano_edge.engine.errors import BundleError
from pixano_edge.export.decoder.quantise import ACCURACY_LEVEL, BLOCK, Quantised, quantise
from pixano_edge.export.decoder.store import WeightStore
from pixano_edge.export.half_weights import drop_casts

CONTRIB = "com.microsoft"
HEAD_BITS = 8
"""Of lm_head, rounded to nearest; see docs/vlm-graphs.md."""
_SKIP_NORM = "SkipSimplifiedLayerNormalization"
_ATTENTION = "GroupQueryAttention"


@dataclass(frozen=True)
class Product:
    """One matrix product of the decoder.

    Attributes:
        name: Of the matrix, for example ``layers.0.mlp.down``.
        node: Index in the graph.
        tensor: What is multiplied.
        weight: Name of the (K, N) initialiser.
    """

    name: str
    node: int
    tensor: str
    weight: str


@dataclass(frozen=True)
class LayerError:
    """What quantising one matrix costs on activations that nothing was fitted to; they only chose the method.

    Attributes:
        name: Of the matrix.
        shape: K and N.
        method: That was chosen.
        exponent: Of AWQ's factors; 0 without.
        rtn: Size of the output's error relative to the output's, rounded to nearest.
        chosen: The same of the chosen method.
    """

    name: str
    shape: tuple[int, int]
    method: str
    exponent: float
    rtn: float
    chosen: float


def products(model: onnx.ModelProto) -> list[Product]:
    """The matrix products of a decoder's layers, in graph order; lm_head is none of them."""
    weights = {t.name for t in model.graph.initializer}
    return [
        Product(node.input[1].removesuffix(".weight"), index, node.input[0], node.input[1])
        for index, node in enumerate(model.graph.node)
        if node.op_type == "MatMul" and node.input[1] in weights
    ]


def tapped_tensors(file: Path) -> dict[str, int]:
    """Channels of the tensors that enter an fp32 decoder's matrices, for `grams.collect`."""
    model, _ = _read(file)
    rows = {t.name: t.dims[0] for t in model.graph.initializer if len(t.dims) == 2}
    return {product.tensor: rows[product.weight] for product in products(model)}


def quantise_decoder(
    file: Path,
    constants: DecoderConstants,
    grams: Mapping[str, Pair],
    store: WeightStore,
    *,
    method: str = AUTO,
    bits: int = 4,
    on_matrix: Callable[[], None] = lambda: None,
) -> tuple[onnx.ModelProto, list[LayerError]]:
    """The decoder's graph with quantised matrices.

    Args:
        file: The fp32 graph for ONNX Runtime. Its weights are read one at a time, wherever they lie and whether in full
            or half precision.
        constants: Of the decoder.
        grams: What enters the matrices, by the name of the tensor; of `tapped_tensors`.
        store: Takes the weights; `WeightStore.seal` the graph afterwards.
        method: See `weight_only`.
        bits: Of the layers' matrices.
        on_matrix: Called after each.

    Raises:
        BundleError: The graph is no decoder of this exporter's.
        EdgeError: Activations are missing or unusable.
    """
    graph = _Decoder(file, constants)
    if len(graph.products) != 4 * constants.layers:
        raise BundleError(
            f"'{file.name}' has {len(graph.products)} matrix products where {4 * constants.layers} were expected.",
            "Export the bundle again with this version.",
        )
    errors = []
    for product in graph.products:
        pair = grams.get(product.tensor)
        if pair is None:
            raise BundleError(f"No activations of '{product.tensor}' were collected.", "Collect them from this graph.")
        undo = graph.undo(product)
        tried = choose(
            graph.read(product.weight), pair.fit, pair.check, method=method, bits=bits, tie=undo.tie if undo else None
        )
        best, rtn = tried[0], next(one for one in tried if one.method == RTN)
        graph.put(product, best, undo)
        errors.append(LayerError(product.name, best.weight.shape, best.method, best.exponent, rtn.error, best.error))
        on_matrix()
    return graph.finish(store, bits), errors


def _read(file: Path) -> tuple[onnx.ModelProto, frozenset[str]]:
    """A graph without its weights' contents, and which of these are stored in half precision."""
    model = onnx.load(str(file), load_external_data=False)
    return model, drop_casts(model)


@dataclass(frozen=True)
class _Undo:
    """What divides a matrix' activations by factors.

    Attributes:
        norm: Name of the initialiser that does.
        product: Else the product whose columns do.
        start: First of these columns.
        heads: Query heads, key heads and channels of a head where attention lies between: query heads that share a key
            head share its factors. None where nothing does.
    """

    norm: str = ""
    product: Product | None = None
    start: int = 0
    heads: tuple[int, int, int] | None = None

    def tie(self, factors: Floats) -> Floats:
        """The nearest factors that can be undone."""
        if self.heads is None:
            return factors
        heads, shared, channels = self.heads
        grouped = factors.reshape(shared, heads // shared, channels)
        mean = np.exp(np.log(grouped).mean(axis=1, keepdims=True))
        found: Floats = np.broadcast_to(mean, grouped.shape).reshape(-1).astype(np.float32)
        return found

    def columns(self, factors: Floats) -> Floats:
        """Factors by column of `product`, from `start` on."""
        if self.heads is None:
            return factors
        heads, shared, channels = self.heads
        return np.ascontiguousarray(factors.reshape(shared, heads // shared, channels)[:, 0]).reshape(-1)


class _Decoder:
    """A decoder's graph while its matrices are replaced.

    Args:
        file: The fp32 graph.
        constants: Of the decoder.
    """

    def __init__(self, file: Path, constants: DecoderConstants) -> None:
        model, self._halves = _read(file)
        self.products = products(model)
        self._model, self._folder, self._constants = model, file.parent, constants
        self._weights = {t.name: t for t in model.graph.initializer}
        self._made: dict[str, NodeProto] = {out: node for node in model.graph.node for out in node.output if out}
        self._uses: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._uses.setdefault(name, []).append(node)
        self._by_output = {model.graph.node[p.node].output[0]: p for p in self.products}
        self._chosen: dict[str, Fitted] = {}
        self._divisors: dict[str, Floats] = {}
        self._changed: dict[str, npt.NDArray[Any]] = {}

    def read(self, name: str) -> npt.NDArray[Any]:
        """Values of an initialiser; those that are stored in half precision as float32."""
        if name in self._changed:
            return self._changed[name]
        values = numpy_helper.to_array(self._weights[name], str(self._folder))
        return values.astype(np.float32) if name in self._halves else values

    def undo(self, product: Product) -> _Undo | None:
        """What can divide the product's activations; None where nothing is known to."""
        made = self._source(product.tensor)
        if made is None or len(self._uses[product.tensor]) != 1:
            return None
        if made.op_type in (_SKIP_NORM, "Mul"):
            scale = made.input[2] if made.op_type == _SKIP_NORM else made.input[1]
            if scale in self._weights:
                return _Undo(norm=scale) if len(self._uses[scale]) == 1 else None
        if made.op_type == "Mul":  # silu(gate) * up
            split = self._source(made.input[1])
            if split is not None and split.op_type == "Split" and list(split.output).index(made.input[1]) == 1:
                return self._columns(split.input[0], self._weights[product.weight].dims[0])
        if made.op_type == _ATTENTION:
            c = self._constants
            value = made.input[2] or made.input[0]
            if made.input[2]:
                split = self._source(made.input[2])
                value = split.input[0] if split is not None and split.op_type == "Split" else ""
            return self._columns(value, (c.heads + c.kv_heads) * c.head_dim, (c.heads, c.kv_heads, c.head_dim))
        return None

    def put(self, product: Product, chosen: Fitted, undo: _Undo | None) -> None:
        """Keeps a quantised matrix; its factors are undone where `undo` says."""
        self._chosen[product.weight] = chosen
        if chosen.factors is None:
            return
        assert undo is not None  # `choose` gives no factors without
        if undo.norm:
            self._changed[undo.norm] = (self.read(undo.norm) / chosen.factors).astype(np.float32)
            return
        assert undo.product is not None
        weight = undo.product.weight
        divisors = self._divisors.setdefault(weight, np.ones(self._weights[weight].dims[1], np.float32))
        columns = undo.columns(chosen.factors)
        divisors[undo.start : undo.start + len(columns)] *= columns

    def finish(self, store: WeightStore, bits: int) -> onnx.ModelProto:
        """The new graph; every weight that it keeps goes to `store`."""
        nodes: list[NodeProto] = []
        written: dict[str, onnx.TensorProto] = {}
        by_node = {p.node: p for p in self.products}
        for index, node in enumerate(self._model.graph.node):
            if index in by_node:
                product = by_node[index]
                node = self._quantised(node, product.name, self._divided(product), bits, store, written)
            elif node.op_type == "Gemm" and node.input[1] in self._weights:
                table = quantise(np.ascontiguousarray(self.read(node.input[1]).T), HEAD_BITS)
                name = node.input[1].removesuffix(".weight")
                node = self._quantised(node, name, table, HEAD_BITS, store, written)
            nodes.append(node)
        used = {name for node in nodes for name in node.input}
        for name in self._weights:
            if name in used:
                written[name] = store.tensor(name, self.read(name))
        old = self._model.graph
        graph = helper.make_graph(nodes, old.name, old.input, old.output, list(written.values()))
        opsets = [helper.make_opsetid(o.domain, o.version) for o in self._model.opset_import]
        if all(o.domain != CONTRIB for o in opsets):
            opsets.append(helper.make_opsetid(CONTRIB, 1))
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=self._model.ir_version, producer_name="pixano-edge"
        )

    def _source(self, tensor: str) -> NodeProto | None:
        """The node that makes a tensor's values; one that takes a part of the tokens is passed over."""
        made = self._made.get(tensor)
        while made is not None and made.op_type == "Slice":
            made = self._made.get(made.input[0])
        return made

    def _columns(self, tensor: str, start: int, heads: tuple[int, int, int] | None = None) -> _Undo | None:
        """Columns of the product, with or without a bias, that makes a tensor."""
        made = self._made.get(tensor)
        if made is not None and made.op_type == "Add" and made.input[1] in self._weights:
            made = self._made.get(made.input[0])
        product = self._by_output.get(made.output[0]) if made is not None else None
        return _Undo(product=product, start=start, heads=heads) if product is not None else None

    def _divided(self, product: Product) -> Quantised:
        """A chosen matrix with its columns, and the bias behind it, divided as the matrices behind it need."""
        weight = self._chosen[product.weight].weight
        divisors = self._divisors.get(product.weight)
        if divisors is None:
            return weight
        for node in self._uses[self._model.graph.node[product.node].output[0]]:
            if node.op_type == "Add" and node.input[1] in self._weights:
                self._changed[node.input[1]] = (self.read(node.input[1]) / divisors).astype(np.float32)
        scales = weight.scales.reshape(len(divisors), -1) / divisors[:, None]
        return replace(weight, scales=scales.reshape(-1))

    def _quantised(
        self,
        node: NodeProto,
        name: str,
        weight: Quantised,
        bits: int,
        store: WeightStore,
        written: dict[str, onnx.TensorProto],
    ) -> NodeProto:
        codes, scales = f"{name}.weight_{bits}bit", f"{name}.scales"
        written[codes] = store.tensor(codes, weight.codes)
        written[scales] = store.tensor(scales, weight.scales)
        rows, columns = weight.shape
        return helper.make_node(
            "MatMulNBits", [node.input[0], codes, scales], list(node.output), name=f"node_{node.output[0]}",
            domain=CONTRIB, K=rows, N=columns, bits=bits, block_size=BLOCK, accuracy_level=ACCURACY_LEVEL,
        )  # fmt: skip
