"""How far one graph's outputs are from another's, over several inputs and sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import ExportError
from pixano_edge.export.extras import missing

Arrays = dict[str, npt.NDArray[Any]]
Feeds = Callable[[GraphSpec, Mapping[str, int], int], Arrays]
"""Inputs of a graph for given sizes of its dynamic dimensions and a seed."""
Settle = Callable[[GraphSpec, Arrays, Arrays], Arrays]
"""Outputs to compare for a graph, the wanted and the given ones: the given ones, unless a family knows differences that
mean nothing, such as two queries that changed ranks on a tie."""


@dataclass
class Worst:
    """Largest error seen of one tensor, and its largest reference value.

    The relative error is against the largest value over all inputs: a single value may be close to 0.
    """

    absolute: float = 0.0
    scale: float = 0.0

    @property
    def relative(self) -> float:
        return self.absolute / (self.scale + 1e-12)

    def add(self, got: npt.NDArray[Any], want: npt.NDArray[Any]) -> None:
        """Takes one more pair into account. Another shape, or NaN, counts as an infinite error."""
        if got.shape != want.shape:
            self.absolute = float("inf")
            return
        difference = float(np.abs(got.astype(np.float64) - want).max())
        # NaN compares as no difference at all; it must count as the largest.
        difference = difference if np.isfinite(difference) else float("inf")
        self.absolute = max(self.absolute, difference)
        self.scale = max(self.scale, float(np.abs(want).max()))


def sizes_to_try(spec: GraphSpec) -> list[dict[str, int]]:
    """Sizes of the dynamic dimensions: smallest, typical, and two that differ in every dimension.

    They stay small, since a graph is run in full on the CPU. A fixed graph gets two empty entries: two inputs. Where
    the contract lists profiles, sizes that fit none of them give way to the smallest of each profile.
    """
    if not spec.ranges:
        return [{}, {}]

    def within(wanted: Callable[[int], int]) -> dict[str, int]:
        return {
            name: max(low, min(high, wanted(index))) for index, (name, (low, _, high)) in enumerate(spec.ranges.items())
        }

    typical = {name: middle for name, (_, middle, _) in spec.ranges.items()}
    tried = [within(lambda i: 0), typical, within(lambda i: 3 + 2 * i), within(lambda i: 5 if i == 0 else 1 + i)]
    fitting = [s for s in tried if not spec.profiles or any(_fits(s, profile) for profile in spec.profiles)]
    if len(fitting) < len(tried):
        tried = fitting + [{name: low for name, (low, _, _) in profile.items()} for profile in spec.profiles]
    return [s for index, s in enumerate(tried) if s not in tried[:index]]


def _fits(sizes: Mapping[str, int], profile: Mapping[str, tuple[int, int, int]]) -> bool:
    return all(low <= sizes[name] <= high for name, (low, _, high) in profile.items())


def measure(
    reference: Path,
    candidate: Path,
    spec: GraphSpec,
    feeds: Feeds,
    threads: int | None = None,
    settle: Settle | None = None,
) -> dict[str, Worst]:
    """Runs both ONNX files on the same inputs, with ONNX Runtime on the CPU and no graph optimisation.

    Args:
        reference: File of the graph that is right.
        candidate: File of the graph to check.
        spec: Contract of both; its ranges give the sizes.
        feeds: Makes the inputs.
        threads: Threads within an operator; ONNX Runtime's choice if None.
        settle: See `Settle`; None compares everything.

    Returns:
        Errors by output name.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        ExportError: The candidate does not load or run.
    """
    try:
        import onnxruntime as ort
        from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
    except ImportError as error:
        raise missing("onnxruntime", "Comparing graphs") from error
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Optimised, two equal graphs may differ by more than the change under test.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads:
        options.intra_op_num_threads = threads
    names = [t.name for t in spec.outputs]
    worst = {name: Worst() for name in names}

    def session(path: Path) -> Any:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    right = session(reference)
    try:
        changed = session(candidate)
        for seed, sizes in enumerate(sizes_to_try(spec)):
            arrays = feeds(spec, sizes, seed)
            want, got = (dict(zip(names, s.run(names, arrays))) for s in (right, changed))
            got = settle(spec, want, got) if settle is not None else got
            for name in names:
                worst[name].add(got[name], want[name])
    except (
        ort_errors.Fail,
        ort_errors.InvalidArgument,
        ort_errors.InvalidGraph,
        ort_errors.NotImplemented,
        ort_errors.RuntimeException,
    ) as error:
        raise ExportError(
            f"The changed graph '{spec.name}' does not run: {str(error).splitlines()[0]}", "Please report this."
        ) from error
    return worst


def problems(worst: Mapping[str, Worst], tolerance: float) -> Iterable[str]:
    """Outputs whose relative error is above `tolerance`, in words."""
    return [f"{name}: {w.relative:.2e} > {tolerance:.0e}" for name, w in worst.items() if not w.relative <= tolerance]
