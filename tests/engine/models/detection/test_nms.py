"""Suppression of overlapping boxes, against a slow version."""

from __future__ import annotations

import numpy as np
import pytest

from pixano_edge.engine.models.detection.nms import box_iou, nms, non_maximum_suppression


def slow(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, threshold: float) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        same = [j for j in kept if labels[j] == labels[i]]
        if all(box_iou(boxes[[j]], boxes[i])[0] <= threshold for j in same):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("classes", [1, 3])
def test_as_the_slow_version(threshold: float, classes: int) -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 60, (80, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 40, (80, 2))], axis=1)
    scores, labels = rng.random(80).round(2), rng.integers(0, classes, 80)
    assert nms(boxes, scores, labels, threshold).tolist() == slow(boxes, scores, labels, threshold)


def test_classes_do_not_suppress_each_other() -> None:
    boxes = np.array([[0, 0, 10, 10]] * 3, np.float32)
    scores, labels = np.array([0.5, 0.9, 0.7]), np.array([0, 0, 1])
    assert nms(boxes, scores, labels, 0.5).tolist() == [1, 2]
    assert non_maximum_suppression(boxes, scores, 0.5) == [1]


def test_nothing_in_nothing_out() -> None:
    assert nms(np.empty((0, 4)), np.empty(0), np.empty(0, np.int64), 0.5).tolist() == []


def test_boxes_without_area_overlap_nothing() -> None:
    boxes = np.array([[1, 1, 1, 5], [1, 1, 1, 5], [0, 0, 4, 4]], np.float32)
    assert nms(boxes, np.array([0.9, 0.8, 0.7]), np.zeros(3, np.int64), 0.1).tolist() == [0, 1, 2]
    assert box_iou(boxes[:1], boxes[0]).tolist() == [0.0]
