"""The command that compares a calibrated variant with fp32 where the truth is known."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pixano_edge.benchmarks import calibrated as bench
from pixano_edge.benchmarks.cli import app
from pixano_edge.calibration.run import Outcome
from pixano_edge.engine.errors import CalibrationError


def test_masks_are_compared_with_the_truth(calibrated: Outcome) -> None:
    assert calibrated.bundle is not None
    words = ["calibrated", "--bundle", str(calibrated.bundle.root), "--scenes", "2", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code in (0, 1), done.output
    told = json.loads(done.stdout)
    assert [row["metric"] for row in told["rows"]] == ["IoU, one click", "IoU, box"]
    for row in told["rows"]:
        assert 0.4 < row["fp32"] < 1
        assert row["low"] <= row["variant"] - row["fp32"] <= row["high"]
        assert row["count"] > 2
    assert told["passed"] == (done.exit_code == 0)


def test_more_than_a_point_lost_is_an_error(calibrated: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibrated.bundle is not None
    lost = bench.Comparison("x", "int8", 1, [bench.Row("IoU", 0.9, 0.88, -0.03, -0.01, 5)])
    assert not lost.passed
    assert bench.Comparison("x", "int8", 1, [bench.Row("IoU", 0.9, 0.891, -0.02, 0.0, 5)]).passed
    monkeypatch.setattr(bench, "compare", lambda *args, **more: lost)
    done = CliRunner().invoke(app, ["calibrated", "--bundle", str(calibrated.bundle.root)])
    assert isinstance(done.exception, CalibrationError)
    assert "-2.00" in done.stdout
