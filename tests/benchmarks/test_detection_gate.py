"""What the packaged detector reaches on held-out scenes, and the bars that it is meant to reach.

The full gate takes minutes (`pytest -m slow`) and holds the project's bars. The packaged model has the lead over the
baseline, but misses the AP50 (docs/demo-detector.md), so that half is marked as a strict expected failure: a model that
reaches it turns it red until the mark is removed. The light one runs by default and notices a
worse bundle or a broken pipeline: on few scenes that are fixed, so its bar is what the packaged model reached on these
very scenes, lowered by the little that precisions and processors change.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pixano_edge.benchmarks import detection_quality as quality
from pixano_edge.engine.bundle import Bundle

FULL, LEAD = 0.80, 0.15
SCENES, REACHED, SLACK = 16, 0.614, 0.03
"""AP50 of the packaged bundle on the first scenes."""
BUNDLE = Path(__file__).resolve().parents[2] / "engine" / "assets" / "owlv2-demo"


@pytest.fixture
def packaged() -> Path:
    pytest.importorskip("skimage", reason="making scenes needs pixano-edge[benchmarks]")
    if not (BUNDLE / "manifest.json").is_file():
        pytest.skip("the demo detector is not in this tree")
    return BUNDLE


def test_light_gate(packaged: Path) -> None:
    result = quality.evaluate(packaged, SCENES, groups=2)
    assert result.of(result.bundle).ap50 >= REACHED - SLACK, result.rows
    assert result.lead() >= LEAD, result.rows


def test_size(packaged: Path) -> None:
    assert sum(file.stat().st_size for file in packaged.rglob("*") if file.is_file()) < 15_000_000


@pytest.fixture(scope="module")
def measured() -> quality.DetectionQuality:
    return quality.evaluate(BUNDLE, 500, jobs=2)


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="the packaged model reaches 0.541, 37.9 points ahead of the baseline")
def test_full_gate(packaged: Path, measured: quality.DetectionQuality) -> None:
    assert measured.of(measured.bundle).ap50 >= FULL, measured.rows


@pytest.mark.slow
def test_full_lead(packaged: Path, measured: quality.DetectionQuality) -> None:
    assert measured.lead() >= LEAD, measured.rows


def test_words_that_name_nothing_find_nothing(packaged: Path) -> None:
    from pixano_edge.engine.models.detection.opening import open_detector
    from pixano_edge.export.demo.scenes import generate_scene

    detector = open_detector(Bundle.open(packaged), threads=1)
    try:
        for seed in range(quality.FIRST_SEED, quality.FIRST_SEED + 5):
            image = generate_scene(seed, "heldout").image
            assert len(detector.detect(image, ["cat", "bicycle", "qwzx"], box_threshold=0.5)) == 0
    finally:
        detector.close()


def test_control_words_exchanged_fail_the_light_gate(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bundle, asked with the classes in another order than they are judged in."""
    from pixano_edge.engine.models.owlv2.detector import Owlv2Detector

    honest = Owlv2Detector.detect

    def exchanged(self: Owlv2Detector, image: np.ndarray, classes: list[str], **options: object) -> object:
        return honest(self, image, [*classes[1:], classes[0]], **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Owlv2Detector, "detect", exchanged)
    result = quality.evaluate(packaged, 4, groups=2)
    assert result.of(result.bundle).ap50 < REACHED - SLACK
