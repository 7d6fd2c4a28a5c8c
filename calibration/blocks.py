"""The layers of a graph that int8 can speed up: products with constant weights, grouped by the layer they belong to.

A block is the smallest thing that is quantised or left alone: one Linear or one convolution, by the name that its
weights have in the checkpoint (``blocks.3.attn.qkv``). Products of two computed tensors (attention's scores) and
transposed convolutions are not among them: ONNX Runtime has int8 kernels for the first, but quantising both factors at
every run takes most of what they save; for the second it has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto

from pixano_edge.calibration.graph import LINEAR, Graph, infer_shapes
from pixano_edge.export.graph_edit import attribute

MIN_WEIGHTS = 2048
"""A smaller layer, such as a head with 4 outputs, saves nothing and is where an error shows most."""
_ATTENTION = re.compile(r"(^|[._])(\w*attn\w*|\w*attention\w*)([._]|$)")
_MLP = re.compile(r"(^|[._])(mlp|fc\d|feed_forward|ffn|linear\d|intermediate)([._]|$)")


@dataclass(frozen=True)
class Block:
    """One layer that can be quantised.

    Attributes:
        name: Of the layer; unique in the graph.
        parent: The scope around it, such as a transformer block: the name without its last parts.
        nodes: Names of its nodes in graph order; several where one weight is used several times.
        macs: Multiplications and additions per run; open sizes count as 1.
        weight_bytes: Of its weights in float32.
        kind: ``attention``, ``mlp``, ``linear``, ``conv`` or ``depthwise``.
        first: It reads the graph's inputs without another block in between.
        last: No other block reads what it gives.
    """

    name: str
    parent: str
    nodes: tuple[str, ...]
    macs: int
    weight_bytes: int
    kind: str
    first: bool
    last: bool


def blocks(model: onnx.ModelProto, sizes: Mapping[str, tuple[int, ...]] | None = None) -> list[Block]:
    """The blocks of a graph, in graph order.

    Args:
        model: fp32, see `graph.load_graph`; left as it is.
        sizes: Shapes of the graph's inputs, for graphs with open sizes.
    """
    graph = Graph(model)
    shapes = infer_shapes(model, sizes)
    groups: dict[str, list[NodeProto]] = {}
    by_weight: dict[str, str] = {}
    for node in model.graph.node:
        if quantisable(graph, node):
            if node.input[1] not in by_weight:
                by_weight[node.input[1]] = _unused(layer_name(graph, node), groups)
            name = by_weight[node.input[1]]
            groups.setdefault(name, []).append(node)
    first, last = _ends(model, groups)
    return [
        Block(
            name,
            _parent(name),
            tuple(node.name for node in nodes),
            sum(_macs(graph, node, shapes) for node in nodes),
            4 * int(np.prod(graph.constants[nodes[0].input[1]].dims, dtype=np.int64)),
            _kind(name, nodes[0]),
            name in first,
            name in last,
        )
        for name, nodes in groups.items()
    ]


def quantisable(graph: Graph, node: NodeProto) -> bool:
    """Whether a node is a product with weights that int8 kernels take."""
    if not node.name or node.op_type not in (*LINEAR, "Conv") or node.domain not in ("", "ai.onnx"):
        return False
    weight = graph.weight(node)
    if weight is None or weight.size < MIN_WEIGHTS or node.input[0] in graph.constants:
        return False
    if node.op_type == "MatMul":
        return weight.ndim == 2
    if node.op_type == "Gemm":
        plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
        return plain and not attribute(node, "transA", 0)
    return weight.ndim == 4


def layer_name(graph: Graph, node: NodeProto) -> str:
    """What the checkpoint calls the layer: the weights tell, or the bias that is added behind; else the node's name."""
    names = [node.input[1], *node.input[2:3]]
    reader = graph.only_reader(node.output[0])
    if reader is not None and reader.op_type == "Add":
        names += [name for name in reader.input if name in graph.constants]
    for name in names:
        scope, dot, parameter = name.rpartition(".")
        if dot and parameter.split("_")[0] in ("weight", "bias"):
            return scope
    return node.name


def _unused(name: str, taken: Mapping[str, object]) -> str:
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}#{number}"
    return found


def _parent(name: str) -> str:
    """The scope up to the last number in it, so that a transformer block's parts share one; else the scope above."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1] if numbers else parts[:-1])


def _kind(name: str, node: NodeProto) -> str:
    if node.op_type == "Conv":
        return "depthwise" if attribute(node, "group", 1) > 1 else "conv"
    if _MLP.search(name):
        return "mlp"
    return "attention" if _ATTENTION.search(name) else "linear"


def _macs(graph: Graph, node: NodeProto, shapes: Mapping[str, list[int]]) -> int:
    weights = graph.constants[node.input[1]]
    total = int(np.prod(weights.dims, dtype=np.int64))
    # Every output value of a channel is one pass over the weights of that channel.
    output = shapes.get(node.output[0], [])
    places = [1 if size < 0 else size for size in output]
    if node.op_type == "Conv":
        return total * int(np.prod([places[0], *places[2:]], dtype=np.int64)) if places else total
    return total * int(np.prod(places[:-1], dtype=np.int64))


def _ends(model: onnx.ModelProto, groups: Mapping[str, list[NodeProto]]) -> tuple[set[str], set[str]]:
    """Names of the first and the last blocks."""
    names = {node.name: name for name, nodes in groups.items() for node in nodes}
    behind: set[str] = set()  # tensors that a block has a part in
    for node in model.graph.node:
        if node.name in names or behind.intersection(node.input):
            behind.update(node.output)
    ahead: set[str] = set()  # tensors that a block depends on
    for node in reversed(model.graph.node):
        if node.name in names or ahead.intersection(node.output):
            ahead.update(node.input)
    first = {name for name, nodes in groups.items() if not any(n.input[0] in behind for n in nodes)}
    last = {name for name, nodes in groups.items() if not any(set(n.output) & ahead for n in nodes)}
    return first, last
