"""Where a decoder's graph of plain operators runs, and that a model opened with it answers as with the other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pixano_edge.engine.bundle import Bundle, demo_path
from pixano_edge.engine.bundle.names import MANIFEST_NAME
from pixano_edge.engine.contracts import decoder as decoders
from pixano_edge.engine.models import opening
from pixano_edge.engine.models.opening import Combination, graph_file, spec_of, target_of
from pixano_edge.engine.models.verify import verify_bundle
from pixano_edge.engine.provider.families import TEXT
from pixano_edge.engine.provider.needs import declared
from pixano_edge.engine.provider.settings import LoadOptions
from pixano_edge.engine.runtime.ort_providers import OPENVINO

PLAIN, FUSED = "decoder.fp32.tensorrt.onnx", "decoder.fp32.onnx"


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open(demo_path("smolvlm-demo"))


@pytest.mark.parametrize(
    ("backend", "precision", "kind", "file"),
    [
        ("onnxruntime", "fp32", "cpu", FUSED),
        ("onnxruntime", "fp16", "cuda", "decoder.fp16.onnx"),
        ("onnxruntime", "fp32", "cuda", PLAIN),
        (OPENVINO, "fp32", "cpu", PLAIN),
        (OPENVINO, "bf16", "cpu", PLAIN),
    ],
)
def test_the_decoder_goes_where_its_attention_has_kernels(
    demo: Bundle, backend: str, precision: str, kind: str, file: str
) -> None:
    graph = decoders.DECODER
    assert graph_file(demo, graph, backend, precision, kind).name == file
    spec = spec_of(demo, graph, Combination(backend, precision), demo.specs[graph], kind)
    names = {tensor.name for tensor in spec.inputs}
    assert (decoders.CACHE_POSITION in names, decoders.SEQLENS_K in names) == (file == PLAIN, file != PLAIN)
    assert target_of(demo, "vision_encoder", backend, precision, kind) == "onnx"
    assert target_of(demo, graph, "tensorrt", precision, kind) == "tensorrt"


def test_a_bundle_without_the_plain_graph_has_the_other_alone(demo: Bundle, tmp_path: Path) -> None:
    folder = shutil.copytree(demo.root, tmp_path / "bundle")
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    variants = manifest["graphs"][decoders.DECODER]["variants"]
    for name in [name for name, variant in variants.items() if variant["target"] == "tensorrt"]:
        del variants[name]
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert graph_file(Bundle.open(folder), decoders.DECODER, "onnxruntime", "fp32", "cuda").name == FUSED


def test_a_model_opened_with_it_answers_as_with_the_other(demo: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """On ONNX Runtime's CPU provider, which has kernels for both; on a GPU the golden samples run before it is used."""
    asked = []

    def plain(bundle: Bundle, graph: str, backend: str, precision: str, kind: str) -> str:
        asked.append(graph)
        return "tensorrt" if graph == decoders.DECODER else "onnx"

    monkeypatch.setattr(opening, "target_of", plain)
    report = verify_bundle(demo, "cpu", "onnxruntime", "fp32", threads=1)
    assert decoders.DECODER in asked
    assert report.passed, report.problems


def test_its_second_cache_is_declared(demo: Bundle) -> None:
    def caches(**settings: str) -> int:
        found = declared(demo.root, LoadOptions(cache_mb=0, **settings), TEXT).use.caches  # type: ignore[arg-type]
        assert found
        return found

    one = caches(device="cuda:0", backend="onnxruntime", precision="fp16")
    two = caches(device="cuda:0", backend="onnxruntime", precision="fp32")
    assert two == 4 * one  # fp32's slots are twice as large, and there are two sets of them
    on_cpu = caches(device="cpu", backend="onnxruntime", precision="fp32")
    assert caches(device="cpu", backend=OPENVINO, precision="fp32") == 2 * on_cpu
