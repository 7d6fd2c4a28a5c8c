"""Which operators a runtime really executes: the table of ONNX Runtime's optimised graph, and its int8 kernels.

``python -m pixano_edge.calibration.fusion FILE`` prints it. A quantised graph says what may be computed in int8;
whether a kernel does so depends on patterns that ONNX Runtime looks for when it loads the file. With ``--quantise`` an
fp32 graph is quantised first, with ranges that are made up: patterns and times do not depend on them, answers do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from pixano_edge.calibration import qdq
from pixano_edge.calibration.graph import digest, load_graph
from pixano_edge.calibration.histograms import Histogram
from pixano_edge.calibration.observe import Observations, open_graph
from pixano_edge.calibration.patterns import order_gelus
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


def with_unit_ranges(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph quantised for its patterns alone: every tensor is taken to reach from -1 to 1."""
    unit = Histogram()
    unit.update(np.linspace(-1, 1, 255, dtype=np.float32))
    observations = Observations(digest(model), dict.fromkeys(qdq.tensors(model), unit))
    return qdq.quantize(model, observations, method="minmax", smooth=None)[0]


def cpu_times(models: Sequence[onnx.ModelProto], sizes: Mapping[str, int], runs: int) -> list[float]:
    """Least CPU time in ms of a run of each graph on one thread; they take turns.

    Args:
        models: With the same inputs.
        sizes: Of open dimensions, by name.
        runs: Of each graph.

    Raises:
        CalibrationError: A dimension is open and has no size.
    """
    random = np.random.default_rng(0)
    feed = {}
    for value in models[0].graph.input:
        dims = [d.dim_value or sizes.get(d.dim_param, 0) for d in value.type.tensor_type.shape.dim]
        if 0 in dims:
            raise CalibrationError(f"Input '{value.name}' has open sizes.", "Give them: --size NAME=VALUE.")
        kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        numbers = random.standard_normal(dims) if kind.kind == "f" else np.zeros(dims)
        feed[value.name] = numbers.astype(kind)
    sessions = [open_graph(model, 1, arena=True) for model in models]
    for session in sessions:
        session.run(None, feed)
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(runs):
        for session, taken in zip(sessions, times):
            start = time.process_time()
            session.run(None, feed)
            taken.append(1000 * (time.process_time() - start))
    return [min(taken) for taken in times]


def main(arguments: list[str] | None = None) -> int:
    """The command: prints the table of a file; 1 when a quantised product stayed in float, 2 when there is no table."""
    parser = argparse.ArgumentParser(prog="python -m pixano_edge.calibration.fusion", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--quantise", action="store_true", help="quantise an fp32 graph first, with made-up ranges")
    parser.add_argument("--time", type=int, metavar="RUNS", help="with --quantise: CPU time of both graphs, one thread")
    parser.add_argument("--size", action="append", default=[], metavar="NAME=VALUE", help="of an open dimension")
    given = parser.parse_args(arguments)
    try:
        model = load_graph(given.file) if given.quantise else _load(given.file)
        looked_at = with_unit_ranges(model) if given.quantise else model
        found = fusion(looked_at)
        sizes = {name: int(value) for name, _, value in (text.partition("=") for text in given.size)}
        times = []
        if given.time and given.quantise:
            ordered = onnx.ModelProto()
            ordered.CopyFrom(model)
            order_gelus(ordered)
            times = cpu_times([model, ordered, looked_at], sizes, given.time)
    except (EdgeError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    lines = [f"{number:6d}  {name}" for name, number in found.operators.items()]
    lines += [f"{found.integer} products in int8, {len(found.left)} with int8 weights left in float", *found.left]
    if times:
        plain, ordered_time, int8 = times
        lines.append(
            f"CPU time: fp32 {plain:.1f} ms, with fused GELUs {ordered_time:.1f} ms, int8 {int8:.1f} ms, "
            f"ratios {int8 / plain:.2f} and {int8 / ordered_time:.2f}"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if found.left else 0


def _load(file: Path) -> onnx.ModelProto:
    try:
        return onnx.load(file)
    except Exception as error:
        raise CalibrationError(f"'{file}' is not a readable ONNX file: {error}", "Give a graph's file.") from error


if __name__ == "__main__":
    raise SystemExit(main())
