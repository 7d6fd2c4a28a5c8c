"""Rewrites that change no value and let ONNX Runtime find its fused operators.

A product that runs four times as fast leaves the operators around it as the larger part, so a quantised graph is worth
little while its GELUs run as five passes over the widest tensors.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto

from pixano_edge.calibration.graph import Graph

_HALF = 0.5


def order_gelus(model: onnx.ModelProto) -> int:
    """Writes ``x * (0.5 * (1 + erf(x / sqrt 2)))`` as ``(x * (1 + erf(..))) * 0.5``, in place, and counts them.

    Torch's exporter multiplies in the first order, ONNX Runtime's GELU fusion knows the second. Halving is exact, so
    both give the same values (but for magnitudes under 1e-37).
    """
    graph = Graph(model)
    found = 0
    for node in model.graph.node:
        if node.op_type == "Mul":
            for index in (0, 1):
                inner = graph.writer(node.input[index])
                if inner is not None and _halves(graph, inner, node, node.input[1 - index]):
                    half = 0 if graph.value(inner.input[0]) is not None else 1
                    value = inner.input[half]
                    inner.input[half] = node.input[1 - index]
                    node.input[1 - index] = value
                    found += 1
                    break
    return found


def _halves(graph: Graph, inner: NodeProto, outer: NodeProto, source: str) -> bool:
    """Whether `inner` is ``0.5 * (1 + erf(source / ..))``, read by `outer` alone."""
    if inner.op_type != "Mul" or graph.only_reader(inner.output[0]) is not outer:
        return False
    for index in (0, 1):
        held, added = graph.value(inner.input[index]), graph.writer(inner.input[1 - index])
        if held is not None and held.size == 1 and float(np.ravel(held)[0]) == _HALF and added is not None:
            erf = [w for name in added.input if (w := graph.writer(name)) is not None and w.op_type == "Erf"]
            scaled = graph.writer(erf[0].input[0]) if added.op_type == "Add" and erf else None
            return scaled is not None and source in scaled.input
    return False
