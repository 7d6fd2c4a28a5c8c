"""Reading the report on TensorRT variants: absent, whole, newer, damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.bundle import Bundle, BundleWriter
from pixano_edge.engine.bundle.tensorrt_report import TENSORRT_REPORT, read_tensorrt_report
from pixano_edge.engine.errors import BundleError
from tests.engine.bundle.sample import add_files, fields, make_bundle


def entry(variant: str = "fp16-tensorrt", **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "graph": "mask_decoder",
        "variant": variant,
        "precision": "fp16",
        "file": "graphs/mask_decoder.tensorrt.onnx",
        "same_as": None,
        "weights": "graphs/mask_decoder.fp16.onnx",
        "passes": [{"name": "drop_no_ops", "places": 2, "reason": "They do nothing."}],
        "fp32_layers": [{"node": "node_sin", "op": "Sin", "reason": "angles"}],
        "differences": [{"tensor": "masks", "max_abs": 1e-3, "max_rel": 1e-4}],
        "sizes": [{"P": 1, "N": 2}],
        "findings": [],
    }
    return {**values, **changes}


def bundle_with(destination: Path, **changes: Any) -> Bundle:
    report = {"reference": "fp32", "tolerance": 1e-5, "reasons": {"angles": "large"}, "variants": [entry()], **changes}
    with BundleWriter(destination) as writer:
        add_files(writer)
        writer.add_file(TENSORRT_REPORT, json.dumps(report).encode())
        writer.finish(fields())
    return Bundle.open(destination)


def test_bundle_of_an_earlier_export_has_none(tmp_path: Path) -> None:
    assert read_tensorrt_report(Bundle.open(make_bundle(tmp_path / "old"))) is None


def test_entries_are_found_by_precision_and_by_name(tmp_path: Path) -> None:
    report = read_tensorrt_report(bundle_with(tmp_path / "b"))
    assert report is not None
    found = report.find("mask_decoder", "fp16")
    assert found is not None
    assert found is report.find("mask_decoder", "fp16-tensorrt")
    assert found.fp32_layers[0].node == "node_sin"
    assert report.reasons[found.fp32_layers[0].reason] == "large"
    assert report.find("mask_decoder", "fp32") is None
    assert report.find("image_encoder", "fp16") is None


def test_fields_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    report = read_tensorrt_report(bundle_with(tmp_path / "b", speed="high", variants=[entry(kernels=72)]))
    assert report is not None
    assert len(report.variants) == 1


@pytest.mark.parametrize("changes", [{"variants": [{"graph": "mask_decoder"}]}, {"tolerance": "small"}])
def test_damaged_report_is_an_error(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a TensorRT report"):
        read_tensorrt_report(bundle_with(tmp_path / "b", **changes))
