"""fp32 graph to fp16 graph with fp32 inputs and outputs, acceptable to strongly typed TensorRT.

The conversion is ONNX Runtime's ``onnxruntime.transformers.float16``, with its round trips undone and its nodes put
in order; what stays in fp32 is decided here. Angles of
Fourier features reach tens of radians, where fp16 has steps of 0.03, so everything up to a `Sin` or `Cos` stays.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pixano_edge.engine.errors import ExportError
from pixano_edge.export.extras import missing


def to_fp16(model: onnx.ModelProto, keep: Collection[str] = ()) -> onnx.ModelProto:
    """A copy of `model` that computes in fp16, with `Cast` at its inputs and outputs.

    Args:
        model: Computes in fp32.
        keep: Names of nodes that stay in fp32, beside those of `fp32_nodes`.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
    """
    try:
        from onnxruntime.transformers.float16 import convert_float_to_float16
    except ImportError as error:
        raise missing("onnxruntime", "Making fp16 graphs") from error
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    blocked = sorted(fp32_nodes(model) | set(keep))
    converted = convert_float_to_float16(copy, keep_io_types=True, node_block_list=blocked)
    drop_round_trips(converted.graph)
    sort_nodes(converted.graph)
    onnx.checker.check_model(converted, full_check=True)
    del converted.graph.value_info[:]
    return converted


def drop_round_trips(graph: onnx.GraphProto) -> None:
    """Reads an fp32 value directly where it was cast to fp16 and back.

    The conversion casts every graph input to fp16 and casts it back for the nodes that stay in fp32: a coordinate of
    1000 would be rounded to half a pixel on the way.
    """
    narrow = {n.output[0]: n.input[0] for n in graph.node if _casts_to(n, TensorProto.FLOAT16)}
    same: dict[str, str] = {}
    for node in graph.node:
        if _casts_to(node, TensorProto.FLOAT) and node.input[0] in narrow:
            same[node.output[0]] = narrow[node.input[0]]
    outputs = {v.name for v in graph.output}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in same and name not in outputs:
                node.input[index] = same[name]
    # Casts that nobody reads any more, the widening ones first.
    for _ in range(2):
        used = {name for node in graph.node for name in node.input} | outputs
        kept = [n for n in graph.node if n.op_type != "Cast" or n.output[0] in used]
        del graph.node[:]
        graph.node.extend(kept)


def _casts_to(node: NodeProto, kind: int) -> bool:
    return node.op_type == "Cast" and any(a.name == "to" and a.i == kind for a in node.attribute)


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Puts nodes after the producers of their inputs, as ONNX demands; the conversion appends its casts at the end.

    Nodes keep their order wherever it is right already.
    """
    known = {v.name for v in graph.input} | {t.name for t in graph.initializer} | {""}
    waiting = list(graph.node)
    ordered: list[NodeProto] = []
    while waiting:
        blocked = []
        for node in waiting:
            if known.issuperset(node.input):
                ordered.append(node)
                known.update(node.output)
            else:
                blocked.append(node)
        if len(blocked) == len(waiting):
            raise ExportError(f"Graph '{graph.name}' has a cycle at '{blocked[0].name}'.", "Please report this.")
        waiting = blocked
    del graph.node[:]
    graph.node.extend(ordered)


# Operators that only move values: nothing is rounded there.
_MOVES = frozenset(
    ("Concat", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Relu", "Reshape", "Slice", "Split",
     "Squeeze", "Transpose", "Unsqueeze", "Where")
)  # fmt: skip


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph for measuring what fp16 costs: fp32 kernels, every fp16 tensor rounded to fp16 where it arises.

    ONNX Runtime's CPU provider computes most fp16 operators in fp32 and leaves out the casts between them, so running
    an fp16 graph there hides most of its error. This graph rounds after each operator, as a GPU that multiplies in
    fp16 and accumulates in fp32 does. Run it without graph optimisations.

    Args:
        model: What `to_fp16` returned.
    """
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    half = {v.name for v in inferred.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT16}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.value_info[:]
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        nodes.append(copy)
        if _casts_to(copy, TensorProto.FLOAT16):
            _set_cast(copy, TensorProto.FLOAT)
        for attribute in copy.attribute:
            if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT16:
                values = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
        for index, name in enumerate(copy.output):
            if name in half and copy.op_type not in _MOVES and copy.op_type != "Constant":
                copy.output[index] = f"{name}.wide"
                nodes.append(helper.make_node("Cast", [f"{name}.wide"], [f"{name}.half"], to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(result, full_check=True)
    return result


def _set_cast(node: NodeProto, kind: int) -> None:
    for attribute in node.attribute:
        if attribute.name == "to":
            attribute.i = kind


def fp32_nodes(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that a `Sin` or `Cos` depends on, with the `Sin` and `Cos`.

    Not beyond a `Sigmoid`: a place that the network itself found is in 0..1, and all that it was found by would be
    among those nodes.
    """
    producer = {output: node for node in model.graph.node for output in node.output}
    pending = [node for node in model.graph.node if node.op_type in ("Sin", "Cos")]
    keep: set[str] = set()
    while pending:
        node = pending.pop()
        if node.name not in keep:
            keep.add(node.name)
            pending += [producer[i] for i in node.input if i in producer and producer[i].op_type != "Sigmoid"]
    return keep
