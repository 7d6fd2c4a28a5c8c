"""`bench startup`: a real start of the server with the demo model, and the bars by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("fastapi", reason="needs pixano-edge[server]")
pytest.importorskip("skimage", reason="the photo needs pixano-edge[benchmarks]")

from pixano_edge.benchmarks import startup
from pixano_edge.benchmarks.readings import read_startup
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.bundle.store import demo_path
from pixano_edge.engine.cli.main import app


def test_a_real_start(demo_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "startup.json"
    args = ["bench", "startup", "--bundle", str(demo_bundle), "--starts", "1", "--threads", "1", "-o", str(file)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    out = json.loads(file.read_text())
    cold = out["cold_start"]
    assert 0 < cold["healthy"]["p50"] <= cold["ready"]["p50"]
    assert out["models"] == ["sam2-demo"]
    (request,) = out["requests"]
    assert request["different"] == 0
    assert (request["first"]["count"], request["steady"]["count"]) == (1, 5)
    assert out["import"]["cpu"]["p50"] > 0
    assert any(name.startswith(("numpy", "pydantic", "pixano_edge")) for name, _ in out["import"]["modules"])
    memory = out["memory"]
    # The idle server has not loaded ONNX Runtime; the limit adds what the bundle declares to a process that has.
    assert 30e6 < memory["idle"] < memory["empty"] < memory["peak"]
    assert memory["limit"] > memory["empty"] + memory["weights"]
    assert [bar["unit"] for bar in out["bars"]] == ["s", "s", "x", "B"]
    assert all(check.passed for check in read_startup(out).checks)
    assert "serve until 1 models are ready" in result.stdout


def test_bars_by_hand(demo_bundle: Path) -> None:
    out = {
        "import": {"wall": {"p50": 0.24}}, "models": ["a", "b"], "cold_start": {"ready": {"p50": 2.1}},
        "requests": [{"task": "a", "times_slower": 1.3}, {"task": "b", "times_slower": 1.1}],
        "memory": {"peak": 10, "limit": 11},
    }  # fmt: skip
    assert [bar.met for bar in startup.bars(out, True)] == [True, False, False, True, True]
    assert startup.bars(out, False)[1].met  # real sizes have more time
    bundle = Bundle.open(demo_bundle)
    one = startup.memory_parts([bundle], 100, [5, None, 7])
    two = startup.memory_parts([bundle, bundle], 100, [None])
    assert (one["peak"], two["peak"]) == (7, None)
    assert two["weights"] == 2 * one["weights"] > 0
    assert one["limit"] == round(100 + one["weights"] + 1.1 * (one["activations"] + one["bindings"]))
    assert startup.memory_parts([bundle], None, [])["limit"] is None


def test_modules_are_read_from_importtime() -> None:
    text = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       100 |        900 |   a.b\nnoise\nimport time:      2000 |       2000 | c\n"
    )
    assert startup.slowest(text) == [("c", 0.002), ("a.b", 0.0001)]


def test_children_find_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    with startup.compiled_environment() as environ:
        code = "import json, sys; print(json.dumps([sys.dont_write_bytecode, sys.pycache_prefix]))"
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **environ}, capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout) == [False, environ["PYTHONPYCACHEPREFIX"]]


def test_requests_that_differ_are_counted() -> None:
    found = [
        {"first": 2.0, "steady": [1.0, 1.0], "known_words": [], "different": 0},
        {"first": 4.0, "steady": [1.0, 3.0], "known_words": [], "different": 1},
    ]
    merged = startup.merge("m", found)
    assert merged["first"]["p50"] == 3
    assert merged["times_slower"] == 3
    assert merged["different"] == 1
    assert "known_words" not in merged
    found[0]["known_words"] = [0.5]
    assert startup.merge("m", found)["known_words"]["p50"] == 0.5


def test_a_detectors_first_request_is_held_against_its_like(monkeypatch: pytest.MonkeyPatch, demo_bundle: Path) -> None:
    """Words that are new each time; repeats with the first ones apart."""
    asked: list[dict[str, Any]] = []

    class Recorder:
        def __init__(self, port: int) -> None:
            pass

        def __enter__(self) -> Recorder:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def post(self, path: str, body: bytes) -> tuple[int, bytes, float]:
            asked.append(json.loads(body))
            return 200, b'{"data": {}}', float(len(asked))

    monkeypatch.setattr(startup, "Client", Recorder)
    found = startup.first_requests(1, {"d": Bundle.open(demo_path("owlv2-demo")), "s": Bundle.open(demo_bundle)}, 0)
    assert found["d"] == {"first": 1, "steady": [2, 3, 4, 5, 6], "known_words": [7, 8, 9, 10, 11], "different": 0}
    assert found["s"]["known_words"] == []
    words = [tuple(body["classes"]) for body in asked[:12]]
    assert len(set(words[:6])) == 6
    assert len({word for pair in words[:6] for word in pair}) == 12
    assert set(words[6:]) == {words[0]}
    pictures = [body["image"] for body in asked[:12]]
    assert len(set(pictures[:11])) == 11
    assert pictures[11] == pictures[0]
