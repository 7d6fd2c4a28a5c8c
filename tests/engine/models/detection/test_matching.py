"""What counts as the same detections, and what does not."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from pixano_edge.engine.models.detection.base import Detections
from pixano_edge.engine.models.detection.matching import Agreement


def some() -> Detections:
    boxes = np.array([[10, 10, 60, 50], [30, 20, 90, 95], [12, 11, 61, 52], [0, 0, 5, 5]], np.float32)
    return Detections(boxes, np.array([0.9, 0.8, 0.7, 0.4], np.float32), np.array([0, 1, 0, 2]), ("a", "b", "c"))


def judge(got: Detections, want: Detections | None = None, **options: float) -> Agreement:
    agreement = Agreement()
    agreement.add(got, some() if want is None else want, 0.3, **options)
    return agreement


def test_equal_detections_agree() -> None:
    agreement = judge(some())
    assert agreement.problems() == []
    assert (agreement.boxes, agreement.unmatched, agreement.max_box, agreement.mean_iou) == (4, 0, 0.0, 1.0)


def test_order_does_not_matter_and_small_differences_are_told() -> None:
    other, turn = some(), [3, 1, 2, 0]
    boxes, scores = other.boxes[turn] + np.float32(0.5), other.scores[turn] - np.float32(4e-4)
    moved = Detections(boxes, scores, other.labels[turn], other.classes)
    agreement = judge(moved)
    assert agreement.problems() == []
    assert agreement.max_box == pytest.approx(0.5)
    assert agreement.max_score == pytest.approx(4e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"labels": np.array([0, 1, 1, 2])}, "2 box"),
        ({"scores": np.array([0.9, 0.8, 0.7, 0.42], np.float32)}, "score differs"),
        ({"boxes": some().boxes + np.array([2, 0, 0, 0], np.float32)}, "2.00 pixels away"),
        ({"boxes": some().boxes[:, [1, 0, 3, 2]]}, "partner|pixels"),
        ({"boxes": np.full((4, 4), np.nan, np.float32)}, "partner|pixels"),
        ({"scores": np.array([0.9, np.nan, 0.7, 0.4], np.float32)}, "score differs"),
    ],
)
def test_differences_are_found(change: dict[str, np.ndarray], problem: str) -> None:
    found = judge(dataclasses.replace(some(), **change)).problems()
    assert found
    assert re.search(problem, "; ".join(found))


def test_a_missing_box_counts_unless_its_score_is_at_the_threshold() -> None:
    less = dataclasses.replace(some(), **{f: getattr(some(), f)[:3] for f in ("boxes", "scores", "labels")})
    assert judge(less).unmatched == 1
    assert judge(some(), less).unmatched == 1
    assert judge(less, margin=0.15).unmatched == 0


def test_nothing_on_both_sides_agrees() -> None:
    none = Detections(np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty(0, np.int64), ("a",))
    assert judge(none, none).mean_iou == 1.0
    assert judge(none).unmatched == 4
