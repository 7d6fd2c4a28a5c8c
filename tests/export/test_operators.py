"""The check against TensorRT 10.3's parser: real graphs pass, graphs with known obstacles do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pixano_edge.engine.bundle import Bundle
from pixano_edge.export.operators import MAX_OPSET, OPERATORS, check_tensorrt_10_3


def model(
    nodes: list[NodeProto],
    *,
    kind: int = TensorProto.FLOAT,
    shape: tuple[int, ...] = (1, 2, 8, 8),
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 18,
    out: int | None = None,
) -> onnx.ModelProto:
    """A graph from ``x`` to ``y``; a second input ``n`` is an int64 vector."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", kind, shape), helper.make_tensor_value_info("n", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", out or kind, None)],
        [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


@pytest.mark.parametrize("variant", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", ["image_encoder", "mask_decoder"])
def test_exported_graphs_pass(variant: str, graph: str, files: Callable[[str], dict[str, Path]]) -> None:
    loaded = onnx.load(files(variant)[graph])
    assert check_tensorrt_10_3(loaded) == []
    used = {node.op_type for node in loaded.graph.node}
    # What the wrappers were written to avoid: control flow, scatters, one-hot codes, bicubic resizing.
    assert used.isdisjoint({"If", "Loop", "Scan", "ScatterND", "ScatterElements", "OneHot", "Tile", "Clip"})


@pytest.mark.parametrize("variant", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", ["memory_attention", "track_decoder", "memory_encoder"])
def test_video_graphs_pass(variant: str, graph: str, tracking_bundle: Path) -> None:
    bundle = Bundle.open(tracking_bundle)
    for target in ("onnx", "tensorrt"):
        loaded = onnx.load(bundle.graph_path(graph, variant, target))
        assert check_tensorrt_10_3(loaded) == []
        used = {node.op_type for node in loaded.graph.node}
        assert used.isdisjoint({"If", "Loop", "Scan", "ScatterND", "ScatterElements", "OneHot", "Tile", "Clip"})


def test_plain_graph_passes() -> None:
    assert check_tensorrt_10_3(model([helper.make_node("Relu", ["x"], ["y"])])) == []


def test_newer_operator_and_opset_fail() -> None:
    gelu = model([helper.make_node("Gelu", ["x"], ["y"], name="act")], opset=20)
    problems = check_tensorrt_10_3(gelu)
    assert any(f"newer than {MAX_OPSET}" in p for p in problems)
    assert any("Gelu 'act': not known" in p for p in problems)


def test_foreign_domain_fails() -> None:
    graph = model([helper.make_node("MatMulNBits", ["x"], ["y"], domain="com.microsoft", K=8, N=8)])
    graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    problems = check_tensorrt_10_3(graph)
    assert any("com.microsoft" in p for p in problems)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"mode": "cubic"}, "mode 'cubic'"),
        ({"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"}, "tf_crop_and_resize"),
        ({"mode": "linear", "antialias": 1}, "antialias 1"),
        ({"mode": "nearest", "nearest_mode": "floor"}, None),
    ],
)
def test_resize(attributes: dict[str, object], reason: str | None) -> None:
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], **attributes)
    problems = check_tensorrt_10_3(model([node], constants={"scales": np.array([1, 1, 2, 2], np.float32)}))
    assert (reason is None and not problems) or any(str(reason) in p for p in problems)


def test_types_are_checked() -> None:
    bounds = {"low": np.array(0, np.int32)}
    clip = model([helper.make_node("Clip", ["x", "low"], ["y"])], kind=TensorProto.INT32, constants=bounds)
    assert any("INT32" in p for p in check_tensorrt_10_3(clip))
    double = model([helper.make_node("Relu", ["x"], ["y"])], kind=TensorProto.DOUBLE)
    assert any("DOUBLE" in p for p in check_tensorrt_10_3(double))
    cast = model([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.DOUBLE)], out=TensorProto.DOUBLE)
    assert any("target type DOUBLE" in p for p in check_tensorrt_10_3(cast))


def test_inputs_that_must_be_constant() -> None:
    dynamic = model([helper.make_node("ReduceMean", ["x", "n"], ["y"])])
    assert any("input 1 must be a constant" in p for p in check_tensorrt_10_3(dynamic))
    fixed = model([helper.make_node("ReduceMean", ["x", "axes"], ["y"])], constants={"axes": np.array([1])})
    assert check_tensorrt_10_3(fixed) == []


def test_pad_with_axes_fails() -> None:
    constants = {"pads": np.array([1, 1]), "value": np.array(0, np.float32), "axes": np.array([2])}
    node = helper.make_node("Pad", ["x", "pads", "value", "axes"], ["y"])
    assert any("axes" in p for p in check_tensorrt_10_3(model([node], constants=constants)))


def test_pooling_and_top_k() -> None:
    pool = helper.make_node("MaxPool", ["x"], ["y", "where"], kernel_shape=[2, 2])
    assert any("first output" in p for p in check_tensorrt_10_3(model([pool])))
    dilated = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[2, 2])
    assert any("dilations" in p for p in check_tensorrt_10_3(model([dilated])))
    top = helper.make_node("TopK", ["x", "k"], ["y", "index"])
    big = model([top], shape=(1, 5000), constants={"k": np.array([4000])})
    assert any("K must be below" in p for p in check_tensorrt_10_3(big))


def test_quantisation_needs_a_zero_point_of_zero() -> None:
    constants = {"scale": np.array(0.1, np.float32), "zero": np.array(3, np.int8)}
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])
    problems = check_tensorrt_10_3(model([node], constants=constants, out=TensorProto.INT8))
    assert any("zero point" in p for p in problems)


def test_every_listed_operator_exists_in_onnx() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert set(OPERATORS) <= known
