"""The whole export of detectors: what is in the bundle, and what is left when something goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner, Result

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.contracts import owlv2 as contract
from pixano_edge.engine.contracts.owlv2 import OwlConstants
from pixano_edge.engine.errors import ExportError
from pixano_edge.export import pipeline, tensorrt_rtx
from pixano_edge.export.operators import check_tensorrt_10_3
from pixano_edge.export.owlv2 import export_owl, graphs
from pixano_edge.export.owlv2.checkpoint import load
from pixano_edge.export.tensorrt_graph import HEAD
from pixano_edge.export.tensorrt_passes import unwelcome

needs_wheels = pytest.mark.skipif(
    tensorrt_rtx.missing_module() is not None,
    reason=f"{tensorrt_rtx.missing_module()} is not installed: pip install 'pixano-edge[tensorrt-rtx]'",
)
VARIANTS = ("fp32", "fp16", "fp32-tensorrt", "fp16-tensorrt")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Destination alone in its folder, so that leftovers are seen."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "bundle"


@pytest.fixture
def fast_export(monkeypatch: pytest.MonkeyPatch, owl_bundle: Path) -> None:
    """Graphs are taken from the tiny bundle instead of torch's exporter, which takes seconds per graph."""
    bundle = Bundle.open(owl_bundle)
    monkeypatch.setattr(pipeline, "export_graph", lambda module, spec, example: onnx.load(bundle.graph_path(spec.name)))


def export(*arguments: object, family: str = "owlv2") -> Result:
    return CliRunner().invoke(app, ["export", family, *map(str, arguments)])


def nothing_left(output: Path) -> bool:
    return list(output.parent.iterdir()) == []


def test_bundle_says_what_it_is(owl_bundle: Path) -> None:
    bundle = Bundle.open(owl_bundle)
    manifest = bundle.manifest
    assert manifest.family == "owlv2"
    assert manifest.source.architecture == "owlv2-patch16-96"
    assert manifest.source.format == "transformers"
    assert manifest.licence.spdx == "Apache-2.0"
    assert manifest.preprocess.resize == "padded-square"
    assert OwlConstants.from_dict(manifest.constants).queries == 36
    assert json.loads(bundle.file(contract.TOKENIZER).read_bytes())["model"]["type"] == "BPE"
    assert set(manifest.graphs) == {"image_encoder", "text_encoder"}
    assert all(set(g.variants) == set(VARIANTS) for g in manifest.graphs.values())
    assert all(v.opset == 18 for g in manifest.graphs.values() for v in g.variants.values())
    assert manifest.parity is not None
    assert manifest.parity.passed
    assert [d.variant for d in manifest.parity.detections] == ["fp32", "fp16", "fp16-cpu", "fp16-tensorrt"]
    assert all(d.images == 2 and d.boxes > 50 for d in manifest.parity.detections)
    assert {(m.graph, m.variant) for m in manifest.memory} >= {("image_encoder", "fp32"), ("text_encoder", "fp16")}
    assert len(manifest.golden) == 2
    assert not any("TensorRT 10.3" in note for note in manifest.notes)


def test_owlvit_has_no_objectness(owlvit_bundle: Path) -> None:
    bundle = Bundle.open(owlvit_bundle)
    assert bundle.manifest.preprocess.resize == "bicubic-square"
    names = [o.name for o in onnx.load(bundle.graph_path("image_encoder")).graph.output]
    assert names == ["boxes", "class_embeds", "logit_shift", "logit_scale"]


def test_golden_samples_can_be_read_without_pickles(owl_bundle: Path) -> None:
    bundle = Bundle.open(owl_bundle)
    for sample in bundle.golden():
        stored = bundle.load_npz(sample.tensors)
        assert len(stored["boxes"]) >= 3
        assert np.all(stored["scores"] > stored["box_threshold"])
        assert np.abs(stored["scores"] - stored["box_threshold"]).min() > 1e-3
        assert stored["classes"].dtype.kind == "U"
        assert {"pixel_values_index", "logits_values", "objectness_values", "input_ids_values"} <= set(stored)


def test_small_heads_stay_in_fp32(owl_bundle: Path) -> None:
    bundle = Bundle.open(owl_bundle)
    plain = onnx.load(bundle.graph_path("image_encoder"))
    kept = graphs.kept_in_fp32("image_encoder", plain)
    assert set(kept.values()) == {HEAD}
    half = {n.name: n for n in onnx.load(bundle.graph_path("image_encoder", "fp16")).graph.node}
    products = [n for n in plain.graph.node if n.op_type in ("MatMul", "Gemm")]
    assert 4 <= sum(n.name in kept for n in products) < len(products)
    assert set(kept) <= set(half)
    text = onnx.load(bundle.graph_path("text_encoder"))
    assert "Div" in {n.op_type for n in text.graph.node if n.name in graphs.kept_in_fp32("text_encoder", text)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("graph", ["image_encoder", "text_encoder"])
def test_operators_for_tensorrt_10_3(graph: str, variant: str, owl_bundle: Path) -> None:
    target = "tensorrt" if variant.endswith("-tensorrt") else "onnx"
    model = onnx.load(Bundle.open(owl_bundle).graph_path(graph, variant, target))
    assert check_tensorrt_10_3(model) == []
    assert unwelcome(model) == []


@needs_wheels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("graph", ["image_encoder", "text_encoder"])
def test_tensorrt_for_rtx_builds(graph: str, variant: str, owl_bundle: Path) -> None:
    bundle = Bundle.open(owl_bundle)
    target = "tensorrt" if variant.endswith("-tensorrt") else "onnx"
    spec = contract.graphs(OwlConstants.from_dict(bundle.manifest.constants))[graph]
    assert tensorrt_rtx.check_build(bundle.graph_path(graph, variant, target), spec).engine_bytes > 10_000


@needs_wheels
def test_tensorrt_for_rtx_builds_owlvit(owlvit_bundle: Path) -> None:
    bundle = Bundle.open(owlvit_bundle)
    for graph, spec in contract.graphs(OwlConstants.from_dict(bundle.manifest.constants)).items():
        assert tensorrt_rtx.check_build(bundle.graph_path(graph, "fp32"), spec).engine_bytes > 10_000


@pytest.mark.usefixtures("fast_export")
def test_the_command(owl_checkpoint: Path, output: Path) -> None:
    result = export(owl_checkpoint, "-o", output, "--variants", "fp32", "--classes", "cat, dog", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    manifest = Bundle.open(output).manifest
    assert answer["bundle"] == str(output)
    assert answer["parity"]["detections"][0]["classes"] == 2
    assert answer["warnings"] == []
    assert manifest.name == owl_checkpoint.name
    assert export(owl_checkpoint, "-o", output, "--classes", " , ").exit_code == 2


@pytest.mark.parametrize(
    ("classes", "message"),
    [("cat," + "a long name " * 10, "more than 14"), (",".join(f"c{i}" for i in range(1001)), "more than 1000")],
)
def test_classes_that_no_detector_can_ask_for(
    owl_checkpoint: Path, output: Path, classes: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "export_graph", lambda *_: pytest.fail("minutes of work before the refusal"))
    result = export(owl_checkpoint, "-o", output, "--classes", classes)
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (1, True)
    assert "The classes to measure parity on do not fit." in result.stderr
    assert message in result.stderr
    assert nothing_left(output)


@pytest.mark.usefixtures("fast_export")
def test_failing_parity_leaves_no_bundle_and_exits_non_zero(
    owl_checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's pre-processing with channels in the wrong order: tensors agree, detections do not."""
    from pixano_edge.engine.models.owlv2 import detector

    real = detector.preprocess
    monkeypatch.setattr(detector, "preprocess", lambda image, *rest: real(image[:, :, ::-1], *rest))
    result = export(owl_checkpoint, "-o", output, "--variants", "fp32")
    assert result.exit_code == 1
    assert "fp32 detections:" in result.output
    assert "Parity: FAILED" in result.output
    assert nothing_left(output)


@pytest.mark.usefixtures("fast_export")
def test_another_family_of_the_two_is_refused(owl_checkpoint: Path, output: Path) -> None:
    result = export(owl_checkpoint, "-o", output, family="owlvit")
    assert result.exit_code == 1
    assert "model_type owlvit" in result.output
    assert nothing_left(output)


class TestCheckpoint:
    def change(self, folder: Path, tmp_path: Path, name: str, **values: Any) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        settings = json.loads((copy / name).read_text())
        settings.update(values)
        (copy / name).write_text(json.dumps(settings))
        return copy

    def test_constants(self, owl_checkpoint: Path) -> None:
        loaded = load(owl_checkpoint, "owlv2")
        c = loaded.constants
        assert (c.image_size, c.patch_size, c.embed_dim, c.max_tokens, c.pad_token) == (96, 16, 32, 16, 0)
        assert c.end_token == len(loaded.text.get_vocab()) - 1
        assert loaded.notes == []

    def test_mean_comes_from_the_processor(self, owl_checkpoint: Path, tmp_path: Path) -> None:
        copy = self.change(owl_checkpoint, tmp_path, "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
        assert load(copy, "owlv2").constants.mean == (0.1, 0.2, 0.3)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"do_pad": False}, "do_pad"),
            ({"do_center_crop": True}, "do_center_crop"),
            ({"size": {"height": 100, "width": 96}}, "size"),
            ({"image_mean": [0.5]}, "three values"),
        ],
    )
    def test_other_preparations_are_refused(
        self, owl_checkpoint: Path, tmp_path: Path, values: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ExportError, match=message):
            load(self.change(owl_checkpoint, tmp_path, "preprocessor_config.json", **values), "owlv2")

    def test_code_is_refused(self, owl_checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="auto_map"):
            load(self.change(owl_checkpoint, tmp_path, "config.json", auto_map={"AutoModel": "x.Y"}), "owlv2")

    @pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "config.json"])
    def test_missing_files(self, owl_checkpoint: Path, tmp_path: Path, name: str) -> None:
        copy = Path(shutil.copytree(owl_checkpoint, tmp_path / "copy"))
        (copy / name).unlink()
        with pytest.raises(ExportError, match=r"tokeniser|safetensors|config\.json"):
            load(copy, "owlv2")

    def test_missing_and_foreign_tensors(self, owl_checkpoint: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        copy = Path(shutil.copytree(owl_checkpoint, tmp_path / "copy"))
        weights = load_file(copy / "model.safetensors")
        weights["extra.weight"] = weights.pop("objectness_head.dense0.weight")
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ExportError, match=r"objectness_head.*extra"):
            load(copy, "owlv2")

    def test_nowhere(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="no checkpoint"):
            load(tmp_path / "nothing here", "owlv2")
        with pytest.raises(ExportError, match="not a bundle name"):
            export_owl(tmp_path, tmp_path / "out", name="a b")
