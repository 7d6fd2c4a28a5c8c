"""Islands: what overflows fp16 stays in float32, and a graph without them fails."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from pixano_edge.calibration import islands
from pixano_edge.calibration.observe import Observations, observe, open_graph
from pixano_edge.engine.errors import CalibrationError
from pixano_edge.export.fp16 import rounded as fp16_rounded
from pixano_edge.export.fp16 import to_fp16
from tests.calibration.core.graphs import TOKENS, WIDTH, Builder, convolutions, error, pictures, run

SHAPE = (1, TOKENS, WIDTH)


def _wild(factor: float) -> onnx.ModelProto:
    """Values times a factor, squared, and back to where they were."""
    made = Builder()
    first = made.linear("x", "one", WIDTH, WIDTH)
    large = made.node("Mul", [first, made.constant("factor", np.array(factor, np.float32))], "large")
    again = made.node("Mul", [large, made.constant("inverse", np.array(1 / factor, np.float32))], "again")
    return made.model([1, TOKENS, WIDTH], made.linear(again, "two", WIDTH, WIDTH))


def _seen(model: onnx.ModelProto) -> Observations:
    return observe(model, pictures(SHAPE), islands.tensors(model), threads=1)


@pytest.mark.parametrize(("factor", "reason"), [(2e4, "reached"), (1e-6, "where fp16 loses bits")])
def test_values_beyond_fp16_stay_in_float32(factor: float, reason: str) -> None:
    model, feed = _wild(factor), pictures(SHAPE, 1, seed=9)[0]
    seen = _seen(model)
    made, kept = islands.halve(model, seen)
    assert set(kept) == {"node_large", "node_again"}
    assert reason in kept["node_large"]
    truth = run(model, feed)[0]
    assert error(run(made, feed)[0], truth) < 2e-3
    weights = {t.name: t.data_type for t in made.graph.initializer}
    assert weights["one_matrix"] == weights["two_matrix"] == TensorProto.FLOAT16

    def unoptimised(graph: onnx.ModelProto) -> np.ndarray:
        return np.asarray(open_graph(graph, 1, optimise=False).run(None, feed)[0])

    assert error(unoptimised(islands.rounded(model, seen)), truth) < 5e-3
    careless = unoptimised(fp16_rounded(to_fp16(model)))
    assert not np.isfinite(careless).all() or error(careless, truth) > 0.01


def test_harmless_graphs_have_no_islands() -> None:
    model = _wild(10.0)
    assert islands.islands(model, _seen(model)) == {}


def test_bf16_keeps_the_range_and_loses_bits() -> None:
    model, feed = _wild(2e4), pictures(SHAPE, 1, seed=9)[0]
    seen = _seen(model)
    made, kept = islands.halve(model, seen, "bf16")
    assert kept == {}
    assert {t.data_type for t in made.graph.initializer if len(t.dims) == 2} == {TensorProto.BFLOAT16}
    simulated = open_graph(islands.rounded(model, seen, "bf16"), 1, optimise=False).run(None, feed)[0]
    assert 5e-4 < error(simulated, run(model, feed)[0]) < 2e-2


def test_bf16_leaves_alone_what_the_opset_has_not() -> None:
    model = convolutions()
    seen = observe(model, pictures((1, 3, 16, 16)), islands.tensors(model), threads=1)
    made, kept = islands.halve(model, seen, "bf16")
    assert {n for n in kept if "conv" in n} == {"node_stem.conv.out", "node_body.conv.out"}
    assert "has no bf16 in opset 18" in kept["node_stem.conv.out"]
    kinds = {t.name: t.data_type for t in made.graph.initializer}
    assert kinds["stem.conv.weight"] == TensorProto.FLOAT
    assert kinds["head.weight"] == TensorProto.BFLOAT16


def test_an_unknown_kind_is_refused() -> None:
    model = _wild(1.0)
    with pytest.raises(CalibrationError, match="Unknown half precision"):
        islands.halve(model, _seen(model), "fp8")
