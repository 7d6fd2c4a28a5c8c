"""Half precision with islands of float32 where the values that were seen demand it.

fp16 ends at 65504 and has full precision above 6e-5; bf16 has float32's range and 8 bits. So fp16 gets an island around
every tensor that came near the end of the range, and around those so small that most of their values would be rounded
to multiples of 6e-8. bf16 needs none for its range; nodes whose operator has no bf16 in the graph's opset stay float32
(Conv before opset 22), and so do the angles of Fourier features in both, see `export.fp16`.

ONNX Runtime's CPU provider has no bf16 kernels: such a graph is for GPUs. `rounded` gives one that runs anywhere and
rounds as either kind does, to measure what it costs.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, defs, helper, numpy_helper

from pixano_edge.calibration.graph import Graph
from pixano_edge.calibration.histograms import SMALLEST_NORMAL, Histogram
from pixano_edge.calibration.observe import Observations
from pixano_edge.engine.errors import CalibrationError
from pixano_edge.export import fp16

KINDS = ("fp16", "bf16")
LARGEST = 65504.0
MARGIN = 4.0
"""Other pictures give larger values than those that were seen: an island starts at `LARGEST` divided by this."""
_MOVES = frozenset(
    ("Concat", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Shape", "Slice", "Split", "Squeeze",
     "Transpose", "Unsqueeze")
)  # fmt: skip


def tensors(model: onnx.ModelProto) -> list[str]:
    """The tensors to observe: every float32 result that is not just another's values moved."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}
    return [
        name
        for node in model.graph.node
        if node.op_type not in _MOVES
        for name in node.output
        if kinds.get(name) == TensorProto.FLOAT
    ]


def islands(model: onnx.ModelProto, observations: Observations, kind: str = "fp16") -> dict[str, str]:
    """Names of the nodes that must stay in float32, each with the reason.

    Args:
        model: The fp32 graph that was observed.
        observations: Of `tensors(model)`; what was not observed is taken to be harmless.
        kind: ``fp16`` or ``bf16``.

    Raises:
        CalibrationError: There is no such kind.
    """
    _check(kind)
    kept = dict.fromkeys(fp16.fp32_nodes(model), "leads to a Sin or Cos")
    if kind == "bf16":
        opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        for node in model.graph.node:
            if not _takes_bf16(node.op_type, opset):
                kept.setdefault(node.name, f"{node.op_type} has no bf16 in opset {opset}")
        return kept
    graph = Graph(model)
    for tensor, reason in _unfit(observations).items():
        writer = graph.writer(tensor)
        for node in ([] if writer is None else [writer]) + graph.readers(tensor):
            kept.setdefault(node.name, f"{tensor} {reason}")
    return kept


def halve(
    model: onnx.ModelProto, observations: Observations, kind: str = "fp16"
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A copy in half precision with float32 inputs and outputs, and the islands with their reasons.

    Raises:
        CalibrationError: There is no such kind.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    kept = islands(model, observations, kind)
    made = fp16.to_fp16(model, kept)
    if kind == "bf16":
        _to_bf16(made, {t.name: t for t in model.graph.initializer})
        onnx.checker.check_model(made, full_check=True)
    return made, kept


def rounded(model: onnx.ModelProto, observations: Observations, kind: str = "fp16") -> onnx.ModelProto:
    """A float32 graph that rounds every tensor where `halve` computes in half precision. Run it unoptimised."""
    made = fp16.rounded(fp16.to_fp16(model, islands(model, observations, kind)))
    if kind == "bf16":
        originals = {t.name: t for t in model.graph.initializer}
        halves = {t.name for t in fp16.to_fp16(model, islands(model, observations, kind)).graph.initializer
                  if t.data_type == TensorProto.FLOAT16}  # fmt: skip
        for tensor in made.graph.initializer:
            if tensor.name in halves and tensor.name in originals:
                values = _bf16(numpy_helper.to_array(originals[tensor.name]))
                wide = (values.astype(np.uint32) << 16).view(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
        _swap_casts(made)
    return made


def _unfit(observations: Observations) -> dict[str, str]:
    """Tensors that fp16 cannot hold, with the reason."""
    found = {}
    for tensor, histogram in observations.histograms.items():
        if histogram.largest > LARGEST / MARGIN:
            found[tensor] = f"reached {histogram.largest:.3g}"
        elif 0 < (typical := _typical(histogram)) < SMALLEST_NORMAL:
            found[tensor] = f"is around {typical:.1e}, where fp16 loses bits"
    return found


def _typical(histogram: Histogram) -> float:
    """Root of the mean square of the values that are not 0."""
    total = int(histogram.counts.sum())
    return float(np.sqrt(histogram.centres**2 @ histogram.counts / total)) if total else 0.0


def _takes_bf16(op: str, opset: int) -> bool:
    try:
        schema = defs.get_schema(op, opset)
    except defs.SchemaError:
        return False
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    floats = [allowed.get(v.type_str, [v.type_str]) for v in (*schema.inputs[:1], *schema.outputs[:1])]
    # A node that takes no floats at all does not mind.
    return all("tensor(bfloat16)" in kinds or "tensor(float)" not in kinds for kinds in floats)


def _to_bf16(model: onnx.ModelProto, originals: dict[str, TensorProto]) -> None:
    """Turns what is fp16 into bf16; weights are rounded once, from float32."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            source = originals.get(tensor.name, tensor)
            _set_bf16(tensor, numpy_helper.to_array(source).astype(np.float32))
    for node in model.graph.node:
        for entry in node.attribute:
            if entry.name == "value" and entry.t.data_type == TensorProto.FLOAT16:
                _set_bf16(entry.t, numpy_helper.to_array(entry.t).astype(np.float32))
    _swap_casts(model)


def _swap_casts(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for entry in node.attribute:
            if node.op_type == "Cast" and entry.name == "to" and entry.i == TensorProto.FLOAT16:
                entry.i = TensorProto.BFLOAT16


def _set_bf16(tensor: TensorProto, values: np.ndarray) -> None:
    name, dims = tensor.name, list(values.shape)
    tensor.CopyFrom(helper.make_tensor(name, TensorProto.BFLOAT16, dims, _bf16(values).tobytes(), raw=True))


def _bf16(values: np.ndarray) -> np.ndarray:
    """The upper half of float32, rounded to nearest, ties to even; (…) uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return np.asarray((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, np.uint64).astype(np.uint16)


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise CalibrationError(f"Unknown half precision '{kind}'.", f"Known: {', '.join(KINDS)}.")
