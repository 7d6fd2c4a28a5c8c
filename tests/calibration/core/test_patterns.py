"""GELUs: the same values in the order that ONNX Runtime fuses."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

from pixano_edge.calibration.fusion import fusion
from pixano_edge.calibration.observe import open_graph
from pixano_edge.calibration.patterns import order_gelus
from tests.calibration.core.graphs import TOKENS, WIDTH, Builder, pictures

SHAPE = (1, TOKENS, WIDTH)


def _gelu(factor: float = 0.5, half_first: bool = True) -> onnx.ModelProto:
    """As torch's exporter writes it: x * (0.5 * (1 + erf(x / sqrt 2)))."""
    made = Builder()
    root = made.constant("root", np.array(math.sqrt(2), np.float32))
    one, half = made.constant("one", np.array(1, np.float32)), made.constant("half", np.array(factor, np.float32))
    erf = made.node("Erf", [made.node("Div", ["x", root], "scaled")], "erf")
    added = made.node("Add", [erf, one], "added")
    halved = made.node("Mul", [half, added] if half_first else [added, half], "halved")
    return made.model([1, TOKENS, WIDTH], made.node("Mul", ["x", halved], "y"))


@pytest.mark.parametrize("half_first", [True, False])
def test_gelus_are_fused_and_keep_their_values(half_first: bool) -> None:
    model, feed = _gelu(half_first=half_first), pictures(SHAPE, 1)[0]
    before = open_graph(model, 1, optimise=False).run(None, feed)[0]
    assert "Gelu" not in fusion(model).operators
    assert order_gelus(model) == 1
    onnx.checker.check_model(model)
    assert fusion(model).operators == {"Gelu": 1}
    assert np.array_equal(open_graph(model, 1, optimise=False).run(None, feed)[0], before)
    assert order_gelus(model) == 0


def test_other_products_are_left_alone() -> None:
    model = _gelu(factor=0.25)
    before = model.SerializeToString()
    assert order_gelus(model) == 0
    assert model.SerializeToString() == before
