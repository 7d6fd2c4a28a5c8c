"""`bench track`: everyone gets the same work, a mistake in it shows, and the cost model is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pixano_edge.benchmarks import checkpoints, track
from pixano_edge.benchmarks.track import BF16, ENGINE, FILLED, Answer, EngineTracking, compare, costs, fit_cost, measure
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.errors import BundleError, EdgeError
from pixano_edge.engine.models.sam2_video.bank import ObjectBank

REFERENCE = track.REFERENCE


def run(bundle: Path, checkpoint: Path | None, **changes: Any) -> list[track.Row]:
    options: dict[str, Any] = {"objects": (1, 3), "rounds": 2, "warmup": 1, "threads": 1, **changes}
    return measure(Bundle.open(bundle), checkpoint, **options)


def test_masks_agree_with_a_full_bank(
    tracking_bundle: Path, tracking_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[int, int]] = set()
    select = ObjectBank.select

    def spy(self: Any, *args: Any) -> Any:
        found = select(self, *args)
        if args[0] >= FILLED:
            seen.add((len(found.memories), len(found.pointers)))
        return found

    monkeypatch.setattr(ObjectBank, "select", spy)
    rows = run(tracking_bundle, tracking_checkpoint)
    assert [(r.contender, r.objects) for r in rows] == [
        (name, count) for count in (1, 3) for name in (ENGINE, REFERENCE, BF16)
    ]
    assert seen == {(7, 16)}
    for row in rows:
        assert row.seconds.count == 2
        assert row.ratio is not None
        assert row.relative_error is not None
        assert row.mask_iou is not None
        if row.contender == ENGINE:
            assert row.relative_error < 2e-4
            assert row.mask_iou > 0.99
        if row.contender == REFERENCE:
            assert (row.relative_error, row.mask_iou, row.ratio) == (0.0, 1.0, 1.0)
        if row.contender == BF16:
            assert row.relative_error > 1e-3
    assert {cost.contender for cost in costs(rows)} == {ENGINE, REFERENCE, BF16}


def test_a_bank_that_is_not_filled_shows(
    tracking_bundle: Path, tracking_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineTracking, "_fill", lambda self: None)
    rows = run(tracking_bundle, tracking_checkpoint, objects=(1,), rounds=1)
    error = rows[0].relative_error
    assert error is not None
    assert error > 1e-3


def test_without_torch_only_the_engine(tracking_bundle: Path) -> None:
    rows = run(tracking_bundle, None)
    assert [(r.contender, r.ratio, r.mask_iou) for r in rows] == [(ENGINE, None, None)] * 2
    assert "n/a" in track.table_rows(rows)[0]


def test_cost_model() -> None:
    exact = fit_cost("a", {1: 0.3, 2: 0.5, 8: 1.7})
    assert exact.frame == pytest.approx(0.1)
    assert exact.each == pytest.approx(0.2)
    assert exact.residual == pytest.approx(0, abs=1e-9)
    bent = fit_cost("b", {1: 0.3, 2: 0.5, 4: 1.4})
    assert bent.residual is not None
    assert bent.residual > 0.1
    assert "off by" in bent.text()
    assert fit_cost("c", {1: 0.3, 2: 0.5}).residual is None


def test_comparing_sees_swapped_objects() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    answer, swapped = Answer(logits, logits > 0), Answer(logits[::-1], logits[::-1] > 0)
    assert compare(answer, answer) == (0.0, 1.0)
    absent = Answer(np.full_like(answer.logits, -1024), np.zeros_like(answer.masks))
    assert compare(absent, absent) == (None, None)
    assert compare(absent, answer)[1] == 0
    error, iou = compare(swapped, answer)
    assert error > 0.5
    assert iou < 0.7


def test_the_demo_model_sees_its_objects(demo_bundle: Path) -> None:
    checkpoint = Path(__file__).parents[2] / "export" / "demo" / "checkpoints" / "sam2-demo"
    rows = run(demo_bundle, checkpoint, objects=(3,), rounds=1)
    assert rows[0].contender == ENGINE
    assert rows[0].mask_iou is not None
    assert rows[0].mask_iou > 0.99
    assert rows[0].relative_error is not None
    assert rows[0].relative_error < 1.5e-3  # memories are rounded to bfloat16


def test_a_bundle_that_does_not_track(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="no graphs for video"):
        run(tiny_bundle, None)


def test_the_command(tracking_bundle: Path, tracking_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "track.json"
    asked = ["--bundle", tracking_bundle, "--checkpoint", tracking_checkpoint, "--objects", 1, "--objects", 2]
    more = ["--rounds", 1, "--warmup", 0, "--threads", 1, "-o", file]
    result = CliRunner().invoke(app, ["bench", "track", *(str(a) for a in (*asked, *more))])
    assert result.exit_code == 0, result.output
    assert "per object" in result.stdout
    content = json.loads(file.read_text())
    assert len(content["rows"]) == 6
    assert {c["contender"] for c in content["costs"]} == {ENGINE, REFERENCE, BF16}


def test_random_video_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXANO_EDGE_HOME", str(tmp_path))
    with pytest.raises(EdgeError, match="demo"):
        checkpoints.random_checkpoint("demo", 256)
    first = checkpoints.random_checkpoint("demo", 128, video=True)
    config = json.loads((first / "config.json").read_text())
    assert config["model_type"] == "sam2_video"
    assert config["image_size"] == 128
    assert checkpoints.random_checkpoint("demo", 128, video=True) == first
    again = checkpoints.random_video_model("demo", 128, 0).state_dict()
    kept = load_file(first / "model.safetensors")
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    assert {"prompt_encoder.no_mask_embed.weight", "mask_decoder.mask_tokens.weight"} <= set(kept)
