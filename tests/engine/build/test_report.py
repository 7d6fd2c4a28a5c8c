"""Layer reports: precisions, and a reason for every layer that stayed in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pixano_edge.engine.build import report as reports
from pixano_edge.engine.build.report import make_report, stored_reasons
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.bundle.tensorrt_report import TENSORRT_REPORT, TensorrtReport
from tests.engine.bundle.sample import HASH, add_files, fields, make_bundle

F32, F16 = "float32", "float16"


def layer(
    name: str, kind: str, inputs: list[tuple[str, str]], output: tuple[str, str], op: str | None = None
) -> dict[str, Any]:
    return {
        "name": name,
        "type": kind,
        "op": op,
        "node": f"node_{name}",
        "inputs": [[n, d, [-1, 4]] for n, d in inputs],
        "outputs": [[*output, [-1, 4]]],
    }


# x -> shuffle -> mul -> add(bias) -> sin -> cast -> matmul -> cast -> shuffle -> y, with a normalisation aside
LAYERS = [
    layer("bias", "CONSTANT", [], ("bias", F32)),
    layer("mul", "ELEMENTWISE", [("x", F32)], ("mul", F32), "PROD"),
    layer("spread", "SHUFFLE", [("bias", F32)], ("spread", F32)),
    layer("add", "ELEMENTWISE", [("mul", F32), ("spread", F32)], ("add", F32), "SUM"),
    layer("sin", "UNARY", [("add", F32)], ("sin", F32), "SIN"),
    layer("turn", "SHUFFLE", [("sin", F32)], ("turn", F32)),
    layer("narrow", "CAST", [("turn", F32)], ("narrow", F16)),
    layer("size", "SHAPE", [("narrow", F16)], ("size", "int64")),
    layer("product", "MATRIX_MULTIPLY", [("narrow", F16)], ("product", F16)),
    layer("up", "CAST", [("product", F16)], ("up", F32)),
    layer("norm", "NORMALIZATION", [("up", F32), ("scale", F32)], ("norm", F32)),
    layer("odd", "SOFTMAX", [("up", F32)], ("odd", F32)),
    layer("down", "CAST", [("norm", F32)], ("down", F16)),
    layer("last", "CAST", [("down", F16)], ("last", F32)),
    layer("y", "SHUFFLE", [("last", F32)], ("y", F32)),
    layer("first", "SHUFFLE", [("z", F32)], ("first", F32)),
    layer("take", "CAST", [("first", F32)], ("take", F16)),
]


def test_each_layer_has_its_precision_and_constants_are_left_out() -> None:
    report = make_report(LAYERS, "g", "fp16", "fp16")
    found = {entry.name: entry for entry in report.layers}
    assert "bias" not in found
    assert "size" not in found
    assert report.left_out == 2
    assert found["product"].precision == F16
    assert found["narrow"].precision == "float32 -> float16"
    assert found["sin"].type == "UNARY SIN"
    assert found["add"].node == "node_add"
    assert found["add"].shape == (-1, 4)
    assert report.precisions == {F32: 9, "float32 -> float16": 3, "float16 -> float32": 2, F16: 1}


def test_layers_that_stayed_in_fp32_have_a_reason() -> None:
    report = make_report(LAYERS, "g", "fp16", "fp16", {"node_norm": "Normalisation overflows."})
    assert report.kept == {
        reports.ANGLES: ["mul", "spread", "add", "sin"],
        reports.AFTER_ANGLES: ["turn"],
        "Normalisation overflows.": ["norm"],
        reports.UNKNOWN: ["odd"],
        reports.BORDER_OUT: ["y"],
        reports.BORDER_IN: ["first"],
    }
    values = report.to_dict()
    assert values["kept_in_fp32"] == report.kept
    assert values["precisions"] == report.precisions
    assert len(values["layers"]) == len(report.layers)


def test_products_of_quantised_tensors_are_told_from_others() -> None:
    layers = [
        layer("q", "QUANTIZE", [("x", F32)], ("q", "int8")),
        layer("d", "DEQUANTIZE", [("q", "int8")], ("d", F32)),
        layer("turn", "SHUFFLE", [("d", F32)], ("turn", F32)),
        layer("w", "DEQUANTIZE", [("weights", "int8")], ("w", F32)),
        layer("both", "MATRIX_MULTIPLY", [("turn", F32), ("w", F32)], ("both", F32)),
        layer("weights alone", "MATRIX_MULTIPLY", [("x", F32), ("w", F32)], ("alone", F32)),
        layer("convolution", "CONVOLUTION", [("d", F32), ("w", F32), ("b", F32)], ("c", F32)),
        layer("sum", "ELEMENTWISE", [("d", F32), ("w", F32)], ("sum", F32), "SUM"),
    ]
    report = make_report(layers, "g", "int8", "int8")
    precisions = {entry.name: entry.precision for entry in report.layers}
    assert [name for name, precision in precisions.items() if precision == "int8 -> float32"] == ["both", "convolution"]
    assert not {"both", "convolution"} & {name for names in report.kept.values() for name in names}


def test_an_fp32_graph_needs_no_reasons() -> None:
    assert make_report(LAYERS, "g", "fp32", "fp32").kept == {}


def test_reasons_come_from_the_exports_report(tmp_path: Path) -> None:
    from pixano_edge.engine.bundle import BundleWriter

    assert stored_reasons(Bundle.open(make_bundle(tmp_path / "without")), "mask_decoder", "fp16") == {}
    variant = {
        "graph": "mask_decoder",
        "variant": "fp16",
        "precision": "fp16",
        "file": "graphs/mask_decoder.fp16.onnx",
        "same_as": "fp16",
        "weights": None,
        "passes": [],
        "fp32_layers": [
            {"node": "node_norm", "op": "LayerNormalization", "reason": "normalisation"},
            {"node": "node_x", "op": "X", "reason": "unlisted"},
        ],
        "differences": [],
        "sizes": [],
        "findings": [],
    }
    stored = TensorrtReport.model_validate(
        {"reference": HASH, "tolerance": 1e-5, "reasons": {"normalisation": "It overflows."}, "variants": [variant]}
    )
    with BundleWriter(tmp_path / "with") as writer:
        add_files(writer)
        writer.add_file(TENSORRT_REPORT, stored.model_dump_json().encode())
        folder = writer.finish(fields())
    bundle = Bundle.open(folder)
    assert stored_reasons(bundle, "mask_decoder", "fp16") == {"node_norm": "It overflows.", "node_x": "unlisted"}
    assert stored_reasons(bundle, "mask_decoder", "fp32") == {}


def test_what_a_comparison_reads_goes_with_it() -> None:
    """It writes no floats itself; the constant that the parser spreads out for it is fp32 because of it."""
    layers = [
        layer("spread", "SHUFFLE", [("bias", F32)], ("spread", F32)),
        layer("greater", "ELEMENTWISE", [("x", F32), ("spread", F32)], ("greater", "bool"), "GREATER"),
    ]
    said = make_report(layers, "g", "fp16", "fp16", {"node_greater": "Compared with 0."})
    assert said.kept == {"Compared with 0.": ["spread"]}
    assert make_report(layers, "g", "fp16", "fp16").kept == {reports.BORDER_IN: ["spread"]}
