"""How well the packaged demo bundle tracks held-out clips, and the bars that it is meant to reach.

The full gate takes minutes (`pytest -m slow`) and holds the project's bars. The light one runs by default and notices
a worse bundle or a broken pipeline: on few clips, so its bar is the full one lowered by the error of the sample. Mean J
per clip varies by about 0.12; on 6 clips that is a standard error of 0.05, and 0.13 is 2.6 of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pixano_edge.benchmarks import tracking_quality
from pixano_edge.benchmarks.tracking_quality import COPY, FLOW, TRUE
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2_video

FULL, LIGHT, LEAD = 0.80, 0.67, 0.15
CLIPS = 6


@pytest.fixture
def packaged(demo_bundle: Path) -> Path:
    pytest.importorskip("skimage", reason="making clips needs pixano-edge[benchmarks]")
    if sam2_video.constants_of(Bundle.open(demo_bundle).manifest.constants) is None:
        pytest.skip("the packaged bundle holds no graphs for video")
    return demo_bundle


def test_light_gate(packaged: Path) -> None:
    result = tracking_quality.evaluate(packaged, CLIPS)
    assert result.model.j >= LIGHT, result.rows


@pytest.mark.slow
def test_full_gate(packaged: Path) -> None:
    result = tracking_quality.evaluate(packaged, 100, jobs=2)
    assert {row.method for row in result.rows[1:]} == {COPY, FLOW, COPY + TRUE, FLOW + TRUE}
    assert result.model.j >= FULL, result.rows
    assert min(result.leads().values()) >= LEAD, result.rows


def test_control_an_untrained_model_fails_the_light_gate(tracking_bundle: Path) -> None:
    pytest.importorskip("skimage", reason="making clips needs pixano-edge[benchmarks]")
    result = tracking_quality.evaluate(tracking_bundle, 1, length=20)
    assert result.model.j < LIGHT
