"""Variants that calibration added: judged by their own budget, told by `info` and `bundle inspect`, run by `bench`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.bundle.manifest import CalibrationEntry
from pixano_edge.engine.bundle.writer import BundleWriter
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.models.calibrated import calibration_text, calibrations_of, golden_bar
from pixano_edge.engine.models.detection.matching import Agreement
from pixano_edge.engine.models.detection.verify import DetectionReport
from pixano_edge.engine.models.detection.verify import judge as judge_detections
from pixano_edge.engine.models.sam2 import verify as of_sam2
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.verify import VerifyReport, judge
from pixano_edge.engine.models.sam2_video.check import ClipCheck

TOLD: dict[str, Any] = {
    "variant": "int8", "graphs": ["image_encoder"], "metric": "mask_iou", "budget": 0.98, "held_out": 0.9873,
    "worst": 0.91, "held_out_samples": 12, "data": "photos", "calibration_samples": 36,
    "method": "auto, 23 of 25 blocks", "created": "2026-11-27T00:00:00Z", "tools": {"onnxruntime": "1.32.0"},
}  # fmt: skip


def entry(**changes: Any) -> CalibrationEntry:
    return CalibrationEntry.model_validate({**TOLD, **changes})


@pytest.fixture(scope="module")
def calibrated(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with the fp16 encoder as ``int8``, and fp32 files for the rest, as calibration leaves them."""
    folder = tmp_path_factory.mktemp("calibrated") / "sam2-int8"
    fields = Bundle.open(demo_bundle).manifest.model_dump(exclude={"files", "schema_version"})
    for graph, held in fields["graphs"].items():
        used = held["variants"]["fp16" if graph == "image_encoder" else "fp32"]
        held["variants"]["int8"] = {**used, "precision": "int8"}
    with BundleWriter(folder) as writer:
        shutil.copytree(demo_bundle, writer.root, dirs_exist_ok=True)
        (writer.root / "manifest.json").unlink()
        report = "reports/calibration.json"
        writer.add_file(report, b"{}")
        writer.finish({**fields, "name": "sam2-int8", "calibrations": [entry(report=report).model_dump()]})
    return folder


def test_the_bar_follows_from_the_budget() -> None:
    assert golden_bar([]) is None
    assert golden_bar([entry()]) == pytest.approx(0.94)
    assert golden_bar([entry(budget=0.995)]) == pytest.approx(0.985)
    assert golden_bar([entry(budget=0.5)]) == 0
    assert golden_bar([entry(golden=0.93)]) == pytest.approx(0.91)  # what was measured counts more than the budget
    assert golden_bar([entry(golden=0.93), entry(metric="j")], clip=True) == pytest.approx(0.91)
    both = [entry(), entry(metric="j", budget=0.9)]
    assert golden_bar(both) == pytest.approx(0.94)
    assert golden_bar(both, clip=True) == pytest.approx(0.7)
    assert golden_bar([entry()], clip=True) == pytest.approx(0.94)  # nobody judged it on clips
    assert golden_bar([entry(metric="j", budget=0.9)]) == pytest.approx(0.7)


def masks(mean: float, clip: float | None = None) -> VerifyReport:
    tracked = None if clip is None else ClipCheck(objects=1, frames=8, shown=8, mean_iou=clip, min_iou=clip)
    return VerifyReport("b", "cpu", "onnxruntime", "int8", 1, [], mean, mean, 0.0, clip=tracked)


def test_masks_and_clips_are_judged_by_it() -> None:
    assert judge(masks(0.95)) == ["masks: mean IoU 0.9500 < 0.98"]
    assert judge(masks(0.95), [entry()]) == []
    assert judge(masks(0.93), [entry()]) == ["masks: mean IoU 0.9300 < 0.94"]
    assert judge(masks(float("nan")), [entry()])
    assert judge(masks(0.99), [entry(budget=0.999)]) == ["masks: mean IoU 0.9900 < 0.997"]  # stricter than int8's
    assert judge(masks(0.95, clip=0.8), [entry()]) == ["tracked clip: mean IoU 0.8000 < 0.94"]
    assert judge(masks(0.95, clip=0.8), [entry(), entry(metric="j", budget=0.92)]) == []


def test_detections_are_judged_by_it() -> None:
    agreement = Agreement(boxes=1, ious=[0.75])
    report = DetectionReport("b", "cpu", "onnxruntime", "int8", 1, [], 1, 0, 0.0, 0.0, 0.75, 0.75, 0.0)
    assert judge_detections(report, agreement) == ["detections: mean IoU 0.7500 < 0.8"]
    assert judge_detections(report, agreement, [entry(budget=0.9)]) == []
    assert judge_detections(report, agreement, [entry(budget=0.95)]) == ["detections: mean IoU 0.7500 < 0.85"]


def test_it_is_told_where_it_runs(calibrated: Path) -> None:
    manifest = Bundle.open(calibrated).manifest
    assert [e.metric for e in calibrations_of(manifest, "int8")] == ["mask_iou"]
    assert calibrations_of(manifest, "fp16") == []
    with Sam2ImagePredictor.open(calibrated, device="cpu", precision="int8", threads=1) as predictor:
        info = predictor.info()
    assert info["precision"] == "int8"
    assert info["precision_reason"] == f"asked for; {calibration_text(manifest.calibrations)}"
    assert "mask_iou 0.9873 on 12 held-out samples of photos (budget 0.98)" in info["precision_reason"]
    with Sam2ImagePredictor.open(calibrated, device="cpu", threads=1) as predictor:
        assert predictor.info()["precision"] == "fp32"  # it is never taken unasked


def test_verify_takes_the_budget_of_the_bundle(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(of_sam2.MIN_IOU, "int8", 1.1)  # which nothing meets
    report = of_sam2.verify_bundle(calibrated, "cpu", precision="int8", threads=1)
    assert report.passed, report.problems
    assert report.clip is not None
    assert judge(report)


def test_info_and_inspect_show_it(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    for command in (["info", str(calibrated), "--precision", "int8"], ["bundle", "inspect", str(calibrated)]):
        shown = CliRunner().invoke(app, [*command])
        assert shown.exit_code == 0, shown.output
        for word in ("mask_iou", "0.9873", "0.9100", "0.98", "36 + 12 held out", "photos", "2026-11-27", "23 of 25"):
            assert word in shown.stdout, (command, word)
        assert "every figure is in reports/calibration.json" in shown.stdout
    told = json.loads(CliRunner().invoke(app, ["info", str(calibrated), "--json"]).stdout)
    assert told["calibrations"][0]["budget"] == 0.98


def test_bundles_without_show_nothing(demo_bundle: Path) -> None:
    assert "Calibrated" not in CliRunner().invoke(app, ["bundle", "inspect", str(demo_bundle)]).stdout


def test_it_can_be_benched(calibrated: Path) -> None:
    pytest.importorskip("skimage", reason="the scenes' textures")
    arguments = ["bench", "quality", "--bundle", str(calibrated), "--precision", "int8", "--scenes", "1", "--json"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["scenes"] == 1
