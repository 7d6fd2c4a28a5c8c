"""Runs an fp32 graph on real inputs and keeps what calibration needs to know of its tensors.

Memory is bounded: the tensors are taken in groups, each by a session that computes the graph only as far as its group
needs, and a tensor is gone once its histogram has been brought up to date. What was collected is saved after every
input, so that an interrupted run goes on where it stopped, with the same result as one that was not interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from pixano_edge.calibration.calibrators import Range, choose
from pixano_edge.calibration.graph import LINEAR, Graph, cut, digest, infer_shapes, load_graph
from pixano_edge.calibration.histograms import Histogram, Rows
from pixano_edge.engine.errors import CalibrationError
from pixano_edge.export.extras import missing

T = TypeVar("T")
GROUP_BYTES = 1 << 30
VERSION = 1


@dataclass
class Observations:
    """What was seen of a graph's tensors.

    Attributes:
        model_sha256: Of the graph that was run, see `graph.digest`.
        histograms: By tensor.
        rows: By tensor that a MatMul or Gemm reads.
        feeds: SHA-256 of every input, in the order in which they were run.
    """

    model_sha256: str
    histograms: dict[str, Histogram] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    feeds: list[str] = field(default_factory=list)
    _memory: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    def range(self, tensor: str, method: str) -> Range:
        """What `calibrators.choose` finds for a tensor; remembered, for a search quantises a graph many times."""
        return self.remember(("range", tensor, method), lambda: choose(self[tensor], method))

    def remember(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` gave for a key the first time; it must depend on these observations and their graph alone."""
        if key not in self._memory:
            self._memory[key] = make()
        found: T = self._memory[key]
        return found

    def __getitem__(self, tensor: str) -> Histogram:
        try:
            return self.histograms[tensor]
        except KeyError:
            raise CalibrationError(f"Tensor '{tensor}' was not observed.", "Observe the graph again.") from None

    def __contains__(self, tensor: object) -> bool:
        return tensor in self.histograms

    def save(self, path: Path) -> None:
        """Writes an npz file; a reader finds the old one or the new one, never a part."""
        arrays: dict[str, NDArray[Any]] = {}
        for index, (name, histogram) in enumerate(self.histograms.items()):
            arrays |= {f"{index}.{key}": value for key, value in histogram.arrays().items()}
            if name in self.rows:
                arrays |= {f"{index}.rows": self.rows[name].values, f"{index}.keys": self.rows[name].keys}
        about = {"version": VERSION, "model": self.model_sha256, "tensors": [*self.histograms], "feeds": self.feeds}
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with unfinished.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            os.replace(unfinished, path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise CalibrationError(
                f"What was collected cannot be saved to '{path}': {error.strerror}.",
                "Make room there, or collect into another folder.",
            ) from error

    @classmethod
    def load(cls, path: Path) -> Observations:
        """Reads what `save` wrote.

        Raises:
            CalibrationError: The file is no such thing.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(arrays.pop("about").tobytes())
            if about["version"] != VERSION:
                raise ValueError(f"version {about['version']}")
            found = cls(about["model"], feeds=list(about["feeds"]))
            parts: dict[str, dict[str, NDArray[Any]]] = {}
            for key, value in arrays.items():
                index, name = key.split(".")
                parts.setdefault(index, {})[name] = value
            for index, tensor in enumerate(about["tensors"]):
                part = parts[str(index)]
                found.histograms[tensor] = Histogram.from_arrays(part)
                if "rows" in part:
                    found.rows[tensor] = Rows()
                    found.rows[tensor].values, found.rows[tensor].keys = part["rows"], part["keys"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise CalibrationError(
                f"'{path}' holds no observations that this version reads: {error}.", "Delete it and collect again."
            ) from error
        return found


def observe(
    model: Path | onnx.ModelProto,
    feeds: Iterable[Mapping[str, NDArray[Any]]],
    tensors: Sequence[str],
    store: Path | None = None,
    *,
    group_bytes: int = GROUP_BYTES,
    threads: int = 0,
    on_feed: Callable[[int], None] | None = None,
) -> Observations:
    """Runs a graph on every feed and keeps the ranges of some of its tensors.

    Args:
        model: The fp32 graph, or its file.
        feeds: Inputs by name, one run each; read once, and those that `store` has already are only compared.
        tensors: Which to look at, see `qdq.tensors`; graph inputs are allowed.
        store: File to save to after each feed and to go on from. None: nothing is saved.
        group_bytes: Most bytes of tensors that one run hands out. More groups mean less memory and more time.
        threads: Of ONNX Runtime; 0 for its default.
        on_feed: Called with the number of feeds that are done, after each.

    Raises:
        CalibrationError: There is no feed; `store` belongs to another graph, other tensors or other feeds; a tensor
            has values that are not finite.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    graph = load_graph(model) if isinstance(model, Path) else model
    found = _start(graph, tensors, store)
    saved, runner = len(found.feeds), None
    index = -1
    for index, feed in enumerate(feeds):
        key = _feed_digest(feed)
        if index < saved:
            if found.feeds[index] != key:
                raise CalibrationError(
                    f"Input {index} is not the one that '{store}' was collected with.",
                    "Use the same data, or delete the file to start anew.",
                )
            continue
        runner = runner or _Runner(graph, tensors, feed, group_bytes, threads)
        for name, value in runner.run(feed):
            try:
                found.histograms[name].update(value)
            except CalibrationError as error:
                raise CalibrationError(f"Tensor '{name}', input {index}: {error.message}", error.action) from error
            if name in found.rows and value.ndim:
                found.rows[name].update(value, index)
        found.feeds.append(key)
        if store is not None:
            found.save(store)
        if on_feed is not None:
            on_feed(index + 1)
    if index + 1 < saved:
        raise CalibrationError(
            f"'{store}' was collected with {saved} inputs, now there are {index + 1}.",
            "Use the same data, or delete the file to start anew.",
        )
    if not found.feeds:
        raise CalibrationError("There is no input to calibrate with.", "Give at least one picture.")
    return found


def _start(graph: onnx.ModelProto, tensors: Sequence[str], store: Path | None) -> Observations:
    """What the store has, or nothing yet."""
    key = digest(graph)
    if store is not None and store.exists():
        found = Observations.load(store)
        if found.model_sha256 != key or set(found.histograms) != set(tensors):
            raise CalibrationError(
                f"'{store}' was collected from another graph or for other layers.", "Delete it to start anew."
            )
        return found
    lookup = Graph(graph)
    found = Observations(key)
    for tensor in dict.fromkeys(tensors):
        readers = {node.op_type for node in lookup.readers(tensor) if node.input[0] == tensor}
        writer = lookup.writer(tensor)
        # The last axis is that of the channels where weights are read; between two activations it may be a sequence.
        weighing = [n for n in lookup.readers(tensor) if n.input[0] == tensor and lookup.weight(n) is not None]
        linear = any(node.op_type in LINEAR for node in weighing)
        convolves = "Conv" in readers or (writer is not None and writer.op_type == "Conv")
        found.histograms[tensor] = Histogram(-1 if linear else 1 if convolves else None)
        if linear:
            found.rows[tensor] = Rows()
    return found


def _feed_digest(feed: Mapping[str, NDArray[Any]]) -> str:
    state = hashlib.sha256()
    for name in sorted(feed):
        state.update(f"{name} {feed[name].dtype} {feed[name].shape};".encode())
        state.update(np.ascontiguousarray(feed[name]).data)
    return state.hexdigest()


class _Runner:
    """Sessions for groups of tensors."""

    def __init__(
        self,
        graph: onnx.ModelProto,
        tensors: Sequence[str],
        feed: Mapping[str, NDArray[Any]],
        group_bytes: int,
        threads: int,
    ) -> None:
        self._graph, self._threads = graph, threads
        self._passed = [t for t in tensors if t in {v.name for v in graph.graph.input}]
        self._groups = plan_groups(graph, [t for t in tensors if t not in self._passed], feed, group_bytes)
        weights = sum(len(t.raw_data) for t in graph.graph.initializer)
        # Every session has its weights; where several of them would be too much, each is opened when it is needed.
        self._open: dict[int, Any] | None = {} if weights * len(self._groups) <= group_bytes else None

    def run(self, feed: Mapping[str, NDArray[Any]]) -> Iterable[tuple[str, NDArray[Any]]]:
        """Every tensor once, with its value."""
        for name in self._passed:
            yield name, feed[name]
        for index, group in enumerate(self._groups):
            session = self._session(index, group)
            wanted = {i.name for i in session.get_inputs()}
            values = session.run(group, {name: value for name, value in feed.items() if name in wanted})
            del session
            while values:
                yield group[len(values) - 1], values.pop()

    def _session(self, index: int, group: list[str]) -> Any:
        if self._open is not None and index in self._open:
            return self._open[index]
        session = open_graph(cut(self._graph, group), self._threads)
        if self._open is not None:
            self._open[index] = session
        return session


def open_graph(
    model: onnx.ModelProto | Path,
    threads: int = 0,
    *,
    optimise: bool = True,
    save: Path | None = None,
    arena: bool = False,
) -> Any:
    """An ``InferenceSession`` of ONNX Runtime on the CPU.

    Args:
        model: Weights inside, at most 2 GB; or its file, which is not held in memory twice.
        threads: 0 for ONNX Runtime's default.
        optimise: Let it rewrite the graph.
        save: File to write the rewritten graph to.
        arena: Keep memory between runs: faster, and a run's peak stays taken.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        CalibrationError: It does not take the graph.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise missing("onnxruntime", "Calibrating") from error
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = arena
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save is not None:
        options.optimized_model_filepath = str(save)
    try:
        held = str(model) if isinstance(model, Path) else model.SerializeToString()
        return ort.InferenceSession(held, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        name = model.name if isinstance(model, Path) else model.graph.name
        raise CalibrationError(
            f"ONNX Runtime does not take the graph '{name}': {error}", "Please report this."
        ) from error


def plan_groups(
    graph: onnx.ModelProto, tensors: Sequence[str], feed: Mapping[str, NDArray[Any]], group_bytes: int
) -> list[list[str]]:
    """The tensors in graph order, as many to a group as fit; one that is larger than that has a group of its own."""
    shapes = infer_shapes(graph, {name: value.shape for name, value in feed.items()})
    place = {o: i for i, node in enumerate(graph.graph.node) for o in node.output}
    sizes = {
        t: 4 * int(np.prod(s, dtype=np.int64)) for t in tensors if (s := shapes.get(t)) is not None and -1 not in s
    }
    unknown = max(sizes.values(), default=group_bytes)
    groups: list[list[str]] = []
    room = 0
    for tensor in sorted(dict.fromkeys(tensors), key=lambda t: place.get(t, -1)):
        size = sizes.get(tensor, unknown)
        if not groups or size > room:
            groups.append([])
            room = group_bytes
        groups[-1].append(tensor)
        room -= size
    return groups
