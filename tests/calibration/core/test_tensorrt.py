"""Quantised graphs build as engines of TensorRT for RTX, and the parsed network has int8 in front of every product."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import onnx
import pytest

from pixano_edge.calibration import islands, qdq
from pixano_edge.calibration.blocks import blocks
from pixano_edge.calibration.observe import observe
from pixano_edge.engine.build.builder import run_child
from pixano_edge.engine.build.key import TENSORRT_RTX
from pixano_edge.engine.build.profiles import profiles
from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.export import tensorrt_rtx
from tests.calibration.core.graphs import TOKENS, WIDTH, pictures, transformer

pytestmark = pytest.mark.skipif(
    tensorrt_rtx.missing_module() is not None,
    reason=f"{tensorrt_rtx.missing_module()} is not installed: pip install 'pixano-edge[tensorrt-rtx]'",
)
SHAPE = (1, TOKENS, WIDTH)


def _spec(model: onnx.ModelProto) -> GraphSpec:
    output = model.graph.output[0].name
    return GraphSpec("test", (TensorSpec("x", "float32", SHAPE),), (TensorSpec(output, "float32", SHAPE),))


def _save(model: onnx.ModelProto, file: Path) -> Path:
    onnx.save(model, file)
    return file


def test_int8_builds(tmp_path: Path) -> None:
    model = transformer(depth=1)
    quantised, _ = qdq.quantize(model, observe(model, pictures(SHAPE), qdq.tensors(model), threads=1))
    file, spec = _save(quantised, tmp_path / "int8.onnx"), _spec(model)
    assert tensorrt_rtx.check_build(file, spec, ("SM89",)).engine_bytes > 10_000
    job = {"action": "parse", "name": "test", "flavour": TENSORRT_RTX, "file": str(file), "spec": asdict(spec)}
    layers = run_child({**job, "profiles": profiles(spec), "flags": {}}, timeout=300)["layers"]
    quantisers = [layer for layer in layers if layer["type"] == "QUANTIZE"]
    assert len(quantisers) == len(blocks(model))
    assert {output[1] for layer in quantisers for output in layer["outputs"]} == {"int8"}
    widened = {o[0] for layer in layers if layer["type"] == "DEQUANTIZE" for o in layer["outputs"]}
    products = [layer for layer in layers if layer["type"] == "MATRIX_MULTIPLY"]
    reading = [layer for layer in products if widened.intersection(i[0] for i in layer["inputs"])]
    assert len(reading) == len(blocks(model))


def test_bf16_builds(tmp_path: Path) -> None:
    model = transformer(depth=1)
    made, _ = islands.halve(model, observe(model, pictures(SHAPE), islands.tensors(model), threads=1), "bf16")
    build = tensorrt_rtx.check_build(_save(made, tmp_path / "bf16.onnx"), _spec(model), ("SM89",))
    assert build.engine_bytes > 10_000
