"""The detector on the tiny bundles: what is computed once, what is answered, what is refused."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.contracts import owlv2 as contract
from pixano_edge.engine.errors import (
    BundleError,
    CancelledError,
    DeviceError,
    ImageError,
    MissingDependencyError,
    PromptError,
)
from pixano_edge.engine.models import opening
from pixano_edge.engine.models.detection.base import Detections, Detector
from pixano_edge.engine.models.detection.opening import open_detector
from pixano_edge.engine.models.owlv2.detector import Owlv2Detector
from tests.support.make_preprocess_reference import procedural_image

CLASSES = ("cat", "coffee cup", "dog")
LOW = 0.05


@pytest.fixture(scope="module")
def opened(owl_bundle: Path) -> Iterator[Owlv2Detector]:
    with Owlv2Detector.open(owl_bundle, threads=1) as detector:
        yield detector


@pytest.fixture
def detector(opened: Owlv2Detector) -> Owlv2Detector:
    opened.text_cache.clear()
    opened.image_cache.clear()
    return opened


@pytest.fixture
def image() -> np.ndarray:
    return procedural_image(90, 130)


def same(a: Detections, b: Detections) -> bool:
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("boxes", "scores", "labels"))


def test_the_protocol(opened: Owlv2Detector, owl_bundle: Path, image: np.ndarray) -> None:
    model: Detector = open_detector(owl_bundle, device="cpu", threads=1)
    assert isinstance(model, Owlv2Detector)
    answer = model.detect(image, CLASSES, box_threshold=LOW)
    model.close()
    assert same(answer, opened.detect(image, CLASSES, box_threshold=LOW))
    assert len(answer) > 3
    assert answer.boxes.dtype == answer.scores.dtype == np.float32
    assert answer.labels.dtype == np.int64
    assert answer.classes == CLASSES
    assert np.all(np.diff(answer.scores) <= 0)
    assert np.all(answer.boxes >= 0)
    assert np.all(answer.boxes <= (130, 90, 130, 90))


def test_text_and_picture_are_encoded_once(detector: Owlv2Detector, image: np.ndarray) -> None:
    start = detector.runs
    first = detector.detect(image, CLASSES, box_threshold=LOW)
    again = detector.detect(image, list(CLASSES), box_threshold=LOW)
    assert same(first, again)
    assert np.subtract(detector.runs, start).tolist() == [1, 1]
    detector.detect(procedural_image(91, 130), CLASSES)
    assert np.subtract(detector.runs, start).tolist() == [2, 1]
    assert detector.info()["text_cache"]["hits"] == detector.text_cache.stats().hits


def test_other_classes_give_another_answer(detector: Owlv2Detector, image: np.ndarray) -> None:
    """With the features of the first list still in the caches."""
    one = detector.detect(image, CLASSES, box_threshold=LOW)
    turned = detector.detect(image, CLASSES[::-1], box_threshold=LOW)
    assert [CLASSES[::-1][i] for i in turned.labels] == one.names()
    other = detector.detect(image, ["wooden table", "spoon"], box_threshold=LOW)
    assert not np.array_equal(other.scores[:3], one.scores[:3])
    detector.text_cache.clear()
    assert same(other, detector.detect(image, ["wooden table", "spoon"], box_threshold=LOW))


def test_many_classes_take_several_runs(detector: Owlv2Detector, image: np.ndarray) -> None:
    names = [f"cup {i}" for i in range(1000)]
    start = detector.runs
    found = detector.detect(image, names, box_threshold=0.0)
    assert detector.runs[1] - start[1] == -(-1000 // contract.CHUNK)
    assert found.labels.max() > contract.CHUNK
    alone = detector.text_features(names[700:701])
    assert np.abs(detector.text_features(names)[700] - alone[0]).max() < 1e-5


def test_a_call_stops_between_the_runs_of_a_long_list(detector: Owlv2Detector, image: np.ndarray) -> None:
    names, start, calls = [f"cup {i}" for i in range(1000)], detector.runs, []

    def check() -> None:
        calls.append(None)
        if len(calls) == 3:
            raise CancelledError("Nobody waits.")

    with pytest.raises(CancelledError):
        detector.detect(image, names, check=check)
    assert np.subtract(detector.runs, start).tolist() == [0, 2]
    assert len(detector.detect(image, names, box_threshold=0.0)) > 0  # nothing half done was kept


def test_precisions_that_share_a_cache_keep_their_own_features(detector: Owlv2Detector) -> None:
    other = Owlv2Detector(
        detector._image_encoder,
        detector._text_encoder,
        detector.constants,
        detector.tokenizer._tokenizer.to_str(),
        bundle_hash=detector._bundle_hash,
        variant="fp16",
        text_cache=detector.text_cache,
    )
    start = detector.runs
    detector.text_features(CLASSES)
    other.text_features(CLASSES)
    assert detector.runs[1] - start[1] == 2


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        ([], {}, "no classes"),
        (np.array([], str), {}, "no classes"),
        (["cat", "\udc80"], {}, "half a character"),
        (["cat", ""], {}, "Class 1 is empty"),
        (["cat"] * 1001, {}, "more than 1000"),
        ("cat", {}, "list of strings"),
        (["the longest name that anybody ever thought of for one thing, and then some"], {}, "tokens"),
        (["猫" * 8], {}, "tokens"),
        (["x" * 1001], {}, "characters"),
        (["cat"], {"box_threshold": 1.5}, "box_threshold"),
        (["cat"], {"box_threshold": float("nan")}, "box_threshold"),
        (["cat"], {"text_threshold": -0.1}, "text_threshold"),
        (["cat"], {"nms": 2.0}, "nms"),
        (["cat"], {"limit": 0}, "limit"),
    ],
)
def test_bad_requests(
    detector: Owlv2Detector, image: np.ndarray, classes: Any, options: dict[str, Any], message: str
) -> None:
    start = detector.runs
    with pytest.raises(PromptError, match=message):
        detector.detect(image, classes, **options)
    assert detector.runs == start


def test_odd_requests_that_are_answered(detector: Owlv2Detector, image: np.ndarray) -> None:
    one = detector.detect(procedural_image(1, 1), ["cat"], box_threshold=0.0)
    assert np.all(one.boxes <= 1)
    assert len(detector.detect(procedural_image(3, 400), ["cat"], box_threshold=0.0)) > 0
    assert len(detector.detect(image, ["cat"], box_threshold=1.0)) == 0
    assert len(detector.detect(image, ["猫", "дом"], box_threshold=0.0)) > 0
    assert len(detector.detect(image, ["cat"], box_threshold=0.0, limit=2)) == 2
    with pytest.raises(ImageError):
        detector.detect(image[:, :, 0], ["cat"])


def test_like_itself(detector: Owlv2Detector, image: np.ndarray) -> None:
    """An object shown by its box on the very picture is found there, and best."""
    features = detector.image_features(image)
    side = max(image.shape[:2])
    query = 14
    x, y, w, h = features.boxes[query] * side
    box = np.clip([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 0, (130, 90, 130, 90))
    start = detector.runs
    found = detector.detect_like(image, image, box, box_threshold=0.0, nms=0.3, name="thing")
    assert detector.runs == start  # one picture, encoded before
    assert found.classes == ("thing",)
    assert found.scores[0] == pytest.approx(1.0, abs=1e-4)
    alone = detector.detect_like(image, procedural_image(50, 60))
    assert len(alone) > 0
    assert not same(alone, found)
    with pytest.raises(PromptError, match="outside"):
        detector.detect_like(image, image, (500, 500, 510, 510))


def test_threads_share_one_detector(detector: Owlv2Detector) -> None:
    pictures = [procedural_image(60 + i, 80) for i in range(3)]
    wanted = [detector.detect(p, CLASSES, box_threshold=LOW) for p in pictures]
    detector.image_cache.clear()
    detector.text_cache.clear()
    failed: list[int] = []

    def ask(index: int) -> None:
        for turn in range(5):
            at = (index + turn) % 3
            if not same(detector.detect(pictures[at], CLASSES, box_threshold=LOW), wanted[at]):
                failed.append(at)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_closed(owl_bundle: Path, image: np.ndarray) -> None:
    detector = Owlv2Detector.open(owl_bundle, threads=1, warm_up=True)
    assert detector.info()["warm_up"]["seconds"] > 0
    assert detector.memory().total > 0
    detector.close()
    detector.close()
    with pytest.raises(DeviceError, match="closed"):
        detector.detect(image, ["cat"])


def test_owlvit(owlvit_bundle: Path, image: np.ndarray) -> None:
    with open_detector(owlvit_bundle, threads=1) as detector:  # type: ignore[attr-defined]
        assert detector.info()["family"] == "owlvit"
        assert len(detector.detect(image, CLASSES, box_threshold=LOW)) > 0
        assert len(detector.detect_like(image, procedural_image(40, 40))) > 0


def test_without_the_tokenizer_library_nothing_is_opened(owl_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_graphs(*_: Any, **__: Any) -> None:
        pytest.fail("sessions were opened for a detector that cannot run")

    monkeypatch.setattr(opening, "open_graphs", open_graphs)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pixano-edge\[detection\]'"):
        open_detector(owl_bundle)


def test_another_family_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="no detector"):
        open_detector(tiny_bundle)
    with pytest.raises(BundleError, match="holds 'sam2'"):
        Owlv2Detector.open(tiny_bundle)
