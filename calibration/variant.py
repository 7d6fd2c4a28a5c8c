"""From a set of blocks to graph files: observations of each graph, and quantised copies of it on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from pixano_edge.calibration.blocks import Block, blocks
from pixano_edge.calibration.graph import load_graph
from pixano_edge.calibration.observe import GROUP_BYTES, Observations, observe
from pixano_edge.calibration.qdq import QuantizationReport, quantize, tensors
from pixano_edge.engine.bundle.files import os_errors

from .result import TensorRange
from .search import Unit
from .spool import Feeds


@dataclass(frozen=True, eq=False)
class Source:
    """One fp32 graph with what was seen of it.

    Attributes:
        graph: Its name in the contract.
        path: Its file.
        model: Weights inside.
        blocks: That can be quantised, by name.
        observations: Of the calibration data.
    """

    graph: str
    path: Path
    model: onnx.ModelProto
    blocks: dict[str, Block]
    observations: Observations

    def units(self) -> list[Unit]:
        """The blocks for the search, in graph order."""
        return [Unit(self.graph, name) for name in self.blocks]


def read_source(
    graph: str,
    path: Path,
    feeds: Feeds,
    store: Path,
    threads: int | None,
    *,
    group_bytes: int = GROUP_BYTES,
    on_feed: Callable[[], None] = lambda: None,
) -> Source:
    """Opens a graph and observes it on recorded inputs; goes on where `store` ends.

    Raises:
        CalibrationError: See `observe`.
    """
    model = load_graph(path)
    sizes = {name: tuple(value.shape) for name, value in feeds[0].items()}
    found = {block.name: block for block in blocks(model, sizes)}
    wanted = tensors(model)
    store.parent.mkdir(parents=True, exist_ok=True)
    seen = observe(
        model, feeds, wanted, store, group_bytes=group_bytes, threads=threads or 0, on_feed=lambda _: on_feed()
    )
    return Source(graph, path, model, found, seen)


class VariantFiles:
    """Graph files of sets of blocks; each is made once and the files of older sets are removed.

    Args:
        sources: By graph.
        folder: For the files.
        method: How ranges are found.
        smooth: How channels are rescaled, see `quantize`.
        keep: Files kept of a graph.
    """

    def __init__(
        self, sources: Mapping[str, Source], folder: Path, method: str, smooth: float | str | None, keep: int = 4
    ) -> None:
        self.sources = sources
        self._folder, self._method, self._smooth, self._keep = folder, method, smooth, keep
        self._made: dict[str, list[Path]] = {graph: [] for graph in sources}

    def quantise(self, graph: str, names: Collection[str]) -> tuple[onnx.ModelProto, QuantizationReport]:
        """A graph with some blocks in int8."""
        source = self.sources[graph]
        return quantize(source.model, source.observations, blocks=set(names), method=self._method, smooth=self._smooth)

    def files(self, units: Iterable[Unit]) -> dict[str, Path]:
        """Files of the graphs that have a block in the set; the others run fp32."""
        by_graph: dict[str, set[str]] = {}
        for unit in units:
            by_graph.setdefault(unit.graph, set()).add(unit.name)
        return {graph: self._file(graph, names) for graph, names in by_graph.items()}

    def _file(self, graph: str, names: set[str]) -> Path:
        name = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]
        path = self._folder / f"{graph}.{name}.onnx"
        made = self._made[graph]
        if path in made:
            return path
        model, _ = self.quantise(graph, names)
        with os_errors(f"writing '{path}'"):
            self._folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(model.SerializeToString())
            made.append(path)
            while len(made) > self._keep:
                made.pop(0).unlink(missing_ok=True)
        return path


def refused(source: Source, files: VariantFiles) -> dict[Unit, str]:
    """Blocks that cannot be quantised, with the reason; for example because their input was always 0."""
    _, report = files.quantise(source.graph, list(source.blocks))
    return {Unit(source.graph, name): why for name, why in report.kept.items()}


def quantised_tensors(model: onnx.ModelProto) -> dict[str, float]:
    """What a quantised graph rounds to int8 while it runs, and the largest magnitude that each holds."""
    scales = {t.name: t for t in model.graph.initializer}
    return {
        node.input[0]: 127 * float(numpy_helper.to_array(scales[node.input[1]]))
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in scales and node.input[1] in scales
    }


def ranges(
    source: Source,
    model: onnx.ModelProto,
    report: QuantizationReport,
    feeds: Feeds,
    held_out: Feeds,
    threads: int | None,
    group_bytes: int = GROUP_BYTES,
) -> tuple[TensorRange, ...]:
    """The ranges of a quantised graph, and what they clip where it really runs: after rescaling, on rounded inputs.

    Args:
        source: What the graph was made of.
        model: Quantised.
        report: Of `quantize`.
        feeds: Some of the calibration data.
        held_out: Some of the held-out data.
        threads: Of ONNX Runtime.
        group_bytes: See `observe`.

    Raises:
        CalibrationError: A value in it is not finite.
    """
    limits = quantised_tensors(model)
    options: dict[str, Any] = {"group_bytes": group_bytes, "threads": threads or 0}
    seen = observe(model, feeds, list(limits), None, **options)
    judged = observe(model, held_out, list(limits), None, **options) if len(held_out) else None
    smoothed = _inputs(source, model, report.smoothed)
    found = []
    for tensor, amax in limits.items():
        histogram = seen[tensor]
        told = report.ranges.get(tensor)
        found.append(
            TensorRange(
                source.graph,
                tensor,
                histogram.limit,
                TensorRange.merged(np.asarray(histogram.counts)),
                amax,
                told.method if told is not None else "",
                clipped_fraction(seen, tensor, amax),
                clipped_fraction(judged, tensor, amax) if judged is not None else None,
                tensor in smoothed,
            )
        )
    return tuple(found)


def clipped_fraction(observations: Observations, tensor: str, amax: float) -> float:
    """Share of a tensor's observed values beyond a magnitude by more than rounding, to a bin's width."""
    histogram = observations[tensor]
    if not histogram.count:
        return 0.0
    edges = histogram.centres - histogram.centres[0]  # lower ones: a value that equals the range is not beyond it
    return float(histogram.counts[edges > amax * (1 + 0.5 / 127)].sum() / histogram.count)


def _inputs(source: Source, model: onnx.ModelProto, blocks: Collection[str]) -> set[str]:
    """The tensors in front of the pairs that some blocks read."""
    writers = {output: node for node in model.graph.node for output in node.output}
    members = {name for block in blocks for name in source.blocks[block].nodes}
    found = set()
    for node in model.graph.node:
        if node.name in members:
            tensor = node.input[0]
            while tensor in writers and writers[tensor].op_type in ("DequantizeLinear", "QuantizeLinear"):
                tensor = writers[tensor].input[0]
            found.add(tensor)
    return found
