"""An int8 decoder once more, of the operators that TensorRT has.

ONNX Runtime's decoder keeps its cache with GroupQueryAttention, which TensorRT lacks, so a bundle has a second graph of
it: plain operators around the same matrix products, under the same names (`export.decoder.graph`). What was seen of one
graph's tensors holds for the other's, so the second is quantised with the same ranges, the same rescaled channels and
the same layers. Nobody searches again, and nothing is judged twice; instead the two are compared, in three ways:

- Every int8 product must have the other's weights, scales and input, to the byte.
- With the rounding of activations taken out, both compute the same function but for the order of float operations:
  logits may differ by `FLOAT_BAR` of the largest one, which is what export asks of the fp32 graphs.
- As they run, a value next to the border of two int8 codes falls to one side here and to the other there, and what
  follows sees a whole step more or less. So they may differ, by at most what int8 itself costs: the distance of ONNX
  Runtime's form from fp32, root of the mean square over the same runs.

The third alone would miss a scale that is off by a quarter, the first alone a wrong wire in the attention.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from pixano_edge.calibration.blocks import blocks
from pixano_edge.calibration.graph import LINEAR, Graph, digest, load_graph
from pixano_edge.calibration.observe import open_graph
from pixano_edge.calibration.qdq import QuantizationReport, quantize
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.bundle.files import os_errors
from pixano_edge.engine.contracts import decoder as decoders
from pixano_edge.engine.contracts.decoder import DecoderConstants
from pixano_edge.engine.errors import CalibrationError

from .publish import FULL, SUFFIX
from .variant import Source

Floats = npt.NDArray[np.float32]
Feed = Mapping[str, npt.NDArray[Any]]

FLOAT_BAR = 1e-4
"""Largest difference without the rounding of activations, relative to the largest logit; export's own bar."""
INT8_BAR = 1.0
"""Root of the mean squared difference as they run, relative to that between int8 and fp32."""
STEPS = 4
"""Tokens at the end of a recorded prompt that are run one by one, each form on its own cache."""


@dataclass(frozen=True, eq=False)
class TensorrtForm:
    """The decoder's fp32 graph for TensorRT, and what it lacks of the other one.

    Attributes:
        path: Its file.
        absent: Blocks of the other graph that cannot be quantised in this one, with the reason.
    """

    path: Path
    absent: Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """How far the two int8 forms are from each other, over `runs` of the decoder.

    Attributes:
        products: In int8 in both.
        runs: Prompts and single tokens.
        unrounded: Largest difference of a logit without the rounding of activations, relative to the largest.
        rounded: Root of the mean squared difference as they run, relative to that between int8 and fp32.
        problems: Why the form must not be published, in words.
    """

    products: int
    runs: int
    unrounded: float
    rounded: float
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.products} products in int8 as in ONNX Runtime's form; over {self.runs} runs logits differ by "
            f"{self.unrounded:.1e} without the rounding of activations, and by {self.rounded:.2f} of what int8 itself "
            "costs with it"
        )


def read_form(bundle: Bundle, source: Source) -> TensorrtForm | None:
    """The graph for TensorRT of a decoder that has operators of ONNX Runtime's own; None where there is no such graph,
    or none is needed.

    Raises:
        CalibrationError: Its file cannot be read.
    """
    held = bundle.manifest.graphs[source.graph].variants
    if source.graph != decoders.DECODER or not held[FULL].onnxruntime_only or FULL + SUFFIX not in held:
        return None
    path = bundle.graph_path(source.graph, FULL, decoders.TENSORRT)
    return TensorrtForm(path, _absent(source, load_graph(path)))


def quantise_form(
    form: TensorrtForm, source: Source, names: Collection[str], method: str, smooth: float | str | None
) -> tuple[onnx.ModelProto, QuantizationReport]:
    """The form with the same blocks in int8, by what was observed of the other graph.

    Args:
        form: Of `read_form`.
        source: The other graph.
        names: Blocks, none of them in `form.absent`.
        method: See `quantize`, as the next.
        smooth: How channels are rescaled.

    Raises:
        CalibrationError: One of the blocks is absent; or as `quantize`.
    """
    if lacking := sorted(set(names).intersection(form.absent)):
        raise CalibrationError(
            f"'{lacking[0]}' cannot be quantised in the graph for TensorRT: {form.absent[lacking[0]]}.",
            "Leave it in high precision in both.",
        )
    model = load_graph(form.path)
    # The weights are the same and the tensors have the same names, so what was seen and remembered holds here too.
    seen = replace(source.observations, model_sha256=digest(model))
    return quantize(model, seen, blocks=set(names), method=method, smooth=smooth)


def int8_products(model: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    """The products of a quantised graph whose factors are both int8, by the name of their node.

    Returns:
        What each reads, and a digest of its weights, their scales, the activation's scale and all zero points.
    """
    constants = {t.name: t for t in model.graph.initializer}
    writers = {output: node for node in model.graph.node for output in node.output}
    found = {}
    for node in model.graph.node:
        if node.op_type not in (*LINEAR, "Conv"):
            continue
        activation, weight = (writers.get(name) for name in node.input[:2])
        if activation is None or weight is None or {activation.op_type, weight.op_type} != {"DequantizeLinear"}:
            continue
        pair = writers.get(activation.input[0])
        if pair is None or pair.op_type != "QuantizeLinear" or weight.input[0] not in constants:
            continue
        state = hashlib.sha256()
        for name in (*weight.input, *activation.input[1:], *pair.input[1:]):
            held = numpy_helper.to_array(constants[name])
            state.update(f"{held.dtype} {held.shape};".encode() + held.tobytes())
        found[node.name] = (pair.input[0], state.hexdigest())
    return found


def differing(ours: onnx.ModelProto, theirs: onnx.ModelProto) -> list[str]:
    """Where the int8 products of the form for TensorRT are not those of ONNX Runtime's, in words.

    Args:
        ours: The form for TensorRT.
        theirs: ONNX Runtime's.
    """
    made, wanted = int8_products(ours), int8_products(theirs)
    problems = [f"the product '{name}' is int8 in ONNX Runtime's form alone" for name in wanted if name not in made]
    problems += [f"the product '{name}' is int8 in the form for TensorRT alone" for name in made if name not in wanted]
    for name in wanted:
        if name in made and made[name][0] != wanted[name][0]:
            problems.append(f"the product '{name}' reads '{made[name][0]}' instead of '{wanted[name][0]}'")
        elif name in made and made[name] != wanted[name]:
            problems.append(f"the product '{name}' has other weights or scales than in ONNX Runtime's form")
    return problems


def compare(
    ours: Path,
    theirs: Path,
    full: Path,
    feeds: Sequence[Feed],
    constants: DecoderConstants,
    threads: int | None,
) -> Comparison:
    """Compares the form for TensorRT with ONNX Runtime's, product by product and by logits.

    Args:
        ours: File of the form for TensorRT, int8; graphs without rounding are written beside it for a while.
        theirs: Of ONNX Runtime's, int8.
        full: Of ONNX Runtime's in fp32.
        feeds: Recorded inputs of ONNX Runtime's form. Prompts are run as far as their last `STEPS` tokens, and these
            one by one.
        constants: Of the decoder.
        threads: Of ONNX Runtime.

    Raises:
        CalibrationError: ONNX Runtime does not take a graph, or there are no feeds.
        BundleError: The disk is full.
    """
    if not len(feeds):
        raise CalibrationError("The decoder never ran on these data.", "Give pictures and questions.")

    def run(file: Path, target: str) -> Floats:
        return _logits(file, feeds, target, constants, threads)

    def run_unrounded(model: onnx.ModelProto, target: str) -> Floats:
        wide = ours.with_name(f".{ours.name}.wide")
        try:
            with os_errors(f"writing '{wide}'"):
                wide.write_bytes(without_rounding(model).SerializeToString())
            return run(wide, target)
        finally:
            wide.unlink(missing_ok=True)

    # From files and one after another: each holds all weights of the decoder.
    held, other = onnx.load(ours), onnx.load(theirs)
    problems = differing(held, other)
    products = len(int8_products(held))
    plain = run_unrounded(held, decoders.TENSORRT)
    wanted = run_unrounded(other, decoders.ONNX)
    del held, other
    unrounded = float((np.abs(plain - wanted).max(axis=1) / np.abs(wanted).max(axis=1)).max())
    int8 = run(theirs, decoders.ONNX)
    apart, cost = _rms(run(ours, decoders.TENSORRT) - int8), _rms(run(full, decoders.ONNX) - int8)
    rounded = apart / cost if cost else float(apart > 0) * np.inf
    if not unrounded <= FLOAT_BAR:  # NaN too
        problems.append(
            f"without the rounding of activations its logits are {unrounded:.1e} of the largest from those of ONNX "
            f"Runtime's form, {FLOAT_BAR:g} at most"
        )
    if not rounded <= INT8_BAR:
        problems.append(
            f"its logits are {rounded:.2f} times as far from those of ONNX Runtime's int8 form as these are from fp32, "
            f"{INT8_BAR:g} at most"
        )
    return Comparison(products, len(int8), unrounded, rounded, tuple(problems))


def without_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a quantised graph in float32: int8 weights are widened, activations are not rounded."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = Graph(copy)
    instead: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        values, scale = graph.value(node.input[0]), graph.value(node.input[1])
        if values is not None and scale is not None:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            shape = [-1 if i == axis % values.ndim else 1 for i in range(values.ndim)]
            wide = values.astype(np.float32) * (scale.reshape(shape) if scale.ndim else scale)
            instead[node.output[0]] = graph.add_constant(f"{node.input[0]}_wide", wide.astype(np.float32))
        elif (pair := graph.writer(node.input[0])) is not None and pair.op_type == "QuantizeLinear":
            instead[node.output[0]] = pair.input[0]
    for node in copy.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = instead.get(name, name)
    kept = [n for n in copy.graph.node if n.op_type != "QuantizeLinear" and n.output[0] not in instead]
    del copy.graph.node[:]
    copy.graph.node.extend(kept)  # the int8 weights stay, unread: taking them out would copy the wide ones
    return copy


def _absent(source: Source, model: onnx.ModelProto) -> dict[str, str]:
    """Blocks of a graph that another one does not have as they are, with the reason."""
    there = {block.name: block for block in blocks(model)}
    held, other = Graph(source.model), Graph(model)
    nodes = {node.name: node for node in source.model.graph.node}
    theirs = {node.name: node for node in model.graph.node}
    found = {}
    for name, block in source.blocks.items():
        if name not in there or there[name].nodes != block.nodes:
            found[name] = "the decoder's graph for TensorRT has no such product"
            continue
        for node in block.nodes:
            ours, weight = theirs[node], other.weight(theirs[node])
            if (ours.op_type, ours.input[0]) != (nodes[node].op_type, nodes[node].input[0]):
                found[name] = "the decoder's graph for TensorRT has another product of this name"
            elif weight is None or not np.array_equal(weight, held.weight(nodes[node])):  # type: ignore[arg-type]
                found[name] = "the decoder's graph for TensorRT has other weights of this name"
    return found


def _logits(file: Path, feeds: Sequence[Feed], target: str, constants: DecoderConstants, threads: int | None) -> Floats:
    """Logits (runs, vocabulary) after every part of every feed, each on the cache that the parts before it left."""
    session = open_graph(file, threads or 0)
    names = constants.cache_names
    outputs = [decoders.LOGITS, *(present for _, present in names)]
    found = []
    for feed in feeds:
        embeds = feed[decoders.INPUTS_EMBEDS]
        filled = int(feed[decoders.SEQLENS_K][0]) - embeds.shape[1] + 1
        cache = {past: feed[past] if target == decoders.ONNX else feed[past][:, :, :filled] for past, _ in names}
        for start, end in _parts(embeds.shape[1]):
            inputs = {decoders.INPUTS_EMBEDS: embeds[:, start:end], **cache}
            if target == decoders.ONNX:
                inputs[decoders.SEQLENS_K] = np.array([filled + end - 1], np.int32)
            else:
                inputs[decoders.CACHE_POSITION] = np.arange(filled + start, filled + end, dtype=np.int32)
            if decoders.POSITION_IDS in feed:
                inputs[decoders.POSITION_IDS] = feed[decoders.POSITION_IDS][:, start:end]
            logits, *presents = session.run(outputs, {k: np.ascontiguousarray(v) for k, v in inputs.items()})
            cache = {past: present for (past, _), present in zip(names, presents)}
            found.append(logits[0])
    return np.stack(found)


def _parts(tokens: int) -> Iterator[tuple[int, int]]:
    """Where the parts of a recorded call start and end: the prompt, then its last tokens one by one."""
    first = max(1, tokens - STEPS)
    yield 0, first
    for start in range(first, tokens):
        yield start, start + 1


def _rms(difference: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
