"""A calibration's result as JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from pixano_edge.calibration.result import Budget, CalibrationResult, Score, TensorRange
from pixano_edge.engine.errors import EdgeError

from .made_up import result, variant


def test_it_comes_back_equal() -> None:
    made = result()
    text = json.dumps(made.to_dict(), allow_nan=False)
    assert CalibrationResult.from_dict(json.loads(text)) == made


def test_nan_comes_back_as_nan() -> None:
    made = result(variants=(replace(variant(), held_out=Score(math.nan), passed=False),))
    back = CalibrationResult.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False)))
    held_out = back.variants[0].held_out
    assert held_out is not None
    assert math.isnan(held_out.mean)
    assert not back.variants[0].budget.met(held_out.mean)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 99}, "layout 99"),
        ({"surprise": 1}, "has no"),
        ({"bundle": 3}, "no str"),
        ({"variants": [{"name": "int8"}]}, "damaged"),
    ],
)
def test_what_is_no_result_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(EdgeError, match=said):
        CalibrationResult.from_dict({**result().to_dict(), **change})


@pytest.mark.parametrize("text", ["mask_iou>=0.98", "mask_iou >= 98%", " mask_iou>=.98 "])
def test_budget_is_read(text: str) -> None:
    assert Budget.parse(text) == Budget("mask_iou", 0.98)
    assert str(Budget.parse(text)) == "mask_iou>=0.98"


@pytest.mark.parametrize("text", ["", "mask_iou", "mask_iou>0.98", "mask_iou>=98", "mask_iou>=0", "0.98", "a>=-1"])
def test_no_budget_is_refused(text: str) -> None:
    with pytest.raises(EdgeError, match="no budget"):
        Budget.parse(text)


def test_budget_needs_a_number() -> None:
    budget = Budget("mask_iou", 0.9)
    assert budget.met(0.9)
    assert not budget.met(0.8999)
    assert not budget.met(None)
    assert not budget.met(math.nan)


def test_bins_are_merged_whole() -> None:
    counts = np.arange(2048)
    merged = TensorRange.merged(counts)
    assert len(merged) == 64
    assert sum(merged) == counts.sum()
    assert merged[0] == counts[:32].sum()
    with pytest.raises(ValueError, match="cannot be merged"):
        TensorRange.merged(np.arange(130))
