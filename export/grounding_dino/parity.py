"""Raw outputs of the exported graphs against transformers' own model, query by query.

Grounding DINO picks its queries by a top-k over the places of the feature maps, and each learned query starts at the
place of its rank. Where two scores nearly tie, two runtimes may rank them differently; the queries of these two ranks
then answer from other places, and their boxes differ by any amount without anybody being wrong. So queries are compared
one by one, and a few may differ where the reference's own scores say that their ranks were a near tie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pixano_edge.engine.models.grounding_dino.text import Caption

Floats = npt.NDArray[np.float32]

LIMIT = 1e-4
"""Largest difference over the largest reference value, for logits and for boxes."""
TIE = 1e-3
"""Selection scores that differ by less may change ranks."""
SWAPS = 4 / 900
"""Largest share of queries that may differ for that reason; two make one swap."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Answers of transformers' model for one image and caption.

    Attributes:
        logits: (Q, T), the caption's own tokens.
        boxes: (Q, 4) cx, cy, w, h.
        selection: (Q,) selection scores by rank.
    """

    logits: Floats
    boxes: Floats
    selection: Floats


@dataclass(frozen=True)
class Agreement:
    """How far one answer is from the reference.

    Attributes:
        logits: Largest difference over the largest reference value, without queries that changed ranks.
        boxes: The same of the boxes.
        swapped: Queries that differ and whose ranks were a near tie.
        queries: All of them.
    """

    logits: float
    boxes: float
    swapped: int
    queries: int

    @property
    def allowed(self) -> int:
        """Most queries that may have changed ranks."""
        return allowed_swaps(self.queries)

    @property
    def passed(self) -> bool:
        return self.logits <= LIMIT and self.boxes <= LIMIT and self.swapped <= self.allowed


def reference(model: Any, pixels: Floats, caption: Caption) -> Reference:
    """Asks transformers' `GroundingDinoForObjectDetection`, which makes masks and position ids itself.

    Args:
        model: In eval mode.
        pixels: (1, 3, H, W).
        caption: Only its ids are used.
    """
    with torch.no_grad():
        answer = model(pixel_values=torch.from_numpy(pixels), input_ids=torch.tensor([caption.ids]))
    count = len(caption)
    selection = answer.enc_outputs_class[0, :, :count].amax(-1).topk(model.config.num_queries)[0].numpy()
    return Reference(answer.logits[0, :, :count].numpy(), answer.pred_boxes[0].numpy(), selection)


def swapped_queries(wanted: Reference, logits: Floats, boxes: Floats, limit: float = LIMIT) -> npt.NDArray[np.bool_]:
    """Queries (Q,) that differ from the reference and whose ranks were a near tie."""
    logit_errors, box_errors = _errors(wanted, logits, boxes)
    # NaN must not pass as "not larger".
    return ~((logit_errors <= limit) & (box_errors <= limit)) & near_ties(wanted.selection)


def allowed_swaps(queries: int) -> int:
    """Most of so many queries that may have changed ranks; two make one swap."""
    return max(2, int(queries * SWAPS))


def _errors(wanted: Reference, logits: Floats, boxes: Floats) -> tuple[Floats, Floats]:
    """Per query the largest difference of its logits and of its box, over the largest reference value."""
    return (
        np.abs(logits - wanted.logits).max(axis=1) / np.abs(wanted.logits).max(),
        np.abs(boxes - wanted.boxes).max(axis=1) / np.abs(wanted.boxes).max(),
    )


def near_ties(selection: Floats) -> npt.NDArray[np.bool_]:
    """Ranks (Q,) whose score is within `TIE` of a neighbour's; the last one may tie with one that was not taken."""
    gaps = -np.diff(selection)
    return np.minimum(np.append(gaps, 0.0), np.insert(gaps, 0, np.inf)) < TIE


def compare(wanted: Reference, logits: Floats, boxes: Floats, limit: float = LIMIT) -> Agreement:
    """Compares one answer, (Q, T) and (Q, 4), with the reference; `limit` tells which queries count as different."""
    logit_errors, box_errors = _errors(wanted, logits, boxes)
    swapped = swapped_queries(wanted, logits, boxes, limit)
    return Agreement(
        float(logit_errors[~swapped].max(initial=0.0)),
        float(box_errors[~swapped].max(initial=0.0)),
        int(swapped.sum()),
        len(logits),
    )
