"""What parity of every family with PyTorch shares: running exported files, the bar of tensors, the error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pixano_edge.engine.bundle.manifest import ParityReport
from pixano_edge.engine.errors import ExportError
from pixano_edge.export.differences import Arrays
from pixano_edge.export.extras import missing

Runner = Callable[[str, Arrays], Arrays]
"""Runs a graph by contract name: inputs by name to outputs by name."""

FP32_MAX_REL = 1e-4
FP16 = "fp16"
"""fp16 as a GPU computes it: every intermediate value rounded (`pixano_edge.export.fp16.rounded`)."""
FP16_CPU = "fp16-cpu"
"""fp16 files as ONNX Runtime's CPU provider runs them: mostly in fp32, with fp16 weights."""


class ParityError(ExportError):
    """The exported graphs do not match PyTorch; `report` holds the figures."""

    def __init__(self, message: str, action: str, report: ParityReport) -> None:
        super().__init__(message, action)
        self.report = report


def require_passed(report: ParityReport, problems: Sequence[str]) -> ParityReport:
    """The report, or ParityError with every figure that misses its bar, in words."""
    if not report.passed:
        only_fp16 = all(p.startswith("fp16") for p in problems)
        raise ParityError(
            f"The exported graphs do not match PyTorch: {'; '.join(problems)}.",
            "No bundle was written. "
            + ("Export with --variants fp32." if only_fp16 else "Please report this with the checkpoint's name."),
            report,
        )
    return report


def onnx_runner(files: Mapping[str, Path], threads: int | None = None, optimise: bool = True) -> Runner:
    """Runs ONNX files with ONNX Runtime on the CPU.

    Args:
        files: File per contract name.
        threads: Threads within an operator; ONNX Runtime's choice if None.
        optimise: Whether ONNX Runtime may rewrite the graph.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise missing("onnxruntime", "Measuring parity") from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads:
        options.intra_op_num_threads = threads
    sessions = {
        name: ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for name, path in files.items()
    }

    def run(graph: str, feeds: Arrays) -> Arrays:
        session = sessions[graph]
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds)))

    return run
