"""Which graph a failed check points at, and what it says to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.bundle.tensorrt_report import Fp32Layer, TensorrtReport, TensorrtVariant
from pixano_edge.engine.errors import BundleError
from pixano_edge.engine.models.sam2 import diagnosis
from pixano_edge.engine.models.sam2.diagnosis import GRAPH_OF, find_suspect, tolerances
from pixano_edge.engine.models.sam2.verify import TensorError


def errors(**figures: float) -> list[TensorError]:
    return [TensorError(name, figures.get(name, 0.0), figures.get(name, 0.0)) for name in GRAPH_OF]


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.mark.parametrize(
    ("figures", "graph", "tensor"),
    [
        ({"pixel_values": 2e-4, "masks": 1.0}, "pre-processing", "pixel_values"),
        ({"high_res_1": 2e-4, "masks": 1.0}, "image_encoder", "high_res_1"),
        ({"image_embed": 9e-5, "object_score_logits": 2e-4}, "mask_decoder", "object_score_logits"),
        ({"image_embed": float("nan"), "masks": float("inf")}, "image_encoder", "image_embed"),
    ],
)
def test_the_first_tensor_beyond_its_tolerance_names_the_graph(
    bundle: Bundle, figures: dict[str, float], graph: str, tensor: str
) -> None:
    found = find_suspect(errors(**figures), bundle, "fp32", "onnxruntime")
    assert found is not None
    assert (found.graph, found.tensor, found.exceeded) == (graph, tensor, True)
    assert tensor in found.text()
    assert "first beyond" in found.text()


def test_without_one_the_nearest_is_named_and_said_to_be_within(bundle: Bundle) -> None:
    found = find_suspect(errors(image_embed=1e-5, iou_scores=5e-5), bundle, "fp32", "onnxruntime")
    assert found is not None
    assert (found.graph, found.exceeded) == ("mask_decoder", False)
    assert "no tensor is beyond" in found.text()


def test_reduced_precision_is_measured_against_what_the_exporter_saw(bundle: Bundle) -> None:
    limits = tolerances(bundle, "fp16")
    assert bundle.manifest.parity is not None
    seen = {t.tensor: t.max_rel for t in bundle.manifest.parity.tensors if t.variant == "fp16"}
    assert limits["image_embed"] == pytest.approx(diagnosis.ROOM * seen["image_embed"])
    assert limits["pixel_values"] == 1e-4
    assert tolerances(bundle, "int8")["masks"] == diagnosis.REDUCED_MAX_REL["int8"]
    assert set(tolerances(bundle, "fp32").values()) == {1e-4}


def test_every_tensor_of_the_family_has_a_graph(bundle: Bundle) -> None:
    for name, spec in bundle.specs.items():
        for tensor in spec.outputs:
            assert GRAPH_OF[tensor.name] == name


def _report(layers: list[str]) -> TensorrtReport:
    variant = TensorrtVariant(
        graph="image_encoder",
        variant="fp16-tensorrt",
        precision="fp16",
        file="graphs/x.onnx",
        same_as=None,
        weights=None,
        passes=[],
        fp32_layers=[Fp32Layer(node=n, op="Softmax", reason="range") for n in layers],
        differences=[],
        sizes=[],
        findings=["opset 23 is new"],
    )
    return TensorrtReport(reference="r", tolerance=1e-4, reasons={"range": "overflows"}, variants=[variant])


def advice(bundle: Bundle, backend: str = "tensorrt", precision: str = "fp16", **facts: Any) -> str:
    found = find_suspect(errors(image_embed=1.0), bundle, precision, backend, {"image_encoder": facts})
    assert found is not None
    return "\n".join(found.advice)


def test_tensorrt_points_at_layers_and_at_the_fp32_list(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "read_tensorrt_report", lambda b: _report([f"/softmax/{i}" for i in range(7)]))
    text = advice(bundle, engine={"file": "image_encoder-fp16.engine"}, warnings=["a weak context"])
    assert f"pixano-edge build {bundle.root} --graph image_encoder --precision fp16 --report" in text
    assert "image_encoder-fp16.engine" in text
    assert "/softmax/4 and 2 more" in text
    assert "/softmax/5" not in text
    assert "opset 23 is new" in text
    assert "a weak context" in text
    assert "--backend tensorrt --precision fp32" in text
    assert "--backend onnxruntime --precision fp16" in text


def test_a_bundle_without_a_list_and_a_damaged_one_say_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "read_tensorrt_report", lambda b: None)
    assert "says nothing about 'image_encoder' in fp16" in advice(bundle)
    monkeypatch.setattr(diagnosis, "read_tensorrt_report", lambda b: _report([]))
    assert "none of its layers in fp32" in advice(bundle)

    def broken(_: object) -> None:
        raise BundleError("not JSON", "")

    monkeypatch.setattr(diagnosis, "read_tensorrt_report", broken)
    assert "not JSON" in advice(bundle)


def test_onnx_runtime_names_its_provider(bundle: Bundle) -> None:
    text = advice(bundle, "onnxruntime", "fp32", provider="CUDAExecutionProvider", warnings=["3 nodes on the CPU"])
    assert "CUDAExecutionProvider" in text
    assert "3 nodes on the CPU" in text
    assert "--precision fp32" not in text  # it ran that already


def test_nothing_to_say_about_nothing() -> None:
    assert find_suspect([], SimpleNamespace(manifest=SimpleNamespace(parity=None, constants={})), "fp32", "x") is None  # type: ignore[arg-type]
