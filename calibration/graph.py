"""An fp32 graph as calibration sees it: weights inside and in float32, with readers and writers looked up by tensor."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pixano_edge.engine.errors import CalibrationError
from pixano_edge.export.fp16 import sort_nodes
from pixano_edge.export.half_weights import widen

LINEAR = ("MatMul", "Gemm")
SMALL = 1024
"""Initialisers with more values than this are no shape arithmetic; the shape inference does without their contents."""


def load_graph(path: Path) -> onnx.ModelProto:
    """Reads a graph with all its weights, those that another file or half precision holds too, as float32.

    Raises:
        CalibrationError: The file is no ONNX graph, or computes in something else than float32.
    """
    try:
        model = onnx.load(path)
    except Exception as error:
        raise CalibrationError(f"'{path}' is not a readable ONNX file: {error}", "Export the bundle again.") from error
    widen(model)
    if any(t.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16) for t in model.graph.initializer):
        raise CalibrationError(f"'{path.name}' has weights in half precision.", "Calibrate the fp32 graph.")
    return model


def digest(model: onnx.ModelProto) -> str:
    """SHA-256 of the graph and its weights."""
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


class Graph:
    """Lookups in a model, and changes to it.

    Args:
        model: Changed in place by the methods that say so; complete only after `finish`.

    Attributes:
        constants: Initialisers by name.
        outputs: Names of the graph's outputs.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants: dict[str, TensorProto] = {t.name: t for t in model.graph.initializer}
        self.outputs = {v.name for v in model.graph.output}
        self._writers = {o: n for n in model.graph.node for o in n.output if o}
        self._readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in dict.fromkeys(node.input):
                self._readers[name].append(node)
        self._names = {*self.constants, *self._writers, *(v.name for v in model.graph.input)}

    def writer(self, tensor: str) -> NodeProto | None:
        """The node that computes a tensor; None for inputs and initialisers."""
        return self._writers.get(tensor)

    def readers(self, tensor: str) -> list[NodeProto]:
        """Nodes that read a tensor, each once, in graph order."""
        return list(self._readers.get(tensor, ()))

    def only_reader(self, tensor: str) -> NodeProto | None:
        """The node that reads a tensor, where there is exactly one and the tensor is no output."""
        readers = self._readers.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in self.outputs else None

    def value(self, tensor: str) -> NDArray[Any] | None:
        """Contents of an initialiser; None if the tensor is computed."""
        held = self.constants.get(tensor)
        return None if held is None else numpy_helper.to_array(held)

    def weight(self, node: NodeProto) -> NDArray[np.float32] | None:
        """The weight of a MatMul, Gemm or Conv, as it lies in the graph; None if it has none."""
        held = self.constants.get(node.input[1]) if len(node.input) > 1 else None
        if held is None or held.data_type != TensorProto.FLOAT:
            return None
        return numpy_helper.to_array(held)

    def set_value(self, tensor: str, value: NDArray[Any], *, owner: NodeProto, index: int) -> str:
        """Gives one node's input a new constant: in place where no other node reads it, else as a copy of its own.

        Returns:
            The name of the initialiser that the node reads afterwards.
        """
        if self.readers(tensor) == [owner] and list(owner.input).count(tensor) == 1 and tensor not in self.outputs:
            self.constants[tensor].CopyFrom(numpy_helper.from_array(value, tensor))
            return tensor
        name = self.add_constant(tensor, value)
        self._readers[tensor].remove(owner)
        self._readers[name].append(owner)
        owner.input[index] = name
        return name

    def move_input(self, node: NodeProto, index: int, tensor: str) -> None:
        """Makes one input of a node read another tensor."""
        old = node.input[index]
        node.input[index] = tensor
        if old not in node.input:
            self._readers[old].remove(node)
        if node not in self._readers[tensor]:
            self._readers[tensor].append(node)

    def add_constant(self, hint: str, value: NDArray[Any]) -> str:
        """Adds an initialiser and returns its name."""
        held = numpy_helper.from_array(value, self.fresh(hint))
        self.model.graph.initializer.append(held)
        self.constants[held.name] = self.model.graph.initializer[-1]
        return held.name

    def add_node(self, op: str, inputs: Iterable[str], hint: str, **attributes: Any) -> str:
        """Appends a node with one output, whose new name is returned; `finish` puts it in its place."""
        output = self.fresh(hint)
        node = helper.make_node(op, list(inputs), [output], name=f"node_{output}", **attributes)
        self.model.graph.node.append(node)
        self._writers[output] = self.model.graph.node[-1]
        for name in dict.fromkeys(node.input):
            self._readers[name].append(self.model.graph.node[-1])
        return output

    def fresh(self, hint: str) -> str:
        """A tensor name that is not taken: `hint`, or with a number behind it."""
        name, number = hint, 1
        while name in self._names:
            number += 1
            name = f"{hint}_{number}"
        self._names.add(name)
        return name

    def finish(self) -> None:
        """Drops initialisers that nothing reads, and puts the nodes in order."""
        used = {name for node in self.model.graph.node for name in node.input} | self.outputs
        kept = [t for t in self.model.graph.initializer if t.name in used]
        if len(kept) < len(self.model.graph.initializer):
            kept = [_copied(t) for t in kept]
            del self.model.graph.initializer[:]
            self.model.graph.initializer.extend(kept)
        sort_nodes(self.model.graph)


def _copied(tensor: TensorProto) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    return copy


def infer_shapes(model: onnx.ModelProto, sizes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, list[int]]:
    """Sizes of tensors where they are known: -1 stands for an open one, tensors of unknown rank are absent.

    Args:
        model: Left as it is.
        sizes: Shapes of the graph's inputs, which fix its dynamic dimensions.
    """
    graph = onnx.GraphProto(name=model.graph.name or "graph")
    graph.node.extend(model.graph.node)
    graph.output.extend(helper.make_empty_tensor_value_info(v.name) for v in model.graph.output)
    for value in model.graph.input:
        shape = (sizes or {}).get(value.name)
        kind = value.type.tensor_type
        graph.input.append(value if shape is None else helper.make_tensor_value_info(value.name, kind.elem_type, shape))
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims, dtype=np.int64) > SMALL:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        else:
            graph.initializer.append(tensor)
    skeleton = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    found = {t.name: list(t.dims) for t in model.graph.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            found[value.name] = [d.dim_value if d.HasField("dim_value") else -1 for d in dims]
    return found


def cut(model: onnx.ModelProto, tensors: Collection[str]) -> onnx.ModelProto:
    """A copy that computes `tensors` alone, as its outputs, with the nodes and weights that they need.

    Raises:
        CalibrationError: The graph has no such tensor.
    """
    writers = {o: n for n in model.graph.node for o in n.output if o}
    inputs = {v.name for v in model.graph.input}
    if absent := sorted(t for t in tensors if t not in writers and t not in inputs):
        raise CalibrationError(f"The graph '{model.graph.name}' has no tensors {absent[:5]}.", "Observe what it has.")
    needed: set[str] = set()
    pending = [t for t in tensors if t in writers]
    while pending:
        name = pending.pop()
        if name and name not in needed:
            needed.add(name)
            if name in writers:
                pending += _inputs(writers[name])
    graph = onnx.GraphProto(name=model.graph.name or "graph")
    graph.node.extend(n for n in model.graph.node if needed.intersection(n.output))
    graph.initializer.extend(t for t in model.graph.initializer if t.name in needed)
    graph.input.extend(v for v in model.graph.input if v.name in needed)
    graph.output.extend(helper.make_empty_tensor_value_info(t) for t in tensors if t in writers)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _inputs(node: NodeProto) -> list[str]:
    """What a node reads, its subgraphs included."""
    names = list(node.input)
    for entry in node.attribute:
        for graph in ([entry.g] if entry.HasField("g") else []) + list(entry.graphs):
            for inner in graph.node:
                names += _inputs(inner)
    return names
