"""Detections of raw outputs against transformers' post-processing."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the reference is transformers")

import torch
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoObjectDetectionOutput

from pixano_edge.engine.contracts.grounding_dino import GroundingDinoConstants
from pixano_edge.engine.models.grounding_dino.postprocess import find, merge
from pixano_edge.engine.models.grounding_dino.text import Caption, Captioner
from tests.support.grounding_dino import small_processor, tokenizer_json

CLASSES = ["a cat", "remote", "remote control", "striped square"]
SIZE = (123, 211)


def raw(caption: Caption, seed: int = 0, queries: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose dots and ends are low, as a trained model has them, and boxes that may leave the picture."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-2, 2, (queries, len(caption))).astype(np.float32)
    outside = np.ones(len(caption), bool)
    for start, stop in caption.edges.reshape(-1, 2):
        outside[start:stop] = False
    logits[:, outside] = -9
    boxes = rng.uniform(0, 1, (queries, 4)).astype(np.float32)
    return logits, boxes


def test_boxes_scores_and_labels_are_those_of_the_reference() -> None:
    processor = small_processor()
    (caption,) = Captioner(tokenizer_json(processor), GroundingDinoConstants()).captions(CLASSES)
    logits, boxes = raw(caption)
    padded = np.full((1, len(logits), 256), -np.inf, np.float32)
    padded[0, :, : len(caption)] = logits
    (expected,) = processor.post_process_grounded_object_detection(
        GroundingDinoObjectDetectionOutput(logits=torch.from_numpy(padded), pred_boxes=torch.from_numpy(boxes[None])),
        torch.from_numpy(caption.input_ids),
        threshold=0.35,
        text_threshold=0.25,
        target_sizes=[SIZE],
    )
    found = find(logits, boxes, caption.labels, caption.edges, SIZE, 0.35, 0.25)
    assert len(found.scores) == len(expected["scores"]) > 50
    np.testing.assert_allclose(found.scores, expected["scores"].numpy(), atol=1e-6)
    limit = torch.tensor([SIZE[1], SIZE[0]] * 2)
    clipped = torch.minimum(expected["boxes"].clamp(min=0), limit).numpy()
    np.testing.assert_allclose(found.boxes, clipped, atol=1e-3)
    assert (np.abs(clipped - expected["boxes"].numpy()) > 1).any(), "no box was outside: clipping is not tested"
    # The token that decided is part of the reference's text.
    probabilities = 1 / (1 + np.exp(-logits))
    rows = np.flatnonzero(probabilities.max(1) > 0.35)
    for row, label, text in zip(rows, found.labels, expected["text_labels"]):
        token = processor.tokenizer.decode([caption.ids[logits[row].argmax()]])
        assert token in CLASSES[label].split()
        assert token in text.split()


def test_tokens_outside_phrases_do_not_count() -> None:
    (caption,) = Captioner(tokenizer_json(small_processor()), GroundingDinoConstants()).captions(CLASSES)
    logits, boxes = raw(caption)
    logits[:] = -5
    dots = [i for i, token in enumerate(caption.ids) if token in (101, 102, 1012)]
    logits[:, dots] = 9
    logits[3, caption.edges[2]] = 1.0
    found = find(logits, boxes, caption.labels, caption.edges, SIZE, 0.3, 0.3)
    assert found.labels.tolist() == [1]
    assert found.scores[0] == pytest.approx(1 / (1 + np.exp(-1)))


@pytest.mark.parametrize(("box", "text"), [(0.4, 0.1), (0.1, 0.4)])
def test_both_thresholds_count(box: float, text: float) -> None:
    (caption,) = Captioner(tokenizer_json(small_processor()), GroundingDinoConstants()).captions(CLASSES)
    found = find(*raw(caption), caption.labels, caption.edges, SIZE, box, text)
    assert found.scores.min() > 0.4
    assert len(find(*raw(caption), caption.labels, caption.edges, SIZE, 0.1, 0.1).scores) > len(found.scores)


def test_extreme_thresholds_and_logits() -> None:
    (caption,) = Captioner(tokenizer_json(small_processor()), GroundingDinoConstants()).captions(CLASSES)
    logits, boxes = raw(caption)
    assert len(find(logits, boxes, caption.labels, caption.edges, SIZE, 0.0, 0.0).scores) == len(logits)
    assert len(find(logits, boxes, caption.labels, caption.edges, SIZE, 1.0, 0.0).scores) == 0
    logits[:] = -1e4
    logits[0] = 1e4
    found = find(logits, boxes, caption.labels, caption.edges, SIZE, 0.5, 0.5)
    assert found.scores.tolist() == [1.0]


def test_box_order_matters() -> None:
    """Negative control: corners taken for centre and size give other boxes."""
    (caption,) = Captioner(tokenizer_json(small_processor()), GroundingDinoConstants()).captions(CLASSES)
    logits, boxes = raw(caption)
    right = find(logits, boxes, caption.labels, caption.edges, SIZE, 0.3, 0.3)
    swapped = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    wrong = find(logits, swapped, caption.labels, caption.edges, SIZE, 0.3, 0.3)
    assert np.abs(right.boxes - wrong.boxes).max() > 1


def test_merging_sorts_and_keeps_ties_in_order() -> None:
    (caption,) = Captioner(tokenizer_json(small_processor()), GroundingDinoConstants()).captions(CLASSES)
    first = find(*raw(caption, 0), caption.labels, caption.edges, SIZE, 0.3, 0.3)
    second = find(*raw(caption, 1), caption.labels, caption.edges, SIZE, 0.3, 0.3)
    merged = merge([first, second])
    assert len(merged.scores) == len(first.scores) + len(second.scores)
    assert (np.diff(merged.scores) <= 0).all()
    twice = merge([first, first])
    np.testing.assert_array_equal(twice.boxes[0::2], twice.boxes[1::2])
