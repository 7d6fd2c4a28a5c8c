"""Overlap and boxes of masks against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pixano_edge.engine.models.masks import mask_box, mask_iou


def _mask(*rows: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in rows])


def test_mask_iou_by_hand():
    a = _mask("##..", "##..")
    b = _mask(".##.", ".##.")
    assert mask_iou(a, b) == pytest.approx(2 / 6)
    assert mask_iou(a, a) == 1.0
    assert mask_iou(a, ~a) == 0.0
    assert mask_iou(a, np.zeros_like(a)) == 0.0


def test_mask_iou_of_two_empty_masks_is_one():
    empty = np.zeros((3, 3), bool)
    assert mask_iou(empty, empty) == 1.0


def test_mask_iou_refuses_other_shapes_and_dtypes():
    with pytest.raises(ValueError, match="one shape"):
        mask_iou(np.ones((2, 2), bool), np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="bool"):
        mask_iou(np.ones((2, 2), np.uint8), np.ones((2, 2), bool))  # type: ignore[arg-type]


def test_mask_box() -> None:
    mask = np.zeros((161, 97), np.bool_)
    assert mask_box(mask) is None
    mask[100, 20] = mask[150, 33] = True
    assert mask_box(mask) == (20, 100, 33, 150)
