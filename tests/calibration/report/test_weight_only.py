"""Quantising one matrix by what it is multiplied with."""

from __future__ import annotations

import numpy as np
import pytest

from pixano_edge.calibration.weight_only import (
    AWQ,
    BOTH,
    CLIP,
    GPTQ,
    METHODS,
    RTN,
    Gram,
    choose,
    clipped,
    gptq,
    relative_error,
)
from pixano_edge.engine.errors import EdgeError
from pixano_edge.export.decoder.quantise import quantise

Floats = np.ndarray


def activations(rows: int, channels: int, seed: int) -> Floats:
    """Channels that move together, a few of them much larger: what a language model's look like."""
    mixing = np.random.default_rng(99).normal(size=(channels // 3, channels))
    random = np.random.default_rng(seed)
    values = random.normal(size=(rows, channels // 3)) @ mixing + 0.5 * random.normal(size=(rows, channels))
    values[:, ::17] *= 12
    return values.astype(np.float32)


def gram(values: Floats) -> Gram:
    return Gram(values.astype(np.float64).T @ values, len(values))


def weight(channels: int, columns: int = 40) -> Floats:
    return np.random.default_rng(5).standard_normal((channels, columns)).astype(np.float32)


@pytest.mark.parametrize("channels", [96, 70])  # whole blocks, and a last one of six
def test_each_method_beats_rounding_on_activations_that_it_never_saw(channels: int) -> None:
    fit, check = gram(activations(600, channels, 1)), gram(activations(300, channels, 2))
    found = choose(weight(channels), fit, check, tie=lambda factors: factors)
    errors = {name: min(one.error for one in found if one.method == name) for name in METHODS}
    assert errors[CLIP] < errors[RTN]
    assert errors[GPTQ] < 0.75 * errors[RTN]
    assert errors[AWQ] < 0.95 * errors[CLIP]
    assert errors[BOTH] < 0.75 * errors[RTN]
    assert found[0].error == min(errors.values())
    assert [one.error for one in found] == sorted(one.error for one in found)


def test_the_error_is_that_of_the_output() -> None:
    matrix, values = weight(64), activations(200, 64, 3)
    near = quantise(matrix, 4).dequantised()
    measured = np.linalg.norm(values @ (matrix - near)) / np.linalg.norm(values @ matrix)
    assert relative_error(matrix, near, gram(values)) == pytest.approx(measured, rel=1e-3)
    assert relative_error(matrix, matrix, gram(values)) == 0
    assert relative_error(np.zeros_like(matrix), matrix, gram(values)) == 0  # no output, nothing to be relative to


def test_the_wrong_activations_are_worse_than_none() -> None:
    """The control: what GPTQ gains comes from the activations, not from having more to choose."""
    matrix, right = weight(96), activations(600, 96, 1)
    wrong = gram(np.roll(right, 7, axis=1))
    check = gram(activations(300, 96, 2))
    rounded = relative_error(matrix, quantise(matrix, 4).dequantised(), check)
    assert relative_error(matrix, gptq(matrix, gram(right), 4).dequantised(), check) < 0.75 * rounded
    assert relative_error(matrix, gptq(matrix, wrong, 4).dequantised(), check) > 1.2 * rounded


@pytest.mark.parametrize("largest_first", [False, True])
def test_channels_that_do_not_move_together_have_nothing_to_make_good(largest_first: bool) -> None:
    matrix, plain = weight(70), Gram(np.diag(np.linspace(1, 2, 70)), 10)
    assert (gptq(matrix, plain, 4, largest_first=largest_first).codes == clipped(matrix, plain, 4).codes).all()


@pytest.mark.parametrize("largest_first", [False, True])
def test_few_rows_and_channels_that_were_never_used(largest_first: bool) -> None:
    values = activations(5, 96, 4)  # of rank 5
    values[:, 40:75] = 0  # one block whole, parts of two
    found = gptq(weight(96), gram(values), 4, largest_first=largest_first).dequantised()
    assert np.isfinite(found).all()
    # What was never used is still there, for it may be used tomorrow.
    assert np.abs(found[40:75] - weight(96)[40:75]).mean() < 0.2


def test_factors_are_undone() -> None:
    matrix, values = weight(64), gram(activations(300, 64, 1))
    found = next(one for one in choose(matrix, values, values, method=AWQ, bits=8, tie=lambda factors: factors))
    assert found.method == AWQ
    assert found.factors is not None
    assert found.factors.max() > 1.5
    assert np.abs(found.dequantised() - matrix).max() < 0.05


def test_without_anything_before_it_no_factors() -> None:
    values = gram(activations(300, 64, 1))
    assert {one.method for one in choose(weight(64), values, values)} == {RTN, CLIP, GPTQ}
    assert [one.method for one in choose(weight(64), values, values, method=AWQ)] == [RTN]


def test_what_cannot_be_is_refused() -> None:
    good = gram(activations(300, 64, 1))
    with pytest.raises(EdgeError, match="64 channels were collected for a matrix that takes 70"):
        choose(weight(70), good, good)
    broken = Gram(np.where(np.eye(64) > 0, np.nan, good.matrix), 300)
    for bad in (broken, Gram(good.matrix, 0)):
        with pytest.raises(EdgeError, match="not finite"):
            choose(weight(64), good, bad)
    with pytest.raises(EdgeError, match="no method 'magic'"):
        choose(weight(64), good, good, method="magic")
