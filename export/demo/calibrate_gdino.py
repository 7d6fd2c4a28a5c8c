"""Moves the scores of a trained Grounding DINO so that 0.5, Pixano's default threshold, is where its boxes are best.

The focal loss keeps scores low. A score is the product of a query's normed state with a token, and all tokens have a
large part in common: what moves the states along it adds nearly the same to all scores of all queries. The last norm's
bias does that; the head that reads boxes from the same states gets the opposite move, so boxes stay as they were, and
which places become queries is decided by another norm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import GroundingDinoForObjectDetection

from pixano_edge.export.demo.calibrate_owlv2 import FIRST_SEED, SCENES, best_threshold
from pixano_edge.export.demo.detect_eval import Tallies, ask
from pixano_edge.export.demo.gdino_model import TorchDetector
from pixano_edge.export.demo.scenes import generate_scene


@torch.no_grad()
def shift_scores(model: Any, by: float) -> None:
    """Adds nearly `by` to every logit of ``model``, in place; boxes and the choice of queries stay as they are."""
    common = model.model.encoder.layers[-1].text_enhancer_layer.layer_norm_after.bias
    move = by * common / common.square().sum()
    model.model.decoder.layer_norm.bias.add_(move)
    head: Any = model.bbox_embed[-1]
    first = head.layers[0]
    first.bias.sub_(first.weight @ move)


@torch.no_grad()
def keep_boxes(model: Any) -> None:
    """Lets each query of ``model`` keep the box of the place that it started from; in place.

    Between its layers the decoder corrects boxes by states before its norm, while the loss only sees states behind it:
    in the packaged run these corrections made boxes worse (docs/demo-detector.md), and the second layer looked in the
    wrong places.
    """
    heads: Any = model.bbox_embed
    for head in heads:
        head.layers[-1].weight.zero_()
        head.layers[-1].bias.zero_()


@torch.no_grad()
def calibrate(model: GroundingDinoForObjectDetection, tokenizer: Any, scenes: int = SCENES) -> float:
    """Shifts the scores of ``model``, in place, and returns the score that is now 0.5.

    Judged on training scenes that no step of the training shows, and on the questions of the benchmark.
    """
    tallies: Tallies = {}
    detector = TorchDetector(model, tokenizer)
    for seed in range(FIRST_SEED, FIRST_SEED + scenes):
        ask(detector, generate_scene(seed, "train"), tallies)
    scores = np.array([score for tally in tallies.values() for score in tally.scores])
    hits = np.array([hit for tally in tallies.values() for hit in tally.hits])
    threshold = best_threshold(scores, hits, sum(tally.objects for tally in tallies.values()))
    shift_scores(model, float(-np.log(threshold / (1 - threshold))))
    return threshold
