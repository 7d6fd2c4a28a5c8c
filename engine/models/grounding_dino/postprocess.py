"""From logits and boxes of every query to detections.

Reference: ``post_process_grounded_object_detection`` of transformers' ``processing_grounding_dino.py``. It scores a box
by the largest probability over all tokens of the caption, keeps it above `box_threshold`, and labels it with the text
of whatever tokens exceed `text_threshold`, which may be half a name, or two. Here the tokens of a class's own phrase
count: its score is their largest probability, a box belongs to the class that scores best, and it is kept where that
score exceeds both thresholds. Wherever the reference's best token belongs to a phrase (and not to a dot or to the
caption's ends, which trained models keep low), box and score are the same, and its label text contains the token that
decided.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Found:
    """Boxes of one or more captions on one image, in no particular order; see `Detections` for the fields."""

    boxes: Floats
    scores: Floats
    labels: npt.NDArray[np.int64]


def find(
    logits: Floats,
    boxes: Floats,
    labels: npt.NDArray[np.int64],
    edges: npt.NDArray[np.int64],
    size: tuple[int, int],
    box_threshold: float,
    text_threshold: float,
) -> Found:
    """Detections of one caption.

    Args:
        logits: (Q, T), not changed.
        boxes: (Q, 4) centre x, centre y, width, height in 0..1, not changed.
        labels: (K,) class of each phrase; see `Caption`.
        edges: (2 K,) start and end of each phrase.
        size: (height, width) of the original image.
        box_threshold: A score must exceed it.
        text_threshold: So must it this one.

    Returns:
        Arrays of their own, in the order of the queries; boxes are corners in pixels, clipped to the image.
    """
    # Every second part is a phrase, the others are its dot and, at the end, the caption's last token.
    best = np.maximum.reduceat(logits, edges, axis=1)[:, ::2]
    phrase = best.argmax(axis=1)
    scores = _sigmoid(best[np.arange(len(best)), phrase])
    kept = np.flatnonzero(scores > max(box_threshold, text_threshold))
    return Found(_corners(boxes[kept], size), scores[kept], labels[phrase[kept]])


def merge(parts: list[Found]) -> Found:
    """All detections, best first; of equal scores the earlier caption and query comes first."""
    scores = np.concatenate([part.scores for part in parts])
    order = np.argsort(-scores, kind="stable")
    boxes = np.concatenate([part.boxes for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    return Found(boxes[order], scores[order], labels[order])


def _sigmoid(x: Floats) -> Floats:
    # exp of a large positive number overflows to infinity, whose quotient is the right 0.
    with np.errstate(over="ignore"):
        return (1 / (1 + np.exp(-x))).astype(np.float32)


def _corners(boxes: Floats, size: tuple[int, int]) -> Floats:
    height, width = size
    centre, half = boxes[:, :2], 0.5 * boxes[:, 2:]
    scale = np.array([width, height, width, height], np.float32)
    corners = np.concatenate([centre - half, centre + half], axis=1) * scale
    return np.clip(corners, 0.0, scale).astype(np.float32)
