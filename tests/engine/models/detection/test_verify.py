"""The golden check of detectors: what passes, and what each mistake is called."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.errors import BundleError
from pixano_edge.engine.models.verdicts import VerdictStore
from pixano_edge.engine.models.verify import record_verdict, verify_bundle


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_passes_at_both_precisions(owl_bundle: Path, precision: str) -> None:
    done: list[tuple[int, int]] = []
    report: Any = verify_bundle(owl_bundle, "cpu", precision=precision, threads=1, progress=lambda *at: done.append(at))
    assert report.passed, report.problems
    assert report.boxes > 10
    assert report.unmatched == 0
    assert report.precision == precision
    assert done == [(1, 2), (2, 2)]
    names = [t.name for t in report.tensors]
    assert names[:3] == ["pixel_values", "input_ids", "text_embeds"]
    assert "objectness" in names
    assert all(t.tolerance >= t.max_rel for t in report.tensors)
    assert "boxes" in report.figures()[0]
    assert report.to_dict()["passed"] is True


def test_owlvit_passes(owlvit_bundle: Path) -> None:
    assert verify_bundle(owlvit_bundle, "cpu", threads=1).passed


@pytest.mark.parametrize(
    ("mistake", "suspect"),
    [("BGR", "pre-processing"), ("gray padding", "pre-processing"), ("no end", "text_encoder"), ("boxes", None)],
)
def test_mistakes_fail_and_are_located(
    owl_bundle: Path, mistake: str, suspect: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixano_edge.engine.models.owlv2 import detector, scores

    if mistake == "BGR":
        real = detector.preprocess
        monkeypatch.setattr(detector, "preprocess", lambda image, *rest: real(image[:, :, ::-1], *rest))
    elif mistake == "gray padding":

        def gray(image: np.ndarray, *rest: Any) -> None:
            side = max(image.shape[:2])
            padded = np.full((side, side, 3), 128, np.uint8)
            padded[: image.shape[0], : image.shape[1]] = image
            real(padded, *rest)

        real = detector.preprocess
        monkeypatch.setattr(detector, "preprocess", gray)
    elif mistake == "no end":
        run = detector.Owlv2Detector._run_text_encoder
        monkeypatch.setattr(
            detector.Owlv2Detector, "_run_text_encoder", lambda self, ids: run(self, np.roll(ids, 1, axis=1))
        )
    else:
        monkeypatch.setattr(scores, "box_scale", lambda size, c: np.array([*size, *size], np.float32))
    report: Any = verify_bundle(owl_bundle, "cpu", threads=1)
    assert not report.passed
    assert any("detections" in p for p in report.problems)
    if suspect is not None:
        assert report.suspect.graph == suspect


def test_a_verdict_is_kept_and_asked(owl_bundle: Path, tmp_path: Path) -> None:
    from pixano_edge.engine.errors import DeviceError
    from pixano_edge.engine.models.owlv2.detector import Owlv2Detector

    store = VerdictStore(tmp_path)
    report: Any = verify_bundle(owl_bundle, "cpu", threads=1)
    assert record_verdict(report, store).passed
    with Owlv2Detector.open(owl_bundle, threads=1, verdicts=store) as detector:
        assert "passed" in detector.info()["precision_reason"]
    report.problems = ["made up"]
    record_verdict(report, store)
    with pytest.raises(DeviceError, match="made up"):
        Owlv2Detector.open(owl_bundle, precision="fp32", threads=1, verdicts=store)


def test_the_command(owl_bundle: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(owl_bundle), "--threads", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "detections:" in result.output
    assert "text_embeds" in result.output


def test_damaged_samples(owl_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Bundle.load_npz

    def without(name: str) -> None:
        monkeypatch.setattr(
            Bundle, "load_npz", lambda self, rel: {k: v for k, v in real(self, rel).items() if k != name}
        )

    for name in ("classes", "boxes", "original_size"):
        without(name)
        with pytest.raises(BundleError, match="malformed"):
            verify_bundle(owl_bundle, "cpu", threads=1)
    monkeypatch.setattr(Bundle, "load_npz", lambda self, rel: {**real(self, rel), "labels": np.zeros(3)})
    with pytest.raises(BundleError, match="malformed"):
        verify_bundle(owl_bundle, "cpu", threads=1)
    monkeypatch.undo()
    copy = shutil.copytree(owl_bundle, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        verify_bundle(copy, "cpu", threads=1)
