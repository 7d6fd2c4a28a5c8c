"""Ahead-of-time builds without a GPU, for two compute capabilities, and builds that must fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.engine.errors import ExportError, MissingDependencyError
from pixano_edge.export import tensorrt_rtx

needs_wheels = pytest.mark.skipif(
    tensorrt_rtx.missing_module() is not None,
    reason=f"{tensorrt_rtx.missing_module()} is not installed: pip install 'pixano-edge[tensorrt-rtx]'",
)
CONSTANTS = contract.Sam2Constants(image_size=128, hidden_dim=32)


@needs_wheels
@pytest.mark.parametrize("variant", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", ["image_encoder", "mask_decoder"])
def test_tiny_graphs_build(graph: str, variant: str, files: Callable[[str], dict[str, Path]]) -> None:
    build = tensorrt_rtx.check_build(files(variant)[graph], contract.graphs(CONSTANTS)[graph], ("SM86", "SM89"))
    assert build.engine_bytes > 10_000
    assert build.version


@needs_wheels
def test_difference_from_the_contract_is_found(files: Callable[[str], dict[str, Path]]) -> None:
    spec = contract.graphs(CONSTANTS)["image_encoder"]
    wrong = dataclasses.replace(spec, outputs=spec.outputs[::-1])
    with pytest.raises(ExportError, match="outputs are"):
        tensorrt_rtx.check_build(files("fp32")["image_encoder"], wrong, ("SM89",))


def _file(folder: Path, op: str, left: int, right: int, out: int) -> tuple[Path, GraphSpec]:
    graph = helper.make_graph(
        [helper.make_node(op, ["a", "b"], ["y"])],
        "test",
        [helper.make_tensor_value_info("a", left, [4]), helper.make_tensor_value_info("b", right, [4])],
        [helper.make_tensor_value_info("y", out, [4])],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    a, b, y = (TensorSpec(n, "float32", (4,)) for n in "aby")
    return path, GraphSpec("test", (a, b), (y,))


@needs_wheels
def test_mixed_precision_is_refused(tmp_path: Path) -> None:
    """Strong typing bites: fp32 plus fp16 does not build, so a careless fp16 pass would be noticed."""
    path, spec = _file(tmp_path, "Add", TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.FLOAT)
    with pytest.raises(ExportError, match="does not take 'test'"):
        tensorrt_rtx.check_build(path, spec, ("SM89",))


@needs_wheels
def test_unknown_operator_is_refused(tmp_path: Path) -> None:
    path, spec = _file(tmp_path, "BitShift", TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT)
    with pytest.raises(ExportError, match="does not take 'test'"):
        tensorrt_rtx.check_build(path, spec, ("SM89",))


@needs_wheels
def test_child_that_dies_is_an_error(tmp_path: Path) -> None:
    path, spec = _file(tmp_path, "Add", TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT)
    with pytest.raises(ExportError, match="ended with code 1"):
        tensorrt_rtx.check_build(path, spec, ("SM999",))


def test_missing_wheels_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tensorrt_rtx, "missing_module", lambda: "tensorrt_rtx_libs")
    with pytest.raises(MissingDependencyError, match=r"pixano-edge\[tensorrt-rtx\]"):
        tensorrt_rtx.check_build(tmp_path / "x.onnx", contract.graphs(CONSTANTS)["image_encoder"])
