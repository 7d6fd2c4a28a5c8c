"""Weights of an fp32 graph stored in half precision, where that loses nothing.

A checkpoint whose weights were rounded to fp16 (or stored so) has fp32 graphs twice as large as what is in them. Such
an initialiser is stored as FLOAT16 with a `Cast` to FLOAT behind it. ONNX Runtime computes the Cast once, when it loads
the graph, and TensorRT when it builds the engine, so both run as before. A weight that fp16 cannot hold exactly stays
as it is; an ordinary fp32 checkpoint has practically no other.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pixano_edge.export.shared_weights import MIN_BYTES

READERS = frozenset(("Add", "Conv", "ConvTranspose", "Expand", "Gather", "Gemm", "MatMul", "Mul", "Reshape", "Sub"))
"""Operators that take a computed tensor as well as an initialiser. TensorRT for RTX 1.7 builds convolutions whose
kernels come from a Cast; TensorRT 10.3 was not tried. Weights of normalisations stay fp32: TensorRT's parser treats
them as weights of a layer, which a Cast is not."""
WIDE = "_wide"
"""At the end of the name of a weight that was widened."""


def narrow(model: onnx.ModelProto) -> int:
    """Stores weights in fp16 where that is exact; changes the model in place and returns the bytes saved.

    Only initialisers of `MIN_BYTES` and more that are read by `READERS` alone are looked at.
    """
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in set(node.input):
            readers[name].append(node)
    saved = 0
    casts = []
    outputs = {v.name for v in model.graph.output}
    for tensor in model.graph.initializer:
        name = tensor.name
        suits = tensor.data_type == TensorProto.FLOAT and len(tensor.raw_data) >= MIN_BYTES and name not in outputs
        if not suits or not all(n.op_type in READERS for n in readers[name]):
            continue
        values = numpy_helper.to_array(tensor)
        half = exact_half(values)
        if half is None:
            continue
        for node in readers[name]:
            for index, source in enumerate(node.input):
                if source == name:
                    node.input[index] = name + WIDE
        casts.append(helper.make_node("Cast", [name], [name + WIDE], name=f"node_{name}{WIDE}", to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(half, name))
        saved += half.nbytes
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return saved


def widen(model: onnx.ModelProto) -> None:
    """Undoes `narrow` in place, for changes to the graph that look at its weights."""
    halves = drop_casts(model)
    for tensor in model.graph.initializer:
        if tensor.name in halves:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def drop_casts(model: onnx.ModelProto) -> frozenset[str]:
    """Lets nodes read narrowed weights themselves, in place; the model is whole once these are float32.

    Contents are not looked at, so they may lie in other files.

    Returns:
        Names of the initialisers that are stored in half precision.
    """
    widened = {
        n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast" and n.output[0] == n.input[0] + WIDE
    }
    kept = [n for n in model.graph.node if n.output[0] not in widened]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    for node in model.graph.node:
        for index, source in enumerate(node.input):
            if source in widened:
                node.input[index] = widened[source]
    return frozenset(widened.values())


def exact_half(values: np.ndarray) -> np.ndarray | None:
    """The values in fp16 if every one of them is kept exactly."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), values) else None
