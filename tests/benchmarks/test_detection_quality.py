"""The detection table: what is summed over scenes, intervals, the lead over the baseline; no model needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("skimage", reason="making scenes needs pixano-edge[benchmarks]")

from pixano_edge.benchmarks import detection_quality as quality
from pixano_edge.export.demo.detect_baselines import ContourDetector, Settings, shape_likeness
from pixano_edge.export.demo.detect_eval import Tallies, Tally, ask, summarise
from pixano_edge.export.demo.scenes import SHAPES, generate_scene, is_evaluated, rasterise, sample_placement


def scene_tallies(hit: bool, alarm: bool = False) -> Tallies:
    """One object asked for by its shape and by its colour, and one phrase in vain."""
    return {
        "circle": Tally("shape", [0.9], [hit], 1),
        "red circle": Tally("color", [0.8, 0.3], [hit, False], 1),
        "blue circle": Tally("color", [0.7] if alarm else [], [False] if alarm else [], 0, 1, int(alarm)),
    }


def test_rows_by_hand() -> None:
    scenes = [scene_tallies(True), scene_tallies(True), scene_tallies(False, alarm=True), scene_tallies(True)]
    rows = {row.kind: row for row in quality.summarise("model", scenes, 4)}
    assert set(rows) == {"shape", "color", "all"}
    # Three of four are found; equal scores rank in the order of the scenes, so the miss stands before the last hit.
    assert rows["shape"].ap50 == pytest.approx((1 + 1 + 3 / 4) / 4)
    assert rows["all"].alarm == pytest.approx(1 / 4)
    assert rows["all"].objects == 8
    assert rows["all"].phrases == 2
    assert all(row.low <= row.ap50 <= row.high for row in rows.values())
    assert rows["shape"].low < rows["shape"].high
    # Leaving out a hit, another, the miss, or the last hit:
    left = np.array([(1 + 2 / 3) / 3, (1 + 2 / 3) / 3, 1.0, 2 / 3])
    error = np.sqrt(3 / 4 * ((left - left.mean()) ** 2).sum())
    assert rows["shape"].high == pytest.approx(min(1.0, rows["shape"].ap50 + 1.96 * error))
    assert quality.summarise("model", scenes, 4) == quality.summarise("model", scenes, 4)


def test_summing_scenes_does_not_change_them() -> None:
    scenes = [scene_tallies(True), scene_tallies(False)]
    quality.summarise("model", scenes, 3)
    assert scenes == [scene_tallies(True), scene_tallies(False)]


def test_lead_and_table() -> None:
    rows = quality.summarise("model", [scene_tallies(True)] * 2, 2)
    rows += quality.summarise(quality.BASELINE, [scene_tallies(False)] * 2, 2)
    found = quality.DetectionQuality(2, ["model"], rows)
    assert found.lead() == pytest.approx(1.0)
    assert found.to_dict()["lead"]["model"]["color"] == pytest.approx(1.0)
    table = quality.table_rows(found)
    assert {len(cells) for cells in table} == {len(quality.COLUMNS)}
    assert table[0][:2] == ("model", "circle (1)")


def test_a_worker_asks_model_and_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = generate_scene(quality.FIRST_SEED, "heldout")

    class Knowing:
        """Answers every class with the box of the first evaluated object of that shape."""

        def detect(self, image: Any, classes: list[str], *, box_threshold: float, text_threshold: float) -> Any:
            assert np.array_equal(image, scene.image)
            assert box_threshold == text_threshold < 0.1
            pairs = [
                (k, obj.box)
                for k, text in enumerate(classes)
                for obj in scene.objects
                if text == obj.shape and is_evaluated(obj)
            ]
            boxes = np.array([box for _, box in pairs], np.float32).reshape(-1, 4)
            labels = np.array([k for k, _ in pairs], np.int64)

            class Found:
                pass

            found: Any = Found()
            found.boxes, found.labels, found.scores = boxes, labels, np.ones(len(pairs), np.float32)
            return found

    monkeypatch.setattr(quality, "_WORKER", {"detectors": {"model": Knowing()}})
    answers = quality._run_scene(quality.FIRST_SEED)
    assert set(answers) == {"model", quality.BASELINE}
    assert summarise(answers["model"])["shape"].ap50 == 1.0
    assert summarise(answers["model"])["color"].ap50 == 0.0


class TestBaseline:
    def test_drawn_shapes_are_told_apart(self) -> None:
        rng = np.random.default_rng(1)
        right = 0
        for shape in SHAPES:
            for _ in range(5):
                mask = rasterise(shape, sample_placement(rng, shape, 256, 128.0, 128.0), 256, 256)
                likeness = shape_likeness(np.asarray(mask > 127, np.uint8))
                right += max(likeness, key=lambda name: likeness[name]) == shape
        # Circle and a wide ellipse, rectangle and square or bar, are near each other: not every one is right.
        assert right >= 45, f"{right} of 60"

    def test_finds_plain_shapes_on_an_empty_picture(self) -> None:
        image = np.full((256, 256, 3), 235, np.uint8)
        rng = np.random.default_rng(0)
        mask = rasterise("circle", sample_placement(rng, "circle", 256, 90.0, 100.0), 256, 256) > 127
        image[mask] = (205, 40, 40)
        boxes, scores, labels = ContourDetector()(image, ["blue circle", "red circle", "red star"], 0.05)
        assert labels[0] == 1
        x, y = np.nonzero(mask)[1], np.nonzero(mask)[0]
        assert np.abs(boxes[0] - (x.min(), y.min(), x.max() + 1, y.max() + 1)).max() <= 4
        assert scores[0] == scores.max()

    def test_two_images_are_not_mixed_up(self) -> None:
        detector = ContourDetector(Settings())
        first, second = generate_scene(0, "train").image, generate_scene(1, "train").image
        before = detector(first, ["circle", "square"], 0.0)
        detector(second, ["circle", "square"], 0.0)
        again = detector(first, ["circle", "square"], 0.0)
        assert all(np.array_equal(a, b) for a, b in zip(before, again, strict=True))

    def test_it_answers_the_questions_of_a_scene(self) -> None:
        tallies: Tallies = {}
        for seed in range(3):
            ask(ContourDetector(), generate_scene(seed, "train"), tallies)
        assert sum(len(tally.scores) for tally in tallies.values()) > 10
