"""Places where the channels of a tensor can be rescaled without changing what a graph computes.

A tensor is written by a LayerNormalization or a Linear (a Relu may follow: it commutes with factors above 0) and read
by Linears alone, perhaps over moves that keep its last axis. Dividing channel j by s_j where it is written and
multiplying row j of every reader's weights by s_j changes nothing but roundings. `smooth` uses this to make
activations easy to quantise, `outliers` to make them hard.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto

from pixano_edge.calibration.blocks import quantisable
from pixano_edge.calibration.graph import LINEAR, Graph, infer_shapes
from pixano_edge.engine.errors import CalibrationError
from pixano_edge.export.graph_edit import attribute

_MOVES = frozenset(("Identity", "Reshape", "Transpose"))


@dataclass(frozen=True)
class Fold:
    """One tensor that can be rescaled.

    Attributes:
        tensor: What the source writes.
        source: ``LayerNormalization``, or the operator of a Linear.
        parameters: What is divided: name of a node, index of its input, axis of the channels in that constant.
        readers: Names of the Linears that read the tensor.
        inputs: Their inputs, each once: the tensor, or what the moves made of it.
        channels: Size of the last axis.
    """

    tensor: str
    source: str
    parameters: tuple[tuple[str, int, int], ...]
    readers: tuple[str, ...]
    inputs: tuple[str, ...]
    channels: int


def folds(model: onnx.ModelProto) -> list[Fold]:
    """All such places, in graph order.

    Args:
        model: fp32, see `graph.load_graph`; left as it is.
    """
    graph = Graph(model)
    shapes = infer_shapes(model)
    found = []
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", *LINEAR, "Add", "Relu"):
            tensor = node.output[0]
            parameters = _parameters(graph, node)
            width = shapes.get(tensor, [-1])[-1] if shapes.get(tensor) else -1
            readers = _readers(graph, shapes, tensor, width) if parameters and width > 0 else None
            if readers:
                names = tuple(n.name for n in readers)
                inputs = tuple(dict.fromkeys(n.input[0] for n in readers))
                found.append(Fold(tensor, node.op_type, tuple(parameters), names, inputs, width))
    return found


def rescale(graph: Graph, fold: Fold, factors: NDArray[np.float64]) -> None:
    """Divides the channels of a fold's tensor by `factors`, in place; the outputs of the graph stay what they are.

    Args:
        graph: Of the model in which the fold was found.
        fold: Names of nodes must still be the same.
        factors: (C,), finite and above 0.

    Raises:
        CalibrationError: They are not.
    """
    if factors.shape != (fold.channels,) or not (np.isfinite(factors).all() and (factors > 0).all()):
        raise CalibrationError(f"Channels of '{fold.tensor}' cannot be rescaled by such factors.", "Report this.")
    nodes = {node.name: node for node in graph.model.graph.node}
    for name, index, axis in fold.parameters:
        node = nodes[name]
        held = graph.value(node.input[index])
        assert held is not None
        shape = [1] * held.ndim
        shape[axis] = -1
        graph.set_value(node.input[index], _as(held, held / factors.reshape(shape)), owner=node, index=index)
    for name in fold.readers:
        node = nodes[name]
        held = graph.value(node.input[1])
        assert held is not None
        column = factors if transposed(node) else factors[:, None]
        graph.set_value(node.input[1], _as(held, held * column), owner=node, index=1)


def transposed(node: NodeProto) -> bool:
    """Whether a Linear's weights lie as (out, in)."""
    return node.op_type == "Gemm" and bool(attribute(node, "transB", 0))


def _as(held: NDArray[np.float32], value: NDArray[np.float64]) -> NDArray[np.float32]:
    return value.astype(held.dtype)


def _parameters(graph: Graph, node: NodeProto) -> list[tuple[str, int, int]]:
    """The constants that scale a node's output by channel; empty if there are no such."""
    if not node.name:
        return []
    if node.op_type == "LayerNormalization":
        gains = [graph.value(name) for name in node.input[1:] if name]
        flat = all(g is not None and g.ndim == 1 for g in gains)
        last = attribute(node, "axis", -1) == -1
        return [(node.name, index + 1, 0) for index in range(len(gains))] if flat and last else []
    if node.op_type == "Relu":
        writer = graph.writer(node.input[0])
        return _parameters(graph, writer) if writer is not None and _single(graph, node.input[0], writer) else []
    if node.op_type == "Add":
        for index in (0, 1):
            writer, held = graph.writer(node.input[1 - index]), graph.value(node.input[index])
            if held is not None and writer is not None and writer.op_type == "MatMul" and held.ndim >= 1:
                inner = _parameters(graph, writer) if graph.only_reader(writer.output[0]) is node else []
                if inner and held.shape[-1] == held.size == graph.constants[writer.input[1]].dims[-1]:
                    return [*inner, (node.name, index, held.ndim - 1)]
        return []
    weight = graph.weight(node) if node.op_type in LINEAR else None
    if weight is None or weight.ndim != 2:
        return []
    if node.op_type == "MatMul":
        return [(node.name, 1, 1)]
    if not quantisable(graph, node):
        return []
    bias = graph.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if len(node.input) > 2 and node.input[2] and (bias is None or bias.ndim != 1):
        return []
    found = [(node.name, 1, 0 if transposed(node) else 1)]
    return found if bias is None else [*found, (node.name, 2, 0)]


def _single(graph: Graph, tensor: str, writer: NodeProto) -> bool:
    """Whether a Linear's output is read once, so that a Relu behind it may be rescaled through it."""
    return writer.op_type in ("Add", *LINEAR) and graph.only_reader(tensor) is not None


def _readers(graph: Graph, shapes: dict[str, list[int]], tensor: str, width: int) -> list[NodeProto] | None:
    """The Linears that read a tensor; None when anything else does."""
    if tensor in graph.outputs:
        return None
    found: list[NodeProto] = []
    for node in graph.readers(tensor):
        if list(node.input).count(tensor) != 1 or node.input[0] != tensor:
            return None
        if node.op_type in _MOVES:
            moved = _readers(graph, shapes, node.output[0], width) if _keeps(node, shapes, width) else None
            if moved is None:
                return None
            found += moved
        elif node.op_type in LINEAR and quantisable(graph, node):
            held = graph.constants[node.input[1]]
            if held.dims[1 if transposed(node) else 0] != width:
                return None
            found.append(node)
        else:
            return None
    weights = [node.input[1] for node in found]
    # A weight with another reader would need two versions of itself; the exporters write none.
    if any(len(graph.readers(name)) > weights.count(name) for name in weights) or len(set(weights)) < len(weights):
        return None
    return found or None


def _keeps(node: NodeProto, shapes: dict[str, list[int]], width: int) -> bool:
    """Whether a move leaves the last axis as it is."""
    if node.op_type == "Transpose":
        order = attribute(node, "perm")
        return order is not None and order[-1] == len(order) - 1
    given, made = shapes.get(node.input[0]), shapes.get(node.output[0])
    return bool(given and made and given[-1] == made[-1] == width)
