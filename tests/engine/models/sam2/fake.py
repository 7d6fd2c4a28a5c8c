"""A SAM 2 of two numpy functions, so that the predictor's own rules are tested without any back end.

The encoder keeps pooled pixels; the decoder draws a disc of logits around the first point, so a mask tells which
image, which coordinates and which labels reached the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.models.sam2.cache import EmbeddingCache
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.runtime import StubDevice, StubSession

CONSTANTS = sam2.Sam2Constants(image_size=128, hidden_dim=32)
SPECS = sam2.graphs(CONSTANTS)
RADIUS = 4.0
"""Of the disc, in cells of the 32 x 32 mask."""


def encode(inputs: dict[str, Any]) -> Mapping[str, Any]:
    pixels = inputs[sam2.PIXEL_VALUES]
    mean = pixels.mean(dtype=np.float32)
    outputs = {s.name: np.full(s.shape(), mean, np.float32) for s in SPECS[sam2.IMAGE_ENCODER].outputs}
    outputs[sam2.HIGH_RES_0][0, 0] = pixels[0, 0].reshape(32, 4, 32, 4).mean(axis=(1, 3))
    return outputs


def decode(inputs: dict[str, Any]) -> Mapping[str, Any]:
    points, labels = inputs[sam2.POINT_COORDS], inputs[sam2.POINT_LABELS]
    count = len(points)
    y, x = np.mgrid[:32, :32].astype(np.float32) + 0.5
    # Distances in image pixels would do as well; cells keep the radius independent of the image's shape.
    center = points[:, 0] / 4
    distance = np.hypot(x - center[:, :1, None], y - center[:, 1:, None])
    disc = (RADIUS - distance) * np.where(labels[:, 0] == 0, -10.0, 10.0)[:, None, None]
    extra = inputs[sam2.MASK_INPUT][:, 0] * inputs[sam2.HAS_MASK_INPUT][:, None, None]
    masks = np.stack([disc + extra, disc, 2 * disc, -disc], axis=1).astype(np.float32)
    bright = inputs[sam2.IMAGE_EMBED].flat[0]
    scores = np.tile(np.array([0.4, 0.5, 0.9, 0.6], np.float32), (count, 1)) + bright / 1000
    objects = (labels >= 0).sum(axis=1, keepdims=True)
    return {
        sam2.MASKS: masks,
        sam2.IOU_SCORES: scores.astype(np.float32),
        sam2.OBJECT_SCORE_LOGITS: objects.astype(np.float32),
    }


def fake_predictor(
    *, cache: EmbeddingCache | None = None, deferred: bool = False, bundle_hash: str = "fake"
) -> Sam2ImagePredictor:
    device = StubDevice(deferred=deferred)
    return Sam2ImagePredictor(
        StubSession(SPECS[sam2.IMAGE_ENCODER], device, encode),
        StubSession(SPECS[sam2.MASK_DECODER], device, decode),
        CONSTANTS,
        bundle_hash=bundle_hash,
        variant="fp32",
        cache=cache,
    )
