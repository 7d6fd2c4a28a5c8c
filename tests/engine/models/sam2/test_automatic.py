"""Segment everything: filters, suppression of duplicates, progress and cancelling."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from pixano_edge.engine.errors import CancelledError, DeviceMemoryError, PromptError
from pixano_edge.engine.models.detection.nms import non_maximum_suppression
from pixano_edge.engine.models.images import decode_image
from pixano_edge.engine.models.masks import mask_box
from pixano_edge.engine.models.rle import decode_rle
from pixano_edge.engine.models.sam2.automatic import AutomaticOptions, generate_masks
from pixano_edge.engine.models.sam2.cache import EmbeddingCache
from pixano_edge.engine.models.sam2.crops import crop_image, point_grid
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from tests.engine.models.sam2.fake import fake_predictor
from tests.support.make_preprocess_reference import procedural_image


def lenient(side: int, **changes: Any) -> AutomaticOptions:
    """The fake's discs are small, so their stability is just around upstream's 0.95."""
    return AutomaticOptions(**{"points_per_side": side, "stability_score_thresh": 0.9, **changes})


def unfiltered(side: int, **changes: Any) -> AutomaticOptions:
    nothing = {"pred_iou_thresh": 0, "stability_score_thresh": 0, "box_nms_thresh": 1, "crop_nms_thresh": 1}
    return AutomaticOptions(**{"points_per_side": side, **nothing, **changes})


def test_finds_the_disc_of_every_click() -> None:
    predictor = fake_predictor()
    seen: list[tuple[int, int]] = []
    masks = generate_masks(
        predictor,
        procedural_image(161, 97),
        lenient(4, points_per_batch=5),
        progress=lambda *now: seen.append(now),
    )
    # The fake's predicted IoUs are 0.5, 0.9 and 0.6: one mask per click passes 0.8, and the discs do not overlap.
    assert len(masks) == 16
    assert seen == [(5, 16), (10, 16), (15, 16), (16, 16)]
    assert predictor.runs == (1, 4)
    grid = {tuple(p) for p in point_grid(4) * (97, 161)}
    assert {m.point for m in masks} == grid
    for found in masks:
        mask = found.mask
        assert mask.shape == (161, 97)
        assert found.area == np.count_nonzero(mask)
        assert found.box == mask_box(mask)
        x, y = found.point
        assert mask[int(y), int(x)]
        assert found.score == found.predicted_iou > 0.8
        assert found.crop_box == (0, 0, 97, 161)


def test_duplicates_are_suppressed() -> None:
    image = procedural_image(96, 96)
    assert len(generate_masks(fake_predictor(), image, lenient(24, box_nms_thresh=1.0))) > 400
    assert len(generate_masks(fake_predictor(), image, lenient(24))) < 300


def test_filters() -> None:
    predictor, image = fake_predictor(), procedural_image(161, 97)

    def count(**changes: Any) -> int:
        return len(generate_masks(predictor, image, unfiltered(3, **changes)))

    assert count() == 27
    assert count(pred_iou_thresh=0.55) == 18
    assert count(pred_iou_thresh=0.95) == 0
    # The disc of mask 1 changes by 10 logits per cell, the one of mask 2 by 20: it is the more stable one.
    assert 0 < count(stability_score_thresh=0.97) < 27
    assert count(stability_score_thresh=1.0) == 0
    assert count(stability_score_thresh=0.97, stability_score_offset=0.01) == 27
    assert count(min_area=5_000) == 9  # everything but the disc
    assert count(min_area=161 * 97) == 0


def test_mask_threshold() -> None:
    predictor, image = fake_predictor(), procedural_image(161, 97)
    area = {
        threshold: {m.point: m.area for m in generate_masks(predictor, image, lenient(3, mask_threshold=threshold))}
        for threshold in (None, 0.0, 30.0)
    }
    assert area[None] == area[0.0]
    assert all(area[30.0][point] < area[0.0][point] for point in area[0.0])


def stop_at(question: int) -> tuple[Callable[[], bool], list[int]]:
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) == question

    return cancelled, asked


def test_cancel() -> None:
    predictor = fake_predictor()
    # The first question is that before the encoder.
    cancelled, _ = stop_at(4)
    with pytest.raises(CancelledError, match="after 6 of 16"):
        generate_masks(predictor, procedural_image(50, 60), lenient(4, points_per_batch=3), cancelled=cancelled)
    assert predictor.runs == (1, 2)
    assert generate_masks(predictor, procedural_image(50, 60), lenient(2))


def test_cancel_at_every_stage() -> None:
    image = procedural_image(161, 97)
    options = unfiltered(2, points_per_batch=2, crop_n_layers=1, use_m2m=True, min_mask_region_area=4)
    cancelled, asked = stop_at(0)
    whole = fake_predictor()
    assert generate_masks(whole, image, options, cancelled=cancelled)
    questions = len(asked)
    encoded, decoded = whole.runs
    # Five crops; each has two batches of clicks and 3 for the six masks of each; then the masks are cleaned.
    assert (encoded, decoded) == (5, 5 * 2 * (1 + 3))
    assert questions > encoded + decoded
    seen = set()
    for question in range(1, questions + 1):
        predictor = fake_predictor()
        cancelled, asked = stop_at(question)
        with pytest.raises(CancelledError, match="of 20 clicks"):
            generate_masks(predictor, image, options, cancelled=cancelled)
        assert len(asked) == question
        # Every question stands before its own piece of work.
        assert sum(predictor.runs) == min(question - 1, encoded + decoded)
        seen.add(predictor.runs)
        # Nothing stays locked.
        assert generate_masks(predictor, image, lenient(1))
    assert len(seen) == encoded + decoded + 1


def test_an_embedding_is_enough() -> None:
    predictor = fake_predictor()
    image = procedural_image(50, 60)
    embedding = predictor.encode(image)
    found = [generate_masks(predictor, source, lenient(2)) for source in (embedding, image)]
    assert len(found[0]) == len(found[1]) > 0
    assert predictor.runs[0] == 1
    with pytest.raises(PromptError, match="Pass the image itself"):
        generate_masks(predictor, embedding, lenient(2, crop_n_layers=1))


def test_crops_are_looked_at_and_pasted_in_place() -> None:
    predictor, image = fake_predictor(), procedural_image(400, 600)
    seen: list[tuple[int, int]] = []
    options = unfiltered(4, crop_n_layers=2, crop_n_points_downscale_factor=2, points_per_batch=5, pred_iou_thresh=0.7)
    masks = generate_masks(predictor, image, options, progress=lambda *now: seen.append(now))
    # 16 clicks on the image, 4 on each of 4 crops, one on each of 16.
    assert seen[-1] == (48, 48)
    assert np.diff([0, *(done for done, _ in seen)]).tolist() == [5, 5, 5, 1] + 4 * [4] + 16 * [1]
    assert predictor.runs == (21, 24)
    crops = [c.box for c in crop_image((400, 600), 2, 512 / 1500)]
    assert {m.crop_box for m in masks} <= set(crops)
    assert len({m.crop_box for m in masks}) > 10
    for found in masks:
        mask, (x1, y1, x2, y2), (x, y) = found.mask, found.crop_box, found.point
        assert mask.shape == (400, 600)
        assert found.box == mask_box(mask)
        assert found.area == mask.sum()
        # The fake's disc lies around the click, within the crop.
        assert mask[int(y), int(x)]
        mask[y1:y2, x1:x2] = False
        assert not mask.any()
    # Smaller crops first.
    areas = [(m.crop_box[2] - m.crop_box[0]) * (m.crop_box[3] - m.crop_box[1]) for m in masks]
    assert areas == sorted(areas)


def test_one_mask_in_memory_at_a_time() -> None:
    image = np.zeros((1500, 1500, 3), np.uint8)
    options = unfiltered(6, crop_n_layers=1, crop_n_points_downscale_factor=2, min_mask_region_area=50)
    predictor = fake_predictor()
    tracemalloc.start()
    try:
        masks = generate_masks(predictor, image, options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(masks) > 50
    # Logits take 4 bytes per pixel; labels of a mask that fills the image take 4 more, its copies one each.
    assert peak < 20 * 1500 * 1500


def test_own_grids() -> None:
    predictor, image = fake_predictor(), procedural_image(300, 400)
    grids = [[[0.25, 0.5], [0.5, 0.5]], np.array([[0.5, 0.5]])]
    masks = generate_masks(predictor, image, unfiltered(9, point_grids=grids, crop_n_layers=1, pred_iou_thresh=0.7))
    whole = {m.point for m in masks if m.crop_box == (0, 0, 400, 300)}
    assert whole == {(100.0, 150.0), (200.0, 150.0)}
    x1, y1, x2, y2 = crop_image((300, 400), 1, 512 / 1500)[1].box
    assert ((x1 + x2) / 2, (y1 + y2) / 2) in {m.point for m in masks}
    assert len(masks) == 6


def test_crops_leave_the_cache_alone() -> None:
    image, other = procedural_image(200, 300), procedural_image(64, 64)
    probe = fake_predictor()
    probe.encode(other)
    entry = probe.cache.stats().bytes
    predictor = fake_predictor(cache=EmbeddingCache(max_bytes=2 * entry))
    predictor.encode(other)
    options = lenient(2, crop_n_layers=2)
    generate_masks(predictor, image, options)
    assert predictor.runs[0] == 2 + 20
    stats = predictor.cache.stats()
    assert (stats.entries, stats.evictions) == (2, 0)
    predictor.encode(other)
    predictor.encode(image)
    assert predictor.runs[0] == 22
    # Nor do they take new buffers every time.
    allocated = predictor.cache.pool.allocated
    generate_masks(predictor, image, options)
    assert predictor.cache.pool.allocated == allocated


def test_second_pass_gets_the_clipped_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, image = fake_predictor(), procedural_image(100, 100)
    batches: list[Any] = []
    decode = predictor.decode

    def spy(embedding: Any, batch: Any) -> Any:
        batches.append(batch)
        return decode(embedding, batch)

    monkeypatch.setattr(predictor, "decode", spy)
    options = unfiltered(2, use_m2m=True, points_per_batch=4)
    generate_masks(predictor, image, options)
    assert [len(b.indices) for b in batches] == [4, 4, 4, 4]
    assert all(mask is None for mask in batches[0].masks)
    masks = [m for b in batches[1:] for m in b.masks]
    assert max(np.abs(m).max() for m in masks) == 32
    # Masks 1..3 of each click are the disc, twice the disc, and its inverse.
    for disc, double, inverse in zip(masks[0::3], masks[1::3], masks[2::3], strict=True):
        assert (disc == -inverse).all()
        assert (double == np.clip(2 * disc, -32, 32)).all()
    coords = np.concatenate([b.point_coords for b in batches[1:]])
    assert (coords == np.repeat(batches[0].point_coords, 3, axis=0)).all()


def test_short_of_memory_halves_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    image = procedural_image(161, 97)
    want = generate_masks(fake_predictor(), image, lenient(4))
    predictor = fake_predictor()
    decode = predictor.decode

    def small(embedding: Any, batch: Any) -> Any:
        if len(batch.indices) > 3:
            raise DeviceMemoryError("Full.", "Free some.")
        return decode(embedding, batch)

    monkeypatch.setattr(predictor, "decode", small)
    got = generate_masks(predictor, image, lenient(4))
    assert [m.rle for m in got] == [m.rle for m in want]
    assert "batch halved 7 time(s)" in str(predictor.info()["warnings"])

    def never(embedding: Any, batch: Any) -> Any:
        raise DeviceMemoryError("Full.", "Free some.")

    monkeypatch.setattr(predictor, "decode", never)
    with pytest.raises(DeviceMemoryError):
        generate_masks(predictor, image, lenient(2))


def test_records_have_the_keys_of_upstream() -> None:
    found = generate_masks(fake_predictor(), procedural_image(200, 300), lenient(2, crop_n_layers=1))[0]
    record = json.loads(json.dumps(found.record()))
    assert set(record) == {
        "segmentation",
        "area",
        "bbox",
        "predicted_iou",
        "point_coords",
        "stability_score",
        "crop_box",
    }
    mask = decode_rle(record["segmentation"])
    assert record["bbox"] == coco.toBbox(coco.encode(np.asfortranarray(mask.view(np.uint8)))).tolist()
    assert record["area"] == mask.sum()
    assert record["point_coords"] == [list(found.point)]
    x, y, width, height = record["crop_box"]
    assert (x, y, x + width, y + height) == found.crop_box


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3)])
def test_tiny_images(size: tuple[int, int]) -> None:
    image = procedural_image(*size)
    options = unfiltered(2, crop_n_layers=2, crop_n_points_downscale_factor=1, min_mask_region_area=2)
    for found in generate_masks(fake_predictor(), image, options):
        assert found.mask.shape == size
        assert found.area == found.mask.sum() > 0


def test_nothing_found() -> None:
    image = procedural_image(60, 50)
    for layers in (0, 1):
        options = lenient(2, pred_iou_thresh=1.0, crop_n_layers=layers, min_mask_region_area=9)
        assert generate_masks(fake_predictor(), image, options) == []


BAD = [
    {"points_per_side": 0},
    {"points_per_side": -1},
    {"points_per_side": 257},
    {"points_per_side": 2.5},
    {"points_per_side": True},
    {"points_per_batch": 0},
    {"points_per_batch": 100_000},
    {"pred_iou_thresh": -0.1},
    {"pred_iou_thresh": 1.1},
    {"pred_iou_thresh": float("nan")},
    {"stability_score_thresh": 2},
    {"stability_score_thresh": "0.5"},
    {"stability_score_offset": -1.0},
    {"stability_score_offset": float("inf")},
    {"mask_threshold": float("nan")},
    {"box_nms_thresh": 1.5},
    {"crop_nms_thresh": -1},
    {"crop_overlap_ratio": 1.01},
    {"crop_n_layers": -1},
    {"crop_n_layers": 5},
    {"crop_n_layers": 1.0},
    {"crop_n_points_downscale_factor": 0},
    {"points_per_side": 3, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2},
    {"min_mask_region_area": -1},
    {"min_area": 0.5},
    {"point_grids": []},
    {"point_grids": [[[0.5, 0.5]]], "crop_n_layers": 1},
    {"point_grids": [[]]},
    {"point_grids": [[[0.5, 1.5]]]},
    {"point_grids": [[[0.5, float("nan")]]]},
    {"point_grids": [[0.5, 0.5]]},
    {"point_grids": [[["a", "b"]]]},
]


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_bad_options(changes: dict[str, Any]) -> None:
    predictor = fake_predictor()
    with pytest.raises(PromptError) as error:
        generate_masks(predictor, procedural_image(50, 60), AutomaticOptions(**changes))
    assert next(iter(changes)) in error.value.message
    assert error.value.action
    assert predictor.runs == (0, 0)


def test_clicks_are_counted() -> None:
    assert AutomaticOptions().clicks() == 1024
    assert AutomaticOptions(points_per_side=8, crop_n_layers=2, crop_n_points_downscale_factor=2).clicks() == 192


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
        found = generate_masks(predictor, image, unfiltered(3))
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
