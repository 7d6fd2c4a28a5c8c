"""Moves the scores of a trained detector so that 0.5, Pixano's default threshold, is where its boxes are best.

The focal loss keeps scores low: a box worth showing may have 0.25. Adding a constant to all logits keeps the order of
the boxes of a picture, and OWLv2 has such a constant: the bias of the class head's shift, which its scale multiplies.
The scale differs a little from token to token, so the order across tokens can change a little too; what that costs is
in the figures, which are taken on the calibrated checkpoint.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import Owlv2ForObjectDetection

from pixano_edge.export.demo.detect_eval import Tallies, ask
from pixano_edge.export.demo.owlv2_model import TorchDetector, normalise
from pixano_edge.export.demo.scenes import generate_scene

FIRST_SEED, SCENES = 2_100_000, 100
"""Training scenes that no step of the training shows."""


def best_threshold(scores: NDArray[np.float64], hits: NDArray[np.bool_], objects: int) -> float:
    """The score above which precision and recall have the largest harmonic mean."""
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(hits[order])
    harmonic = 2 * found / (np.arange(1, len(order) + 1) + objects)
    best = int(harmonic.argmax())
    following = scores[order][min(best + 1, len(order) - 1)]
    return float((scores[order][best] + following) / 2)


@torch.no_grad()
def calibrate(model: Owlv2ForObjectDetection, tokenizer: Any, scenes: int = SCENES) -> float:
    """Shifts the scores of ``model``, in place, and returns the score that is now 0.5."""
    tallies: Tallies = {}
    scales = []
    detector = TorchDetector(model, tokenizer)
    for seed in range(FIRST_SEED, FIRST_SEED + scenes):
        scene = generate_scene(seed, "train")
        ask(detector, scene, tallies)
        features = model.image_embedder(normalise(torch.from_numpy(scene.image)[None]))[0]
        scales.append(float((F.elu(model.class_head.logit_scale(features)) + 1).mean()))
    scores = np.array([score for tally in tallies.values() for score in tally.scores])
    hits = np.array([hit for tally in tallies.values() for hit in tally.hits])
    threshold = best_threshold(scores, hits, sum(tally.objects for tally in tallies.values()))
    model.class_head.logit_shift.bias.sub_(float(np.log(threshold / (1 - threshold)) / np.mean(scales)))
    return threshold
