"""Segment everything: filters, suppression of duplicates, progress and cancelling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.errors import CancelledError, PromptError
from pixano_edge.engine.models.images import decode_image
from pixano_edge.engine.models.masks import mask_box
from pixano_edge.engine.models.rle import decode_rle
from pixano_edge.engine.models.sam2.automatic import (
    Filters,
    generate_masks,
    non_maximum_suppression,
    point_grid,
)
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from tests.engine.models.sam2.fake import fake_predictor
from tests.support.make_preprocess_reference import procedural_image

# The fake's discs are small, so their stability is just around upstream's 0.95.
LENIENT = Filters(stability_score_thresh=0.9)
OPEN = Filters(pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1)


def test_grid_is_centred_and_in_pixels() -> None:
    assert point_grid(2, (100, 40)).tolist() == [[10, 25], [30, 25], [10, 75], [30, 75]]


def test_finds_the_disc_of_every_click() -> None:
    predictor = fake_predictor()
    seen: list[tuple[int, int]] = []
    masks = generate_masks(
        predictor,
        procedural_image(161, 97),
        4,
        points_per_batch=5,
        filters=LENIENT,
        progress=lambda *now: seen.append(now),
    )
    # The fake's predicted IoUs are 0.5, 0.9 and 0.6: one mask per click passes 0.8, and the discs do not overlap.
    assert len(masks) == 16
    assert seen == [(5, 16), (10, 16), (15, 16), (16, 16)]
    assert predictor.runs == (1, 4)
    grid = {tuple(p) for p in point_grid(4, (161, 97))}
    assert {m.point for m in masks} == grid
    for found in masks:
        mask = found.mask
        assert mask.shape == (161, 97)
        assert found.area == np.count_nonzero(mask)
        assert found.box == mask_box(mask)
        x, y = found.point
        assert mask[int(y), int(x)]
        assert found.score == found.predicted_iou > 0.8


def test_duplicates_are_suppressed() -> None:
    image = procedural_image(96, 96)
    every = Filters(stability_score_thresh=0.9, box_nms_thresh=1.0)
    assert len(generate_masks(fake_predictor(), image, 24, filters=every)) > 400
    assert len(generate_masks(fake_predictor(), image, 24, filters=LENIENT)) < 300


def test_filters() -> None:
    predictor, image = fake_predictor(), procedural_image(161, 97)

    def count(**changes: Any) -> int:
        return len(generate_masks(predictor, image, 3, filters=Filters(**{**OPEN.__dict__, **changes})))

    assert count() == 27
    assert count(pred_iou_thresh=0.55) == 18
    assert count(pred_iou_thresh=0.95) == 0
    # The disc of mask 1 changes by 10 logits per cell, the one of mask 2 by 20: it is the more stable one.
    assert 0 < count(stability_score_thresh=0.97) < 27
    assert count(stability_score_thresh=1.0) == 0
    assert count(stability_score_thresh=0.97, stability_score_offset=0.01) == 27
    assert count(min_area=5_000) == 9  # everything but the disc
    assert count(min_area=161 * 97) == 0


def test_cancel() -> None:
    predictor = fake_predictor()
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(CancelledError, match="after 6 of 16"):
        generate_masks(predictor, procedural_image(50, 60), 4, points_per_batch=3, cancelled=cancelled)
    assert predictor.runs == (1, 2)
    assert generate_masks(predictor, procedural_image(50, 60), 2, filters=LENIENT)


def test_an_embedding_is_enough() -> None:
    predictor = fake_predictor()
    image = procedural_image(50, 60)
    embedding = predictor.encode(image)
    found = [generate_masks(predictor, source, 2, filters=LENIENT) for source in (embedding, image)]
    assert len(found[0]) == len(found[1]) > 0
    assert predictor.runs[0] == 1


@pytest.mark.parametrize("side", [0, -1, 257])
def test_grid_out_of_range(side: int) -> None:
    with pytest.raises(PromptError):
        generate_masks(fake_predictor(), procedural_image(50, 60), side)


def naive_nms(boxes: Any, scores: Any, threshold: float) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):

        def overlap(j: int, i: int = i) -> float:
            a, b = boxes[i], boxes[j]
            w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            shared = max(w, 0) * max(h, 0)
            total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
            return shared / total if total else 0.0

        if all(overlap(j) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_suppression_against_the_definition(threshold: float) -> None:
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 40, (80, 2))
    boxes = np.concatenate([corner, corner + rng.integers(0, 20, (80, 2))], axis=1).astype(np.float64)
    scores = rng.random(80)
    assert non_maximum_suppression(boxes, scores, threshold) == naive_nms(boxes, scores, threshold)


def test_no_boxes() -> None:
    assert non_maximum_suppression(np.empty((0, 4)), np.empty(0), 0.5) == []


def test_masks_are_those_of_single_clicks(tiny_bundle: Path, bedroom: Path) -> None:
    image = decode_image(bedroom / "00000.jpg")[100:333, 200:601]
    with Sam2ImagePredictor.open(tiny_bundle, threads=1) as predictor:
        found = generate_masks(predictor, image, 3, filters=OPEN)
        assert len(found) == 27
        by_click: dict[tuple[float, float], list[Any]] = {}
        for mask in found:
            by_click.setdefault(mask.point, []).append(mask)
        for point, masks in by_click.items():
            alone = predictor.predict(image, [Prompt(points=[point])])
            for mask in masks:
                slot = int(np.abs(alone.scores[0] - mask.predicted_iou).argmin())
                different = np.count_nonzero(decode_rle(mask.rle) != alone.masks[0, slot])
                assert different <= 1e-3 * image.shape[0] * image.shape[1]
