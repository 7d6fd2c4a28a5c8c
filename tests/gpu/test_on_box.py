"""The commands that prove a box, on a real GPU with the demo bundle; run with ``pytest -m gpu``.

What the device, the back ends and the predictor do there is tested beside their own files (``test_*_gpu.py``).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixano_edge.benchmarks.contenders import CLICK_CASE
from pixano_edge.benchmarks.gpu import measure_gpu
from pixano_edge.benchmarks.gpu_contenders import CASES
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.gpu_parts import CUDA, NVML, PYCUDA, gpu_parts
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.errors import DeviceError
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.verify import TensorError
from pixano_edge.engine.provider.hardware import read_hardware

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"


def invoke(*args: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def onnxruntime(demo_bundle: Path) -> None:
    """Skips where ONNX Runtime cannot use the GPU: native TensorRT serves without it."""
    try:
        Sam2ImagePredictor.open(
            demo_bundle, device=DEVICE, backend="onnxruntime", precision="fp32", prove=False, warm_up=False
        ).close()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("onnxruntime")
def test_verify_passes_and_is_remembered(demo_bundle: Path) -> None:
    result = invoke(
        "verify", demo_bundle, "--backend", "onnxruntime", "--precision", "fp32", "--device", DEVICE, "--json"
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["device"] == DEVICE
    assert report["product"] == read_hardware().gpus[0].name
    assert report["compute_capability"]
    assert report["driver"]
    with Sam2ImagePredictor.open(demo_bundle, device=DEVICE, backend="onnxruntime", precision="fp32") as predictor:
        assert "passed" in predictor.info()["precision_reason"]


@pytest.mark.usefixtures("onnxruntime")
def test_a_wrong_answer_disables_the_combination(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TensorError.add

    def add(self: TensorError, got: Any, want: Any) -> None:
        real(self, got + 1 if self.graph == "image_encoder" else got, want)

    monkeypatch.setattr(TensorError, "add", add)
    asked = ("--backend", "onnxruntime", "--precision", "fp32", "--device", DEVICE)
    result = invoke("verify", demo_bundle, *asked, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["suspect"]["graph"] == "image_encoder"
    with pytest.raises(DeviceError, match="failed"):
        Sam2ImagePredictor.open(demo_bundle, device=DEVICE, backend="onnxruntime", precision="fp32")


def test_bench_has_both_clocks_and_they_agree(demo_bundle: Path) -> None:
    figures = measure_gpu(Bundle.open(demo_bundle), DEVICE, rounds=10, power_seconds=1.0)
    assert figures.rows
    ran = {(row.contender, row.case) for row in figures.rows}
    for name in figures.starts:
        for case in CASES:
            assert ((name, case) in ran) != (f"{name}, {case}" in figures.skipped), (name, case)
            assert (name, case) in ran or name.endswith("graph"), figures.skipped[f"{name}, {case}"]
    for row in figures.rows:
        limit = 1e-3 if "fp32" in row.contender else 5e-2
        if row.case == CLICK_CASE:
            assert row.device is None
            assert row.mask_iou is not None
        else:
            assert row.device is not None
            # The GPU's part of a call is no longer than the call.
            assert 0 < row.device.p50 < row.wall.p50 * 1.05, row
            assert row.relative_error is not None
            assert row.relative_error < limit, row
        assert row.mask_iou is None or row.mask_iou > (0.99 if "fp32" in row.contender else 0.9), row
    for name, start in figures.starts.items():
        assert start.recorded == name.endswith("graph")
    for power in figures.powers.values():
        assert power is None or (math.isfinite(power.watts) and power.watts > 0)


def test_the_parts_of_doctor_load() -> None:
    parts = {part.name: part for part in gpu_parts()}
    assert parts[CUDA].works or parts[PYCUDA].works
    if parts[NVML].version:
        assert read_hardware().gpus[0].driver
