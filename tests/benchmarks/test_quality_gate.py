"""What the packaged demo bundle reaches on held-out scenes, and the bars that it is meant to reach.

The full gate takes minutes (`pytest -m slow`) and holds the project's bars; the packaged model misses them (README),
so it is marked as a strict expected failure: a model that reaches them turns it red until the mark is removed.

The light gate runs by default and notices a worse bundle or a broken pipeline: without the baselines, on few scenes,
so its bars are those of the packaged model (0.837 and 0.859 on 500 scenes) lowered by the error of the sample. Mean
IoU per scene varies by about 0.12; on 40 scenes that is a standard error of 0.12 / sqrt(40) = 0.019, and 0.05 is
2.6 of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pixano_edge.benchmarks import quality
from pixano_edge.benchmarks.seeds import FIRST_SEED

FULL = {"click": 0.85, "box": 0.92}
LIGHT = {"click": 0.787, "box": 0.809}
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


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="the packaged model reaches 0.837 and 0.859, 13 and 7 points ahead")
def test_full_gate(demo_bundle: Path) -> None:
    result = quality.evaluate(demo_bundle, 500, jobs=2)
    got = means(result, result.bundle)
    for kind, bar in FULL.items():
        assert got[kind] >= bar, got
        assert result.lead(kind) >= LEAD, result.summaries
    assert {s.method for s in result.summaries} == {result.bundle, "flood fill", "GrabCut"}


def test_control_an_untrained_model_fails_the_light_gate(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_baselines", lambda: {kind: {} for kind in quality.KINDS})
    result = quality.evaluate(tiny_bundle, 3)
    assert all(mean < LIGHT[kind] for kind, mean in means(result, result.bundle).items())


def test_the_scenes_are_not_those_that_training_watches() -> None:
    assert FIRST_SEED > 100_100
