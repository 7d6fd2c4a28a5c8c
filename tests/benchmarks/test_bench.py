"""`bench`: who is compared with whom, on which figures, and that the tables say so."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pixano_edge.benchmarks import checkpoints, memory, segment
from pixano_edge.benchmarks.quality import Sample, main_rows, scene_samples, summarise
from pixano_edge.benchmarks.report import environment, environment_lines, markdown, write_json
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor


def _invoke(*args: object):
    return CliRunner().invoke(app, ["bench", *(str(a) for a in args)])


def test_calls_take_turns_and_the_order_rotates():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = segment.interleave(calls, rounds=3, warmup=1)
    assert order == [*"cab", *"abc", *"bca", *"cab"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_segment_compares_all_contenders(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path):
    file = tmp_path / "figures" / "segment.json"
    args = ("--bundle", tiny_bundle, "--checkpoint", tiny_checkpoint, "--rounds", 1, "--threads", 1, "--output", file)
    result = _invoke("segment", *args)
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    rows = {(r["case"], r["contender"]): r for r in content["rows"]}
    cases = {case for case, _ in rows}
    assert cases == {"encoder", "decoder, one click", "decoder, one click + mask", "whole click to 960x540"}
    for case in cases:
        assert {"pixano-edge fp32", "PyTorch fp32", "PyTorch bf16"} <= {c for k, c in rows if k == case}
        engine, bf16 = rows[case, "pixano-edge fp32"], rows[case, "PyTorch bf16"]
        assert rows[case, "PyTorch fp32"]["ratio"] == 1
        assert engine["ratio"] == pytest.approx(rows[case, "PyTorch fp32"]["seconds"]["p50"] / engine["seconds"]["p50"])
        if engine["relative_error"] is not None:
            assert engine["relative_error"] < 1e-4
            assert bf16["relative_error"] > 1e-3  # the comparison can tell a difference
        if engine["mask_iou"] is not None:
            assert engine["mask_iou"] >= 0.999
            assert bf16["mask_iou"] < 0.9999
    assert rows["encoder", "PyTorch fp32"]["seconds"]["count"] == 1
    assert rows["decoder, one click", "PyTorch fp32"]["seconds"]["count"] == 5
    assert content["environment"]["threads"] == 1
    assert content["environment"]["versions"]["numpy"] == np.__version__
    assert "vs torch fp32" in result.stdout
    assert "threads per contender: 1" in result.stdout


def test_segment_without_torch_times_the_engine_and_says_so(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "torch" else real(n, *a))
    result = _invoke("segment", "--bundle", tiny_bundle, "--rounds", 1, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "PyTorch is not installed" in result.stderr
    assert "PyTorch fp32" not in result.stdout
    assert "n/a" in result.stdout
    result = _invoke("segment", "--rounds", 1)
    assert result.exit_code == 1
    assert "pip install 'pixano-edge[export]'" in result.stderr


def test_swapped_features_would_show(tiny_bundle: Path):
    """Negative control: the accuracy columns see a contender that decodes the wrong features."""
    reference = {"masks": np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)}
    error, agreement = segment.compare("decoder, one click", {"masks": reference["masks"][:, ::-1]}, reference)
    assert error > 0.1
    assert agreement < 0.9
    assert segment.compare("decoder, one click", reference, reference) == (0.0, 1.0)


def test_random_checkpoints_are_refused_by_name_and_size():
    with pytest.raises(EdgeError, match="huge"):
        checkpoints.random_checkpoint("huge")
    with pytest.raises(EdgeError, match="100"):
        checkpoints.random_checkpoint("tiny", 100)


def test_quality_summary_by_hand():
    def samples(method: str, click: list[float], box: list[float]) -> list[Sample]:
        return [
            Sample(scene, shape, method, kind, value)
            for kind, values in (("click", click), ("box", box))
            for scene, (shape, value) in enumerate(zip(("star", "ring"), values))
        ]

    every = [*samples("model", [0.95, 0.85], [1.0, 0.92]), *samples("flood fill", [0.5, 0.3], [0.6, 0.4])]
    quality = summarise([*every, *samples("GrabCut", [0.7, 0.5], [0.1, 0.2])], 2, "model")
    by = {(s.method, s.kind): s for s in quality.summaries}
    assert by["model", "click"].mean == pytest.approx(0.9)
    assert by["model", "click"].good == 0.5  # 0.95 is above 0.9, 0.85 is not
    assert by["model", "box"].good == 1.0
    assert 0.85 <= by["model", "click"].low <= 0.9 <= by["model", "click"].high <= 0.95
    assert quality.lead("click") == pytest.approx(0.9 - 0.6)  # over GrabCut, the better one here
    assert quality.lead("box") == pytest.approx(0.96 - 0.5)  # over flood fill
    assert quality.shapes["click"]["star"] == {"model": 0.95, "flood fill": 0.5, "GrabCut": 0.7}
    assert quality.prompts == 2
    assert [row[0] for row in main_rows(quality)] == ["model", "flood fill", "GrabCut"]


def test_quality_gives_everyone_the_same_prompts(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("skimage", reason="making scenes needs pixano-edge[benchmarks]")
    from pixano_edge.export.demo import baselines
    from pixano_edge.export.demo.scenes import generate_scene, held_out_prompts

    asked: list[dict] = []

    def truth(image, *, click=None, box=None):
        asked.append({"click": click, "box": box})
        scene = generate_scene(3, "heldout", 128)
        prompt = next(p for p in held_out_prompts(scene) if p.click == click or p.box == box)
        return scene.objects[prompt.index].visible

    monkeypatch.setattr(baselines, "grabcut", truth)
    with Sam2ImagePredictor.open(tiny_bundle) as predictor:
        samples = scene_samples(predictor, "model", 3, 128)
    prompts = held_out_prompts(generate_scene(3, "heldout", 128))
    assert asked == [{"click": p.click, "box": None} for p in prompts] + [
        {"click": None, "box": p.box} for p in prompts
    ]
    # The answer that is the truth scores 1, the random model does not.
    assert {s.iou for s in samples if s.method == "GrabCut"} == {1.0}
    assert np.mean([s.iou for s in samples if s.method == "model"]) < 0.6
    assert len(samples) == 3 * 2 * len(prompts)


def test_quality_does_not_depend_on_the_number_of_processes(tiny_bundle: Path, tmp_path: Path):
    pytest.importorskip("skimage", reason="making scenes needs pixano-edge[benchmarks]")
    figures = []
    for name, jobs in (("a.json", 1), ("b.json", 2)):
        args = ("--bundle", tiny_bundle, "--scenes", 2, "--jobs", jobs, "-o", tmp_path / name)
        result = _invoke("quality", *args)
        assert result.exit_code == 0, result.output
        content = json.loads((tmp_path / name).read_text())
        content.pop("environment")
        figures.append(content)
    assert figures[0] == figures[1]
    assert figures[0]["scenes"] == 2
    assert figures[0]["first"] == 500_000  # not the scenes that training watches
    assert "| method | IoU, one click" in result.stdout
    assert "| flood fill |" in result.stdout
    assert "| GrabCut |" in result.stdout


def test_bundle_of_a_changed_checkpoint_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pixano_edge.export import sam2 as export

    monkeypatch.setenv("PIXANO_EDGE_HOME", str(tmp_path / "home"))
    made: list[Path] = []

    def fake(checkpoint: Path, destination: Path, **_: object) -> Path:
        destination.mkdir(parents=True)
        (destination / "manifest.json").touch()
        made.append(destination)
        return destination

    monkeypatch.setattr(export, "export_sam2", fake)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1")
    first = checkpoints.exported_bundle(folder)
    assert checkpoints.exported_bundle(folder) == first
    assert len(made) == 1
    (folder / "model.safetensors").write_bytes(b"22")
    assert checkpoints.exported_bundle(folder) != first
    assert len(made) == 2
    with pytest.raises(EdgeError, match="no checkpoint folder"):
        checkpoints.exported_bundle(tmp_path / "nowhere")


def test_memory_stands_still_and_a_leak_would_show(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = Bundle.open(tiny_bundle)
    drift = memory.measure_drift(bundle, calls=40, warmup=10, threads=1)
    assert drift.calls == 40
    assert drift.answer > 3 * 540 * 960  # three masks and their scores
    assert abs(drift.traced_drift) < 100_000
    assert drift.work_memory < drift.answer

    kept = []
    real = Sam2ImagePredictor.predict

    def leaking(self, *args, **kwargs):
        kept.append(real(self, *args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(Sam2ImagePredictor, "predict", leaking)
    assert memory.measure_drift(bundle, calls=5, warmup=1, threads=1).traced_drift > 4 * drift.answer


def test_memory_command(tiny_bundle: Path, tmp_path: Path):
    file = tmp_path / "memory.json"
    result = _invoke("memory", "--bundle", tiny_bundle, "--calls", 5, "--threads", 1, "--output", file)
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text())["calls"] == 5
    assert "drift over 5 clicks" in result.stdout


def test_json_goes_to_stdout_as_with_every_command(tiny_bundle: Path):
    result = _invoke("memory", "--bundle", tiny_bundle, "--calls", 2, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert (content["benchmark"], content["calls"]) == ("memory", 2)
    error = json.loads(_invoke("memory", "--bundle", "no-such-bundle", "--json").stdout)
    assert error["error"]["type"] == "BundleError"


def test_environment_and_tables(tmp_path: Path):
    facts = environment(2)
    assert facts["threads"] == 2
    assert any("CPU" in line for line in environment_lines(facts))
    busy = environment_lines({**facts, "load_average_1min": 3.0})
    assert any("load average was 3.0" in line for line in busy)
    assert markdown(("a", "b"), [("x", "1.0"), ("y", "2.5")]) == "| a | b |\n|---|---:|\n| x | 1.0 |\n| y | 2.5 |"
    write_json(tmp_path / "sub" / "x.json", {"value": float("inf"), "array": np.arange(2)})
    assert json.loads((tmp_path / "sub" / "x.json").read_text()) == {"value": None, "array": [0, 1]}


def test_a_contender_that_keeps_spinning_does_not_slow_the_next_one() -> None:
    """Work that a call leaves behind must end in the pause; without the pause it falls into the next turn."""
    busy_until = 0.0

    def spins() -> None:
        nonlocal busy_until
        busy_until = time.perf_counter() + 0.02

    def waits_for_the_core() -> None:
        while time.perf_counter() < busy_until:
            pass

    calls = {"spins": spins, "next": waits_for_the_core}
    settled = segment.interleave(calls, rounds=2, warmup=0)
    assert max(settled["next"]) < 0.01
    crowded = segment.interleave(calls, rounds=2, warmup=0, settle=0)
    assert max(crowded["next"]) > 0.01
