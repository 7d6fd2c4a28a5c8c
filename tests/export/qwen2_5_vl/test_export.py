"""Qwen2.5-VL through the decoder's code of every family: parity, windows, M-RoPE, TensorRT, mistakes that must show."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from pixano_edge.engine.build.plan import choose
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import decoder as decoders
from pixano_edge.engine.contracts import qwen2_5_vl as contract
from pixano_edge.engine.errors import ExportError
from pixano_edge.engine.models.decoder.verify import AnswerReport
from pixano_edge.engine.models.verify import verify_bundle
from pixano_edge.export import tensorrt_rtx
from pixano_edge.export.decoder.run import DecoderRun
from pixano_edge.export.operators import check_tensorrt_10_3
from pixano_edge.export.photos import Photo
from pixano_edge.export.qwen2_5_vl.checkpoint import QwenVlCheckpoint, load
from pixano_edge.export.qwen2_5_vl.family import QwenVlFamily
from pixano_edge.export.qwen2_5_vl.vision import VisionEncoder, arrange
from pixano_edge.export.vlm.family import Answer
from tests.support import vlm

needs_wheels = pytest.mark.skipif(
    tensorrt_rtx.missing_module() is not None,
    reason=f"{tensorrt_rtx.missing_module()} is not installed: pip install 'pixano-edge[tensorrt-rtx]'",
)
BAR = 1e-4


def test_answers_are_pytorchs(qwen_bundle: Path) -> None:
    parity = Bundle.open(qwen_bundle).manifest.parity
    assert parity is not None
    assert parity.passed
    found = {g.variant: g for g in parity.generations}
    assert list(found) == ["fp32", "fp16-cpu", "fp32-tensorrt", "fp16-tensorrt"]
    for variant in ("fp32", "fp32-tensorrt"):
        assert found[variant].equal == found[variant].tokens == 2 * 64
        assert found[variant].max_rel < BAR
    features = {t.variant: t.max_rel for t in parity.tensors if t.tensor == contract.FEATURES}
    assert features["fp32"] < 1e-5 < features["fp16"] < 2e-2


def test_what_the_bundle_holds(qwen_bundle: Path) -> None:
    bundle = Bundle.open(qwen_bundle)
    c = contract.QwenVlConstants.from_dict(bundle.manifest.constants)
    assert c.window_units == 2
    assert c.decoder.rope == decoders.MROPE
    assert c.decoder.eos_ids == (302, 300)
    assert bundle.file("chat_template.jinja").read_text() == vlm.QWEN_TEMPLATE
    for name in ("vision_encoder", "decoder", "embed_tokens"):
        for target in ("onnx", "tensorrt"):
            if (name, target) != ("decoder", "onnx"):
                file = bundle.graph_path(name, "fp16", target)
                assert check_tensorrt_10_3(onnx.load(file, load_external_data=False)) == []


@needs_wheels
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_builds_ahead_of_time(qwen_bundle: Path, precision: str) -> None:
    for choice in choose(Bundle.open(qwen_bundle), ("vision_encoder", "decoder"), (precision,)):
        build = tensorrt_rtx.check_build(qwen_bundle / choice.file, choice.spec, ("SM89",))
        assert build.engine_bytes > 10_000


@pytest.fixture(scope="module", params=["onnx", "tensorrt"])
def run(request: pytest.FixtureRequest, qwen_bundle: Path, loaded_qwen: QwenVlCheckpoint) -> DecoderRun:
    file = Bundle.open(qwen_bundle).graph_path("decoder", "fp32", request.param)
    return DecoderRun(file, loaded_qwen.constants.decoder, request.param, threads=1)


def error(got: np.ndarray, answer: Answer) -> float:
    return float(np.abs(got - answer.logits).max() / np.abs(answer.logits).max())


def test_every_step_of_a_greedy_answer(run: DecoderRun, qwen_answer: Answer) -> None:
    got = run.logits(qwen_answer.parts(), qwen_answer.part_positions(), slots=200)
    assert error(got, qwen_answer) < BAR
    assert (got.argmax(axis=1) == qwen_answer.tokens).all()
    assert len(set(qwen_answer.tokens.tolist())) > 8


def test_positions_of_text_alone_show(run: DecoderRun, qwen_answer: Answer) -> None:
    """Slots instead of rows and columns; and rows for columns."""
    parts, positions = qwen_answer.parts(), qwen_answer.part_positions()
    assert positions is not None
    starts = np.cumsum([0] + [p.shape[1] for p in parts])
    slots = [np.broadcast_to(np.arange(a, b, dtype=np.int32), (3, b - a)).copy() for a, b in itertools.pairwise(starts)]
    assert error(run.logits(parts, slots), qwen_answer) > 100 * BAR
    swapped = [np.ascontiguousarray(p[[0, 2, 1]]) for p in positions]
    assert error(run.logits(parts, swapped), qwen_answer) > 100 * BAR


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 200), (61, 45)])
def test_one_vision_graph_for_every_size(
    qwen_bundle: Path, loaded_qwen: QwenVlCheckpoint, height: int, width: int
) -> None:
    import onnxruntime as ort

    answer = QwenVlFamily(loaded_qwen).ask(Photo("x", vlm.picture(height, width, 4)), "What?", 2)
    session = ort.InferenceSession(
        str(Bundle.open(qwen_bundle).graph_path("vision_encoder")), providers=["CPUExecutionProvider"]
    )
    (one,) = answer.runs
    (got,) = session.run(None, one.feeds)
    rows = got.reshape(-1, got.shape[-1])[one.rows]
    want = one.want[contract.FEATURES]
    assert np.abs(rows - want).max() / np.abs(want).max() < 1e-5


def test_absent_patches_mean_nothing(loaded_qwen: QwenVlCheckpoint) -> None:
    """Whatever stands there; and one that is wrongly called present does matter."""
    c = loaded_qwen.constants
    encoder = VisionEncoder(loaded_qwen.model, c).eval()
    patches = np.random.default_rng(0).standard_normal((6 * 10, c.patch_channels)).astype(np.float32)
    feeds, places = arrange(patches, (6, 10), c)

    def features() -> np.ndarray:
        with torch.no_grad():
            return encoder(*(torch.from_numpy(v) for v in feeds.values())).numpy().reshape(-1, 64)[places]

    want = features()
    absent = feeds[contract.VALID] == 0
    assert absent.any()
    feeds[contract.PIXEL_VALUES][absent] = 5
    feeds[contract.PATCH_POSITIONS][absent] = 7
    assert np.abs(features() - want).max() < 1e-6 * np.abs(want).max()
    feeds[contract.VALID][tuple(np.argwhere(absent)[0])] = 1
    assert np.abs(features() - want).max() > 1e-2 * np.abs(want).max()


def test_limits_of_the_checkpoint(tmp_path: Path) -> None:
    loaded = load(vlm.write_qwen(tmp_path / "x", max_pixels=12_845_056, tied=False))
    assert loaded.constants.max_pixels == contract.MAX_PIXELS
    assert any("at most" in note for note in loaded.notes)


def edit(folder: Path, name: str, **changes: object) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"model_type": "qwen2_vl"}, "type 'qwen2_vl'"),
        ("preprocessor_config.json", {"patch_size": 14}, "patch_size 14"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize is off"),
        ("preprocessor_config.json", {"resample": "x"}, "filter x"),
    ],
)
def test_checkpoints_that_cannot_be(
    qwen_folder: Path, tmp_path: Path, name: str, changes: dict[str, object], message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(qwen_folder, copy)
    edit(copy, name, **changes)
    with pytest.raises(ExportError, match=message):
        load(copy)


def test_golden_samples_pass_without_torch(qwen_bundle: Path) -> None:
    report = verify_bundle(qwen_bundle, "cpu", "onnxruntime", "fp32", threads=1)
    assert report.passed, report.problems
    assert isinstance(report, AnswerReport)
    assert report.prompts == report.samples == 2
    assert report.equal == report.tokens == 64
