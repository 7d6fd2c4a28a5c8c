"""The ONNX files: match the contract, hold nothing of the exporting machine, keep fp32 where it matters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.engine.errors import ExportError
from pixano_edge.export import fp16
from pixano_edge.export.onnx_graph import check_contract, export_graph

CONSTANTS = contract.Sam2Constants(image_size=128, hidden_dim=32)
GRAPHS = contract.graphs(CONSTANTS)


@pytest.mark.parametrize("variant", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", sorted(GRAPHS))
def test_files_match_the_contract(graph: str, variant: str, files: Callable[[str], dict[str, Path]]) -> None:
    model = onnx.load(files(variant)[graph])
    onnx.checker.check_model(model, full_check=True)
    check_contract(model, GRAPHS[graph])
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]


@pytest.mark.parametrize("variant", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", sorted(GRAPHS))
def test_files_hold_no_paths(graph: str, variant: str, files: Callable[[str], dict[str, Path]]) -> None:
    data = files(variant)[graph].read_bytes()
    here = str(Path(__file__).resolve().parents[2]).encode()
    assert here not in data
    assert b"site-packages" not in data
    assert b"stack_trace" not in data


def test_difference_is_named(files: Callable[[str], dict[str, Path]]) -> None:
    model = onnx.load(files("fp32")[contract.MASK_DECODER])
    spec = GRAPHS[contract.MASK_DECODER]
    with pytest.raises(ExportError, match="outputs"):
        check_contract(model, dataclasses.replace(spec, outputs=spec.outputs[:2]))
    other = contract.mask_decoder(contract.Sam2Constants(image_size=256, hidden_dim=32))
    with pytest.raises(ExportError, match="image_embed"):
        check_contract(model, other)
    labels = tuple(dataclasses.replace(t, dtype="int64") if t.name == "point_labels" else t for t in spec.inputs)
    with pytest.raises(ExportError, match="point_labels"):
        check_contract(model, dataclasses.replace(spec, inputs=labels))


def test_module_that_cannot_be_traced() -> None:
    class Branches(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    spec = GraphSpec("branches", (TensorSpec("x", "float32", (4,)),), (TensorSpec("y", "float32", (4,)),))
    with pytest.raises(ExportError, match="could not export 'branches'"):
        export_graph(Branches(), spec, (torch.zeros(4),))


def test_fp16_weights_are_half_and_fourier_features_are_not(files: Callable[[str], dict[str, Path]]) -> None:
    model = onnx.load(files("fp16")[contract.MASK_DECODER])
    floats = [t for t in model.graph.initializer if t.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)]
    half = sum(np.prod(t.dims) for t in floats if t.data_type == TensorProto.FLOAT16)
    assert half > 0.95 * sum(np.prod(t.dims) for t in floats)
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    angles = [n.output[0] for n in model.graph.node if n.op_type in ("Sin", "Cos")]
    assert len(angles) == 2
    assert all(types[name] == TensorProto.FLOAT for name in angles)


def _fourier_graph() -> onnx.ModelProto:
    """y = sin(30 x) * 0.5"""
    constants = {"thirty": np.array(30, np.float32), "half": np.array(0.5, np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "thirty"], ["angle"], name="scale"),
            helper.make_node("Sin", ["angle"], ["wave"], name="sin"),
            helper.make_node("Mul", ["wave", "half"], ["y"], name="halve"),
        ],
        "fourier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [256])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_fp32_island_keeps_angles_exact() -> None:
    """Negative control included: converted without the island, the same graph is an order of magnitude worse."""
    import onnxruntime as ort
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = _fourier_graph()
    assert fp16.fp32_nodes(model) == {"scale", "sin"}
    x = np.linspace(0, 1, 256, dtype=np.float32)

    def error(converted: onnx.ModelProto) -> float:
        fp16.sort_nodes(converted.graph)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(
            fp16.rounded(converted).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return float(np.abs(session.run(None, {"x": x})[0] - 0.5 * np.sin(30 * x)).max())

    kept = error(fp16.to_fp16(model))
    lost = error(convert_float_to_float16(_fourier_graph(), keep_io_types=True))
    assert kept < 5e-4
    assert lost > 8 * kept


def test_nodes_are_sorted_and_cycles_refused() -> None:
    model = _fourier_graph()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([nodes[2], nodes[0], nodes[1]])
    fp16.sort_nodes(model.graph)
    assert [n.name for n in model.graph.node] == ["scale", "sin", "halve"]
    model.graph.node[0].input[0] = "y"
    with pytest.raises(ExportError, match="cycle"):
        fp16.sort_nodes(model.graph)
