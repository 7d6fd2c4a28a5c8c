"""OpenVINO's own runtime on the graph files of a bundle, where the package ``openvino`` is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .contenders import Outputs

Arrays = Mapping[str, npt.NDArray[Any]]

PRECISIONS = {"OpenVINO fp32": "f32", "OpenVINO bf16": "bf16"}
"""Contender -> ``INFERENCE_PRECISION_HINT``. Without a hint OpenVINO takes bf16 where the CPU has it."""

MISSING = "not installed: pip install 'pixano-edge[openvino-runtime]'"


def is_here() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def left_out(flags: Sequence[str]) -> dict[str, str]:
    """Of `PRECISIONS`, who cannot run on a CPU with these flags (as of `engine.cli.host.Host`), and why."""
    if not is_here():
        return dict.fromkeys(PRECISIONS, MISSING)
    if {"AVX512-BF16", "AMX-BF16", "BF16"} & set(flags):
        return {}
    return {"OpenVINO bf16": "this CPU has no bf16 instructions"}


class OpenVinoGraph:
    """One ONNX file, compiled for the CPU with the shapes of the first call.

    Args:
        path: The file.
        threads: CPU threads.
        precision: A value of `PRECISIONS`.

    Raises:
        RuntimeError: OpenVINO cannot read or compile it.
    """

    def __init__(self, path: Path, threads: int, precision: str) -> None:
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }  # fmt: skip
        model = core.read_model(str(path))
        self._compiled: Any = core.compile_model(model, "CPU", settings)
        self._request: Any = self._compiled.create_infer_request()
        # A tensor may have the name of an operator beside the graph's own.
        self._outputs = {name: port for port in self._compiled.outputs for name in port.get_names()}

    def run(self, feeds: Arrays) -> Outputs:
        """Outputs by name, as views that the next call overwrites; inputs are not copied where they fit."""
        found = self._request.infer(dict(feeds), share_inputs=True, share_outputs=True)
        return {name: np.asarray(found[port]) for name, port in self._outputs.items()}
