"""SAM 2.1 tiny at its real size, with seeded weights: export with tracking, parity on real photos, TensorRT builds.

Many minutes: the clip alone is 12 frames of two objects, for each variant and for PyTorch.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from transformers import Sam2VideoConfig, Sam2VideoModel

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.export import tensorrt_rtx
from pixano_edge.export.operators import check_tensorrt_10_3
from pixano_edge.export.sam2 import checkpoint, export_sam2
from tests.support.tiny import make_original_pt, sharpen_for_tracking

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Sam2VideoModel:
    """`Sam2VideoConfig()` is SAM 2.1 tiny; the weights are seeded and sharpened."""
    return sharpen_for_tracking(Sam2VideoModel(Sam2VideoConfig()).eval(), seed=1)


@pytest.fixture(scope="module")
def bundle(model: Sam2VideoModel, bedroom: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("real")
    model.save_pretrained(folder / "checkpoint")
    photos = [bedroom / "00000.jpg", bedroom / "00020.jpg"]
    return Bundle.open(export_sam2(folder / "checkpoint", folder / "bundle", photos=photos))


def test_parity_on_real_photos(bundle: Bundle) -> None:
    report = bundle.manifest.parity
    assert report is not None
    assert report.passed
    assert report.inputs == ["00000.jpg", "00020.jpg"]
    assert max(t.max_rel for t in report.tensors if t.variant == "fp32") < 1e-4
    masks = {m.variant: m for m in report.masks}
    assert masks["fp32"].min_iou >= 0.999
    assert masks["fp16"].mean_iou >= 0.99
    clips = {c.variant: c for c in report.clips}
    assert clips["fp32"].shown > 12
    assert clips["fp32"].min_iou >= 0.999
    assert clips["fp16"].mean_iou >= 0.99


def test_tensorrt_variants_cost_next_to_nothing(bundle: Bundle) -> None:
    files = [f for f in bundle.manifest.files if f.endswith(".tensorrt.onnx")]
    assert len(files) == 9  # nothing is to be changed in the memory encoder in fp32
    assert sum(bundle.manifest.files[f].size for f in files) < 2_000_000


@pytest.mark.parametrize("variant", ["fp32", "fp16", "fp32-tensorrt", "fp16-tensorrt"])
@pytest.mark.parametrize(
    "graph", ["image_encoder", "mask_decoder", "memory_attention", "track_decoder", "memory_encoder"]
)
def test_tensorrt(graph: str, variant: str, bundle: Bundle) -> None:
    path = bundle.graph_path(graph, variant, "tensorrt" if variant.endswith("-tensorrt") else "onnx")
    assert check_tensorrt_10_3(onnx.load(path)) == []
    if tensorrt_rtx.missing_module():
        pytest.skip("pip install 'pixano-edge[tensorrt-rtx]'")
    assert tensorrt_rtx.check_build(path, bundle.specs[graph], ("SM86", "SM89")).engine_bytes > 5e6


def test_original_checkpoint_gives_the_same_model(model: Sam2VideoModel, tmp_path: Path) -> None:
    loaded = checkpoint.load(make_original_pt(model, tmp_path / "sam2_hiera_tiny.pt"))
    assert loaded.source.architecture == "sam2.1-hiera-tiny"
    assert loaded.source.format == "sam2-pt"
    assert loaded.constants == contract.Sam2Constants()
    assert loaded.licence.spdx == "unknown"
    assert loaded.video is not None
    for name, value in loaded.video_model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
