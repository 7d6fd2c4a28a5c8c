"""Editing an ONNX graph with the symbolic shape of every tensor at hand.

Shapes come from ONNX Runtime's symbolic inference, which keeps sums such as ``N + 6``; onnx's own inference gives
them new names, so that two equal shapes no longer look equal. It serves for graphs that ONNX Runtime's cannot follow,
those with `Range`: there fewer places are found to be alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pixano_edge.export.extras import missing
from pixano_edge.export.fp16 import sort_nodes

Shape = tuple[int | str, ...]
"""Sizes; a string is a name or an expression, and equal strings are equal sizes."""
SMALL = 1024
"""Initialisers with more values than this are no shape arithmetic; their contents are left out of the inference."""


class GraphEditor:
    """A graph whose nodes can be looked up, replaced and removed. Changes are made in the given model.

    Args:
        model: Changed in place; complete only after `finish`.

    Attributes:
        graph: The model's graph.
        shapes: Symbolic shape by tensor name, where it is known.
        types: Element type by tensor name, where it is known.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.graph = model.graph
        self.shapes, self.types = infer_shapes(model)
        self.outputs = {v.name for v in self.graph.output}
        self.constants = {t.name: t for t in self.graph.initializer}
        self._producers = {o: n for n in self.graph.node for o in n.output if o}
        self._made = 0

    def nodes(self, *ops: str) -> Iterator[NodeProto]:
        """Nodes of the given operators, in graph order; the graph may change meanwhile."""
        return iter([n for n in self.graph.node if n.op_type in ops])

    def producer(self, name: str) -> NodeProto | None:
        """The node that writes a tensor; None for inputs and initialisers."""
        return self._producers.get(name)

    def made_by(self, name: str, op: str) -> NodeProto | None:
        """The node that writes a tensor, if it is an `op`."""
        node = self.producer(name)
        return node if node is not None and node.op_type == op else None

    def constant(self, name: str) -> npt.NDArray[Any] | None:
        """Value of an initialiser; None if the tensor is computed."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def add_constant(self, value: npt.NDArray[Any], hint: str) -> str:
        """Adds an initialiser and returns its name; equal small ones are shared."""
        for name, tensor in self.constants.items():
            same = (
                tensor.data_type == helper.np_dtype_to_tensor_dtype(value.dtype) and tuple(tensor.dims) == value.shape
            )
            if same and value.size <= SMALL and np.array_equal(numpy_helper.to_array(tensor), value):
                return name
        tensor = numpy_helper.from_array(value, self.fresh(hint))
        self.graph.initializer.append(tensor)
        self.constants[tensor.name] = tensor
        self.shapes[tensor.name] = tuple(tensor.dims)
        self.types[tensor.name] = tensor.data_type
        return tensor.name

    def add_node(self, op: str, inputs: Sequence[str], hint: str, **attributes: Any) -> str:
        """Appends a node with one output, whose new name is returned. Order is put right by `finish`."""
        output = self.fresh(hint)
        self.graph.node.append(helper.make_node(op, list(inputs), [output], name=f"node_{output}", **attributes))
        self._producers[output] = self.graph.node[-1]
        return output

    def fresh(self, hint: str) -> str:
        """A tensor name that is not taken; the same for the same graph and order of changes."""
        self._made += 1
        return f"trt_{hint}_{self._made}"

    def replace(self, old: str, new: str) -> bool:
        """Makes every reader of `old` read `new`. False, and no change, when `old` is an output of the graph."""
        if old in self.outputs:
            return False
        for node in self.graph.node:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new
        return True

    def finish(self) -> None:
        """Removes what nothing reads any more, and puts the nodes in order.

        Raises:
            ExportError: The changes made a cycle.
        """
        producers = {o: n for n in self.graph.node for o in n.output if o}
        needed: set[str] = set()
        pending = list(self.outputs)
        while pending:
            name = pending.pop()
            if name and name not in needed:
                needed.add(name)
                if name in producers:
                    pending += producers[name].input
        kept = [n for n in self.graph.node if needed.intersection(n.output)]
        del self.graph.node[:]
        self.graph.node.extend(kept)
        for index in reversed(range(len(self.graph.initializer))):
            if self.graph.initializer[index].name not in needed:
                del self.graph.initializer[index]
        sort_nodes(self.graph)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Value of a node's attribute; text as str."""
    for entry in node.attribute:
        if entry.name == name:
            value = helper.get_attribute_value(entry)
            return value.decode() if isinstance(value, bytes) else value
    return default


def infer_shapes(model: onnx.ModelProto) -> tuple[dict[str, Shape], dict[str, int]]:
    """Symbolic shapes and element types by tensor name; unknown ones are absent.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
    """
    try:
        from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
    except ImportError as error:
        raise missing("onnxruntime", "Fitting graphs for TensorRT") from error
    skeleton = _without_weights(model)
    if any(node.op_type == "Range" for node in model.graph.node):
        # Sizes computed from others: ONNX Runtime's inference stops where it cannot show that two expressions, such as
        # floor(floor(H / 4) / 2) and floor(H / 8), are equal. onnx's own gives every such size a name of its own.
        inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    else:
        inferred = SymbolicShapeInference.infer_shapes(skeleton, auto_merge=False).graph
    shapes: dict[str, Shape] = {t.name: tuple(t.dims) for t in model.graph.initializer}
    types: dict[str, int] = {t.name: t.data_type for t in model.graph.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = value.type.tensor_type
        types[value.name] = tensor.elem_type
        if tensor.HasField("shape"):
            dims = [d.dim_param or (d.dim_value if d.HasField("dim_value") else "") for d in tensor.shape.dim]
            if "" not in dims:
                shapes[value.name] = tuple(dims)
    return shapes, types


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which large initialisers are inputs: the inference copies the model, and shapes need no weights."""
    graph = onnx.GraphProto(name=model.graph.name)
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims, dtype=np.int64) > SMALL and tensor.data_type != TensorProto.INT64:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        else:
            graph.initializer.append(tensor)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
