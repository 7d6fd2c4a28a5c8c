"""Writing an ONNX graph node by node, with names that stay the same from export to export."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper

from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.export.decoder.store import WeightStore
from pixano_edge.export.half_weights import WIDE, exact_half
from pixano_edge.export.shared_weights import MIN_BYTES

OPSET = 18
IR_VERSION = 10
CONTRIB = "com.microsoft"
ONNX_TYPES = {
    "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int32": TensorProto.INT32,
    "int64": TensorProto.INT64, "uint8": TensorProto.UINT8,
}  # fmt: skip


class GraphWriter:
    """Collects nodes and initialisers; tensors are named after the node that writes them.

    Args:
        spec: Inputs and outputs of the graph.
        store: Where weights go.
        half: Store fp32 matrices in half precision where that is exact, see `half_weights`.
    """

    def __init__(self, spec: GraphSpec, store: WeightStore, half: bool = False) -> None:
        self._spec, self._store, self._half = spec, store, half
        self._nodes: list[NodeProto] = []
        self._weights: dict[str, TensorProto] = {}
        self._contrib = False

    def weight(self, name: str, values: npt.NDArray[Any]) -> str:
        """An initialiser; a name that is known already is not written again."""
        if name not in self._weights:
            self._weights[name] = self._store.tensor(name, values)
        return name

    def matrix(self, name: str, values: npt.NDArray[Any]) -> str:
        """An initialiser that is stored in half precision, with a Cast behind, where `half` says so."""
        half = exact_half(values) if self._half and values.dtype == np.float32 else None
        if half is None or half.nbytes < MIN_BYTES:
            return self.weight(name, values)
        if name in self._weights:
            return name + WIDE
        return self.cast(self.weight(name, half), "float32", name + WIDE)

    def ints(self, *values: int) -> str:
        """A constant of int64."""
        return self.weight(f"ints.{'.'.join(map(str, values))}", np.array(values, np.int64))

    def scalar(self, value: float, dtype: str) -> str:
        """A constant without dimensions."""
        return self.weight(f"{dtype}.{value:g}", np.array(value, dtype))

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Adds a node with one output, whose name is returned."""
        return self.split(op, inputs, name, [name], **attributes)[0]

    def split(
        self, op: str, inputs: list[str], name: str, outputs: list[str], contrib: bool = False, **attributes: Any
    ) -> list[str]:
        """Adds a node with several outputs; `contrib` is one of ONNX Runtime's own operators."""
        domain = CONTRIB if contrib else ""
        self._contrib |= contrib
        self._nodes.append(helper.make_node(op, inputs, outputs, name=f"node_{name}", domain=domain, **attributes))
        return outputs

    def cast(self, value: str, dtype: str, name: str) -> str:
        return self.node("Cast", [value], name, to=ONNX_TYPES[dtype])

    def finish(self) -> onnx.ModelProto:
        """The model; weights lie in the store."""
        inputs, outputs = (
            [helper.make_tensor_value_info(t.name, ONNX_TYPES[t.dtype], list(t.dims)) for t in tensors]
            for tensors in (self._spec.inputs, self._spec.outputs)
        )
        graph = helper.make_graph(self._nodes, self._spec.name, inputs, outputs, list(self._weights.values()))
        opsets = [helper.make_opsetid("", OPSET)] + ([helper.make_opsetid(CONTRIB, 1)] if self._contrib else [])
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="pixano-edge")
