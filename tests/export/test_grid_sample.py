"""Sampling written out with Gather against onnx's GridSample in ONNX Runtime."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pixano_edge.export import grid_sample
from pixano_edge.export.graph_edit import GraphEditor

ort = pytest.importorskip("onnxruntime", reason="comparing needs pixano-edge[cpu]")


def make_model(opset: int = 18, dynamic: bool = False, **attributes: object) -> onnx.ModelProto:
    """One GridSample: image (2, 3, 5, 7), grid (2, 4, 6, 2), or all sizes dynamic."""
    image, grid, out = (2, 3, 5, 7), (2, 4, 6, 2), (2, 3, 4, 6)
    if dynamic:
        image, grid, out = ("N", "C", "H", "W"), ("N", "h", "w", 2), ("N", "C", "h", "w")  # type: ignore[assignment]
    graph = helper.make_graph(
        [helper.make_node("GridSample", ["image", "grid"], ["sampled"], name="sample", **attributes),
         helper.make_node("Neg", ["sampled"], ["y"], name="neg")],
        "sampling",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, image),
         helper.make_tensor_value_info("grid", TensorProto.FLOAT, grid)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    """Half of the grid lies outside the picture, and some points exactly on its border and its corners."""
    rng = np.random.default_rng(seed)
    grid = rng.uniform(-2, 2, (2, 4, 6, 2))
    grid[0, 0, :4] = [(-1, -1), (1, 1), (1, -1), (0, 0)]
    return {"image": rng.standard_normal((2, 3, 5, 7)).astype(np.float32), "grid": grid.astype(np.float32)}


def run(model: onnx.ModelProto) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs())[0]


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    edit = GraphEditor(copy)
    assert grid_sample.grid_sample_to_gather(edit) == 1
    edit.finish()
    onnx.checker.check_model(copy, full_check=True)
    assert "GridSample" not in {n.op_type for n in copy.graph.node}
    return copy


@pytest.mark.parametrize(
    ("padding", "align", "dynamic"), list(itertools.product(("zeros", "border"), (0, 1), (False, True)))
)
def test_bilinear_matches_onnx_runtime(padding: str, align: int, dynamic: bool) -> None:
    model = make_model(dynamic=dynamic, mode="bilinear", padding_mode=padding, align_corners=align)
    assert np.abs(run(rewritten(model)) - run(model)).max() < 1e-5


def test_linear_of_opset_20_is_taken() -> None:
    """The word that TensorRT's parser takes for `nearest`."""
    model = make_model(opset=20, mode="linear", padding_mode="zeros", align_corners=0)
    assert np.abs(run(rewritten(model)) - run(model)).max() < 1e-5


def test_mistakes_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: the nearest pixel, the other corner convention, and a rewrite that swaps x and y."""
    model = make_model(mode="bilinear", padding_mode="zeros", align_corners=0)
    want = run(model)
    for wrong in (
        make_model(mode="nearest", padding_mode="zeros", align_corners=0),
        make_model(mode="bilinear", padding_mode="zeros", align_corners=1),
    ):
        assert np.abs(run(wrong) - want).max() > 0.1
    real = grid_sample._Sampler._pixels
    monkeypatch.setattr(grid_sample._Sampler, "_pixels", lambda self, axis, size: real(self, 1 - axis, size))
    assert np.abs(run(rewritten(model)) - want).max() > 0.1


@pytest.mark.parametrize("attributes", [{"mode": "nearest"}, {"mode": "bilinear", "padding_mode": "reflection"}])
def test_other_modes_are_left_alone(attributes: dict[str, str]) -> None:
    model = make_model(**attributes)
    assert grid_sample.grid_sample_to_gather(GraphEditor(model)) == 0
    assert "GridSample" in {n.op_type for n in model.graph.node}
