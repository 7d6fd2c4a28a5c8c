"""OWLv2 base/16 and OWL-ViT base/32 at their real sizes, with seeded weights: parity on real photos, TensorRT builds.

Some minutes each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Owlv2Config, Owlv2ForObjectDetection, OwlViTConfig, OwlViTForObjectDetection

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import owlv2 as contract
from pixano_edge.engine.contracts.owlv2 import OwlConstants
from pixano_edge.engine.models.verify import verify_bundle
from pixano_edge.export import tensorrt_rtx
from pixano_edge.export.owlv2 import export_owl
from tests.support.tiny_owl import make_tokenizer, save_checkpoint, sharpen

pytestmark = pytest.mark.slow


def make(family: str) -> Any:
    text = {"vocab_size": len(make_tokenizer().get_vocab()), "bos_token_id": 0, "eos_token_id": 1}
    if family == "owlv2":
        config = Owlv2Config(text_config=text, vision_config={"image_size": 960, "patch_size": 16})
        return sharpen(Owlv2ForObjectDetection(config))
    return sharpen(OwlViTForObjectDetection(OwlViTConfig(text_config=text)))


@pytest.fixture(scope="module", params=["owlv2", "owlvit"])
def bundle(request: pytest.FixtureRequest, bedroom: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("real")
    save_checkpoint(make(request.param), folder / "checkpoint")
    photos = [bedroom / "00000.jpg", bedroom / "00020.jpg"]
    return Bundle.open(export_owl(folder / "checkpoint", folder / "bundle", request.param, photos=photos))


def test_parity_on_real_photos(bundle: Bundle) -> None:
    report = bundle.manifest.parity
    assert report is not None
    assert report.passed
    assert max(t.max_rel for t in report.tensors if t.variant == "fp32") < 1e-4
    (full,) = (d for d in report.detections if d.variant == "fp32")
    assert full.boxes > 20  # OWLv2 has 31 here
    assert full.unmatched == 0
    assert verify_bundle(bundle, "cpu").passed


@pytest.mark.skipif(tensorrt_rtx.missing_module() is not None, reason="needs pixano-edge[tensorrt-rtx]")
@pytest.mark.parametrize("variant", ["fp32", "fp16", "fp32-tensorrt", "fp16-tensorrt"])
def test_tensorrt_builds(bundle: Bundle, variant: str) -> None:
    target = "tensorrt" if variant.endswith("-tensorrt") else "onnx"
    for graph, spec in contract.graphs(OwlConstants.from_dict(bundle.manifest.constants)).items():
        path = bundle.graph_path(graph, variant, target)
        assert tensorrt_rtx.check_build(path, spec).engine_bytes > 1_000_000
