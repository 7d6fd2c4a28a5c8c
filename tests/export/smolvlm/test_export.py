"""SmolVLM from a checkpoint folder to a bundle: parity, golden samples, text files, TensorRT, mistakes found."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pixano_edge.engine.build.plan import choose
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import smolvlm as contract
from pixano_edge.engine.errors import ExportError
from pixano_edge.engine.models.decoder import verify
from pixano_edge.engine.models.verify import verify_bundle
from pixano_edge.export import tensorrt_rtx
from pixano_edge.export.cli import app
from pixano_edge.export.parity import ParityError
from pixano_edge.export.smolvlm import export_smolvlm, family
from pixano_edge.export.smolvlm.checkpoint import SmolVlmCheckpoint, load
from pixano_edge.export.smolvlm.family import SmolVlmFamily
from pixano_edge.export.work_memory import measure_file
from tests.support import vlm

from .conftest import PHOTOS

needs_wheels = pytest.mark.skipif(
    tensorrt_rtx.missing_module() is not None,
    reason=f"{tensorrt_rtx.missing_module()} is not installed: pip install 'pixano-edge[tensorrt-rtx]'",
)


def test_answers_are_pytorchs(smolvlm_bundle: Path) -> None:
    parity = Bundle.open(smolvlm_bundle).manifest.parity
    assert parity is not None
    assert parity.passed
    found = {g.variant: g for g in parity.generations}
    assert list(found) == ["fp32", "fp16-cpu", "int4", "fp32-tensorrt", "fp16-tensorrt"]
    for variant in ("fp32", "fp32-tensorrt"):
        assert found[variant].equal == found[variant].tokens == 2 * 64
        assert found[variant].max_rel < 1e-4
    assert found["fp16-tensorrt"].max_rel < 5e-2
    assert found["int4"].equal > 64
    features = {t.variant: t.max_rel for t in parity.tensors if t.tensor == contract.FEATURES}
    assert features["fp32"] < 1e-5 < features["fp16"]


def test_what_the_bundle_holds(smolvlm_bundle: Path, smolvlm_folder: Path) -> None:
    bundle = Bundle.open(smolvlm_bundle)
    assert bundle.variants() == ["fp32", "fp16", "int4"]
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert bundle.manifest.files[name].sha256 == hashlib.sha256(bundle.file(name).read_bytes()).hexdigest()
    assert bundle.file("chat_template.jinja").read_text() == vlm.SMOLVLM_TEMPLATE
    assert bundle.file("tokenizer.json").read_bytes() == (smolvlm_folder / "tokenizer.json").read_bytes()
    c = contract.SmolVlmConstants.from_dict(bundle.manifest.constants)
    assert (c.image_size, c.image_seq_len, c.longest_edge, c.resample) == (32, 4, 96, "lanczos")
    assert c.decoder.eos_ids == (vlm.token_id("<end_of_utterance>"),)
    assert bundle.spec("decoder", "fp16").tensor("past_key.0").dtype == "float16"
    assert bundle.spec("decoder", "fp32", "tensorrt").tensor("past_key.0").dims[2] == "P"
    # fp32 weights lie in one file: the decoder's for either target, and the tied embedding's.
    sizes = {f: e.size for f, e in bundle.manifest.files.items() if f.startswith("graphs/")}
    assert sum(size for f, size in sizes.items() if (".fp32" in f and "decoder" in f) or "embed" in f) < 1.2 * (
        sizes["graphs/decoder.fp32.weights"] + 20_000
    )


def test_memory_is_measured_on_a_prompt_that_fits(smolvlm_bundle: Path) -> None:
    """`seqlens_k` of 0 with a prompt of many tokens would point before the cache."""
    bundle = Bundle.open(smolvlm_bundle)
    spec = bundle.specs["decoder"]
    filled = {"seqlens_k": spec.ranges["S"][1] - 1}
    measured = measure_file(bundle.graph_path("decoder", "int4"), spec, 1, filled)
    assert measured is None or measured["sizes"] == {"S": 256, "C": 512}


def test_only_plain_graphs_are_built(smolvlm_bundle: Path) -> None:
    chosen = choose(Bundle.open(smolvlm_bundle))
    assert {(c.graph, c.precision) for c in chosen} == {
        (g, p) for g in ("vision_encoder", "embed_tokens", "decoder") for p in ("fp32", "fp16")
    }
    decoders = {c.precision: c for c in chosen if c.graph == "decoder"}
    assert all(c.target == "tensorrt" for c in decoders.values())
    assert decoders["fp16"].spec.tensor("past_key.0").dtype == "float16"


@needs_wheels
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_builds_ahead_of_time(smolvlm_bundle: Path, precision: str) -> None:
    """Steps and prompts have a profile each, in which past and new slots go together."""
    for choice in choose(Bundle.open(smolvlm_bundle), precisions=(precision,)):
        build = tensorrt_rtx.check_build(smolvlm_bundle / choice.file, choice.spec, ("SM89",))
        assert build.engine_bytes > 10_000


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_golden_samples_pass_without_torch(smolvlm_bundle: Path, precision: str) -> None:
    report = verify_bundle(smolvlm_bundle, "cpu", "onnxruntime", precision, threads=1)
    assert report.passed, report.problems
    assert isinstance(report, verify.AnswerReport)
    assert report.prompts == report.samples == 2
    assert report.tokens == 64
    if precision == "fp32":
        assert report.equal == report.tokens
        assert {t.name for t in report.tensors if t.max_rel < 1e-4} == {"features", "logits"}
    assert json.loads(json.dumps(report.to_dict()))["passed"]


def spoil(bundle: Path, folder: Path, name: str, change: object) -> Bundle:
    """A copy with one changed file, signed anew."""
    copy = folder / "spoilt"
    shutil.copytree(bundle, copy)
    content = (copy / name).read_bytes()
    changed = change(content)  # type: ignore[operator]
    assert changed != content
    (copy / name).write_bytes(changed)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(changed).hexdigest(), "size": len(changed)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(copy)


def test_a_changed_template_is_found(smolvlm_bundle: Path, tmp_path: Path) -> None:
    spoilt = spoil(smolvlm_bundle, tmp_path, "chat_template.jinja", lambda b: b.replace(b"Assistant:", b"Assistant :"))
    report = verify_bundle(spoilt, "cpu", "onnxruntime", "fp32", threads=1)
    assert not report.passed
    assert "prompts" in report.problems[0]


def test_changed_weights_are_found(smolvlm_bundle: Path, tmp_path: Path) -> None:
    def flip(content: bytes) -> bytes:
        values = np.frombuffer(content, np.float32).copy()
        values[:2000] *= -1
        return values.tobytes()

    spoilt = spoil(smolvlm_bundle, tmp_path, "graphs/decoder.fp32.weights", flip)
    report = verify_bundle(spoilt, "cpu", "onnxruntime", "fp32", threads=1)
    assert not report.passed
    assert report.suspect is not None
    assert report.suspect.graph == "decoder"


def test_swapped_tiles_are_found(smolvlm_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixano_edge.engine.models.smolvlm import model

    cut = model.cut

    def swapped(*args: object, **named: object) -> object:
        tiles = cut(*args, **named)  # type: ignore[arg-type]
        first, second, *rest = tiles.squares
        return type(tiles)(tiles.rows, tiles.columns, (second, first, *rest))

    monkeypatch.setattr(model, "cut", swapped)
    report = verify_bundle(smolvlm_bundle, "cpu", "onnxruntime", "fp32", threads=1)
    assert not report.passed
    assert report.suspect is not None
    assert report.suspect.graph == "vision_encoder"


def test_a_wrong_vision_encoder_leaves_no_bundle(
    smolvlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Position embeddings of patches in another order."""
    made = family.VisionEncoder.__init__

    def wrong(self: family.VisionEncoder, model: object) -> None:
        made(self, model)
        self.position = self.position.flip(1)

    monkeypatch.setattr(family.VisionEncoder, "__init__", wrong)
    with pytest.raises(ParityError, match=r"features: relative error"):
        export_smolvlm(
            smolvlm_folder,
            tmp_path / "b",
            variants=("fp32",),
            photos=PHOTOS[:1],
            questions=("Hi",),
            tokens=2,
            threads=1,
        )
    assert list(tmp_path.iterdir()) == []


def test_another_preparation_is_found(loaded_smolvlm: SmolVlmCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "_filter", lambda name: 2)
    with pytest.raises(ExportError, match="pixels of 'wide' are not the original"):
        SmolVlmFamily(loaded_smolvlm).ask(PHOTOS[0], "Hi", 2)
    monkeypatch.undo()
    monkeypatch.setattr(family, "image_text", lambda c, rows, columns: "<image>" * 28)
    with pytest.raises(ExportError, match="tokens of 'wide' are not the original"):
        SmolVlmFamily(loaded_smolvlm).ask(PHOTOS[0], "Hi", 2)


@pytest.mark.parametrize("kind", ["smolvlm", "idefics3"])
@pytest.mark.parametrize("split", [True, False])
def test_both_names_of_the_family(tmp_path: Path, kind: str, split: bool) -> None:
    loaded = load(vlm.write_smolvlm(tmp_path / "x", kind, split=split, tied=kind == "smolvlm", longest_edge=64))
    assert loaded.constants.split == split
    assert loaded.source.architecture.startswith(f"{kind}-32-")
    answer = SmolVlmFamily(loaded).ask(PHOTOS[1], "What?", 4)
    assert len(answer.pixel_values) == (5 if split else 1)


def edit(folder: Path, name: str, **changes: object) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
        (lambda f: (f / "chat_template.jinja").write_text("{% for %}"), "chat template"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokeniser"),
        (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda f: edit(f, "config.json", model_type="llava"), "type 'llava'"),
        (lambda f: edit(f, "config.json", auto_map={"AutoModel": "x.Y"}), "auto_map"),
        (lambda f: edit(f, "preprocessor_config.json", max_image_size={"longest_edge": 48}), "tiles of 48"),
        (lambda f: edit(f, "preprocessor_config.json", do_rescale=False), "do_rescale is off"),
        (lambda f: edit(f, "preprocessor_config.json", resample=7), "filter 7"),
        (lambda f: edit(f, "processor_config.json", image_seq_len=5), "5 image tokens"),
    ],
)
def test_checkpoints_that_cannot_be(smolvlm_folder: Path, tmp_path: Path, spoilt: object, message: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(smolvlm_folder, copy)
    spoilt(copy)  # type: ignore[operator]
    with pytest.raises(ExportError, match=message):
        load(copy)


def test_a_prompt_that_does_not_fit(loaded_smolvlm: SmolVlmCheckpoint) -> None:
    with pytest.raises(ExportError, match="the model takes 512"):
        SmolVlmFamily(loaded_smolvlm).ask(PHOTOS[0], "why " * 300, 64)


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["smolvlm", str(tmp_path / "none"), "-o", str(tmp_path / "out")])
    assert isinstance(result.exception, ExportError)
    assert "no checkpoint" in result.exception.message
    result = CliRunner().invoke(app, ["smolvlm", "x", "-o", str(tmp_path / "out"), "--variants", "fp16"])
    assert isinstance(result.exception, ExportError)
