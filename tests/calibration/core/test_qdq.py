"""Quantised graphs: close to the original, int8 in every kernel, and what goes wrong is noticed."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from pixano_edge.calibration import qdq
from pixano_edge.calibration.blocks import blocks
from pixano_edge.calibration.fusion import fusion
from pixano_edge.calibration.observe import Observations, observe
from pixano_edge.engine.errors import CalibrationError
from pixano_edge.export.operators import check_tensorrt_10_3
from tests.calibration.core.graphs import TOKENS, WIDTH, Builder, convolutions, error, pictures, run, transformer

CASES = {"transformer": (transformer, (1, TOKENS, WIDTH)), "convolutions": (convolutions, (1, 3, 16, 16))}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[onnx.ModelProto, Observations, tuple[int, ...]]:
    make, shape = CASES[request.param]
    model = make()
    return model, observe(model, pictures(shape), qdq.tensors(model), threads=1), shape


Case = tuple[onnx.ModelProto, Observations, tuple[int, ...]]


def test_int8_is_close_and_every_product_uses_it(case: Case) -> None:
    model, observations, shape = case
    quantised, report = qdq.quantize(model, observations)
    names = [b.name for b in blocks(model)]
    assert report.blocks == names
    assert not report.kept
    found = fusion(quantised)
    assert found.integer == len(names)
    assert found.left == []
    for feed in pictures(shape, 2, seed=9):  # not those that it was calibrated with
        assert 1e-4 < error(run(quantised, feed)[0], run(model, feed)[0]) < 0.08


def test_the_format_is_what_tensorrt_takes(case: Case) -> None:
    model, observations, _ = case
    quantised, _ = qdq.quantize(model, observations)
    held = {t.name: t for t in quantised.graph.initializer}
    pairs = [n for n in quantised.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in pairs:
        zero, scale = numpy_helper.to_array(held[node.input[2]]), numpy_helper.to_array(held[node.input[1]])
        assert zero.dtype == np.int8
        assert not zero.any()
        assert (scale > 0).all()
    kinds = {t.data_type for t in held.values()}
    assert TensorProto.INT32 not in kinds  # no quantised bias
    weights = [t for t in held.values() if t.data_type == TensorProto.INT8 and len(t.dims) > 1]
    assert len(weights) == len(blocks(model))
    assert not any(b"\x80" in t.raw_data for t in weights)  # -128 would not be symmetric
    assert not check_tensorrt_10_3(quantised)


def test_only_the_asked_blocks_change(case: Case) -> None:
    model, observations, shape = case
    chosen = blocks(model)[-1].name
    quantised, report = qdq.quantize(model, observations, blocks=[chosen])
    assert report.blocks == [chosen]
    assert fusion(quantised).integer == 1
    nothing, _ = qdq.quantize(model, observations, blocks=[])
    feed = pictures(shape, 1)[0]
    assert np.array_equal(run(nothing, feed)[0], run(model, feed)[0])
    assert report.weight_bytes[1] < report.weight_bytes[0]


def test_the_original_is_left_alone(case: Case) -> None:
    model, observations, _ = case
    before = model.SerializeToString(deterministic=True)
    qdq.quantize(model, observations)
    assert model.SerializeToString(deterministic=True) == before


def test_a_broken_scale_shows(case: Case) -> None:
    """A tenth of one activation's range clips, ten times wastes bits: both are far above the error of a good one."""
    model, observations, shape = case
    feed = pictures(shape, 1, seed=9)[0]
    truth = run(model, feed)[0]
    good, _ = qdq.quantize(model, observations, method="minmax")
    fair = error(run(good, feed)[0], truth)
    for factor in (0.05, 40.0):
        broken = onnx.ModelProto()
        broken.CopyFrom(good)
        quantiser = next(n for n in broken.graph.node if n.op_type == "QuantizeLinear")
        scale = next(t for t in broken.graph.initializer if t.name == quantiser.input[1])
        wrong = (numpy_helper.to_array(scale) * factor).astype(np.float32)
        scale.CopyFrom(numpy_helper.from_array(wrong, scale.name))
        assert error(run(broken, feed)[0], truth) > 3 * fair


def test_scales_of_the_wrong_axis_are_no_valid_layer() -> None:
    """Columns of a matrix have the scales; with those of the rows the error is that of uniform scales or worse."""
    random = np.random.default_rng(0)
    weight = (random.standard_normal((64, 64)) * np.geomspace(0.01, 1, 64)).astype(np.float32)
    right, wrong = qdq.quantize_weight(weight, 1), qdq.quantize_weight(weight, 0)
    back = right[0] * right[1]
    turned = wrong[0] * wrong[1][:, None]
    assert np.abs(back - weight).max(axis=0) == pytest.approx(right[1] / 2, rel=0.2)
    rows = np.abs(back - weight).mean(axis=0) / np.abs(weight).mean(axis=0)
    assert (rows < 0.01).all()
    small = np.abs(turned - weight).mean(axis=0)[:8] / np.abs(weight).mean(axis=0)[:8]
    assert (small > 0.1).all()
    quantised = qdq.quantize_weight(np.concatenate([weight, weight], axis=1), 1)
    assert quantised[1].shape == (128,)


def test_a_channel_of_zeros_has_a_scale() -> None:
    weight = np.ones((4, 3), np.float32)
    weight[:, 1] = 0
    values, scales = qdq.quantize_weight(weight, 1)
    assert scales[1] == 1
    assert not values[:, 1].any()
    weight[0, 0] = np.nan
    with pytest.raises(CalibrationError, match="not finite"):
        qdq.quantize_weight(weight, 1)


def test_what_does_not_belong_together_is_refused(case: Case) -> None:
    model, observations, _ = case
    with pytest.raises(CalibrationError, match="another graph"):
        qdq.quantize(model, dataclasses.replace(observations, model_sha256="0"))
    with pytest.raises(CalibrationError, match=r"no blocks \['absent'\]"):
        qdq.quantize(model, observations, blocks=["absent"])
    with pytest.raises(CalibrationError, match="not observed"):
        qdq.quantize(model, dataclasses.replace(observations, histograms={}, _memory={}))
    old = onnx.ModelProto()
    old.CopyFrom(model)
    old.opset_import[0].version = 12
    with pytest.raises(CalibrationError, match="opset 12"):
        qdq.quantize(old, observations)


def test_a_layer_that_saw_only_zeros_stays_in_float() -> None:
    model = convolutions()
    feeds = [{"x": np.zeros((1, 3, 16, 16), np.float32)}]
    quantised, report = qdq.quantize(model, observe(model, feeds, qdq.tensors(model), threads=1))
    assert "was 0" in report.kept["stem.conv"]
    assert report.blocks == ["body.conv", "head"]
    assert fusion(quantised).integer == 2


def test_a_convolution_with_several_readers_stays_in_float() -> None:
    model = convolutions()
    model.graph.output.append(onnx.helper.make_tensor_value_info("stem.conv.out", TensorProto.FLOAT, [1, 32, 16, 16]))
    feeds = pictures((1, 3, 16, 16))
    quantised, report = qdq.quantize(model, observe(model, feeds, qdq.tensors(model), threads=1))
    assert list(report.kept) == ["stem.conv"]
    assert np.allclose(run(quantised, feeds[0])[1], run(model, feeds[0])[1])


def test_what_the_placement_avoids() -> None:
    """A bias of one dimension is why ONNX Runtime's stock Q/DQ gains little; this test says when that is over."""
    model = transformer(depth=1)
    observations = observe(model, pictures((1, TOKENS, WIDTH)), qdq.tensors(model), threads=1)
    quantised, _ = qdq.quantize(model, observations)
    for tensor in quantised.graph.initializer:
        if tensor.name.endswith(".bias") and len(tensor.dims) == 3:
            flat = numpy_helper.to_array(tensor).reshape(-1)
            tensor.CopyFrom(numpy_helper.from_array(flat, tensor.name))
    found = fusion(quantised)
    assert found.integer == 0
    assert len(found.left) == 6


def test_a_large_position_embedding_is_stored_in_half() -> None:
    made = Builder()
    placed = made.node("Add", ["x", made.weight("position", 1, 256, WIDTH, scale=1.0)], "placed")
    model = made.model([1, 256, WIDTH], made.linear(placed, "fc", WIDTH, WIDTH))
    feeds = pictures((1, 256, WIDTH), 2)
    quantised, report = qdq.quantize(model, observe(model, feeds, qdq.tensors(model), threads=1))
    kinds = {t.name: t.data_type for t in quantised.graph.initializer}
    assert kinds["position"] == TensorProto.FLOAT16
    assert report.weight_bytes[1] < 0.52 * report.weight_bytes[0]
    assert error(run(quantised, feeds[0])[0], run(model, feeds[0])[0]) < 0.02


def test_a_convolution_that_reads_another_one() -> None:
    made = Builder()
    first = made.node("Conv", ["x", made.weight("one.weight", 64, 32, 1, 1), made.weight("one.bias", 64)], "one.out")
    second = made.node("Conv", [first, made.weight("two.weight", 32, 64, 1, 1), made.weight("two.bias", 32)], "y")
    model = made.model([1, 32, 8, 8], second)
    feeds = pictures((1, 32, 8, 8))
    quantised, _ = qdq.quantize(model, observe(model, feeds, qdq.tensors(model), threads=1))
    assert len({n.name for n in quantised.graph.node}) == len(quantised.graph.node)
    found = fusion(quantised)
    assert (found.integer, found.left) == (2, [])
    assert found.operators["QuantizeLinear"] == found.operators["DequantizeLinear"] == 1
    assert error(run(quantised, feeds[0])[0], run(model, feeds[0])[0]) < 0.05
