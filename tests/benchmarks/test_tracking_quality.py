"""`bench track-quality`: what is counted, who is compared with whom, and who is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pixano_edge.benchmarks import tracking_quality
from pixano_edge.benchmarks.tracking_quality import COPY, FLOW, TRUE, Track, judge, summarise, table_rows
from pixano_edge.engine.cli.main import app

FRAMES = 5


@pytest.fixture
def _clips_can_be_made() -> None:
    pytest.importorskip("skimage", reason="making clips needs pixano-edge[benchmarks]")


def masks(*areas: int) -> np.ndarray:
    """One mask per number: that many pixels of a row of ten."""
    out = np.zeros((len(areas), 1, 10), bool)
    for mask, area in zip(out, areas):
        mask[0, :area] = True
    return out


def test_the_first_frame_does_not_count_and_hidden_frames_do() -> None:
    track = judge(3, "star", "m", list(masks(10, 5, 0, 4)), masks(5, 5, 0, 0))
    assert track.first == 0.5
    assert track.shown == [1.0]
    assert track.hidden == [1.0, 0.0]
    assert track.j == pytest.approx(2 / 3)


def test_late_frames_are_the_last_ten() -> None:
    truth = masks(*[10] * 30)
    answer = masks(*[10] * 20, *[5] * 10)
    track = judge(0, "bar", "m", list(answer), truth)
    assert track.late == 0.5
    assert track.j == pytest.approx((19 + 5) / 29)


def test_a_clip_counts_as_one_draw() -> None:
    """Objects of one clip are not independent: the interval is over clips."""
    tracks = [Track(clip, "s", "m", 1.0, float(clip % 2), 1.0, [1.0], []) for clip in range(8) for _ in range(50)]
    row = summarise(tracks, "m", 8, 60).model
    assert row.j == 0.5
    assert row.low <= 0.25
    assert row.high >= 0.75
    assert row.hidden is None
    assert table_rows(summarise(tracks, "m", 8, 60))[0][-1] == "n/a"


@pytest.mark.usefixtures("_clips_can_be_made")
def test_command_compares_the_bundle_with_copies_and_flow(tracking_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    args = ["bench", "track-quality", "--bundle", str(tracking_bundle), "--clips", "2", "--frames", str(FRAMES)]
    result = CliRunner().invoke(app, [*args, "--output", str(file)])
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    rows = {row["method"]: row for row in content["rows"]}
    assert list(rows) == [content["bundle"], COPY, FLOW, COPY + TRUE, FLOW + TRUE]
    assert content["clips"] == 2
    assert content["objects"] >= 2
    assert rows[COPY]["first"] == rows[FLOW]["first"] == rows[content["bundle"]]["first"]
    assert rows[COPY + TRUE]["first"] == rows[FLOW + TRUE]["first"] == 1
    # A few frames of slow motion: with the true first mask both baselines must do well, or the truth is misplaced.
    assert rows[FLOW + TRUE]["j"] > 0.8
    assert rows[FLOW + TRUE]["j"] > rows[COPY + TRUE]["j"]
    assert set(content["leads"]) == set(rows) - {content["bundle"]}
    assert f"| {FLOW} |" in result.stdout
    assert "lead over" in result.stdout


@pytest.mark.usefixtures("_clips_can_be_made")
def test_equal_arguments_give_equal_figures_with_any_number_of_jobs(tracking_bundle: Path) -> None:
    one, two = (tracking_quality.evaluate(tracking_bundle, 2, length=3, jobs=jobs) for jobs in (1, 2))
    assert one == two


@pytest.mark.usefixtures("_clips_can_be_made")
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_bundle_that_cannot_track_is_refused(tiny_bundle: Path, jobs: str) -> None:
    args = ["bench", "track-quality", "--bundle", str(tiny_bundle), "--clips", "1", "--jobs", jobs]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 1
    assert "holds no graphs for video" in result.stderr
