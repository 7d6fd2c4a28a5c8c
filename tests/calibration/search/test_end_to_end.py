"""From a folder of pictures to a variant that the engine opens, and all that must not lead to one."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pixano_edge.calibration.data import open_data
from pixano_edge.calibration.result import Budget, CalibrationResult
from pixano_edge.calibration.run import Outcome, calibrate
from pixano_edge.calibration.search import Found
from pixano_edge.calibration.tasks.base import Task, TaskOptions
from pixano_edge.engine.bundle import Bundle, BundleWriter, demo_path
from pixano_edge.engine.errors import BundleError, CalibrationError, EdgeError
from pixano_edge.engine.models.images import decode_image
from pixano_edge.engine.models.masks import mask_iou
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt

from .conftest import decoder_request


def command(*words: str) -> Any:
    """Runs `pixano-edge calibrate`."""
    from typer.testing import CliRunner

    from pixano_edge.calibration.cli import app

    return CliRunner().invoke(app, list(words))


def test_a_variant_is_published_and_says_what_it_is(calibrated: Outcome, sam2_demo: Bundle) -> None:
    bundle, variant = calibrated.bundle, calibrated.result.variants[0]
    assert bundle is not None
    assert bundle.variants() == [*sam2_demo.variants(), "int8"]
    assert variant.passed
    assert variant.published
    assert not variant.problems
    (entry,) = bundle.manifest.calibrations
    assert entry.held_out == pytest.approx(variant.held_out.mean if variant.held_out else None)
    assert entry.held_out >= entry.budget == 0.95
    assert entry.graphs == ["image_encoder", "mask_decoder"]
    assert entry.golden is not None
    assert 0.8 < entry.golden < 1
    assert entry.report is not None
    stored = CalibrationResult.from_dict(json.loads(bundle.file(entry.report).read_text()))
    assert stored.variants[0].held_out == variant.held_out
    assert set(stored.data.held_out).isdisjoint(stored.data.calibration)
    # What was not calibrated runs the fp32 file, which is there once.
    held = bundle.manifest.graphs
    assert held["image_encoder"].variants["int8"].file == held["image_encoder"].variants["fp32"].file
    assert held["mask_decoder"].variants["int8"].file == "graphs/mask_decoder.int8.onnx"
    assert "int8-tensorrt" in held["memory_encoder"].variants
    # Everything else of the bundle is as it was.
    assert {f: e for f, e in bundle.manifest.files.items() if "int8" not in f} == sam2_demo.manifest.files


def test_the_report_has_every_figure(calibrated: Outcome) -> None:
    variant = calibrated.result.variants[0]
    (size,) = variant.graphs
    assert size.graph == "mask_decoder"
    assert size.layers == size.of_layers > 20
    assert size.bytes < 0.4 * size.fp32_bytes
    assert {b.graph for b in variant.blocks} == {"mask_decoder"}
    assert all(b.quantised and b.alone is not None for b in variant.blocks)
    assert variant.ranges
    assert all(r.amax > 0 and r.held_out_clipped is not None for r in variant.ranges)
    assert len(variant.speed) == len(variant.fp32_speed) == 1
    assert variant.worst
    values = [w.value for w in variant.worst]
    assert values == sorted(values)
    assert all(w.fp32_png and w.variant_png for w in variant.worst)


def test_the_engine_opens_it_and_segments_nearly_as_fp32(calibrated: Outcome, scenes: Path) -> None:
    assert calibrated.bundle is not None
    image = decode_image(scenes / "scene-000000.png")
    prompts = [Prompt(points=[[96, 96]], labels=[1]), Prompt(box=[20, 20, 150, 150])]
    answers = []
    for precision in ("fp32", "int8"):
        with Sam2ImagePredictor.open(calibrated.bundle, device="cpu", precision=precision, threads=1) as predictor:
            answers.append(predictor.predict(image, prompts))
            assert predictor.info()["precision"] == precision
    full, reduced = answers
    assert not np.array_equal(full.scores, reduced.scores)
    best = full.scores.argmax(axis=1)
    overlaps = [mask_iou(full.masks[i, b], reduced.masks[i, b]) for i, b in enumerate(best)]
    assert min(overlaps) > 0.8


def test_nothing_of_the_work_is_left(calibrated: Outcome) -> None:
    assert calibrated.bundle is not None
    work = calibrated.bundle.root.parent / "work"
    assert not list(work.iterdir())
    assert sorted(p.name for p in calibrated.bundle.root.parent.iterdir()) == ["sam2-int8", "work"]


def test_an_interrupted_run_goes_on_with_an_equal_result(
    calibrated: Outcome, sam2_demo: Bundle, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in Python, taken up again by the command."""
    monkeypatch.setattr("pixano_edge.calibration.run.verified", lambda *_: None)  # seconds, and tested above
    request = decoder_request(scenes, tmp_path / "out", tmp_path / "work")
    seen: list[str] = []

    def stop(what: str, done: int, of: int) -> None:
        seen.append(what)
        if what.startswith("Searching") and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(sam2_demo, request, stop)
    assert not (tmp_path / "out").exists()
    (work,) = (tmp_path / "work").iterdir()
    recorded = {p: p.stat().st_mtime_ns for p in work.rglob("*.npz")}
    assert len(recorded) > 6
    options = ["--data", str(scenes), "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    options += ["--budget", "mask_iou>=0.95", "--graphs", "mask_decoder", "--search-samples", "2", "--threads", "1"]
    again = command("sam2-demo", *options, "--report", str(tmp_path / "report"), "--json")
    assert again.exit_code == 0, again.output
    told = json.loads(again.stdout)
    assert told["published"]
    assert told["command"].startswith("pixano-edge")
    assert (tmp_path / "report" / "report.html").is_file()
    result = CalibrationResult.from_dict(json.loads((tmp_path / "report" / "report.json").read_text()))
    ours, theirs = result.variants[0], calibrated.result.variants[0]
    assert (ours.held_out, ours.blocks, ours.ranges) == (theirs.held_out, theirs.blocks, theirs.ranges)
    assert calibrated.bundle is not None
    for file, entry in Bundle.open(tmp_path / "out").manifest.files.items():
        if file.startswith("graphs/"):
            assert entry == calibrated.bundle.manifest.files[file], file


def test_pictures_without_contrast_are_caught(
    sam2_demo: Bundle, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges of pictures in fog clip what ordinary ones hold. The files have the ordinary ones' names."""

    def all_of_them(units: Any, *rest: Any, refused: Any, **more: Any) -> Found:
        return Found(frozenset(unit for unit in units if unit not in refused), 1.0, 1.0)

    monkeypatch.setattr("pixano_edge.calibration.make_int8.search", all_of_them)  # a minute, and tested elsewhere
    foggy = tmp_path / "foggy"
    foggy.mkdir()
    for path in scenes.glob("*.png"):
        cv2.imwrite(str(foggy / path.name), (cv2.imread(str(path)) // 8 + 112).astype(np.uint8))
    data = open_data(foggy, allow_few=True)
    assert "grey levels" in data.warnings[0]
    request = replace(
        decoder_request(scenes, tmp_path / "out", tmp_path / "work", "mask_iou>=0.9"),
        data=data,
        held_out=open_data(scenes, limit=3, allow_few=True),
        graphs=("image_encoder",),
        method="minmax",
        smooth=None,
        search_samples=1,
    )
    outcome = calibrate(sam2_demo, request)
    assert outcome.bundle is None
    assert not (tmp_path / "out").exists()
    variant = outcome.result.variants[0]
    assert not variant.passed
    assert not variant.published
    assert [p for p in variant.problems if "are clipped" in p]


def test_ranges_that_clip_held_out_values_are_a_problem() -> None:
    from pixano_edge.calibration.make_int8 import _clipping
    from pixano_edge.calibration.result import TensorRange

    def clips(*shares: float | None) -> list[str]:
        return _clipping([TensorRange("g", f"t{i}", 1.0, (1,), 1.0, "minmax", 0.0, s) for i, s in enumerate(shares)])

    assert not clips(0.0, 0.009, None)
    assert not clips()
    (one,) = clips(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.06)
    assert "6.0 % more of the held-out values of 't9' (g)" in one
    (all_of_them,) = clips(0.02, 0.02)
    assert "2.0 % more of the held-out values are clipped" in all_of_them
    assert not _clipping([TensorRange("g", "t", 1.0, (1,), 1.0, "mse", 0.1, 0.105)])  # clipped on purpose


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan, -1.0])
def test_a_broken_scale_is_never_published(calibrated: Outcome, tmp_path: Path, value: float) -> None:
    from pixano_edge.calibration.publish import publish
    from pixano_edge.calibration.work import NewGraph

    bundle = calibrated.bundle
    assert bundle is not None
    model = onnx.load(bundle.graph_path("mask_decoder", "int8"))
    scales = {n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    target = next(t for t in model.graph.initializer if t.name in scales)
    target.CopyFrom(numpy_helper.from_array(np.array(value, np.float32), target.name))
    onnx.save(model, tmp_path / "broken.onnx")
    before = bundle.hash
    with pytest.raises(CalibrationError, match="broken"):
        publish(
            bundle,
            bundle.root,
            "int8",
            "int8",
            {"mask_decoder": NewGraph(tmp_path / "broken.onnx")},
            bundle.manifest.calibrations[0],
            {},
        )
    assert Bundle.open(bundle.root).hash == before


def test_a_full_disk_leaves_the_bundle_as_it_was(
    calibrated: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixano_edge.calibration.publish import publish
    from pixano_edge.calibration.work import NewGraph

    assert calibrated.bundle is not None
    bundle = Bundle.open(shutil.copytree(calibrated.bundle.root, tmp_path / "bundle"))
    model = onnx.load(bundle.graph_path("mask_decoder", "int8"))
    onnx.save(model, tmp_path / "new.onnx")
    added: list[str] = []
    plain = BundleWriter.add_file

    def full(self: BundleWriter, rel: str, source: bytes | Path | str) -> Path:
        added.append(rel)
        if rel == "graphs/mask_decoder.int8.onnx":
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(self, rel, source)

    monkeypatch.setattr(BundleWriter, "add_file", full)
    arguments: Any = (
        bundle,
        bundle.root,
        "int8",
        "int8",
        {"mask_decoder": NewGraph(tmp_path / "new.onnx")},
        bundle.manifest.calibrations[0].model_copy(update={"report": None}),
        {},
    )
    with pytest.raises(BundleError, match="disk is full"):
        publish(*arguments)
    assert added[-1] == "graphs/mask_decoder.int8.onnx"
    assert Bundle.open(bundle.root).hash == bundle.hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "new.onnx"]
    monkeypatch.undo()
    assert publish(*arguments).variants() == bundle.variants()


def test_an_exported_variant_is_replaced_only_on_request(calibrated: Outcome, tmp_path: Path) -> None:
    from pixano_edge.calibration.publish import publish
    from pixano_edge.calibration.work import NewGraph

    bundle = calibrated.bundle
    assert bundle is not None
    onnx.save(onnx.load(bundle.graph_path("mask_decoder", "int8")), tmp_path / "new.onnx")
    entry = bundle.manifest.calibrations[0].model_copy(update={"variant": "fp16", "report": None})
    arguments: Any = (bundle, tmp_path / "out", "fp16", "fp16", {"mask_decoder": NewGraph(tmp_path / "new.onnx")})
    with pytest.raises(CalibrationError, match="was exported"):
        publish(*arguments, entry, {})
    made = publish(*arguments, entry, {}, replace=True)
    parity = made.manifest.parity
    assert parity is not None
    assert "fp16" not in {figure.variant for figure in (*parity.tensors, *parity.masks, *parity.clips)}
    assert {e.variant for e in made.manifest.calibrations} == {"int8", "fp16"}
    # The exported file stays: the fp32 graph takes weights from it.
    assert made.manifest.graphs["mask_decoder"].variants["fp16"].file == "graphs/mask_decoder.fp16.calibrated.onnx"
    assert "graphs/mask_decoder.fp16.onnx" in made.manifest.files
    onnx.load(made.graph_path("mask_decoder", "fp32"))


def test_a_graph_that_is_left_alone_this_time_runs_fp32_again(calibrated: Outcome, tmp_path: Path) -> None:
    from pixano_edge.calibration.publish import publish
    from pixano_edge.calibration.work import NewGraph

    bundle = calibrated.bundle
    assert bundle is not None
    onnx.save(onnx.load(bundle.graph_path("mask_decoder", "fp32")), tmp_path / "new.onnx")
    entry = bundle.manifest.calibrations[0].model_copy(update={"report": None, "metric": "j"})
    new = {"memory_encoder": NewGraph(tmp_path / "new.onnx")}
    beside = publish(bundle, tmp_path / "beside", "int8", "int8", new, entry, {})
    assert beside.manifest.graphs["mask_decoder"] == bundle.manifest.graphs["mask_decoder"]
    assert {e.metric for e in beside.manifest.calibrations} == {"mask_iou", "j"}
    again = publish(bundle, tmp_path / "again", "int8", "int8", new, entry, {}, considered=bundle.manifest.graphs)
    held = again.manifest.graphs["mask_decoder"].variants
    assert held["int8"].file == held["fp32"].file
    assert not [f for f in again.manifest.files if f.startswith(("graphs/mask_decoder.int8", "reports/calibration"))]
    assert [e.metric for e in again.manifest.calibrations] == ["j"]


def test_a_budget_that_nothing_meets_publishes_nothing(sam2_demo: Bundle, scenes: Path, tmp_path: Path) -> None:
    request = replace(decoder_request(scenes, tmp_path / "out", tmp_path / "work"), smooth=None, method="minmax")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "score", lambda self, files, samples, *more: _zero(samples))
        with pytest.raises(CalibrationError, match="No layer fits the budget"):
            calibrate(sam2_demo, request)
    assert not (tmp_path / "out").exists()


def _zero(samples: Any) -> Any:
    from pixano_edge.calibration.result import SampleValue, Score

    return Score.of(tuple(SampleValue(s.name, 0.0) for s in samples))


def test_requests_that_cannot_be(sam2_demo: Bundle, scenes: Path, tmp_path: Path) -> None:
    request = decoder_request(scenes, tmp_path / "out", tmp_path / "work")
    with pytest.raises(CalibrationError, match="'ap' is not what 'sam2' is judged by") as caught:
        calibrate(sam2_demo, replace(request, budget=Budget("ap", 0.9)))
    assert "mask_iou>=0.9" in caught.value.action
    with pytest.raises(CalibrationError, match="do not run in this task"):
        calibrate(sam2_demo, replace(request, graphs=("memory_encoder",)))
    with pytest.raises(CalibrationError, match="int4 is for language models"):
        calibrate(sam2_demo, replace(request, precision="int4"))
    detector = Bundle.open(demo_path("owlv2-demo"))
    with pytest.raises(CalibrationError, match="there are no classes"):
        calibrate(detector, replace(request, budget=Budget("ap", 0.9)))
    with pytest.raises(CalibrationError, match="do not track"):
        calibrate(detector, replace(request, options=TaskOptions(video=True)))


def test_commands_that_cannot_be(scenes: Path, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        result = command("sam2-demo", *words)
        assert result.exit_code != 0
        assert isinstance(result.exception, EdgeError)
        assert result.exception.action
        return result.exception.message

    data, out = ["--data", str(scenes)], ["--output", str(tmp_path / "out")]
    assert "where the variant goes" in refused(*data)
    assert "where the variant goes" in refused(*data, *out, "--in-place")
    assert "no precision 'int2'" in refused(*data, *out, "--precision", "int2")
    assert "is no budget" in refused(*data, *out, "--budget", "good")
    (tmp_path / "empty").mkdir()
    assert "no picture to calibrate on" in refused("--data", str(tmp_path / "empty"), *out)
    assert not (tmp_path / "out").exists()
