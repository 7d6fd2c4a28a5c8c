"""The demo bundle of the package: what it says, and that TensorRT takes its graphs."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.engine.contracts import sam2_video
from pixano_edge.export import tensorrt_rtx
from pixano_edge.export.operators import check_tensorrt_10_3

MAX_BYTES = 15_000_000
GRAPHS = (
    contract.IMAGE_ENCODER,
    contract.MASK_DECODER,
    sam2_video.MEMORY_ATTENTION,
    sam2_video.TRACK_DECODER,
    sam2_video.MEMORY_ENCODER,
)


def test_it_says_what_it_is(demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    manifest = bundle.manifest
    assert manifest.family == contract.FAMILY
    assert manifest.source.format == "transformers"
    assert manifest.source.architecture.startswith("sam2")
    assert manifest.licence.spdx == "Apache-2.0"
    assert manifest.parity is not None
    assert manifest.parity.passed
    assert {"fp32", "fp16"} <= {m.variant for m in manifest.parity.masks}
    assert not any("TensorRT" in note for note in manifest.notes)
    assert bundle.golden()
    assert manifest.golden_clip is not None
    assert set(bundle.specs) == set(GRAPHS)
    assert manifest.parity.clips


def test_it_is_small(demo_bundle: Path) -> None:
    assert sum(f.stat().st_size for f in demo_bundle.rglob("*") if f.is_file()) < MAX_BYTES


@pytest.mark.parametrize("graph", GRAPHS)
def test_operators_suit_tensorrt(graph: str, demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    assert {"fp32", "fp16"} <= set(bundle.variants())
    for variant in bundle.variants():
        for target in ("onnx", "tensorrt"):
            assert check_tensorrt_10_3(onnx.load(bundle.graph_path(graph, variant, target))) == [], (variant, target)


@pytest.mark.parametrize("variant", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_tensorrt_builds_it_for_two_kinds_of_cards(graph: str, variant: str, demo_bundle: Path) -> None:
    if tensorrt_rtx.missing_module():
        pytest.skip(f"{tensorrt_rtx.missing_module()} is not installed: pip install 'pixano-edge[tensorrt-rtx]'")
    bundle = Bundle.open(demo_bundle)
    path = bundle.graph_path(graph, variant, "tensorrt")
    build = tensorrt_rtx.check_build(path, bundle.specs[graph], ("SM86", "SM89"))
    assert build.engine_bytes > 10_000


def test_its_weights_are_stored_once(demo_bundle: Path) -> None:
    """The checkpoint is rounded to fp16, so fp32 graphs refer to the weights of the fp16 ones."""
    manifest = Bundle.open(demo_bundle).manifest
    for name, graph in manifest.graphs.items():
        full, half = graph.variants["fp32"], graph.variants["fp16"]
        assert full.weight_bytes is not None
        assert full.weight_bytes > 1.5 * manifest.files[half.file].size or name == sam2_video.TRACK_DECODER
        assert manifest.files[full.file].size < 0.6 * full.weight_bytes
    assert any("float16" in note for note in manifest.notes)


def test_the_checkpoint_in_the_source_is_the_one_in_the_bundle(demo_bundle: Path) -> None:
    from pixano_edge.engine.bundle.files import hash_file
    from pixano_edge.export.demo.package import CHECKPOINT

    weights = Path(__file__).resolve().parents[2] / CHECKPOINT / "model.safetensors"
    assert hash_file(weights) == Bundle.open(demo_bundle).manifest.source.sha256


def test_rounding_a_checkpoint(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from pixano_edge.engine.errors import ExportError
    from pixano_edge.export.demo.package import round_checkpoint

    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    weights = {"a": torch.tensor([1.0, 1 + 2**-12, -3e-9]), "b": torch.tensor([1, 2])}
    save_file(weights, tmp_path / "model.safetensors")
    change = round_checkpoint(tmp_path, tmp_path / "half")
    assert 2e-4 < change < 3e-4
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert half["a"].dtype == torch.float16
    assert half["b"].dtype == torch.int64
    assert '"float16"' in (tmp_path / "half" / "config.json").read_text()
    assert round_checkpoint(tmp_path / "half", tmp_path / "half") == 0.0
    save_file({"a": torch.tensor([1e5])}, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match="65504"):
        round_checkpoint(tmp_path, tmp_path / "half")
