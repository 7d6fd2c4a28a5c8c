"""Explicit quantisation: int8 weights and `QuantizeLinear`/`DequantizeLinear` pairs, placed where kernels use them.

One file for ONNX Runtime and for TensorRT, so everything is symmetric (zero point 0), activations have one scale,
weights one per output channel, and biases stay in float: ``int8 weight - DQ`` and ``tensor - Q - DQ`` in front of the
product. What ONNX Runtime 1.32 makes of it decides the rest (docs/calibration-graphs.md has the figures):

- ``MatMul`` without a pair behind it becomes ``MatMulIntegerToFloat``: int8 in, float out, nothing rounded twice. But
  a bias of one or two dimensions is merged into a float ``Gemm`` before that, and the product stays in float. So a
  bias gets a third dimension, or is subtracted with the opposite sign where the product has only two; ``Gemm`` nodes
  are written as such a MatMul.
- ``Conv`` becomes ``QLinearConv`` only with a pair behind it that has one reader; others stay in float. Where a Relu
  follows, the pair before it and the pair that the next layer reads share one scale, so that the second rounds
  nothing.
- On x86, signed activations are rewritten to unsigned ones, for the sake of the kernels, where a `QuantizeLinear` has
  one reader; where it has more, as in front of query, key and value, all of them stay in float. So each product has a
  pair of its own. Equal pairs would be merged again, therefore their scales differ by one unit in the last place.
- Pairs sit next to the products: ONNX Runtime and TensorRT move them over reshapes and transpositions themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto

from pixano_edge.calibration import smooth as smoothing
from pixano_edge.calibration.blocks import blocks as find_blocks
from pixano_edge.calibration.calibrators import Range, levels
from pixano_edge.calibration.graph import LINEAR, Graph, digest, infer_shapes
from pixano_edge.calibration.observe import Observations
from pixano_edge.calibration.patterns import order_gelus
from pixano_edge.engine.errors import CalibrationError
from pixano_edge.export.graph_edit import attribute
from pixano_edge.export.graph_sizes import stored_bytes
from pixano_edge.export.half_weights import narrow

MIN_CONSTANT = 1 << 14
"""Bytes of an added constant from which on it is stored in fp16."""
MIN_OPSET = 13
"""`DequantizeLinear` has scales by channel from here on."""


@dataclass
class QuantizationReport:
    """What `quantize` did.

    Attributes:
        blocks: Names of the quantised blocks.
        kept: Blocks that were asked for and stayed in float, with the reason.
        ranges: By tensor of the fp32 graph that is quantised.
        smoothed: Blocks whose channels were rescaled, with the strength.
        weight_bytes: Of the weights before and after, as they are stored.
    """

    blocks: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, Range] = field(default_factory=dict)
    smoothed: dict[str, float] = field(default_factory=dict)
    weight_bytes: tuple[int, int] = (0, 0)


def tensors(model: onnx.ModelProto, blocks: Collection[str] | None = None) -> list[str]:
    """The tensors that must be observed to quantise some blocks, all of them by default."""
    graph = Graph(model)
    nodes = {node.name: node for node in model.graph.node}
    found: dict[str, None] = {}
    for block in find_blocks(model):
        if blocks is None or block.name in blocks:
            for name in block.nodes:
                found[nodes[name].input[0]] = None
                if nodes[name].op_type == "Conv":
                    found[_result(graph, nodes[name])] = None
    return list(found)


def quantize(
    model: onnx.ModelProto,
    observations: Observations,
    *,
    blocks: Collection[str] | None = None,
    method: str = "auto",
    smooth: float | str | None = "search",
) -> tuple[onnx.ModelProto, QuantizationReport]:
    """A copy of a graph in which some blocks compute in int8.

    Args:
        model: The fp32 graph that was observed; left as it is.
        observations: Of `tensors(model, blocks)` at least.
        blocks: Names, see `blocks.blocks`; None for all.
        method: How ranges are found, see `calibrators`.
        smooth: Strength with which channels are rescaled first, see `smooth`; ``search`` finds the best for each
            place; None for none.

    Raises:
        CalibrationError: The observations are another graph's or lack a tensor, a block is unknown, a weight is not
            finite, or the graph's opset is too old.
    """
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset < MIN_OPSET:
        raise CalibrationError(f"The graph has opset {opset}.", f"Export it with opset {MIN_OPSET} or later.")
    if observations.model_sha256 != digest(model):
        raise CalibrationError("The observations are those of another graph.", "Observe this graph.")
    known = find_blocks(model)
    if unknown := sorted(set(blocks or ()) - {b.name for b in known}):
        raise CalibrationError(f"The graph has no blocks {unknown[:5]}.", f"It has {[b.name for b in known][:5]}...")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    order_gelus(copy)
    chosen = [block for block in known if blocks is None or block.name in blocks]
    work = _Quantizer(copy, observations, method)
    if smooth is not None:
        work.smooth({block.name: block.nodes for block in chosen}, _strength(smooth))
    for block in chosen:
        work.quantize(block.name, block.nodes)
    work.report.weight_bytes = (stored_bytes(model), 0)
    work.graph.finish()
    if work.report.blocks:
        _round_constants(copy)
    narrow(copy)
    onnx.checker.check_model(copy)
    work.report.weight_bytes = (work.report.weight_bytes[0], stored_bytes(copy))
    return copy, work.report


def quantize_weight(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 with one scale per channel.

    Args:
        weight: Finite.
        axis: Of the output channels.

    Returns:
        Values of -127 to 127 and the scales (C,), above 0; a channel of zeros has scale 1.

    Raises:
        CalibrationError: A value is not finite.
    """
    if not np.isfinite(weight).all():
        raise CalibrationError("A weight is not finite.", "The checkpoint is damaged; export it again.")
    others = tuple(i for i in range(weight.ndim) if i != axis)
    peaks = np.abs(weight).max(axis=others)
    # A peak so small that its scale would be 0 is a channel of zeros too.
    scales = (peaks / levels(8)).astype(np.float32)
    scales = np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)
    shape = [1] * weight.ndim
    shape[axis] = -1
    return np.clip(np.rint(weight / scales.reshape(shape)), -levels(8), levels(8)).astype(np.int8), scales


def _round_constants(model: onnx.ModelProto) -> None:
    """Rounds large constants that are only added (position embeddings) to fp16, in which `narrow` then stores them.

    They can be as large as all int8 weights together; fp16's error is a hundredth of int8's. In place.
    """
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    for tensor in model.graph.initializer:
        if (
            tensor.data_type == onnx.TensorProto.FLOAT
            and len(tensor.raw_data) >= MIN_CONSTANT
            and readers.get(tensor.name) == {"Add"}
        ):
            values = onnx.numpy_helper.to_array(tensor)
            if np.abs(values).max() < np.finfo(np.float16).max:
                rounded = values.astype(np.float16).astype(np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(rounded, tensor.name))


def _strength(smooth: float | str) -> float | None:
    """The number that was given; None for a search."""
    if smooth == "search":
        return None
    if isinstance(smooth, str) or not 0 < smooth < 1:
        raise CalibrationError(f"'{smooth}' is no strength of smoothing.", "Use one above 0 and below 1, or search.")
    return smooth


class _Quantizer:
    """Changes a graph block by block."""

    def __init__(self, model: onnx.ModelProto, observations: Observations, method: str) -> None:
        self.graph = Graph(model)
        self.report = QuantizationReport()
        self._nodes = {node.name: node for node in model.graph.node}
        self._ranks = {name: len(dims) for name, dims in infer_shapes(model).items()}
        self._observations = observations
        self._method = method
        self._pairs: dict[str, int] = {}  # tensor -> how many pairs it has
        self._rescaled: dict[str, Range] = {}  # by tensor as it is read now
        self._weights: dict[tuple[str, bool], str] = {}

    def smooth(self, chosen: Mapping[str, Collection[str]], strength: float | None) -> None:
        """Rescales channels, and notes the ranges of what was rescaled."""
        done = smoothing.smooth(self.graph, self._observations, chosen, strength)
        by_node = {node: made for made in done.values() for node in made.readers}
        for tensor, made in done.items():
            self._rescaled[tensor] = smoothing.smoothed(self._observations, made, self._method)
        self.report.smoothed = {
            name: by_node[node].strength for name, nodes in chosen.items() for node in nodes if node in by_node
        }

    def quantize(self, name: str, nodes: Collection[str]) -> None:
        """Quantises a block, or notes why it stays."""
        members = [self._nodes[node] for node in nodes]
        shared = [n for n in members if n.op_type == "Conv" and self._is_shared(n.output[0])]
        if shared:
            self.report.kept[name] = "several nodes read its result, for which ONNX Runtime has no int8 convolution"
            return
        needed = {node.input[0]: None for node in members}
        needed |= {_result(self.graph, node): None for node in members if node.op_type == "Conv"}
        for tensor in needed:
            if tensor not in self.report.ranges:
                try:
                    self.report.ranges[tensor] = self._range(tensor)
                except CalibrationError as error:
                    if not self._observations[tensor].count or self._observations[tensor].largest > 0:
                        raise
                    self.report.kept[name] = f"{tensor}: {error.message}"
                    return
        for node in members:
            if node.op_type in LINEAR:
                self._linear(node)
            else:
                self._convolution(node)
        self.report.blocks.append(name)

    def _is_shared(self, tensor: str) -> bool:
        """Whether a tensor is read more than once."""
        return len(self.graph.readers(tensor)) + (tensor in self.graph.outputs) > 1

    def _range(self, tensor: str) -> Range:
        if tensor in self._rescaled:
            return self._rescaled[tensor]
        return self._observations.range(tensor, self._method)

    def _linear(self, node: NodeProto) -> None:
        weight, bias = node.input[1], node.input[2] if len(node.input) > 2 else ""
        transposed = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
        source, output = self._pair(node.input[0]), node.output[0]
        graph = self.graph
        if node.op_type == "Gemm":
            node.op_type = "MatMul"
            del node.attribute[:]
            del node.input[:]
            node.input.extend([source, self._weight(weight, 1, transposed)])
            if bias:
                node.output[0] = graph.fresh(f"{output}_product")
                self._subtract(node.output[0], bias, output)
            return
        node.input[0], node.input[1] = source, self._weight(weight, 1, False)
        reader = graph.only_reader(output)
        if reader is None or reader.op_type != "Add":
            return
        index = 1 if reader.input[0] == output else 0
        held = graph.value(reader.input[index])
        if held is None or held.ndim > 2 or output not in self._ranks:
            return
        if self._ranks[output] > 2:
            wide = held.reshape((1,) * (3 - held.ndim) + held.shape)
            graph.set_value(reader.input[index], wide, owner=reader, index=index)
        else:
            bias = reader.input[index]
            reader.op_type = "Sub"
            del reader.input[:]
            reader.input.extend([output, graph.add_constant(f"{bias}_negative", -held)])

    def _subtract(self, product: str, bias: str, output: str) -> None:
        """Adds a bias with two signs: ONNX Runtime merges an Add into a Gemm, which is float."""
        held = self.graph.value(bias)
        minuend = self.graph.add_constant(f"{bias}_negative", -held) if held is not None else None
        op, other = ("Sub", minuend) if minuend is not None else ("Add", bias)
        self.graph.model.graph.node.append(
            onnx.helper.make_node(op, [product, other], [output], name=f"node_{output}_bias")
        )

    def _convolution(self, node: NodeProto) -> None:
        result = _result(self.graph, node)
        amax = self.report.ranges[result]
        node.input[0] = self._pair(node.input[0])
        node.input[1] = self._weight(node.input[1], 0, False)
        output = node.output[0]
        # Readers of the output, and the output of the graph, keep its name; the convolution gets another.
        inner = self.graph.fresh(f"{output}_float")
        node.output[0] = inner
        scale, zero = self._scale(output, amax.scale())
        quantised = self.graph.add_node("QuantizeLinear", [inner, scale, zero], f"{output}_int8")
        name = f"node_{self.graph.fresh(f'{output}_result')}"
        node = onnx.helper.make_node("DequantizeLinear", [quantised, scale, zero], [output], name=name)
        self.graph.model.graph.node.append(node)

    def _pair(self, tensor: str) -> str:
        """What a product reads instead of a tensor. Every product has a pair of its own, see the module."""
        scale = np.float32(self.report.ranges[tensor].scale())
        for _ in range(self._pairs.get(tensor, 0)):
            scale = np.nextafter(scale, np.float32(np.inf))
        self._pairs[tensor] = self._pairs.get(tensor, 0) + 1
        inputs = self._scale(tensor, float(scale))
        quantised = self.graph.add_node("QuantizeLinear", [tensor, *inputs], f"{tensor}_int8")
        return self.graph.add_node("DequantizeLinear", [quantised, *inputs], f"{tensor}_dequantised")

    def _scale(self, tensor: str, scale: float) -> tuple[str, str]:
        """Names of a tensor's scale and zero point."""
        if not np.isfinite(np.float32(scale)) or np.float32(scale) <= 0:
            raise CalibrationError(f"The scale of '{tensor}' is {scale}.", "Observe the graph on real data.")
        name = self.graph.add_constant(f"{tensor}_scale", np.array(scale, np.float32))
        if "int8_zero" not in self.graph.constants:
            self.graph.add_constant("int8_zero", np.array(0, np.int8))
        return name, "int8_zero"

    def _weight(self, name: str, axis: int, transposed: bool) -> str:
        """Name of a weight behind its `DequantizeLinear`."""
        if (name, transposed) not in self._weights:
            weight = self.graph.value(name)
            assert weight is not None
            values, scales = quantize_weight(np.ascontiguousarray(weight.T) if transposed else weight, axis)
            inputs = [
                self.graph.add_constant(f"{name}_int8", values),
                self.graph.add_constant(f"{name}_scales", scales),
                self.graph.add_constant(f"{name}_zeros", np.zeros(len(scales), np.int8)),
            ]
            dequantised = self.graph.add_node("DequantizeLinear", inputs, f"{name}_dequantised", axis=axis)
            self._weights[name, transposed] = dequantised
        return self._weights[name, transposed]


def _result(graph: Graph, node: NodeProto) -> str:
    """The tensor whose range a convolution's output has: behind the Relu, if one follows."""
    reader = graph.only_reader(node.output[0])
    return reader.output[0] if reader is not None and reader.op_type == "Relu" else node.output[0]
