"""How far one detector's answer is from another's: box by box, for parity at export and for golden samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .base import Detections
from .nms import box_iou

MAX_BOX = 1.0
"""Pixels that a corner may be away at full precision."""
MAX_SCORE = 1e-3
"""What a score may differ by at full precision."""
SAME_IOU = 0.5
"""Boxes of one class that overlap so much mean one object, whatever their distance."""


@dataclass
class Agreement:
    """Pairs of boxes of two answers, and what had no partner. Add several answers up with `add`.

    Attributes:
        boxes: Of the reference.
        unmatched: Boxes of either side without a partner of the same class, but for those whose score is so near to
            the threshold that the other side may have left them out.
        max_box: Largest distance of a corner of a pair, in pixels.
        max_score: Largest difference of the scores of a pair.
        ious: Overlap of each pair; 0 for each unmatched box.
    """

    boxes: int = 0
    unmatched: int = 0
    max_box: float = 0.0
    max_score: float = 0.0
    ious: list[float] = field(default_factory=list)

    def add(self, got: Detections, want: Detections, threshold: float, margin: float = MAX_SCORE) -> None:
        """Takes one more pair of answers into account.

        Args:
            got: To judge.
            want: Reference.
            threshold: That both were asked with.
            margin: A box without partner counts only if its score is further from the threshold.
        """
        self.boxes += len(want)
        free = np.ones(len(got), bool)
        for box, score, label in zip(want.boxes, want.scores, want.labels):
            partner = _partner(got, free, box, float(score), int(label))
            if partner is None:
                self._miss(float(score), threshold, margin)
                continue
            free[partner] = False
            self.max_box = max(self.max_box, _largest(got.boxes[partner] - box))
            self.max_score = max(self.max_score, _largest(got.scores[partner] - score))
            self.ious.append(float(box_iou(got.boxes[partner][None], box)[0]))
        for score in got.scores[free]:
            self._miss(float(score), threshold, margin)

    def _miss(self, score: float, threshold: float, margin: float) -> None:
        if not abs(score - threshold) <= margin:
            self.unmatched += 1
            self.ious.append(0.0)

    @property
    def mean_iou(self) -> float:
        """Of all pairs and unmatched boxes; 1 where there is nothing on either side."""
        return float(np.mean(self.ious)) if self.ious else 1.0

    @property
    def min_iou(self) -> float:
        return min(self.ious, default=1.0)

    def problems(self) -> list[str]:
        """What misses the bar of full precision, in words."""
        found = []
        if self.unmatched:
            found.append(f"{self.unmatched} box(es) without a partner of the same class")
        if not self.max_box <= MAX_BOX:
            found.append(f"a box is {self.max_box:.2f} pixels away > {MAX_BOX}")
        if not self.max_score <= MAX_SCORE:
            found.append(f"a score differs by {self.max_score:.2e} > {MAX_SCORE:.0e}")
        return found


def _largest(difference: npt.NDArray[np.float32]) -> float:
    """Largest magnitude; infinite for NaN, which compares as no difference at all."""
    value = float(np.abs(difference).max())
    return value if np.isfinite(value) else float("inf")


def _partner(
    got: Detections, free: npt.NDArray[np.bool_], box: npt.NDArray[np.float32], score: float, label: int
) -> int | None:
    """The free box of this class that is nearest, in place and then in score, and means the same object."""
    candidates = np.flatnonzero(free & (got.labels == label))
    if not len(candidates):
        return None
    distance = np.abs(got.boxes[candidates] - box).max(axis=1)
    # Two queries may answer with one box; their scores tell them apart.
    order = np.lexsort((np.abs(got.scores[candidates] - score), np.round(distance / MAX_BOX)))
    best = order[0]
    same = distance[best] <= MAX_BOX or box_iou(got.boxes[candidates[best]][None], box)[0] >= SAME_IOU
    return int(candidates[best]) if same else None
