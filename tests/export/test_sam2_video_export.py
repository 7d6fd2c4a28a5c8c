"""Export of checkpoints that track: what is in the bundle, what is left out, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Sam2Model
from typer.testing import CliRunner, Result

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.errors import ExportError
from pixano_edge.export.sam2 import checkpoint, export_sam2, original, video_graphs
from pixano_edge.export.sam2.checkpoint import Checkpoint
from tests.support.stored import stored_graph
from tests.support.tiny import make_original_pt, make_tracking_model, save_checkpoint, tiny_config

IMAGE = {sam2.IMAGE_ENCODER, sam2.MASK_DECODER}
VIDEO = {sam2_video.MEMORY_ATTENTION, sam2_video.TRACK_DECODER, sam2_video.MEMORY_ENCODER}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Destination alone in its folder, so that leftovers are seen."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "bundle"


@pytest.fixture
def fast_export(monkeypatch: pytest.MonkeyPatch, tracking_bundle: Path) -> None:
    """Graphs are taken from the tracking bundle instead of torch's exporter, which takes seconds per graph."""
    from pixano_edge.export import pipeline as export

    bundle = Bundle.open(tracking_bundle)
    monkeypatch.setattr(export, "export_graph", lambda module, spec, example: stored_graph(bundle, spec))


def export(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", "sam2", *map(str, arguments)])


def test_a_bundle_that_tracks(tracking_bundle: Path) -> None:
    bundle = Bundle.open(tracking_bundle)
    manifest = bundle.manifest
    assert set(manifest.graphs) == set(bundle.specs) == IMAGE | VIDEO
    assert bundle.variants() == ["fp32", "fp16"]
    for graph in manifest.graphs.values():
        assert {(v.precision, v.target) for v in graph.variants.values()} == {
            (p, t) for p in ("fp32", "fp16") for t in ("onnx", "tensorrt")
        }
    video = sam2_video.constants_of(manifest.constants)
    assert video is not None
    assert (video.memory_dim, video.num_memories, video.max_pointers) == (64, 7, 16)
    assert manifest.parity is not None
    assert {c.variant for c in manifest.parity.clips} == {m.variant for m in manifest.parity.masks}
    assert len(manifest.parity.tensors) == 5 * 13
    clicks = {"image_prepare", "mask_prepare", "click_decoder"}
    assert set(manifest.cpu_graphs) == {*clicks, "memory_attention"}
    assert manifest.golden_clip is not None
    assert not any("track" in note for note in manifest.notes)
    assert not any("TensorRT" in note for note in manifest.notes)


@pytest.mark.usefixtures("fast_export")
def test_image_only_leaves_tracking_out_and_says_so(tracking_checkpoint: Path, output: Path) -> None:
    result = export(tracking_checkpoint, "-o", output, "--variants", "fp32", "--image-only")
    assert result.exit_code == 0, result.output
    assert "does not track: its memory modules were left out" in result.output
    manifest = Bundle.open(output).manifest
    assert set(manifest.graphs) == IMAGE
    assert sam2_video.constants_of(manifest.constants) is None
    assert manifest.golden_clip is None
    assert manifest.parity is not None
    assert manifest.parity.clips == []


@pytest.mark.usefixtures("fast_export")
def test_a_checkpoint_without_memory_gives_images_and_says_so(
    tracking_checkpoint: Path, output: Path, tmp_path: Path
) -> None:
    Sam2Model.from_pretrained(tracking_checkpoint).save_pretrained(tmp_path / "image")
    steps: list[tuple[int, int]] = []
    export_sam2(
        tmp_path / "image",
        output,
        variants=["fp32"],
        threads=1,
        progress=lambda name, done, total: steps.append((done, total)),
    )
    manifest = Bundle.open(output).manifest
    assert set(manifest.graphs) == IMAGE
    assert any("the checkpoint has no memory modules" in note for note in manifest.notes)
    assert [done for done, _ in steps] == list(range(steps[-1][1]))


@pytest.mark.usefixtures("fast_export")
def test_the_command_shows_the_clip_and_inspect_says_that_it_tracks(tracking_checkpoint: Path, output: Path) -> None:
    result = export(tracking_checkpoint, "-o", output, "--variants", "fp32")
    assert result.exit_code == 0, result.output
    assert "Tracked clip, cut out of" in result.output
    assert "tracked_embed" in result.output
    shown = CliRunner().invoke(app, ["bundle", "inspect", str(output)])
    assert "yes (7 memories and 16 pointers per object)" in shown.output
    assert "2, and a clip" in shown.output
    assert "Tracked clip" in shown.output


@pytest.mark.usefixtures("fast_export")
def test_a_wrong_video_graph_leaves_no_bundle_and_exits_non_zero(
    tracking_checkpoint: Path, tracking_bundle: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real export of a wrong wrapper: the scale before the memory encoder is half of what it should be."""
    from pixano_edge.export import onnx_graph
    from pixano_edge.export import pipeline as module

    bundle = Bundle.open(tracking_bundle)

    def one(wrapper: Any, spec: Any, example: Any) -> Any:
        if spec.name == sam2_video.MEMORY_ENCODER:
            return onnx_graph.export_graph(wrapper, spec, example)
        return stored_graph(bundle, spec)

    class Faint(video_graphs.MemoryEncoder):
        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.scale /= 2

    monkeypatch.setattr(module, "export_graph", one)
    monkeypatch.setattr(video_graphs, "MemoryEncoder", Faint)
    result = export(tracking_checkpoint, "-o", output, "--variants", "fp32")
    assert result.exit_code == 1
    assert "memory_encoder.memory_features: relative error" in result.output
    assert "fp32 clip: lowest IoU" in result.output
    assert "Parity: FAILED" in result.output
    assert list(output.parent.iterdir()) == []


@pytest.fixture(scope="module")
def tracking(tracking_checkpoint: Path) -> Checkpoint:
    return checkpoint.load(tracking_checkpoint)


def test_both_models_are_loaded_on_one_set_of_weights(tracking: Checkpoint) -> None:
    assert tracking.video is not None
    image, video = tracking.model.state_dict(), tracking.video_model.state_dict()
    assert set(image) < set(video)
    assert all(value.data_ptr() == video[name].data_ptr() for name, value in image.items())


def test_an_original_checkpoint_gives_the_same_model(tracking: Checkpoint, tmp_path: Path) -> None:
    path = make_original_pt(tracking.video_model, tmp_path / "tracking.pt")
    held = original.load(path, tiny_config(128, 128))
    assert held.has_memory
    expected = tracking.video_model.state_dict()
    assert {n: v.shape for n, v in held.video_model.state_dict().items()} == {n: v.shape for n, v in expected.items()}
    assert all(torch.equal(value, expected[name]) for name, value in held.video_model.state_dict().items())
    assert checkpoint.read_video_constants(held.video_model, tracking.constants) == tracking.video


def test_the_first_generation_is_exported_too(tmp_path: Path, output: Path) -> None:
    """SAM 2 has no time of pointers and no mark of absence: an input that nothing reads stays in the graph."""
    model = make_tracking_model(
        enable_temporal_pos_encoding_for_object_pointers=False, enable_occlusion_spatial_embedding=False
    )
    export_sam2(save_checkpoint(model, tmp_path / "sam2"), output, variants=["fp32"], threads=1)
    manifest = Bundle.open(output).manifest
    assert manifest.source.architecture == "sam2-hiera-custom"
    assert set(manifest.graphs) == IMAGE | VIDEO
    assert manifest.parity is not None
    assert manifest.parity.passed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("object_pointer_proj.proj_in.weight"), "object_pointer_proj.proj_in.weight"),
        (lambda s: s.update({"memory_attention.extra": torch.zeros(2)}), "memory_attention.extra"),
    ],
)
def test_incomplete_memory_is_refused(change: Any, message: str, tracking_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tracking_checkpoint, tmp_path / "partial")
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=message) as caught:
        checkpoint.load(folder)
    assert "--image-only" in caught.value.action
    assert checkpoint.load(folder, image_only=True).video_model is None


def test_a_width_that_transformers_cannot_track_with_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ExportError, match="the hidden size is 32, expected a multiple of 64") as caught:
        checkpoint.load(tiny_checkpoint)
    assert "--image-only" in caught.value.action
