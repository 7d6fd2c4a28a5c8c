"""Smoothing: outliers ruin naive int8 and not the shipped one; nothing that rescales changes the function."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from pixano_edge.calibration import qdq
from pixano_edge.calibration.blocks import blocks
from pixano_edge.calibration.folds import folds, rescale
from pixano_edge.calibration.fusion import fusion
from pixano_edge.calibration.graph import Graph
from pixano_edge.calibration.observe import Observations, observe
from pixano_edge.calibration.outliers import inject
from pixano_edge.calibration.smooth import smooth
from pixano_edge.engine.errors import CalibrationError
from tests.calibration.core.graphs import (
    HIDDEN,
    TOKENS,
    WIDTH,
    Builder,
    convolutions,
    error,
    pictures,
    run,
    transformer,
)

SHAPE = (1, TOKENS, WIDTH)


@pytest.fixture(scope="module")
def hard() -> tuple[onnx.ModelProto, Observations]:
    """The transformer with outliers, and what was seen of it."""
    model = inject(transformer(), seed=3)
    return model, observe(model, pictures(SHAPE), qdq.tensors(model), threads=1)


def _error(model: onnx.ModelProto, quantised: onnx.ModelProto) -> float:
    feed = pictures(SHAPE, 1, seed=9)[0]
    return error(run(quantised, feed)[0], run(model, feed)[0])


def test_places() -> None:
    found = {fold.tensor: fold for fold in folds(transformer())}
    assert found["layers.0.norm1.out"].channels == WIDTH
    assert len(found["layers.0.norm1.out"].readers) == 3
    assert found["layers.0.norm2.out"].source == "LayerNormalization"
    assert found["layers.1.active"].channels == HIDDEN  # through the Relu into fc1
    assert found["layers.1.active"].source == "Relu"
    assert not {t for t in found if "added" in t or "end" in t or "mixed" in t}


def test_rescaling_changes_no_answer() -> None:
    model = transformer()
    random = np.random.default_rng(0)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = Graph(changed)
    for fold in folds(model):
        rescale(graph, fold, random.uniform(0.1, 10, fold.channels))
    graph.finish()
    assert changed.SerializeToString() != model.SerializeToString()
    assert _error(model, changed) < 1e-5
    fold = folds(model)[0]
    for bad in (np.zeros(fold.channels), np.ones(3), np.full(fold.channels, np.nan)):
        with pytest.raises(CalibrationError, match="cannot be rescaled"):
            rescale(graph, fold, bad)


def test_gains_that_two_normalisations_share_are_rescaled_apart() -> None:
    made = Builder()
    gain, bias = made.constant("unit", np.ones(WIDTH, np.float32)), made.constant("none", np.zeros(WIDTH, np.float32))
    first = made.node("LayerNormalization", ["x", gain, bias], "first", axis=-1)
    middle = made.linear(first, "one", WIDTH, WIDTH)
    second = made.node("LayerNormalization", [middle, gain, bias], "second", axis=-1)
    model = made.model([1, TOKENS, WIDTH], made.linear(second, "two", WIDTH, WIDTH))
    assert _error(model, inject(model, seed=0)) < 1e-5


def test_outliers_are_there_and_change_nothing(hard: tuple[onnx.ModelProto, Observations]) -> None:
    model, observations = hard
    assert _error(transformer(), model) < 1e-5
    channels = observations["layers.0.norm1.out"].channels
    assert channels is not None
    assert (channels > 20 * np.median(channels)).sum() == 3
    assert inject(transformer(), seed=3).SerializeToString() == model.SerializeToString()


def test_naive_int8_fails_where_the_shipped_one_holds(hard: tuple[onnx.ModelProto, Observations]) -> None:
    model, observations = hard
    naive, _ = qdq.quantize(model, observations, method="minmax", smooth=None)
    shipped, report = qdq.quantize(model, observations)
    paper, _ = qdq.quantize(model, observations, method="minmax", smooth=0.5)
    plain = transformer()
    seen = observe(plain, pictures(SHAPE), qdq.tensors(plain), threads=1)
    easy = _error(plain, qdq.quantize(plain, seen)[0])
    assert _error(model, naive) > 5 * easy
    assert _error(model, shipped) < 1.5 * easy
    assert _error(model, paper) < 0.5 * _error(model, naive)
    assert {f"layers.0.attn.{part}" for part in "qkv"} <= set(report.smoothed)
    assert fusion(shipped).integer == len(blocks(model))
    assert fusion(shipped).left == []


def test_only_chosen_blocks_are_smoothed(hard: tuple[onnx.ModelProto, Observations]) -> None:
    model, observations = hard
    quantised, report = qdq.quantize(model, observations, blocks=["layers.0.attn.v", "layers.1.mlp.fc2"])
    assert "layers.0.attn.v" in report.smoothed
    assert set(report.smoothed) <= {"layers.0.attn.v", "layers.1.mlp.fc2"}
    assert _error(model, quantised) < 0.05


def test_smoothing_alone_changes_no_answer(hard: tuple[onnx.ModelProto, Observations]) -> None:
    model, observations = hard
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = Graph(changed)
    done = smooth(graph, observations, [b.name for b in blocks(model)])
    graph.finish()
    assert len(done) >= 4
    assert _error(model, changed) < 1e-5


def test_a_mul_is_set_behind_a_gelu_only_where_it_pays() -> None:
    for peak, expected in ((1.0, 0), (300.0, 1)):
        made = Builder()
        spread = np.ones(WIDTH, np.float32)
        spread[5] = peak
        wide = made.node("Mul", ["x", made.constant("spread", spread)], "wide")
        active = made.node("Tanh", [made.node("Add", [wide, made.constant("zero", np.zeros(1, np.float32))], "a")], "b")
        stretched = made.node("Mul", [active, made.constant("again", spread)], "stretched")
        product = made.node("MatMul", [stretched, made.weight("fc.weight", WIDTH, WIDTH)], "y")
        for tensor in made.constants:
            if tensor.name == "fc.weight":
                held = onnx.numpy_helper.to_array(tensor).copy()
                held[5] /= peak
                tensor.CopyFrom(onnx.numpy_helper.from_array(held, "fc.weight"))
        model = made.model([1, TOKENS, WIDTH], product)
        seen = observe(model, pictures(SHAPE), qdq.tensors(model), threads=1)
        quantised, report = qdq.quantize(model, seen)
        assert sum(n.op_type == "Mul" for n in quantised.graph.node) == 2 + expected
        assert len(report.smoothed) == expected
        assert _error(model, quantised) < 0.02
        assert fusion(quantised).integer == 1


def test_nonsense_is_refused(hard: tuple[onnx.ModelProto, Observations]) -> None:
    for strength in (0.0, 1.0, "best"):
        with pytest.raises(CalibrationError, match="no strength"):
            qdq.quantize(*hard, smooth=strength)
    with pytest.raises(CalibrationError, match="No normalisation"):
        inject(convolutions(), seed=0)
    with pytest.raises(CalibrationError, match="Cannot make 99"):
        inject(transformer(), seed=0, channels=99)
