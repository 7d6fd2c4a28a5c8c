"""What the packaged demo bundle reaches on held-out scenes, and the bars that it is meant to reach.

The full gate takes minutes (`pytest -m slow`) and holds the project's bars. The packaged model reaches those for a
click; those for a box it misses (README), so that half is marked as a strict expected failure: a model that reaches
them turns it red until the mark is removed.

The light gate runs by default and notices a worse bundle or a broken pipeline: without the baselines, on few scenes,
so its bars are those of the packaged model (0.861 and 0.865 on 500 scenes) lowered by the error of the sample. Mean
IoU per scene varies by about 0.12; on 40 scenes that is a standard error of 0.12 / sqrt(40) = 0.019, and 0.05 is
2.6 of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pixano_edge.benchmarks import quality
from pixano_edge.benchmarks.seeds import FIRST_SEED

FULL = {"click": 0.85, "box": 0.92}
LIGHT = {"click": 0.811, "box": 0.815}
LEAD = 0.15
SCENES = 40


@pytest.fixture(autouse=True)
def _scenes_can_be_made() -> None:
    pytest.importorskip("skimage", reason="making scenes needs pixano-edge[benchmarks]")


def means(result: quality.Quality, method: str) -> dict[str, float]:
    return {s.kind: s.mean for s in result.summaries if s.method == method}


def test_light_gate(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_baselines", lambda: {kind: {} for kind in quality.KINDS})
    result = quality.evaluate(demo_bundle, SCENES)
    got = means(result, result.bundle)
    assert got["click"] >= LIGHT["click"], got
    assert got["box"] >= LIGHT["box"], got


@pytest.fixture(scope="module")
def measured() -> quality.Quality:
    bundle = Path(__file__).resolve().parents[2] / "engine" / "assets" / "sam2-demo"
    return quality.evaluate(bundle, 500, jobs=2)


MISSED = pytest.mark.xfail(strict=True, reason="the packaged model reaches 0.865 from a box, 10.8 points ahead")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["click", pytest.param("box", marks=MISSED)])
def test_full_gate(measured: quality.Quality, kind: str) -> None:
    assert {s.method for s in measured.summaries} == {measured.bundle, "flood fill", "GrabCut"}
    assert means(measured, measured.bundle)[kind] >= FULL[kind], measured.summaries
    assert measured.lead(kind) >= LEAD, measured.summaries


def test_control_an_untrained_model_fails_the_light_gate(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_baselines", lambda: {kind: {} for kind in quality.KINDS})
    result = quality.evaluate(tiny_bundle, 3)
    assert all(mean < LIGHT[kind] for kind, mean in means(result, result.bundle).items())


def test_the_scenes_are_not_those_that_training_watches() -> None:
    assert FIRST_SEED > 100_100
