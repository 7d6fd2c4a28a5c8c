"""Which operators a runtime really executes: the table of ONNX Runtime's optimised graph, and its int8 kernels.

``python -m pixano_edge.calibration.fusion FILE`` prints it. A quantised graph says what may be computed in int8;
whether a kernel does so depends on patterns that ONNX Runtime looks for when it loads the file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from pixano_edge.calibration.observe import open_graph
from pixano_edge.engine.errors import CalibrationError, EdgeError

INTEGER = frozenset(
    ("ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearConv",
     "QLinearMatMul")
)  # fmt: skip
FLOAT = frozenset(("Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"))


@dataclass(frozen=True)
class Fusion:
    """What became of a graph.

    Attributes:
        operators: How many nodes of each operator the optimised graph has.
        integer: Products that run in int8.
        left: Names of products with quantised weights that stayed in float: the weight is widened at every run.
    """

    operators: dict[str, int]
    integer: int
    left: list[str]


def fusion(model: onnx.ModelProto) -> Fusion:
    """Lets ONNX Runtime's CPU provider optimise a graph, and looks at the result.

    Raises:
        CalibrationError: ONNX Runtime does not take the graph.
        MissingDependencyError: It is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "optimised.onnx"
        open_graph(model, 1, save=file)
        optimised = onnx.load(file)
    return count(optimised)


def count(optimised: onnx.ModelProto) -> Fusion:
    """The table of an optimised graph."""
    nodes = optimised.graph.node
    weights = {t.name for t in optimised.graph.initializer if t.data_type in (TensorProto.INT8, TensorProto.UINT8)}
    widened = {n.output[0] for n in nodes if n.op_type == "DequantizeLinear" and n.input[0] in weights}
    left = [n.name or n.output[0] for n in nodes if n.op_type in FLOAT and widened.intersection(n.input)]
    operators = Counter(str(n.op_type) for n in nodes)
    return Fusion(dict(sorted(operators.items())), sum(operators[name] for name in INTEGER), left)


def main(arguments: list[str] | None = None) -> int:
    """The command: prints the table of a file; 1 when a quantised product stayed in float."""
    parser = argparse.ArgumentParser(prog="python -m pixano_edge.calibration.fusion", description=__doc__)
    parser.add_argument("file", type=Path)
    file = parser.parse_args(arguments).file
    try:
        try:
            model = onnx.load(file)
        except Exception as error:
            raise CalibrationError(f"'{file}' is not a readable ONNX file: {error}", "Give a graph's file.") from error
        found = fusion(model)
    except EdgeError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    lines = [f"{number:6d}  {name}" for name, number in found.operators.items()]
    lines += [f"{found.integer} products in int8, {len(found.left)} with int8 weights left in float", *found.left]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if found.left else 0


if __name__ == "__main__":
    raise SystemExit(main())
