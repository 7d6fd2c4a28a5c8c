"""Suppression of boxes that overlap a better one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def non_maximum_suppression(boxes: npt.NDArray[Any], scores: npt.NDArray[Any], threshold: float) -> list[int]:
    """Indices of the boxes kept, best score first: a box goes when its IoU with a better one exceeds `threshold`.

    Boxes are x1, y1, x2, y2 with area (x2 - x1) * (y2 - y1), as in torchvision's ``nms``; boxes without area
    overlap nothing. Equal scores keep their order.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(int(best))
        corner = np.minimum(boxes[rest, 2:], boxes[best, 2:]) - np.maximum(boxes[rest, :2], boxes[best, :2])
        shared = np.prod(np.maximum(corner, 0.0), axis=1)
        union = areas[rest] + areas[best] - shared
        order = rest[shared <= threshold * union]
    return kept


def nms(
    boxes: npt.NDArray[Any], scores: npt.NDArray[Any], labels: npt.NDArray[np.int64], threshold: float
) -> npt.NDArray[np.int64]:
    """The same within each class: only boxes of one class suppress each other.

    Args:
        boxes: (N, 4) x1, y1, x2, y2.
        scores: (N,).
        labels: (N,).
        threshold: IoU above which the lesser box goes.

    Returns:
        Indices kept, best score first.
    """
    kept: list[int] = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        kept += [int(own[i]) for i in non_maximum_suppression(boxes[own], scores[own], threshold)]
    found = np.array(sorted(kept), np.int64)
    return found[np.argsort(-scores[found], kind="stable")]


def box_iou(boxes: npt.NDArray[Any], box: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(N,) IoU of x1, y1, x2, y2 boxes with one; 0 where neither has an area."""
    boxes, box = np.asarray(boxes, np.float64), np.asarray(box, np.float64)
    corner = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    shared = np.prod(np.maximum(corner, 0.0), axis=1)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    union = areas + (box[2] - box[0]) * (box[3] - box[1]) - shared
    iou = np.zeros(len(boxes))
    np.divide(shared, union, out=iou, where=union > 0)
    return iou
