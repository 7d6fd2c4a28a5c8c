"""Small graphs with seeded weights, as the exporters write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pixano_edge.calibration.observe import open_graph

WIDTH, HIDDEN, TOKENS = 64, 96, 48


class Builder:
    """Collects nodes and seeded weights."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, name: str, *shape: int, scale: float | None = None) -> str:
        spread = scale if scale is not None else shape[0] ** -0.5
        return self.constant(name, (self.random.standard_normal(shape) * spread).astype(np.float32))

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def linear(self, source: str, name: str, inner: int, outer: int) -> str:
        product = self.node("MatMul", [source, self.weight(f"{name}_matrix", inner, outer)], f"{name}.product")
        return self.node("Add", [product, self.weight(f"{name}.bias", outer)], f"{name}.out")

    def norm(self, source: str, name: str, width: int) -> str:
        gain = self.constant(f"{name}.weight", (1 + 0.1 * self.random.standard_normal(width)).astype(np.float32))
        bias = self.weight(f"{name}.bias", width, scale=0.1)
        return self.node("LayerNormalization", [source, gain, bias], f"{name}.out", axis=-1, epsilon=1e-5)

    def model(self, shape: list[int | str], output: str, rank: int | None = None) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [
                helper.make_tensor_value_info(
                    output, TensorProto.FLOAT, ["a", "b", "c"][: len(shape) - 2 * (len(shape) == 4)]
                )
            ],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model)
        return model


def transformer(seed: int = 0, depth: int = 2) -> onnx.ModelProto:
    """Normalisation, query, key, value, attention, projection, normalisation, MLP with Relu; (1, 48, 64) in and out."""
    made = Builder(seed)
    stream = "x"
    for index in range(depth):
        scope = f"layers.{index}"
        normal = made.norm(stream, f"{scope}.norm1", WIDTH)
        query, key, value = (made.linear(normal, f"{scope}.attn.{part}", WIDTH, WIDTH) for part in "qkv")
        turned = made.node("Transpose", [key], f"{scope}.turned", perm=[0, 2, 1])
        scores = made.node("MatMul", [query, turned], f"{scope}.scores")
        weights = made.node("Softmax", [scores], f"{scope}.weights", axis=-1)
        mixed = made.node("MatMul", [weights, value], f"{scope}.mixed")
        added = made.node("Add", [stream, made.linear(mixed, f"{scope}.attn.proj", WIDTH, WIDTH)], f"{scope}.added")
        hidden = made.linear(made.norm(added, f"{scope}.norm2", WIDTH), f"{scope}.mlp.fc1", WIDTH, HIDDEN)
        active = made.node("Relu", [hidden], f"{scope}.active")
        stream = made.node("Add", [added, made.linear(active, f"{scope}.mlp.fc2", HIDDEN, WIDTH)], f"{scope}.end")
    return made.model([1, TOKENS, WIDTH], stream)


def convolutions(seed: int = 0) -> onnx.ModelProto:
    """Two convolutions with a Relu between them and a fully connected head; (1, 3, 16, 16) to (1, 32)."""
    made = Builder(seed)
    first = made.node(
        "Conv",
        ["x", made.weight("stem.conv.weight", 32, 3, 5, 5, scale=0.1), made.weight("stem.conv.bias", 32)],
        "stem.conv.out",
        pads=[2, 2, 2, 2],
    )
    active = made.node("Relu", [first], "stem.active")
    second = made.node(
        "Conv",
        [active, made.weight("body.conv.weight", 64, 32, 3, 3, scale=0.05), made.weight("body.conv.bias", 64)],
        "body.conv.out",
        pads=[1, 1, 1, 1],
        strides=[2, 2],
    )
    pooled = made.node("GlobalAveragePool", [second], "pooled")
    flat = made.node("Flatten", [pooled], "flat")
    head = made.node(
        "Gemm", [flat, made.weight("head.weight", 32, 64), made.weight("head.bias", 32)], "head.out", transB=1
    )
    return made.model([1, 3, 16, 16], head, 2)


def pictures(shape: tuple[int, ...], number: int = 4, seed: int = 1) -> list[dict[str, NDArray[np.float32]]]:
    """Feeds of normally distributed values."""
    random = np.random.default_rng(seed)
    return [{"x": random.standard_normal(shape).astype(np.float32)} for _ in range(number)]


def run(model: onnx.ModelProto, feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """The outputs of a graph, on one thread."""
    return open_graph(model, 1).run(None, feed)


def error(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Root of the mean squared difference, relative to `other`."""
    return float(np.sqrt(np.mean((one - other) ** 2) / np.mean(other**2)))
