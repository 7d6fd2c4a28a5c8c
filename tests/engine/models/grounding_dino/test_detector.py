"""The whole detector against transformers' model and processor on photos, and what users may ask for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs pixano-edge[export]")

import torch
from PIL import Image

from pixano_edge.engine.errors import CancelledError, DeviceError, ImageError, PromptError
from pixano_edge.engine.models.detection.base import Detections
from pixano_edge.engine.models.grounding_dino.detector import GroundingDinoDetector
from pixano_edge.export.photos import default_photos
from tests.support.grounding_dino import Exported

CLASSES = ["a cat", "remote", "remote control", "Striped Square", "coffee cup on table"]
BOX, TEXT = 0.6, 0.5


@pytest.fixture(scope="module")
def detector(small_dino: Exported) -> GroundingDinoDetector:
    return small_dino.open()


def stock(exported: Exported, image: np.ndarray, classes: list[str], box: float, text: float) -> Detections:
    """Detections of transformers' model and processor; its scores per token are summed up per class here.

    Boxes are its own, in pixels, clipped. Where its best token belongs to a phrase, its score must be the class's.
    """
    processor = exported.processor
    inputs = processor(images=Image.fromarray(image), text=classes, return_tensors="pt")
    with torch.no_grad():
        outputs = exported.model(**inputs)
    size = image.shape[:2]
    (everything,) = processor.post_process_grounded_object_detection(
        outputs, inputs["input_ids"], threshold=-1.0, text_threshold=text, target_sizes=[size]
    )
    ids = inputs["input_ids"][0].tolist()
    probabilities = outputs.logits[0, :, : len(ids)].sigmoid().numpy()
    owner, phrase = [], 0
    for token in ids:
        owner.append(-1 if token in (101, 102, 1012) else phrase)
        phrase += token == 1012
    scores, labels, rows = [], [], []
    for row, probability in enumerate(probabilities):
        inside = [i for i, number in enumerate(owner) if number >= 0]
        best = max(inside, key=lambda i: probability[i])
        if owner[int(probability.argmax())] >= 0:
            assert float(everything["scores"][row]) == pytest.approx(probability[best], abs=1e-6)
        if probability[best] > box and probability[best] > text:
            scores.append(probability[best])
            labels.append(owner[best])
            rows.append(row)
    boxes = everything["boxes"].numpy()[rows].reshape(-1, 4)
    boxes = np.clip(boxes, 0, np.array([size[1], size[0]] * 2))
    order = np.argsort(-np.array(scores), kind="stable") if scores else np.zeros(0, int)
    return Detections(boxes[order], np.array(scores)[order], np.array(labels, int)[order], tuple(classes))


def same(found: Detections, wanted: Detections) -> bool:
    """Equal up to 1 px and 1e-3: every detection has a partner of its own."""
    if len(found) != len(wanted):
        return False
    left = list(range(len(wanted)))
    for box, score, label in zip(found.boxes, found.scores, found.labels):
        partner = next(
            (
                i
                for i in left
                if wanted.labels[i] == label
                and abs(wanted.scores[i] - score) < 1e-3
                and np.abs(wanted.boxes[i] - box).max() < 1
            ),
            None,
        )
        if partner is None:
            return False
        left.remove(partner)
    return True


def pictures() -> list[np.ndarray]:
    """Photos at several aspect ratios, odd sizes among them."""
    coffee, cat = (photo.pixels for photo in default_photos())
    return [
        coffee,
        cat,
        np.ascontiguousarray(coffee.transpose(1, 0, 2)),
        coffee[:, 100:301],
        coffee[100:260],
        cat[:97, :113],
    ]


def test_detections_are_those_of_the_stock_model(small_dino: Exported, detector: GroundingDinoDetector) -> None:
    counts = []
    for image in pictures():
        image = np.ascontiguousarray(image)
        found = detector.detect(image, CLASSES, box_threshold=BOX, text_threshold=TEXT)
        wanted = stock(small_dino, image, CLASSES, BOX, TEXT)
        assert same(found, wanted), image.shape
        counts.append(len(found))
        assert found.classes == tuple(CLASSES)
        assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)
        assert (np.diff(found.scores) <= 0).all()
    assert min(counts) > 2
    assert len(set(counts)) > 1


@pytest.mark.parametrize("mistake", ["mask", "positions", "normalisation", "swapped edges"])
def test_mistakes_change_detections(small_dino: Exported, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: each of these must be seen in the detections, not only in the raw outputs."""
    from pixano_edge.engine.models.grounding_dino import detector as module
    from pixano_edge.engine.models.grounding_dino import text

    plain = text.phrase_masks

    def wrong_masks(ids: Any, special: Any) -> Any:
        mask, positions = plain(ids, special)
        return (np.ones_like(mask), positions) if mistake == "mask" else (mask, np.arange(len(ids), dtype=np.int32))

    if mistake in ("mask", "positions"):
        monkeypatch.setattr(text, "phrase_masks", wrong_masks)
    elif mistake == "normalisation":
        right = module.preprocess

        def scaled(image: Any, constants: Any, out: Any) -> None:
            right(image, constants, out)
            out *= 0.9

        monkeypatch.setattr(module, "preprocess", scaled)
    else:
        right_find = module.find
        monkeypatch.setattr(module, "find", lambda *a: right_find(*a[:4], a[4][::-1], *a[5:]))
    image = pictures()[0]
    found = small_dino.open().detect(image, CLASSES, box_threshold=BOX, text_threshold=TEXT)
    assert not same(found, stock(small_dino, image, CLASSES, BOX, TEXT))


def test_text_is_encoded_once_per_list(small_dino: Exported) -> None:
    detector, image = small_dino.open(), pictures()[1]
    first = detector.detect(image, ["a cat", "bed"], box_threshold=BOX)
    assert detector.runs == (1, 1)
    again = detector.detect(image, ["A Cat ", "bed"], box_threshold=BOX)
    assert detector.runs == (1, 2)
    np.testing.assert_array_equal(first.boxes, again.boxes)
    other = detector.detect(image, ["bed", "a cat"], box_threshold=BOX)
    assert detector.runs == (2, 3)
    assert same(other, stock(small_dino, image, ["bed", "a cat"], BOX, 0.5))
    back = detector.detect(image, ["a cat", "bed"], box_threshold=BOX)
    assert detector.runs == (2, 4)
    np.testing.assert_array_equal(first.scores, back.scores)
    detector.text_cache.clear()
    detector.detect(image, ["a cat", "bed"])
    assert detector.runs == (3, 5)


def test_a_thousand_classes_are_asked_for_in_parts(small_dino: Exported, detector: GroundingDinoDetector) -> None:
    image = pictures()[1]
    classes = [f"cat {i}" for i in range(1000)]
    captions = detector.captioner.captions(classes)
    assert len(captions) > 10
    before = detector.runs[1]
    found = detector.detect(image, classes, box_threshold=0.8, text_threshold=0.5)
    assert detector.runs[1] - before == len(captions)
    parts = []
    for caption in captions[:3]:
        names = [classes[i] for i in caption.labels]
        part = detector.detect(image, names, box_threshold=0.8, text_threshold=0.5)
        assert same(part, stock(small_dino, image, names, 0.8, 0.5))
        parts.append((part, caption.labels))
    last = captions[2].labels[-1]
    wanted = sorted((float(s), int(numbers[n])) for part, numbers in parts for s, n in zip(part.scores, part.labels))
    assert wanted
    assert sorted((float(s), int(n)) for s, n in zip(found.scores, found.labels) if n <= last) == wanted
    with pytest.raises(PromptError, match="more than 1000"):
        detector.detect(image, [*classes, "dog"])


def test_a_call_stops_between_captions(small_dino: Exported, detector: GroundingDinoDetector) -> None:
    before, calls = detector.runs[1], []

    def check() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise CancelledError("Nobody waits.")

    with pytest.raises(CancelledError):
        detector.detect(pictures()[1], [f"cat {i}" for i in range(1000)], check=check)
    assert detector.runs[1] - before == 1


def test_equal_names_give_one_set_of_boxes(detector: GroundingDinoDetector) -> None:
    image = pictures()[1]
    once = detector.detect(image, ["cat", "bed"], box_threshold=BOX)
    twice = detector.detect(image, ["cat", "CAT.", "bed"], box_threshold=BOX)
    np.testing.assert_array_equal(once.boxes, twice.boxes)
    assert set(twice.labels.tolist()) <= {0, 2}
    assert once.names() == twice.names()


@pytest.mark.parametrize("classes", [["кошка", "猫"], ["\U0001f408 cat"], ["st. bernard"], ["x" * 100]])
def test_unusual_names_have_defined_results(
    small_dino: Exported, detector: GroundingDinoDetector, classes: list[str]
) -> None:
    image = pictures()[1]
    found = detector.detect(image, classes, box_threshold=BOX)
    wanted = stock(small_dino, image, [c.replace(".", " ") for c in classes], BOX, 0.5)
    assert same(found, wanted)


@pytest.mark.parametrize(
    ("classes", "problem"),
    [
        ([], "no classes"),
        (["cat", ""], "Class 1 is empty"),
        (["..."], "no word"),
        (["cat", "\U0001f408"], "no word of class 1"),
        (["x" * 1000], "no word of class 0"),
        (["cat " * 240 + "."], "tokens|characters"),
    ],
)
def test_impossible_classes_are_refused(detector: GroundingDinoDetector, classes: list[str], problem: str) -> None:
    if problem.startswith("tokens"):
        classes = ["a " * 300]
    with pytest.raises(PromptError, match=problem):
        detector.detect(pictures()[1], classes)


@pytest.mark.parametrize("name", ["box_threshold", "text_threshold", "nms"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_numbers_out_of_range_are_refused(detector: GroundingDinoDetector, name: str, value: float) -> None:
    with pytest.raises(PromptError, match=f"{name} must be 0 to 1"):
        detector.detect(pictures()[1], ["cat"], **{name: value})


def test_thresholds_at_the_ends(small_dino: Exported, detector: GroundingDinoDetector) -> None:
    image = pictures()[1]
    assert (
        len(detector.detect(image, ["cat"], box_threshold=0.0, text_threshold=0.0)) == small_dino.constants.num_queries
    )
    assert len(detector.detect(image, ["cat"], box_threshold=1.0, text_threshold=0.0)) == 0
    few = detector.detect(image, ["cat"], box_threshold=0.0, text_threshold=0.0, limit=3)
    assert len(few) == 3


def test_tiny_and_narrow_images(small_dino: Exported, detector: GroundingDinoDetector) -> None:
    for shape in ((1, 1), (2, 3)):
        image = np.full((*shape, 3), 200, np.uint8)
        found = detector.detect(image, CLASSES, box_threshold=0.4, text_threshold=0.4)
        assert same(found, stock(small_dino, image, CLASSES, 0.4, 0.4))
    with pytest.raises(ImageError, match="too narrow"):
        detector.detect(np.zeros((10, 1000, 3), np.uint8), ["cat"])
    with pytest.raises(ImageError, match="uint8"):
        detector.detect(np.zeros((10, 10, 3), np.float32), ["cat"])  # type: ignore[arg-type]


def test_nms_removes_the_lesser_of_two(detector: GroundingDinoDetector) -> None:
    image = pictures()[0]
    every = detector.detect(image, CLASSES, box_threshold=0.3, text_threshold=0.3)
    kept = detector.detect(image, CLASSES, box_threshold=0.3, text_threshold=0.3, nms=0.5)
    assert 0 < len(kept) < len(every)
    assert kept.scores[0] == every.scores[0]


def test_threads_get_their_own_answers(small_dino: Exported) -> None:
    detector = small_dino.open()
    asked = [(image, names) for image in pictures()[:3] for names in (["a cat"], ["bed", "lamp"])]
    alone = [detector.detect(i, n, box_threshold=BOX) for i, n in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda a: detector.detect(a[0], a[1], box_threshold=BOX), asked * 2))
    for one, other in zip(alone * 2, together):
        np.testing.assert_array_equal(one.boxes, other.boxes)


def test_info_memory_and_closing(small_dino: Exported) -> None:
    detector = small_dino.open()
    detector.warm_up()
    told = detector.info()
    assert told["family"] == "grounding-dino"
    assert told["warm_up"]["shapes"] == ["H=96, W=128, T=9"]
    assert told["text_cache"]["entries"] == 0
    detector.detect(pictures()[1], ["cat"])
    assert detector.info()["text_cache"]["entries"] == 1
    assert detector.memory().total > 0
    detector.close()
    detector.close()
    with pytest.raises(DeviceError, match="closed"):
        detector.detect(pictures()[1], ["cat"])
