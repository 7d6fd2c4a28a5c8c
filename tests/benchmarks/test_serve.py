"""`bench serve`: small runs on the demo bundle; figures are plausible, and failures are none of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("fastapi", reason="needs pixano-edge[server]")

from pixano_edge.benchmarks import serve, serving
from pixano_edge.benchmarks.readings import read_serve
from pixano_edge.engine.errors import EdgeError


def test_a_small_run_of_everything(demo_bundle: Path, tmp_path: Path) -> None:
    from pixano_edge.benchmarks.cli import app

    output = tmp_path / "serve.json"
    arguments = ["serve", "--bundle", str(demo_bundle), "--rounds", "3", "--seconds", "0.5", "--clients", "1"]
    arguments += ["--clients", "3", "--clicks", "2", "--threads", "1", "-o", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    content = json.loads(output.read_text())
    rows = {row["case"]: row for row in content["rows"]}
    assert list(rows) == [serve.WARM_NEW, serve.FIRST, serve.LEAN, serve.ECHO, serve.OWN, serve.HANDLE]
    for row in rows.values():
        assert 0 < row["overhead"]["p50"] < row["http"]["p50"]
        assert row["engine"]["count"] == row["http"]["count"] == 3
    # What is sent shows which request is which: the page's echo, and ten numbers instead of it.
    assert rows[serve.ECHO]["sent"] > rows[serve.LEAN]["sent"] + 500_000
    assert rows[serve.HANDLE]["sent"] < rows[serve.LEAN]["sent"] + 50_000
    assert rows[serve.FIRST]["received"] > 10 * rows[serve.LEAN]["received"]
    assert [row["clients"] for row in content["load"]] == [1, 3]
    assert all(row["errors"] == 0 and row["requests"] >= row["clients"] for row in content["load"])
    wait = content["while_tracking"]
    # That none waits for two frames is what test_hangups.py shows, where nothing depends on the machine's load.
    assert wait["click"]["count"] == wait["frames"]["count"] == 2
    assert wait["frame"]["count"] >= 8
    assert 0 <= wait["queued"]["p50"] < wait["click"]["p99"]
    assert 0 < wait["step"] < 60
    assert wait["most_steps"] > 0
    # `bench all` reads the same output.
    read = read_serve(content)
    assert len(read.figures) == 3 * len(rows) + 2 * 2 + 1
    assert [check.passed for check in read.checks] == [True]


def test_the_photo_is_as_large_as_it_says() -> None:
    pixels = serving.photo(2.0)
    assert pixels.shape[0] * pixels.shape[1] == pytest.approx(2e6, rel=0.01)
    assert pixels.shape[0] != pixels.shape[1]
    assert len(serving.jpeg_uri(pixels)) > 400_000
    assert np.array_equal(pixels, serving.photo(2.0))


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match=r"(?s)did not start.*PIXANO_EDGE_THREADS is malformed"):
        serving.ServerProcess(tmp_path, {"PIXANO_EDGE_THREADS": "none"})


def test_an_answer_that_is_none_is_an_error() -> None:
    assert serving.engine_seconds(b'{"id":"x","processingTime":1.5e-2,"data":{}}') == 0.015
    with pytest.raises(EdgeError, match="No answer"):
        serving.engine_seconds(b'{"error":{"code":"not_found"}}')
