"""How long each graph takes, full and reduced in turns on the same recorded inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .result import Speed
from .spool import Feeds

ROUNDS = 12
WARM = 2


def time_graphs(
    pairs: Mapping[str, tuple[Path, Path]],
    feeds: Callable[[str], Feeds],
    threads: int | None,
    rounds: int = ROUNDS,
    on_graph: Callable[[], None] = lambda: None,
) -> tuple[tuple[Speed, ...], tuple[Speed, ...]]:
    """Times of fp32 and of the variant, graph by graph, in ONNX Runtime's CPU provider.

    Args:
        pairs: fp32 file and the variant's, by graph.
        feeds: Recorded inputs of a graph, of which those of the most frequent shapes are used; a graph without any is
            left out.
        threads: Of ONNX Runtime. With one thread the process's own time is taken, which other processes do not
            lengthen.
        rounds: Runs of each file.
        on_graph: Called after each graph.
    """
    full, reduced = [], []
    for graph, files in pairs.items():
        given = of_one_shape(feeds(graph))
        if len(given):
            times = _time(files, given, threads, rounds)
            full.append(_speed(graph, threads, times[0]))
            reduced.append(_speed(graph, threads, times[1]))
        on_graph()
    return tuple(full), tuple(reduced)


def of_one_shape(feeds: Feeds) -> Feeds:
    """The calls of the most frequent shapes: a median over prompts and single tokens would be that of neither."""
    shapes = [tuple((name, array.shape) for name, array in feed.items()) for feed in feeds]
    most = max(shapes, key=shapes.count, default=())
    return Feeds([file for file, shape in zip(feeds.files, shapes) if shape == most])


def _time(files: Sequence[Path], feeds: Feeds, threads: int | None, rounds: int) -> list[list[float]]:
    clock = _clock(threads)
    sessions = [_open(path, threads) for path in files]
    times: list[list[float]] = [[] for _ in files]
    for turn in range(WARM + rounds):
        feed = feeds[turn % len(feeds)]
        for session, taken in zip(sessions, times):
            start = clock()
            session.run(None, feed)
            if turn >= WARM:
                taken.append(clock() - start)
    return times


def _clock(threads: int | None) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


def _open(path: Path, threads: int | None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _speed(graph: str, threads: int | None, times: Sequence[float]) -> Speed:
    p50, p90 = np.percentile(times, (50, 90))
    clock = "cpu" if threads == 1 else "wall"
    return Speed(graph, "onnxruntime CPUExecutionProvider", threads, len(times), float(p50), float(p90), clock)
