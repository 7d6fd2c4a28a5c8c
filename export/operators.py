"""Which ONNX operators the parser of TensorRT 10.3 takes (JetPack 6), and a check of a graph against it.

No table of exactly that release was at hand. This one is conservative: an operator is listed when onnx-tensorrt's
``docs/operators.md`` of TensorRT 8.5 has it, or when ``docs/Changelog.md`` adds it in a release up to 10.3. Types add
INT64 to INT32 (native since 9.0) where the table of 10.15 agrees, and to casts BFLOAT16 (a data type since the table
of 9.2; also in that of 10.0). A restriction counts when any of these tables states
it, and what later releases allowed (tensor `axes` of `Pad` in 10.4) is refused. The parser of 8.6 was built with ONNX
1.13 (opset 18), so opset 18 is safe in 10.3; newer ones may be.

The check says that the parser should accept a graph, not that the engine is right or fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

MAX_OPSET = 18
FINDING = "TensorRT 10.3: "
"""Start of the manifest notes that hold what the check found."""

_FLOAT = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})
_INT = frozenset({TensorProto.INT32, TensorProto.INT64})
_BOOL = frozenset({TensorProto.BOOL})
_NUMBER = _FLOAT | _INT
_ANY = _NUMBER | _BOOL
_CASTABLE = _ANY | {TensorProto.BFLOAT16}


def _table() -> dict[str, frozenset[int]]:
    """Element types per operator, for its data input."""
    groups: list[tuple[str, Iterable[int]]] = [
        # Floating point only.
        (
            "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos "
            "Cosh CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool "
            "GridSample GroupNormalization HardSigmoid HardSwish InstanceNormalization IsInf LRN LayerNormalization "
            "LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization "
            "NonMaxSuppression NonZero PRelu Pow Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax "
            "ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Resize RoiAlign Round Selu Sigmoid Sin "
            "Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample",
            _FLOAT,
        ),
        # Floating point and integers.
        (
            "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min "
            "Mod Mul Neg Pad Range ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK",
            _NUMBER,
        ),
        # Moving data around.
        (
            "Cast Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity "
            "OneHot Reshape Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
            _ANY,
        ),
        ("And Not Or Xor", _BOOL),
        ("QuantizeLinear", _FLOAT),
        ("DequantizeLinear", {TensorProto.INT8}),
    ]
    table = {op: frozenset(types) for names, types in groups for op in names.split()}
    return {**table, "Cast": _CASTABLE}


OPERATORS = _table()

# Which input carries the data whose type is restricted, where it is not the first.
_DATA_INPUT = {"Where": 1}
# Inputs that must be known when the engine is built.
_CONSTANT_INPUTS: dict[str, tuple[int, ...]] = {
    "Slice": (3,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "CumSum": (1,),
    "OneHot": (1,),
    "TopK": (1,),
    "Dropout": (2,),
    **{
        f"Reduce{kind}": (1,)
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    },
}
_RESIZE: dict[str, set[Any]] = {
    "mode": {"nearest", "linear"},
    "coordinate_transformation_mode": {
        "half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners",
    },
    "nearest_mode": {"floor", "ceil", "round_prefer_floor", "round_prefer_ceil"},
    "keep_aspect_ratio_policy": {"stretch"},
    "antialias": {0},
}  # fmt: skip
_TOPK_LIMIT = 3840


class _Graph:
    """Element types, ranks and constants of a model by tensor name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        self.types: dict[str, int] = {t.name: t.data_type for t in inferred.initializer}
        self.ranks: dict[str, int] = {t.name: len(t.dims) for t in inferred.initializer}
        self.initializers = {t.name: t for t in inferred.initializer}
        for value in (*inferred.input, *inferred.value_info, *inferred.output):
            tensor = value.type.tensor_type
            self.types[value.name] = tensor.elem_type
            if tensor.HasField("shape"):
                self.ranks[value.name] = len(tensor.shape.dim)
        for node in inferred.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.initializers[node.output[0]] = node.attribute[0].t


def check_tensorrt_10_3(model: onnx.ModelProto) -> list[str]:
    """Every reason why TensorRT 10.3's ONNX parser may refuse a model; empty when none is known.

    Args:
        model: Complete model; weights may be inside only.

    Returns:
        One sentence per problem, each naming the node.
    """
    problems = [
        f"opset {o.version} of '{o.domain or 'ai.onnx'}' is newer than {MAX_OPSET} or not a standard domain"
        for o in model.opset_import
        if (o.domain in ("", "ai.onnx") and o.version > MAX_OPSET) or o.domain not in ("", "ai.onnx")
    ]
    if model.functions:
        problems.append(f"{len(model.functions)} local functions; inline them")
    try:
        graph = _Graph(model)
    except onnx.shape_inference.InferenceError as error:
        return [*problems, f"types cannot be inferred: {str(error).splitlines()[0]}"]
    for node in model.graph.node:
        problems += [f"{node.op_type} '{node.name}': {reason}" for reason in _check_node(node, graph)]
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type not in _ANY:
            problems.append(f"'{value.name}': type {_type_name(value.type.tensor_type.elem_type)} is not supported")
    return problems


def _check_node(node: NodeProto, graph: _Graph) -> list[str]:
    allowed = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if allowed is None:
        return ["not known to TensorRT 10.3's parser" + (f" (domain {node.domain})" if node.domain else "")]
    problems = []
    position = _DATA_INPUT.get(node.op_type, 0)
    if len(node.input) > position:
        kind = graph.types.get(node.input[position], TensorProto.UNDEFINED)
        if kind not in allowed:
            problems.append(f"input type {_type_name(kind)} is not supported")
    problems += [
        f"input {index} must be a constant"
        for index in _CONSTANT_INPUTS.get(node.op_type, ())
        if len(node.input) > index and node.input[index] and node.input[index] not in graph.initializers
    ]
    special = _SPECIAL.get(node.op_type)
    return problems + (special(node, graph) if special else [])


def _attribute(node: NodeProto, name: str) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            value = helper.get_attribute_value(attribute)
            return value.decode() if isinstance(value, bytes) else value
    return None


def _resize(node: NodeProto, graph: _Graph) -> list[str]:
    return [
        f"{name} {value!r} is not supported"
        for name, values in _RESIZE.items()
        if (value := _attribute(node, name)) is not None and value not in values
    ]


def _pad(node: NodeProto, graph: _Graph) -> list[str]:
    # Opset 18 gave Pad an `axes` input, which the parser reads from 10.4 on.
    return ["input axes is not supported"] if len(node.input) > 3 and node.input[3] else []


def _one_output(node: NodeProto, graph: _Graph) -> list[str]:
    extra = [o for o in node.output[1:] if o]
    return [f"only the first output is supported, not {extra}"] if extra else []


def _pool(node: NodeProto, graph: _Graph) -> list[str]:
    problems = _one_output(node, graph)
    kernel, dilations = _attribute(node, "kernel_shape"), _attribute(node, "dilations")
    if isinstance(kernel, list) and len(kernel) not in (2, 3):
        problems.append("only 2-D and 3-D pooling is supported")
    if isinstance(dilations, list) and any(d != 1 for d in dilations):
        problems.append("dilations are not supported")
    return problems


def _top_k(node: NodeProto, graph: _Graph) -> list[str]:
    count = graph.initializers.get(node.input[1])
    if count is not None and int(numpy_helper.to_array(count).max()) >= _TOPK_LIMIT:
        return [f"K must be below {_TOPK_LIMIT}"]
    return []


def _quantize(node: NodeProto, graph: _Graph) -> list[str]:
    if len(node.input) < 3 or not node.input[2]:
        return []
    zero = graph.initializers.get(node.input[2])
    if zero is None or numpy_helper.to_array(zero).any():
        return ["the zero point must be a constant 0"]
    return []


def _scatter_nd(node: NodeProto, graph: _Graph) -> list[str]:
    reduction = _attribute(node, "reduction")
    return [] if reduction in (None, "none") else [f"reduction {reduction!r} is not supported"]


def _einsum(node: NodeProto, graph: _Graph) -> list[str]:
    return ["ellipsis is not supported"] if "..." in str(_attribute(node, "equation")) else []


def _grid_sample(node: NodeProto, graph: _Graph) -> list[str]:
    return [] if graph.ranks.get(node.input[0], 4) == 4 else ["the input must have four dimensions"]


def _cast(node: NodeProto, graph: _Graph) -> list[str]:
    target = _attribute(node, "to")
    return [] if target in _CASTABLE else [f"target type {_type_name(int(str(target)))} is not supported"]


_SPECIAL: dict[str, Callable[[NodeProto, _Graph], list[str]]] = {
    "AveragePool": _pool,
    "Cast": _cast,
    "DequantizeLinear": _quantize,
    "Einsum": _einsum,
    "GridSample": _grid_sample,
    "LayerNormalization": _one_output,
    "MaxPool": _pool,
    "Pad": _pad,
    "QuantizeLinear": _quantize,
    "Resize": _resize,
    "ScatterND": _scatter_nd,
    "TopK": _top_k,
}


def _type_name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind)) if kind in TensorProto.DataType.values() else str(kind)
