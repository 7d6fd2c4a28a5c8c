"""Tiny ONNX graphs and their contracts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec

_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int32": TensorProto.INT32}


def spec(
    name: str = "twice",
    dims: tuple[int | str, ...] = ("P", 4),
    dtype: str = "float32",
    source: str = "x",
    target: str = "y",
    limit: int = 8,
) -> GraphSpec:
    """One input, one output of the same shape."""
    return GraphSpec(
        name,
        (TensorSpec(source, dtype, dims),),
        (TensorSpec(target, dtype, dims),),
        {d: (1, 1, limit) for d in dims if isinstance(d, str)},
    )


def save(path: Path, nodes: list[Any], graph: GraphSpec, constants: dict[str, np.ndarray] | None = None) -> Path:
    """Writes a graph whose inputs and outputs are those of `graph`."""

    def info(tensor: TensorSpec) -> Any:
        return helper.make_tensor_value_info(tensor.name, _TYPES[tensor.dtype], list(tensor.dims))

    made = helper.make_graph(
        nodes,
        graph.name,
        [info(t) for t in graph.inputs],
        [info(t) for t in graph.outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def twice(folder: Path, graph: GraphSpec | None = None) -> tuple[Path, GraphSpec]:
    """``y = relu(x + x)``: one intermediate tensor."""
    graph = graph or spec()
    source, target = graph.inputs[0].name, graph.outputs[0].name
    nodes = [helper.make_node("Add", [source, source], ["sum"]), helper.make_node("Relu", ["sum"], [target])]
    return save(folder / f"{graph.name}.onnx", nodes, graph), graph


def quantised_convolution(folder: Path) -> tuple[Path, GraphSpec]:
    """A convolution as `calibrate` writes it: Q and DQ in front, int8 weights by output channel, a bias in float."""
    graph = spec("quantised", dims=(1, 8, 16, 16))
    draw = np.random.default_rng(11)
    constants: dict[str, np.ndarray] = {
        "scale": np.float32(0.03),
        "zero": np.int8(0),
        "w": draw.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8),
        "w_scale": draw.uniform(0.001, 0.003, 8).astype(np.float32),
        "w_zero": np.zeros(8, np.int8),
        "b": draw.normal(size=8).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["v"], axis=0),
        helper.make_node("Conv", ["d", "v", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["c", "scale", "zero"], ["e"]),
        helper.make_node("DequantizeLinear", ["e", "scale", "zero"], ["y"]),
    ]
    return save(folder / "quantised.onnx", nodes, graph, constants), graph
