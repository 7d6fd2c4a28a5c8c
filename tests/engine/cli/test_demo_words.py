"""The demo's words on the bundled pictures, with a fake detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixano_edge.engine.cli.demo import demo_folder, read_pictures
from pixano_edge.engine.cli.demo_words import ABSENT, run_words, word_of
from pixano_edge.engine.models.detection.base import Detections
from tests.support.fake_detector import FakeDetector

OBJECTS: list[tuple[str, Any]] = [
    ("red striped star", (10, 10, 60, 60)),
    ("red plain star", (80, 10, 120, 60)),
    ("blue plain circle", (10, 70, 50, 110)),
]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (128, 128), (90, 90, 90)).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def _answers(monkeypatch: pytest.MonkeyPatch, *boxes: tuple[tuple[float, ...], str]) -> FakeDetector:
    """A detector that finds these."""
    detector = FakeDetector()

    def detect(image: np.ndarray, classes: Any, **_: Any) -> Detections:
        detector.images.append(image)
        detector.asked.append({"classes": tuple(classes)})
        labels = np.array([list(classes).index(name) for _, name in boxes], np.int64)
        found = np.array([box for box, _ in boxes], np.float32).reshape(-1, 4)
        return Detections(found, np.full(len(boxes), 0.9, np.float32), labels, tuple(classes))

    monkeypatch.setattr(detector, "detect", detect)
    return detector


def test_all_found(picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = _answers(
        monkeypatch,
        ((12, 10, 60, 58), "red star"), ((80, 12, 118, 60), "red star"), ((10, 70, 50, 110), "blue circle"),
    )  # fmt: skip
    result = run_words(detector, picture, OBJECTS, tmp_path, 0.5)
    assert result.words == ["red star", "blue circle", ABSENT]
    assert (result.objects, result.found, result.wrong) == (3, 3, 0)
    assert result.first_seconds > 0
    assert np.asarray(Image.open(tmp_path / result.file)).shape == (128, 128, 3)
    first, again = detector.images
    assert (first != again).any()  # so that the image is encoded again


@pytest.mark.parametrize(
    ("boxes", "found", "wrong"),
    [
        ([], 0, 0),
        ([((10, 70, 50, 110), "red star")], 0, 1),  # the name of another
        ([((30, 90, 70, 130), "blue circle")], 0, 1),  # too far off
        ([((10, 10, 60, 60), "red star"), ((11, 10, 60, 60), "red star")], 1, 1),  # twice the same one
        ([((5, 5, 9, 9), ABSENT)], 0, 1),
    ],
)
def test_what_counts(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boxes: Any, found: int, wrong: int
) -> None:
    result = run_words(_answers(monkeypatch, *boxes), picture, OBJECTS, tmp_path, 0.5)
    assert (result.found, result.wrong) == (found, wrong)


def test_the_absent_word_is_on_no_bundled_picture() -> None:
    for _, objects in read_pictures(demo_folder()):
        assert ABSENT not in {word_of(o.name) for o in objects}
