"""SmolVLM-256M's shape with seeded, sharpened weights: 64 greedy tokens in every variant, golden samples, TensorRT."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixano_edge.engine.build.plan import choose
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.models.verify import verify_bundle
from pixano_edge.export import tensorrt_rtx
from pixano_edge.export.photos import default_photos
from pixano_edge.export.smolvlm import export_smolvlm
from tests.support import vlm
from tests.support.int8_form import int8_forms

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 1024 pixels: two tiles by one or two, and the whole; 2048 would only be slower. Attention is no sharper
    than fp16 can follow."""
    folder = tmp_path_factory.mktemp("real")
    checkpoint = vlm.write_smolvlm(folder / "smolvlm-256m", real=True, longest_edge=1024, choice=1.5)
    return export_smolvlm(
        checkpoint,
        folder / "bundle",
        variants=("fp32", "fp16", "int4"),
        photos=default_photos()[:2],
        questions=("Describe this image in detail.",),
    )


def test_parity(bundle: Path) -> None:
    parity = Bundle.open(bundle).manifest.parity
    assert parity is not None
    found = {g.variant: g for g in parity.generations}
    for variant in ("fp32", "fp32-tensorrt"):
        assert found[variant].equal + found[variant].ties == found[variant].tokens == 2 * 64
        assert found[variant].max_rel < 1e-4


def test_weights_lie_there_once(bundle: Path) -> None:
    sizes = {f: e.size for f, e in Bundle.open(bundle).manifest.files.items()}
    assert sizes["graphs/decoder.fp32.weights"] < 545e6
    assert sizes["graphs/decoder.int4.weights"] < 105e6
    assert sizes["graphs/decoder.fp32.onnx"] + sizes["graphs/embed_tokens.fp32.onnx"] < 1e6


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_golden_samples(bundle: Path, precision: str) -> None:
    report = verify_bundle(bundle, "cpu", "onnxruntime", precision)
    assert report.passed, report.problems


@pytest.mark.skipif(tensorrt_rtx.missing_module() is not None, reason="needs: pip install 'pixano-edge[tensorrt-rtx]'")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_builds_ahead_of_time(bundle: Path, precision: str) -> None:
    for choice in choose(Bundle.open(bundle), ("vision_encoder", "decoder"), (precision,)):
        build = tensorrt_rtx.check_build(bundle / choice.file, choice.spec, ("SM89",))
        assert build.engine_bytes > 50e6


def test_both_forms_of_an_int8_decoder_are_one(bundle: Path, tmp_path: Path) -> None:
    """With 30 layers far more activations lie next to the border of two codes than in the demo's four."""
    case = int8_forms(Bundle.open(bundle), tmp_path, "Describe this image in detail.", 6)
    found = case.compare(case.ours)
    print(found)  # noqa: T201 (pytest -s shows it)
    assert found.problems == ()
    assert found.products == 121
