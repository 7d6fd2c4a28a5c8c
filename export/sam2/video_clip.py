"""The clip that parity and the golden clip are measured on: prompts that a model answers, chosen with PyTorch.

A model may see no object at a place picked blindly, and empty masks agree whatever the graphs do. So a few clicks and
boxes are tried on the first frame, and the first ones are taken whose masks are neither empty nor everything, there and
on the next frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from pixano_edge.engine.models.sam2_video.clip import Clip, ClipPrompt, Image, moving_clip
from pixano_edge.export.sam2.video_reference import Answer, VideoReference

Place = TypeVar("Place", bound=tuple[float, ...])

CLICKS: tuple[tuple[float, float], ...] = tuple((x, y) for y in (0.5, 0.3, 0.7) for x in (0.5, 0.3, 0.7))
"""Places of a click, as fractions of a frame's width and height."""
BOXES: tuple[tuple[float, float, float, float], ...] = (
    (0.25, 0.2, 0.85, 0.75), (0.3, 0.3, 0.7, 0.7), (0.1, 0.1, 0.5, 0.5), (0.5, 0.1, 0.9, 0.5), (0.1, 0.5, 0.5, 0.9),
    (0.5, 0.5, 0.9, 0.9),
)  # fmt: skip
VISIBLE = (0.005, 0.7)
"""Share of a frame that a mask worth comparing covers."""


def find_clip(reference: VideoReference, size: tuple[int, int], frames: Sequence[Image]) -> Clip:
    """The clip whose frames the reference has, with the prompts that the model answers best.

    Args:
        reference: Fresh; left without objects.
        size: Height and width of the picture.
        frames: Of ``moving_clip(size, ...)``.
    """
    click = _first_seen(reference, {c: moving_clip(size, len(frames), click=c).passes[0].prompts[0] for c in CLICKS})
    box = _first_seen(reference, {b: moving_clip(size, len(frames), box=b).passes[0].prompts[1] for b in BOXES})
    return moving_clip(size, len(frames), click, box)


def _first_seen(reference: VideoReference, places: Mapping[Place, ClipPrompt]) -> Place:
    """The first place whose mask is visible on both frames, else one where it is on most."""
    scores: dict[Place, int] = {}
    for place, prompt in places.items():
        answers = [reference.prompt(prompt.object_id, 0, prompt.points, prompt.labels, prompt.box)]
        answers += [found[prompt.object_id] for _, found in reference.propagate(1, 1)]
        reference.forget(prompt.object_id)
        scores[place] = sum(visible(answer) for answer in answers)
        if scores[place] == len(answers):
            break
    return max(scores, key=lambda place: scores[place])


def visible(answer: Answer) -> bool:
    """Whether a mask covers a part of the frame that is worth comparing."""
    logits, score = answer
    return score > 0 and VISIBLE[0] < float(np.mean(logits > 0)) < VISIBLE[1]
