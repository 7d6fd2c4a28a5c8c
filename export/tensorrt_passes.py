"""Changes to a graph that TensorRT gains from; each keeps the numbers and says which limitation it is for.

What TensorRT needs was taken from its documentation, changelogs and issue threads, named at each pass. Short names:
TRT = github.com/NVIDIA/TensorRT, parser = github.com/onnx/onnx-tensorrt. "Fused attention" is the page *Fused
Attention* of NVIDIA's TensorRT documentation (before 10.16: *MHA fusion* in the developer guide).

Points that need no pass, and why:

* int64: native since TensorRT 9.0, which then also demands int64 buffers for int64 inputs (parser, Changelog 9.0 EA).
  The contracts of this project use int32 for labels and ids, so nothing is cast.
* Scatters, one-hot and control flow: the wrappers in `pixano_edge.export.sam2.graphs` avoid them at the source;
  `unwelcome` reports them should a later family bring one.
* fp16: see `pixano_edge.export.tensorrt_graph`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto

from pixano_edge.engine.errors import ExportError
from pixano_edge.export.graph_edit import GraphEditor, Shape, attribute
from pixano_edge.export.grid_sample import grid_sample_to_gather

Pass = Callable[[GraphEditor], int]
"""Changes the graph and returns the number of places."""


def join_key_transpose(edit: GraphEditor) -> int:
    """One Transpose instead of Reshape-Transpose-Reshape where the last two dimensions change places.

    torch's exporter writes the transposed key of `scaled_dot_product_attention` as (B, H, S, D) -> (B*H, S, D) ->
    (B*H, D, S) -> (B, H, D, S), with the shapes computed at run time. Fused attention wants MatMul, Softmax, MatMul on
    (batch, heads, sequence, head size); whether a release looks through the reshapes is its own affair: TRT#3575 and
    TRT#4167 are attention blocks left unfused on Orin.
    """
    changes = 0
    for last in edit.nodes("Reshape"):
        turn = edit.made_by(last.input[0], "Transpose")
        first = edit.made_by(turn.input[0], "Reshape") if turn is not None else None
        if turn is None or first is None:
            continue
        whole, merged, result = (edit.shapes.get(n) for n in (first.input[0], first.output[0], last.output[0]))
        if whole is None or merged is None or result is None or len(merged) < 2 or len(whole) < len(merged):
            continue
        swapped = [*range(len(merged) - 2), len(merged) - 1, len(merged) - 2]
        if attribute(turn, "perm") != swapped or merged[-2:] != whole[-2:]:
            continue
        if result != (*whole[:-2], whole[-1], whole[-2]) or last.output[0] in edit.outputs:
            continue
        perm = [*range(len(whole) - 2), len(whole) - 1, len(whole) - 2]
        joined = edit.add_node("Transpose", [first.input[0]], "key", perm=perm)
        edit.shapes[joined] = result
        changes += edit.replace(last.output[0], joined)
    return changes


def merge_transposes(edit: GraphEditor) -> int:
    """Two Transposes in a row become one.

    TensorRT maps each ONNX Transpose to a shuffle layer of its own. The pair arises where a head split is followed
    by the transposed key; the attention pattern above wants a single one.
    """
    changes = 0
    for node in edit.nodes("Transpose"):
        before = edit.made_by(node.input[0], "Transpose")
        if before is None:
            continue
        inner, outer = attribute(before, "perm"), attribute(node, "perm")
        if inner is None or outer is None:
            continue
        node.input[0] = before.input[0]
        _set_perm(node, [inner[i] for i in outer])
        changes += 1
    return changes


def drop_no_ops(edit: GraphEditor) -> int:
    """Removes Reshape, Expand, Transpose and Pad that change nothing.

    The exporter leaves a Reshape to the same shape after every attention and a Pad by zero before every window that
    divides its grid. TensorRT removes them only when it can prove it; with dynamic sizes the shapes of such a Reshape
    are run-time values.
    """
    changes = 0
    for node in edit.nodes("Reshape", "Expand", "Transpose", "Pad", "Identity"):
        source, result = edit.shapes.get(node.input[0]), edit.shapes.get(node.output[0])
        if node.op_type == "Identity":
            idle = True
        elif node.op_type == "Transpose":
            perm = attribute(node, "perm")
            idle = perm is not None and perm == sorted(perm)
        elif node.op_type == "Pad":
            pads = edit.constant(node.input[1])
            idle = pads is not None and not pads.any()
        else:
            idle = source is not None and source == result
        # An input of the graph that becomes an output needs the node between them.
        if idle and edit.replace(node.output[0], node.input[0]):
            changes += 1
    return changes


def constant_reshapes(edit: GraphEditor) -> int:
    """Target shapes of Reshape as constants: 0 copies a dimension, -1 takes what is left.

    The exporter computes them from the inputs' sizes with Shape, Slice, Concat and Gather. TensorRT runs such shape
    tensors on the host at every enqueue of a new shape, and what hangs on them is dynamic to its fusions even where
    the size is fixed. One Reshape can leave one dimension open; where two are unknown the arithmetic stays.
    """
    changes = 0
    for node in edit.nodes("Reshape"):
        if edit.constant(node.input[1]) is not None or attribute(node, "allowzero", 0):
            continue
        source, result = edit.shapes.get(node.input[0]), edit.shapes.get(node.output[0])
        target = None if source is None or result is None else _target(source, result)
        if target is not None:
            node.input[1] = edit.add_constant(np.array(target, np.int64), "shape")
            changes += 1
    return changes


def _target(source: Shape, result: Shape) -> list[int] | None:
    """Shape operand that turns `source` into `result`, with at most one -1; None if there is none."""
    target = []
    for index, size in enumerate(result):
        if isinstance(size, int):
            target.append(size)
        else:
            target.append(0 if index < len(source) and source[index] == size else -1)
    # A size of 0 would be read as "copy".
    return target if target.count(-1) <= 1 and 0 not in result else None


def scale_query_only(edit: GraphEditor) -> int:
    """The attention scale on the query alone, instead of its square root on query and key.

    Fused attention allows either, and asks that the scale comes before the first MatMul. One factor saves a
    multiplication of the larger operand (4096 keys of an image against a handful of tokens), and in fp16 one rounding
    of the key. Only where Softmax follows, and where both factors are single constants.
    """
    changes = 0
    for softmax in edit.nodes("Softmax"):
        product = edit.made_by(softmax.input[0], "MatMul")
        if product is None:
            continue
        query, key = (_scaled(edit, edit.made_by(name, "Mul")) for name in product.input)
        if query is None or key is None:
            continue
        # In float64, so that a scale of 1/sqrt(d) is rounded once.
        both = np.float64(query[1]) * np.float64(key[1])
        constant = edit.add_constant(np.array(both, query[1].dtype), "scale")
        name = edit.add_node("Mul", [query[0], constant], "query")
        edit.shapes[name] = edit.shapes.get(query[0], ())
        product.input[0], product.input[1] = name, key[0]
        changes += 1
    return changes


def _scaled(edit: GraphEditor, node: NodeProto | None) -> tuple[str, npt.NDArray[Any]] | None:
    """Tensor and factor of a multiplication by a single constant."""
    if node is None:
        return None
    for tensor, other in (node.input, node.input[::-1]):
        value = edit.constant(other)
        if value is not None and value.ndim == 0:
            return tensor, value
    return None


def one_hot_to_where(edit: GraphEditor) -> int:
    """OneHot over the last axis becomes Equal and Where.

    The parser takes OneHot only with a constant depth (parser, `docs/operators.md`); comparing with a constant row is
    plain pointwise code that fuses with its neighbours.
    """
    changes = 0
    for node in edit.nodes("OneHot"):
        depth, values = edit.constant(node.input[1]), edit.constant(node.input[2])
        kind = edit.types.get(node.input[0])
        if depth is None or values is None or kind not in (TensorProto.INT32, TensorProto.INT64):
            continue
        if attribute(node, "axis", -1) != -1:
            continue
        whole = np.int64 if kind == TensorProto.INT64 else np.int32
        count = int(depth.reshape(-1)[0])
        row = edit.add_constant(np.arange(count, dtype=whole), "classes")
        wrap = edit.add_constant(np.array(count, whole), "depth")
        axis = edit.add_constant(np.array([-1], np.int64), "axis")
        zero = edit.add_constant(np.array(0, whole), "zero")
        # Indices from -depth to -1 count from the end; anything else gives a row of `off`.
        negative = edit.add_node("Less", [node.input[0], zero], "negative")
        shifted = edit.add_node("Add", [node.input[0], wrap], "shifted")
        index = edit.add_node("Where", [negative, shifted, node.input[0]], "index")
        column = edit.add_node("Unsqueeze", [index, axis], "column")
        hit = edit.add_node("Equal", [column, row], "hit")
        off, on = (edit.add_constant(np.array(v), "value") for v in values)
        changes += edit.replace(node.output[0], edit.add_node("Where", [hit, on, off], "one_hot"))
    return changes


def halve_gelu_last(edit: GraphEditor) -> int:
    """``x * (1 + erf) * 0.5`` instead of ``x * ((1 + erf) * 0.5)`` in GELU.

    torch's exporter writes the second. ONNX Runtime knows the first, as torch wrote it before, and makes one operator
    of it on every provider that has one (``onnxruntime/core/optimizer/gelu_fusion.cc``), with the bias before it.
    """
    changes = 0
    for erf in edit.nodes("Erf"):
        inner = edit.made_by(erf.input[0], "Div")
        added = only_reader(edit, erf.output[0], "Add")
        half = only_reader(edit, added.output[0], "Mul") if added is not None else None
        last = only_reader(edit, half.output[0], "Mul") if half is not None else None
        if inner is None or added is None or half is None or last is None or inner.input[0] not in last.input:
            continue
        factor = next((n for n in half.input if n != added.output[0]), "")
        value = edit.constant(factor)
        if value is None or value.size != 1 or last.output[0] in edit.outputs:
            continue
        product = edit.add_node("Mul", [inner.input[0], added.output[0]], "gelu")
        result = edit.add_node("Mul", [product, factor], "gelu")
        shape = edit.shapes.get(last.output[0])
        if shape is not None:
            edit.shapes[product] = edit.shapes[result] = shape
        changes += edit.replace(last.output[0], result)
    return changes


def only_reader(edit: GraphEditor, name: str, op: str) -> NodeProto | None:
    """The one node that reads a tensor, if it is an `op` and the tensor is no output."""
    readers = [n for n in edit.graph.node if name in n.input]
    return readers[0] if len(readers) == 1 and readers[0].op_type == op and name not in edit.outputs else None


PASSES: tuple[Pass, ...] = (
    grid_sample_to_gather,
    one_hot_to_where,
    join_key_transpose,
    merge_transposes,
    constant_reshapes,
    drop_no_ops,
    scale_query_only,
)
"""In this order: the transposed key first, since it frees the shape arithmetic that hangs on it."""

PLAIN_PASSES: tuple[Pass, ...] = (
    join_key_transpose,
    merge_transposes,
    constant_reshapes,
    drop_no_ops,
    scale_query_only,
    halve_gelu_last,
)
"""Those that every graph gains from: fewer nodes, and no sizes computed at run time. ONNX Runtime would compute them on
the CPU, between the GPU's kernels, and could not record the graph's launches."""


def apply_passes(model: onnx.ModelProto, passes: Sequence[Pass]) -> dict[str, int]:
    """Changes an fp32 graph in place; returns the places changed by the pass's name, without passes that found nothing.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        ExportError: A pass left a graph that is no ONNX any more.
    """
    done = {}
    for change in passes:
        edit = GraphEditor(model)
        places = change(edit)
        if places:
            edit.finish()
            done[change.__name__] = places
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"The passes {sorted(done)} broke graph '{model.graph.name}': {str(error).splitlines()[0]}",
            "Please report this.",
        ) from error
    return done


UNWELCOME: dict[str, str] = {
    "ScatterElements": "imported as a plugin (parser, Changelog 10.3), which TensorRT for RTX does not have",
    "NonZero": "its output's size depends on the data, so buffers cannot be bound ahead",
    "NonMaxSuppression": "its output's size depends on the data, so buffers cannot be bound ahead",
    "If": "splits the engine and cannot be captured in a CUDA graph",
    "Loop": "splits the engine and cannot be captured in a CUDA graph",
    "Scan": "splits the engine and cannot be captured in a CUDA graph",
}
_FP16_MAX = 65504


def unwelcome(model: onnx.ModelProto) -> list[str]:
    """What TensorRT takes but handles badly; one sentence each. Empty for every graph of this project so far."""
    found = [f"{n.op_type} '{n.name}': {UNWELCOME[n.op_type]}" for n in model.graph.node if n.op_type in UNWELCOME]
    edit = GraphEditor(model)
    for node in edit.nodes("Softmax"):
        width = (edit.shapes.get(node.input[0]) or ("",))[-1]
        half = edit.types.get(node.input[0]) == TensorProto.FLOAT16
        if half and isinstance(width, int) and width >= _FP16_MAX:
            # github.com/tier4/autoware-ml/pull/95: 65536 keys of equal weight gave NaN in the fused kernel.
            found.append(f"Softmax '{node.name}': the sum over {width} keys overflows fp16 in fused attention")
    return found


def _set_perm(node: NodeProto, perm: list[int]) -> None:
    for entry in node.attribute:
        if entry.name == "perm":
            del entry.ints[:]
            entry.ints.extend(perm)
