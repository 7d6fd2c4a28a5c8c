"""From a graph's outputs to detections: scores of classes, boxes in pixels, the choice of an example's embedding.

References: ``class_predictor`` and ``embed_image_query`` of transformers' ``modeling_owlv2.py`` and
``modeling_owlvit.py``, ``post_process_object_detection`` and ``post_process_image_guided_detection`` of their image
processors, and ``embed_image_query`` of upstream's ``scenic/projects/owl_vit/notebooks/inference.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...contracts.owlv2 import PADDED_SQUARE, OwlConstants
from ...errors import PromptError
from ..detection.base import Detections
from ..detection.nms import box_iou, non_maximum_suppression
from ..detection.nms import nms as suppress
from ..resampling import Scratch

Floats = npt.NDArray[np.float32]

_EPSILON = np.float32(1e-6)
"""Added to lengths before dividing, as upstream does."""
_NEAR = 0.8
"""Boxes that overlap the asked one by this share of the best overlap may give the example's embedding."""


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """What the image encoder says of one image, in host memory of its own.

    Attributes:
        boxes: (Q, 4) centre x, centre y, width, height in 0..1 of the square input.
        class_embeds: (Q, D), not normalised.
        shift: (Q, 1).
        scale: (Q, 1).
        objectness: (Q,) logits; None of a model without.
        inverse: (Q, 1) one over the length of each class embedding.
    """

    boxes: Floats
    class_embeds: Floats
    shift: Floats
    scale: Floats
    objectness: Floats | None
    inverse: Floats

    @classmethod
    def of(
        cls, boxes: Floats, class_embeds: Floats, shift: Floats, scale: Floats, objectness: Floats | None
    ) -> ImageFeatures:
        """Takes arrays over and computes the lengths."""
        lengths = np.sqrt(np.einsum("qd,qd->q", class_embeds, class_embeds))[:, None]
        return cls(boxes, class_embeds, shift, scale, objectness, 1 / (lengths + _EPSILON))

    @property
    def nbytes(self) -> int:
        arrays = (self.boxes, self.class_embeds, self.shift, self.scale, self.objectness, self.inverse)
        return sum(a.nbytes for a in arrays if a is not None)


def class_logits(features: ImageFeatures, embeds: Floats, scratch: Scratch) -> Floats:
    """(Q, C) logits of every box for every class, in `scratch`: valid until its next use.

    Args:
        features: Of the image.
        embeds: (C, D) unit vectors.
        scratch: Work memory that grows to the largest request.
    """
    logits = scratch.take("logits", (len(features.class_embeds), len(embeds)))
    np.matmul(features.class_embeds, embeds.T, out=logits)
    logits *= features.inverse
    logits += features.shift
    logits *= features.scale
    return logits


def sigmoid(x: Floats) -> Floats:
    # exp of a large number overflows to infinity, whose quotient is the right 0.
    with np.errstate(over="ignore"):
        return (1 / (1 + np.exp(-x))).astype(np.float32)


def box_scale(size: tuple[int, int], constants: OwlConstants) -> Floats:
    """(4,) pixels that 1 in a box stands for: the long side where the picture was padded, else each its own."""
    height, width = size
    if constants.resize == PADDED_SQUARE:
        height = width = max(size)
    return np.array([width, height, width, height], np.float32)


def corners(boxes: Floats) -> Floats:
    """Centre x, centre y, width, height to x1, y1, x2, y2."""
    centre, half = boxes[:, :2], np.float32(0.5) * boxes[:, 2:]
    return np.concatenate([centre - half, centre + half], axis=1)


def in_picture(boxes: Floats, size: tuple[int, int]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Boxes in pixels clipped to the picture, and which of them have anything left of them."""
    height, width = size
    clipped = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    return clipped, (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])


def find(
    features: ImageFeatures,
    logits: Floats,
    size: tuple[int, int],
    constants: OwlConstants,
    classes: tuple[str, ...],
    threshold: float,
    nms: float | None,
    limit: int | None,
) -> Detections:
    """Each box with the class that it scores highest, the first of equal ones, if that is above the threshold.

    Boxes wholly outside the picture, in what was added to make it square, are left out.

    Args:
        features: Of the image.
        logits: (Q, C) of `class_logits`, not changed.
        size: (height, width) of the original image.
        constants: Of the checkpoint.
        classes: Go into the answer.
        threshold: Of the score.
        nms: See `Detector.detect`.
        limit: See `Detector.detect`.
    """
    labels = logits.argmax(axis=1)
    scores = sigmoid(logits[np.arange(len(logits)), labels])
    kept = np.flatnonzero(scores > threshold)
    kept = kept[np.argsort(-scores[kept], kind="stable")]
    boxes, visible = in_picture(corners(features.boxes[kept]) * box_scale(size, constants), size)
    boxes, kept = boxes[visible], kept[visible]
    picked = slice(None) if nms is None else suppress(boxes, scores[kept], labels[kept], nms)
    return Detections(
        boxes[picked][:limit].copy(), scores[kept][picked][:limit].copy(), labels[kept][picked][:limit].copy(), classes
    )


def example_query(
    features: ImageFeatures, size: tuple[int, int], constants: OwlConstants, box: npt.NDArray[np.float64] | None
) -> int:
    """Which box of an example image stands for what is looked for.

    With a `box`, and for OWL-ViT without one, too, where it is the whole picture: of the boxes that overlap it about
    as well as the best, the one least like the mean of all embeddings. Training gives one box of an object its class
    and makes all others background, which is what the mean is like. OWLv2 without a `box`: the likeliest object.

    Args:
        features: Of the example.
        size: (height, width) of the example in pixels.
        constants: Of the checkpoint.
        box: x1, y1, x2, y2 in pixels.

    Raises:
        PromptError: The box is empty or outside the picture.
    """
    if box is None:
        if features.objectness is not None:
            return int(features.objectness.argmax())
        target = np.array([0.0, 0.0, 1.0, 1.0])
    else:
        target = _checked_box(box, size) / box_scale(size, constants)
    boxes = corners(features.boxes).astype(np.float64)
    overlap = box_iou(boxes, target)
    if not overlap.any():
        return int(_generalised_iou(boxes, target).argmax())
    near = np.flatnonzero(overlap >= overlap.max() * _NEAR)
    embeds = features.class_embeds
    return int(near[(embeds[near] @ embeds.mean(axis=0)).argmin()])


def find_like(
    features: ImageFeatures,
    logits: Floats,
    size: tuple[int, int],
    constants: OwlConstants,
    name: str,
    threshold: float,
    nms: float | None,
    limit: int | None,
) -> Detections:
    """Boxes that look like an example, as ``post_process_image_guided_detection``.

    Scores are relative: the best box of the image has 1, one of a tenth of its probability 0 and is left out.

    Args:
        features: Of the image, not of the example.
        logits: (Q, 1) of `class_logits` for the example's embedding, not changed.
        size: (height, width) of the original image.
        constants: Of the checkpoint.
        name: Of the one class of the answer.
        threshold: Least probability, before scores become relative.
        nms: IoU above which the lesser of two boxes goes; None keeps both.
        limit: Most boxes returned.
    """
    scores = sigmoid(logits[:, 0])
    order = np.argsort(-scores, kind="stable")
    best = scores[order[0]] + np.float32(1e-6)
    relative = np.clip((scores - best * np.float32(0.1)) / (best * np.float32(0.9)), 0, 1)
    # What goes here could only have suppressed what goes, too.
    order = order[(scores[order] >= threshold) & (relative[order] > 0)]
    boxes = corners(features.boxes[order])
    if nms is not None:
        # Before clipping, as the reference does it.
        kept = non_maximum_suppression(boxes, scores[order], nms)
        boxes, order = boxes[kept], order[kept]
    boxes, visible = in_picture(boxes * box_scale(size, constants), size)
    boxes, order = boxes[visible][:limit], order[visible][:limit]
    return Detections(boxes.copy(), relative[order], np.zeros(len(order), np.int64), (name,))


def _checked_box(box: npt.NDArray[np.float64], size: tuple[int, int]) -> npt.NDArray[np.float64]:
    height, width = size
    if box.shape != (4,) or not np.isfinite(box).all() or box[2] <= box[0] or box[3] <= box[1]:
        raise PromptError(f"'{box.tolist()}' is no box.", "Send x1, y1, x2, y2 in pixels, with x1 < x2 and y1 < y2.")
    if box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
        raise PromptError(
            f"The box {box.tolist()} lies outside the example of {width}x{height} pixels.", "Draw it on the example."
        )
    return np.clip(box, 0, (width, height, width, height))


def _generalised_iou(boxes: npt.NDArray[np.float64], box: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(N,) IoU less the share of the common hull that neither covers (Rezatofighi et al., 2019)."""
    hull = np.prod(np.maximum(boxes[:, 2:], box[2:]) - np.minimum(boxes[:, :2], box[:2]), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    iou = box_iou(boxes, box)
    union = areas / (1 + iou)  # of areas a + b with overlap i: iou = i / (a + b - i)
    found: npt.NDArray[np.float64] = iou - (hull - union) / hull
    return found
