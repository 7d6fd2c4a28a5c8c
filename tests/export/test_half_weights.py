"""Weights that fp16 holds exactly are stored in it; nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pixano_edge.export import tensorrt_rtx
from pixano_edge.export.fp16 import to_fp16
from pixano_edge.export.half_weights import narrow, widen
from pixano_edge.export.operators import check_tensorrt_10_3
from pixano_edge.export.shared_weights import share_weights


def make_model(exact: bool = True) -> onnx.ModelProto:
    """y = conv(x) @ weight + bias, with weights that fp16 holds, or does not."""
    rng = np.random.default_rng(0)

    def values(*shape: int) -> np.ndarray:
        drawn = rng.standard_normal(shape).astype(np.float32)
        return drawn.astype(np.float16).astype(np.float32) if exact else drawn

    weights = {"kernel": values(8, 8, 3, 3), "weight": values(16, 32), "bias": values(8, 16, 32), "small": values(32)}
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("MatMul", ["c", "weight"], ["m"], name="mm"),
        helper.make_node("Add", ["m", "bias"], ["b"], name="add"),
        helper.make_node("Add", ["b", "small"], ["y"], name="add2"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 16, 32])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(path: Path, optimise: bool = True) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((1, 8, 16, 16)).astype(np.float32)
    return session.run(None, {"x": x})[0]


def kinds(model: onnx.ModelProto) -> dict[str, int]:
    return {t.name: t.data_type for t in model.graph.initializer}


def test_exact_weights_of_products_sums_and_convolutions_are_narrowed(tmp_path: Path) -> None:
    model = make_model()
    assert narrow(model) == 2 * (8 * 8 * 3 * 3 + 16 * 32 + 8 * 16 * 32)
    half, full = TensorProto.FLOAT16, TensorProto.FLOAT
    assert kinds(model) == {"kernel": half, "weight": half, "bias": half, "small": full}
    onnx.checker.check_model(model, full_check=True)
    assert check_tensorrt_10_3(model) == []
    onnx.save(make_model(), tmp_path / "plain.onnx")
    onnx.save(model, tmp_path / "narrow.onnx")
    for optimise in (True, False):
        assert np.array_equal(run(tmp_path / "narrow.onnx", optimise), run(tmp_path / "plain.onnx", optimise))


def test_other_weights_stay() -> None:
    model = make_model(exact=False)
    assert narrow(model) == 0
    assert model == make_model(exact=False)


@pytest.mark.parametrize("value", [65520.0, 1e-8, float("nan"), 1 + 2**-12])
def test_one_value_that_fp16_does_not_hold_keeps_the_whole_tensor(value: float) -> None:
    model = make_model()
    weight = numpy_helper.to_array(model.graph.initializer[1]).copy()
    weight[3, 5] = value
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight, "weight"))
    narrow(model)
    assert kinds(model)["weight"] == TensorProto.FLOAT
    assert kinds(model)["bias"] == TensorProto.FLOAT16


def test_widening_gives_the_model_back() -> None:
    model = make_model()
    narrow(model)
    widen(model)
    assert model == make_model()


def test_the_bytes_are_those_of_the_fp16_graph(tmp_path: Path) -> None:
    half = to_fp16(make_model())
    (tmp_path / "half.onnx").write_bytes(half.SerializeToString())
    model = make_model()
    narrow(model)
    made = share_weights(model, tmp_path / "half.onnx")
    assert made.saved == {"half.onnx": 2 * (8 * 8 * 3 * 3 + 16 * 32 + 8 * 16 * 32)}
    onnx.save(make_model(), tmp_path / "plain.onnx")
    (tmp_path / "full.onnx").write_bytes(made.model.SerializeToString())
    assert np.array_equal(run(tmp_path / "full.onnx"), run(tmp_path / "plain.onnx"))


def test_onnx_runtime_computes_the_casts_when_it_loads(tmp_path: Path) -> None:
    import onnxruntime as ort

    model = make_model()
    narrow(model)
    onnx.save(model, tmp_path / "narrow.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(str(tmp_path / "narrow.onnx"), options, providers=["CPUExecutionProvider"])
    loaded = onnx.load(tmp_path / "loaded.onnx")
    assert [n.op_type for n in loaded.graph.node].count("Cast") == 0


def test_tensorrt_takes_it_and_stores_fp32(tmp_path: Path) -> None:
    if tensorrt_rtx.missing_module():
        pytest.skip(f"{tensorrt_rtx.missing_module()} is not installed: pip install 'pixano-edge[tensorrt-rtx]'")
    from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec

    spec = GraphSpec("g", (TensorSpec("x", "float32", (1, 8, 16, 16)),), (TensorSpec("y", "float32", (1, 8, 16, 32)),))
    sizes = []
    for name, change in (("plain", lambda model: 0), ("narrow", narrow)):
        model = make_model()
        change(model)
        onnx.save(model, tmp_path / f"{name}.onnx")
        sizes.append(tensorrt_rtx.check_build(tmp_path / f"{name}.onnx", spec, ("SM86", "SM89")).engine_bytes)
    assert sizes[1] > 0.95 * sizes[0]  # were the casts left for later, the weights would be half as large
