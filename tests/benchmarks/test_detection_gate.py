"""What the packaged detectors reach on held-out scenes, and the bars that they are meant to reach.

The full gate (`pytest -m slow`) holds the project's bars for the better one, Grounding DINO. The light one runs by
default and notices a worse bundle or a broken pipeline: on few scenes that are fixed, so its bar is what the packaged
models reached on these very scenes, lowered by the little that precisions and processors change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.benchmarks import detection_quality as quality
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.models.grounding_dino.detector import GroundingDinoDetector
from pixano_edge.engine.models.owlv2.detector import Owlv2Detector

FULL, LEAD = 0.80, 0.15
SCENES, SLACK = 16, 0.03
REACHED = {"grounding-dino-demo": 0.882, "owlv2-demo": 0.614}
"""AP50 of the packaged bundles on the first scenes."""
KINDS: dict[str, Any] = {"grounding-dino-demo": GroundingDinoDetector, "owlv2-demo": Owlv2Detector}
ASSETS = Path(__file__).resolve().parents[2] / "engine" / "assets"
BETTER = "grounding-dino-demo"


@pytest.fixture
def need_bundles() -> None:
    pytest.importorskip("skimage", reason="making scenes needs pixano-edge[benchmarks]")
    for name in REACHED:
        if not (ASSETS / name / "manifest.json").is_file():
            pytest.skip(f"{name} is not in this tree")


@pytest.mark.usefixtures("need_bundles")
def test_light_gate() -> None:
    result = quality.evaluate([ASSETS / name for name in REACHED], SCENES, groups=2)
    for name, reached in REACHED.items():
        assert result.of(name).ap50 >= reached - SLACK, result.rows
        assert result.lead(bundle=name) >= LEAD, result.rows


@pytest.mark.usefixtures("need_bundles")
@pytest.mark.parametrize("name", REACHED)
def test_size(name: str) -> None:
    assert sum(file.stat().st_size for file in (ASSETS / name).rglob("*") if file.is_file()) < 15_000_000


@pytest.fixture(scope="module")
def measured() -> quality.DetectionQuality:
    return quality.evaluate(ASSETS / BETTER, 500, jobs=2)


@pytest.mark.slow
@pytest.mark.usefixtures("need_bundles")
def test_full_gate(measured: quality.DetectionQuality) -> None:
    assert measured.of(measured.bundle).ap50 >= FULL, measured.rows


@pytest.mark.slow
@pytest.mark.usefixtures("need_bundles")
def test_full_lead(measured: quality.DetectionQuality) -> None:
    assert measured.lead() >= LEAD, measured.rows


@pytest.mark.usefixtures("need_bundles")
@pytest.mark.parametrize("name", REACHED)
def test_words_that_name_nothing_find_nothing(name: str) -> None:
    from pixano_edge.engine.models.detection.opening import open_detector
    from pixano_edge.export.demo.scenes import generate_scene

    detector = open_detector(Bundle.open(ASSETS / name), threads=1)
    try:
        for seed in range(quality.FIRST_SEED, quality.FIRST_SEED + 5):
            image = generate_scene(seed, "heldout").image
            assert len(detector.detect(image, ["cat", "bicycle", "qwzx"], box_threshold=0.5)) == 0
    finally:
        detector.close()


@pytest.mark.usefixtures("need_bundles")
@pytest.mark.parametrize("name", REACHED)
def test_control_words_exchanged_fail_the_light_gate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bundle, asked with the classes in another order than they are judged in."""
    kind = KINDS[name]
    honest = kind.detect

    def exchanged(self: Any, image: np.ndarray, classes: list[str], **options: object) -> object:
        return honest(self, image, [*classes[1:], classes[0]], **options)

    monkeypatch.setattr(kind, "detect", exchanged)
    result = quality.evaluate(ASSETS / name, 4, groups=2)
    assert result.of(result.bundle).ap50 < REACHED[name] - SLACK
