"""The whole way of a small Grounding DINO: saved folder, bundle, check of its golden samples, opened by family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs pixano-edge[export]")

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import grounding_dino as contract
from pixano_edge.engine.errors import ExportError
from pixano_edge.engine.models.detection.opening import open_detector
from pixano_edge.engine.models.grounding_dino.detector import GroundingDinoDetector
from pixano_edge.engine.models.verify import verify_bundle
from pixano_edge.export.detection.family import GraphRun
from pixano_edge.export.grounding_dino import checkpoint, export_grounding_dino, parity, reference
from pixano_edge.export.grounding_dino.family import GroundingDinoFamily
from pixano_edge.export.photos import default_photos
from tests.support.grounding_dino import Exported


@pytest.fixture
def folder(dino_checkpoint: Path) -> Path:
    """What is exported; read-only."""
    return dino_checkpoint


@pytest.fixture
def bundle(dino_bundle: Path) -> Bundle:
    """What was made of it; read-only."""
    return Bundle.open(dino_bundle)


def test_a_saved_folder_is_loaded_whole(folder: Path, small_dino: Exported) -> None:
    loaded = checkpoint.load(folder)
    for name, value in small_dino.model.state_dict().items():
        assert (loaded.model.state_dict()[name] == value).all(), name
    assert loaded.constants == small_dino.constants
    assert loaded.source.architecture == "grounding-dino-swin-16-2-2-2-2"


def test_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    fewer = {k: v for k, v in weights.items() if "level_embed" not in k}
    save_file(fewer, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"missing: model\.level_embed"):
        checkpoint.load(copy)
    save_file({**weights, "more": weights["model.level_embed"].clone()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match="unexpected: more"):
        checkpoint.load(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "sam2"}))
    with pytest.raises(ExportError, match="model_type grounding-dino"):
        checkpoint.load(copy)
    with pytest.raises(ExportError, match="There is no checkpoint"):
        checkpoint.load(tmp_path / "nothing.pth")


def test_the_bundle_is_proven(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.family == contract.FAMILY
    assert manifest.preprocess.resize == "shortest-edge"
    assert manifest.preprocess.longest_edge == 160
    report = manifest.parity
    assert report is not None
    assert report.passed
    assert max(t.max_rel for t in report.tensors) < 1e-4
    found = {d.variant: d for d in report.detections}
    assert found["fp32"].boxes > 10
    assert found["fp32"].unmatched == 0
    assert not [note for note in manifest.notes if note.startswith("TensorRT 10.3")]


def test_golden_samples_pass_and_damage_shows(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = verify_bundle(bundle, "cpu", threads=1)
    assert report.passed, report.problems
    from pixano_edge.engine.models.grounding_dino import text

    plain = text.phrase_masks

    def open_masks(ids: Any, special: Any) -> Any:
        mask, positions = plain(ids, special)
        return np.ones_like(mask), positions

    monkeypatch.setattr(text, "phrase_masks", open_masks)
    assert not verify_bundle(bundle, "cpu", threads=1).passed


def test_the_family_is_opened(bundle: Bundle) -> None:
    with open_detector(bundle, device="cpu", threads=1) as detector:  # type: ignore[attr-defined]
        assert isinstance(detector, GroundingDinoDetector)
        assert detector.info()["bundle"] == bundle.manifest.name
        assert len(detector.detect(default_photos()[1].pixels, ["cat"], box_threshold=0.0, text_threshold=0.0)) == 60


def test_ranks_that_changed_on_a_tie_are_settled(folder: Path) -> None:
    family = GroundingDinoFamily(checkpoint.load(folder))
    (answer,) = family.ask(default_photos()[1], [["a cat", "bed"]])
    run = next(r for r in answer.runs if r.graph == contract.DETECTOR)
    want: dict[str, Any] = {k: v.copy() for k, v in run.want.items()}
    want[contract.SELECTION_SCORES][0] = np.linspace(5, 0, want[contract.SELECTION_SCORES].size)
    got = {k: v.copy() for k, v in want.items()}
    for name in (contract.LOGITS, contract.BOXES):
        got[name][0, [3, 4]] = got[name][0, [4, 3]]
    plain = family.settle(GraphRun(run.graph, run.feeds, want), got)
    assert (plain[contract.BOXES] != want[contract.BOXES]).any(), "a difference without a tie was settled"
    want[contract.SELECTION_SCORES][0, 4] = want[contract.SELECTION_SCORES][0, 3]
    settled = family.settle(GraphRun(run.graph, run.feeds, want), got)
    np.testing.assert_array_equal(settled[contract.BOXES], want[contract.BOXES])
    assert parity.allowed_swaps(900) == 4


@pytest.mark.parametrize("classes", [["st. bernard"], ["cat", "CAT"], ["cat " * 300]])
def test_classes_that_the_stock_processor_cannot_answer(folder: Path, classes: list[str]) -> None:
    loaded = checkpoint.load(folder)
    with pytest.raises(ExportError, match="--classes"):
        reference.ask(loaded.model, loaded.processor, default_photos()[1], classes)


@pytest.mark.parametrize("classes", [["st. bernard"], ["cat", "CAT "], ["cat " * 300]])
def test_such_classes_are_refused_before_graphs_are_made(
    dino_checkpoint: Path, tmp_path: Path, classes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a graph was exported")

    monkeypatch.setattr("pixano_edge.export.pipeline.export_graph", never)
    with pytest.raises(ExportError, match=r"[Cc]lasses"):
        export_grounding_dino(dino_checkpoint, tmp_path / "out", variants=("fp32",), classes=[["dog"], classes])
    assert not (tmp_path / "out").exists()
