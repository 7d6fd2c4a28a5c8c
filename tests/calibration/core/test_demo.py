"""The demo SAM 2 encoder on the demo's pictures: with outliers naive int8 fails, the shipped one holds and fuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from pixano_edge.calibration import qdq
from pixano_edge.calibration.blocks import blocks
from pixano_edge.calibration.fusion import cpu_times, fusion, main
from pixano_edge.calibration.graph import load_graph
from pixano_edge.calibration.observe import observe
from pixano_edge.calibration.outliers import inject
from tests.calibration.core.graphs import error, run

ASSETS = Path(__file__).resolve().parents[3] / "engine" / "assets"
ENCODER = ASSETS / "sam2-demo" / "graphs" / "image_encoder.fp32.onnx"


def _feed(name: str) -> dict[str, NDArray[np.float32]]:
    """A picture as the encoder takes it; the constants are those of ImageNet, which the demo's manifest has."""
    with Image.open(ASSETS / "demo" / name) as picture:
        pixels = np.asarray(picture.convert("RGB").resize((256, 256)), np.float32) / 255
    normal = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return {"pixel_values": normal.astype(np.float32).transpose(2, 0, 1)[None]}


@pytest.fixture(scope="module")
def encoder() -> onnx.ModelProto:
    return load_graph(ENCODER)


def test_outliers_ruin_naive_int8_and_not_the_shipped_one(encoder: onnx.ModelProto) -> None:
    held_out = _feed("scene-3.png")
    calibration = [_feed("scene-1.png"), _feed("scene-2.png")]
    truth = run(encoder, held_out)
    errors = {}
    for name, model in (("plain", encoder), ("outliers", inject(encoder, seed=5))):
        seen = observe(model, calibration, qdq.tensors(model), threads=1)
        naive, _ = qdq.quantize(model, seen, method="minmax", smooth=None)
        shipped, report = qdq.quantize(model, seen)
        for kind, made in (("naive", naive), ("shipped", shipped)):
            errors[name, kind] = max(error(a, b) for a, b in zip(run(made, held_out), truth))
    assert len(report.smoothed) > 15
    assert report.weight_bytes[1] < 0.36 * report.weight_bytes[0]
    assert errors["plain", "naive"] < 0.06
    assert errors["outliers", "naive"] > 0.3
    assert errors["outliers", "shipped"] < 0.06
    found = fusion(shipped)
    assert (found.integer, found.left) == (len(blocks(encoder)), [])
    assert found.operators["Gelu"] == 10


def test_the_command_quantises_and_times(capsys: pytest.CaptureFixture[str], encoder: onnx.ModelProto) -> None:
    text = ASSETS / "owlv2-demo" / "graphs" / "text_encoder.fp32.onnx"
    assert main(["--quantise", "--time", "1", str(text)]) == 2
    assert "--size NAME=VALUE" in capsys.readouterr().err
    assert main(["--quantise", "--time", "1", "--size", "C=2", str(text)]) == 0
    assert "13 products in int8, 0 with int8 weights left in float\nCPU time: fp32 " in capsys.readouterr().out
    once, again = cpu_times([encoder, encoder], {}, 3)
    assert 0.5 < once / again < 2
