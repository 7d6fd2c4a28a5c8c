"""`bench detect`: who is compared with whom, that kept text is used and that other classes get their own answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("torch", reason="the comparison needs pixano-edge[export]")
pytest.importorskip("skimage", reason="the picture needs pixano-edge[benchmarks]")

from pixano_edge.benchmarks import detect, detector_checkpoints
from pixano_edge.benchmarks.detect_contenders import EngineDetections
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.models.detection.base import Detections

CLASSES = "cat,spoon,table"


def _invoke(*args: object):
    return CliRunner().invoke(app, ["bench", "detect", *(str(a) for a in args)])


@pytest.fixture(params=["owl", "dino"])
def given(request: pytest.FixtureRequest) -> tuple[str, Path, Path]:
    """Name of the family, bundle and checkpoint."""
    name = request.param
    return name, request.getfixturevalue(f"{name}_bundle"), request.getfixturevalue(f"{name}_checkpoint")


def test_all_contenders_and_cases(given: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, bundle, checkpoint = given
    file = tmp_path / "detect.json"
    args = ("--bundle", bundle, "--checkpoint", checkpoint, "--classes", CLASSES, "--rounds", 2, "--threads", 1)
    result = _invoke(*args, "-o", file)
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    rows = {(r["case"], r["contender"]): r for r in content["rows"]}
    cases = [detect.FIRST, detect.CACHED] + ([detect.SAME] if name == "owl" else [])
    assert {case for case, _ in rows} == set(cases)
    contenders = {c for _, c in rows}
    assert {"pixano-edge fp32", "PyTorch fp32"} <= contenders
    assert "PyTorch bf16" in contenders or "PyTorch bf16" in content["left_out"]
    for case in cases:
        engine, reference = rows[case, "pixano-edge fp32"], rows[case, "PyTorch fp32"]
        assert reference["ratio"] == 1
        assert engine["ratio"] == pytest.approx(reference["seconds"]["p50"] / engine["seconds"]["p50"])
        assert engine["seconds"]["count"] == 2
        # Two timed calls and two to warm up: all of them compute the text, or none does.
        assert engine["texts"] == (4 if case == detect.FIRST else 0)
        assert reference["texts"] is None
    accuracy = {a["contender"]: a for a in content["accuracy"]}
    engine = accuracy["pixano-edge fp32"]
    assert engine["boxes"] >= 4
    assert engine["unmatched"] == 0
    assert engine["worst_box"] <= 1
    assert engine["worst_score"] <= 1e-3
    if "PyTorch bf16" in accuracy:  # the comparison can tell a difference
        other = accuracy["PyTorch bf16"]
        assert other["unmatched"] or other["worst_score"] > 1e-3
    assert "vs torch fp32" in result.stdout
    assert "text encoded" in result.stdout
    assert "without a partner" in result.stdout


def test_text_is_computed_once_per_list_and_other_classes_get_their_own_answer(
    given: tuple[str, Path, Path],
) -> None:
    from skimage import data

    opened, picture = Bundle.open(given[1]), data.coffee()[:200, :300]
    lists = (("cat", "spoon"), ("table",), ("cat", "spoon"), ("spoon", "cat"))

    def asked(classes: tuple[str, ...], detector: Any) -> Detections:
        return detector.detect(picture, classes, box_threshold=0.0, text_threshold=0.0, limit=20)

    engine = EngineDetections(opened, picture, lists[0], 1, "auto")
    runs, answers = [], []
    for classes in lists:
        answers.append(asked(classes, engine.detector))
        runs.append(engine.detector._text_encoder.runs)
    assert runs == [1, 2, 2, 3]  # the order of the classes is part of the list
    assert engine.texts == 3
    engine.close()
    for classes, answer in zip(lists, answers):
        fresh = EngineDetections(opened, picture, classes, 1, "auto")
        expected = asked(classes, fresh.detector)
        fresh.close()
        np.testing.assert_array_equal(answer.scores, expected.scores)
        np.testing.assert_array_equal(answer.boxes, expected.boxes)
        assert answer.names() == expected.names()
    # Negative control: an answer for the classes before would show.
    assert not np.array_equal(answers[0].scores, answers[1].scores)


def test_classes_that_cannot_be_compared(given: tuple[str, Path, Path]) -> None:
    name, bundle, checkpoint = given
    classes = "a long name " * 10 if name == "owl" else ",".join(f"cat {i}" for i in range(200))
    result = _invoke("--bundle", bundle, "--checkpoint", checkpoint, "--classes", classes, "--rounds", 1)
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (1, True)
    assert ("tokens, more than" if name == "owl" else "do not fit one caption") in result.stderr


def test_without_torch_the_engine_alone_is_timed(owl_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "torch" else real(n, *a))
    result = _invoke("--bundle", owl_bundle, "--classes", CLASSES, "--rounds", 1, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "PyTorch is not installed" in result.stderr
    assert "n/a" in result.stdout
    assert "without a partner" not in result.stdout
    result = _invoke("--rounds", 1)
    assert result.exit_code == 1
    assert "pip install 'pixano-edge[export]'" in result.stderr


def test_wrong_boxes_would_show() -> None:
    boxes = np.array([[10, 10, 60, 60], [70, 10, 120, 50]], np.float32)
    want = Detections(boxes, np.array([0.9, 0.8], np.float32), np.array([0, 1]), ("a", "b"))
    assert detect.accuracy("same", want, want, 0.5) == detect.Accuracy("same", 0.5, 2, 0, 0.0, 0.0)
    swapped = Detections(boxes, want.scores, want.labels[::-1].copy(), want.classes)
    assert detect.accuracy("swapped", swapped, want, 0.5).unmatched == 4
    moved = Detections(boxes + 3, want.scores, want.labels, want.classes)
    assert detect.accuracy("moved", moved, want, 0.5).worst_box == pytest.approx(3)


@pytest.mark.parametrize(
    ("family", "size", "side", "message"),
    [
        ("owlv2", "huge", None, "huge"),
        ("owlv2", "demo", 100, "100 pixels"),
        ("grounding-dino", "demo", 250, "250 pixels"),
        ("yolo", "demo", None, "no random 'yolo'"),
    ],
)
def test_unknown_random_checkpoints(family: str, size: str, side: int | None, message: str) -> None:
    with pytest.raises(EdgeError, match=message):
        detector_checkpoints.random_detector(family, size, side)


def test_only_detectors_are_exported(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match=r"no readable config\.json"):
        detector_checkpoints.export_detector(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"model_type": "sam2"}')
    with pytest.raises(EdgeError, match="'sam2', which is no detector"):
        detector_checkpoints.export_detector(tmp_path, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["owlv2", "grounding-dino"])
def test_random_checkpoints_export_and_agree(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXANO_EDGE_HOME", str(tmp_path))
    result = _invoke("--family", family, "--rounds", 1, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    (engine,) = [a for a in content["accuracy"] if a["contender"] == "pixano-edge fp32"]
    assert (engine["boxes"] > 0, engine["unmatched"]) == (True, 0)
