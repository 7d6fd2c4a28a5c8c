"""Makes engine/assets/double.onnx, the graph that `pixano-edge doctor` opens to see which providers really load.

Run from the repository root: python tests/support/make_double_onnx.py
"""

from __future__ import annotations

from pathlib import Path

from onnx import TensorProto, checker, helper


def build() -> bytes:
    """``y = x + x`` on float32[4], opset 13, small enough to live in the package."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    checker.check_model(model)
    return bytes(model.SerializeToString())


if __name__ == "__main__":
    Path("engine/assets/double.onnx").write_bytes(build())
