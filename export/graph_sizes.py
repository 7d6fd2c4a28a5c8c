"""How many values and bytes the weights of a graph have. No torch: calibration counts with it too."""

from __future__ import annotations

import numpy as np
import onnx

from pixano_edge.export.half_weights import WIDE


def count_parameters(model: onnx.ModelProto) -> int:
    """Number of values in the graph's initialisers."""
    return sum(int(np.prod(tensor.dims, dtype=np.int64)) for tensor in model.graph.initializer)


def stored_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the graph's initialisers as they are stored, inside or not."""
    return sum(map(_nbytes, model.graph.initializer))


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the graph's initialisers, inside or not; of those that are stored in half precision, once widened."""
    casts = {node.input[0]: node for node in model.graph.node if node.op_type == "Cast"}
    widened = {name for name, node in casts.items() if node.output[0] == name + WIDE}
    return sum(_nbytes(t) * (2 if t.name in widened else 1) for t in model.graph.initializer)


def _nbytes(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
