"""Each pass on a small graph: same numbers after it, and hands off where it does not hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pixano_edge.export import tensorrt_passes as passes
from pixano_edge.export.graph_edit import GraphEditor, infer_shapes

ort = pytest.importorskip("onnxruntime", reason="comparing needs pixano-edge[cpu]")
node = helper.make_node


def make_model(
    nodes: Sequence[NodeProto],
    inputs: dict[str, Sequence[int | str]],
    outputs: dict[str, Sequence[int | str]],
    constants: dict[str, np.ndarray] | None = None,
    integers: bool = False,
) -> onnx.ModelProto:
    kind = TensorProto.INT64 if integers else TensorProto.FLOAT
    for index, entry in enumerate(nodes):
        entry.name = f"n{index}"
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def changed(model: onnx.ModelProto, change: passes.Pass) -> tuple[onnx.ModelProto, int]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    edit = GraphEditor(copy)
    places = change(edit)
    edit.finish()
    onnx.checker.check_model(copy, full_check=True)
    return copy, places


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def run(model: onnx.ModelProto, **sizes: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [sizes.get(d.dim_param, d.dim_value) for d in tensor.shape.dim]
        whole = tensor.elem_type == TensorProto.INT64
        feeds[value.name] = rng.integers(-6, 7, shape) if whole else rng.random(shape, np.float32)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def same(before: onnx.ModelProto, after: onnx.ModelProto, **sizes: int) -> bool:
    return all(np.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(run(before, **sizes), run(after, **sizes)))


def attention(scales: tuple[float, float] = (0.7, 0.7), wrong: str = "") -> onnx.ModelProto:
    """What torch's exporter writes: q, k, v (B, S, 4, 8) to softmax(s q (s k)^T) v, with run-time shapes."""
    constants = {
        "sq": np.array(scales[0], np.float32),
        "sk": np.array(scales[1], np.float32),
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "four": np.array([4], np.int64),
        "eight": np.array([8], np.int64),
        "minus": np.array([-1], np.int64),
        "split": np.array([0, 4, 8, -1], np.int64),
    }
    merge_order = ["minus", "eight", "S"] if wrong == "merge" else ["minus", "S", "eight"]
    nodes = [
        node("Transpose", ["q"], ["qt"], perm=[0, 2, 1, 3]),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1, 3]),
        node("Transpose", ["v"], ["vt"], perm=[0, 2, 1, 3]),
        node("Shape", ["k"], ["shape"]),
        node("Slice", ["shape", "one", "two"], ["S"]),
        node("Slice", ["shape", "zero", "one"], ["B"]),
        node("Concat", merge_order, ["merged_shape"], axis=0),
        node("Reshape", ["kt", "merged_shape"], ["merged"]),
        node("Transpose", ["merged"], ["turned"], perm=[0, 2, 1]),
        node("Concat", ["B", "four", "eight", "S"], ["key_shape"], axis=0),
        node("Reshape", ["turned", "key_shape"], ["key"]),
        node("Mul", ["qt", "sq"], ["scaled_q"]),
        node("Mul", ["key", "sk"], ["scaled_k"]),
        node("MatMul", ["scaled_q", "scaled_k"], ["scores"]),
        node("Softmax", ["scores"], ["weights"], axis=-1),
        node("MatMul", ["weights", "vt"], ["mixed"]),
        node("Neg", ["mixed"], ["y"]),
    ]
    constants["two"] = np.array([2], np.int64)
    shape = ("B", "S", 4, 8)
    return make_model(nodes, dict.fromkeys("qkv", shape), {"y": ("B", 4, "S", 8)}, constants)


def test_symbolic_sums_stay_recognisable() -> None:
    nodes = [node("Concat", ["a", "b"], ["c"], axis=0), node("Neg", ["c"], ["y"])]
    shapes, types = infer_shapes(make_model(nodes, {"a": ("N", 3), "b": (6, 3)}, {"y": ("M", 3)}))
    assert shapes["c"] == ("N + 6", 3)
    assert types["c"] == TensorProto.FLOAT


def test_key_transpose_is_joined_and_its_shape_arithmetic_goes() -> None:
    model = attention()
    joined, places = changed(model, passes.join_key_transpose)
    assert places == 1
    assert "Shape" not in ops(joined)
    merged, places = changed(joined, passes.merge_transposes)
    assert places == 1
    assert sorted(ops(merged)) == sorted(["Transpose"] * 3 + ["Mul", "Mul", "MatMul", "Softmax", "MatMul", "Neg"])
    for sizes in ({"B": 1, "S": 1}, {"B": 3, "S": 5}):
        assert same(model, merged, **sizes)


def test_other_reshapes_around_a_transpose_are_left_alone() -> None:
    """(B*H, D, S) read as (B*H, S, D): shapes fit at run time, the values are others."""
    assert changed(attention(wrong="merge"), passes.join_key_transpose)[1] == 0


def test_scale_moves_to_the_query() -> None:
    model, _ = changed(attention((0.5, 0.25)), passes.join_key_transpose)
    scaled, places = changed(model, passes.scale_query_only)
    assert places == 1
    assert ops(scaled).count("Mul") == 1
    factors = [numpy_helper.to_array(t) for t in scaled.graph.initializer if t.name.startswith("trt_scale")]
    assert factors == [np.float32(0.125)]
    assert same(model, scaled, B=2, S=3)


def test_scale_of_a_vector_or_without_softmax_is_left_alone() -> None:
    model = attention()
    for tensor in model.graph.initializer:
        if tensor.name == "sk":
            tensor.CopyFrom(numpy_helper.from_array(np.full((8, 1), 0.7, np.float32), "sk"))
    assert changed(model, passes.scale_query_only)[1] == 0
    model = attention()
    next(n for n in model.graph.node if n.op_type == "Softmax").op_type = "LogSoftmax"
    assert changed(model, passes.scale_query_only)[1] == 0


def run_time_reshape(target: Sequence[str], constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    """x (B, S, 8) reshaped to the concatenation of `target`; B and S are read from x."""
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Slice", ["shape", "zero", "one"], ["B"]),
        node("Slice", ["shape", "one", "two"], ["S"]),
        node("Concat", target, ["target"], axis=0),
        node("Reshape", ["x", "target"], ["r"]),
        node("Neg", ["r"], ["y"]),
    ]
    ints = {k: np.array([v], np.int64) for k, v in {"zero": 0, "one": 1, "two": 2}.items()}
    return make_model(nodes, {"x": ("B", "S", 8)}, {"y": [f"d{i}" for i in range(len(target))]}, ints | constants)


def test_reshape_gets_a_constant_target() -> None:
    parts = {"four": np.array([4], np.int64)}
    model = run_time_reshape(["B", "S", "four", "two"], parts)
    result, places = changed(model, passes.constant_reshapes)
    assert places == 1
    assert ops(result) == ["Reshape", "Neg"]
    (shape,) = (numpy_helper.to_array(t) for t in result.graph.initializer)
    assert shape.tolist() == [0, 0, 4, 2]
    for sizes in ({"B": 1, "S": 1}, {"B": 3, "S": 5}):
        assert same(model, result, **sizes)


def test_reshape_with_two_open_sizes_keeps_its_arithmetic() -> None:
    model = run_time_reshape(["S", "B", "four", "two"], {"four": np.array([4], np.int64)})
    assert changed(model, passes.constant_reshapes)[1] == 0


def test_no_ops_go_and_the_outputs_keep_their_names() -> None:
    constants = {
        "pads": np.zeros(4, np.int64),
        "some": np.array([0, 1, 0, 0], np.int64),
        "shape": np.array([-1, 6], np.int64),
    }
    nodes = [
        node("Pad", ["x", "pads"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=[0, 1]),
        node("Reshape", ["b", "shape"], ["c"]),
        node("Identity", ["c"], ["d"]),
        node("Pad", ["d", "some"], ["e"]),
        node("Transpose", ["e"], ["y"], perm=[0, 1]),
    ]
    model = make_model(nodes, {"x": ("B", 6)}, {"y": ("B", 7)}, constants)
    result, places = changed(model, passes.drop_no_ops)
    assert places == 4
    # The last one writes the output, so it stays.
    assert ops(result) == ["Pad", "Transpose"]
    assert [o.name for o in result.graph.output] == ["y"]
    assert same(model, result, B=3)


@pytest.mark.parametrize("depth", [4, 7])
def test_one_hot_is_written_out(depth: int) -> None:
    """Indices from -6 to 6: negative ones count from the end, those out of range give no hit."""
    constants = {"depth": np.array([depth], np.int64), "values": np.array([-0.5, 2.0], np.float32)}
    nodes = [node("OneHot", ["x", "depth", "values"], ["hot"]), node("Neg", ["hot"], ["y"])]
    model = make_model(nodes, {"x": ("B", 9)}, {"y": ("B", 9, depth)}, constants, integers=True)
    result, places = changed(model, passes.one_hot_to_where)
    assert places == 1
    assert "OneHot" not in ops(result)
    assert same(model, result, B=5)


def test_one_hot_over_another_axis_is_left_alone() -> None:
    constants = {"depth": np.array([4], np.int64), "values": np.array([0, 1], np.float32)}
    nodes = [node("OneHot", ["x", "depth", "values"], ["hot"], axis=0), node("Neg", ["hot"], ["y"])]
    model = make_model(nodes, {"x": ("B", 9)}, {"y": (4, "B", 9)}, constants, integers=True)
    assert changed(model, passes.one_hot_to_where)[1] == 0


def test_unwelcome_operators_are_named() -> None:
    nodes = [node("NonZero", ["x"], ["places"]), node("Cast", ["places"], ["y"], to=TensorProto.FLOAT)]
    (found,) = passes.unwelcome(make_model(nodes, {"x": (3, 3)}, {"y": (2, "K")}))
    assert found.startswith("NonZero 'n0': its output's size depends on the data")


def test_softmax_over_more_keys_than_fp16_can_sum_is_named() -> None:
    def model(width: int) -> onnx.ModelProto:
        nodes = [
            node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
            node("Softmax", ["half"], ["soft"], axis=-1),
            node("Cast", ["soft"], ["y"], to=TensorProto.FLOAT),
        ]
        return make_model(nodes, {"x": (2, width)}, {"y": (2, width)})

    assert passes.unwelcome(model(4096)) == []
    (found,) = passes.unwelcome(model(65536))
    assert "65536 keys overflows fp16" in found
