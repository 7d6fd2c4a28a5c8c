"""Half precision through the whole command: judged by a graph that rounds as a GPU does, published as it will run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from pixano_edge.calibration.run import calibrate
from pixano_edge.engine.bundle import Bundle

from .conftest import decoder_request


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_judged_as_a_gpu_rounds(
    sam2_demo: Bundle, scenes: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixano_edge.calibration.run.verified", lambda *_: None)  # seconds, and tested elsewhere
    request = decoder_request(scenes, tmp_path / "out", tmp_path / "work", "mask_iou>=0.9")
    request = replace(request, precision=precision, replace=True)
    outcome = calibrate(sam2_demo, request)
    variant = outcome.result.variants[0]
    assert outcome.bundle is not None, variant.problems
    assert variant.held_out is not None
    assert 0.9 <= variant.held_out.mean < 1
    assert variant.graphs[0].bytes < 0.6 * variant.graphs[0].fp32_bytes
    assert bool(variant.speed) == (precision == "fp16")  # the CPU has no kernels for bf16
    model = onnx.load(outcome.bundle.graph_path("mask_decoder", precision))
    kind = onnx.TensorProto.BFLOAT16 if precision == "bf16" else onnx.TensorProto.FLOAT16
    assert sum(t.data_type == kind for t in model.graph.initializer) > 20
    # The exported graphs open as before, whatever they share with the one that was replaced.
    onnx.load(outcome.bundle.graph_path("mask_decoder", "fp32"))
    assert precision in outcome.bundle.variants()
