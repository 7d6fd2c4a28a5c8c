"""Does memory stand still while an annotator clicks? Resident set and Python allocations over many clicks."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt


@dataclass(frozen=True)
class Drift:
    """Bytes. "Before" is taken after the warm-up.

    Attributes:
        calls: Measured clicks.
        rss_before: Resident set before.
        rss_after: Resident set after.
        traced_before: Python allocations (numpy included) before.
        traced_after: The same after.
        traced_peak: Highest during the clicks.
        answer: Size of one answer (masks and scores), which the caller owns and drops.
    """

    calls: int
    rss_before: int
    rss_after: int
    traced_before: int
    traced_after: int
    traced_peak: int
    answer: int

    @property
    def rss_drift(self) -> int:
        return self.rss_after - self.rss_before

    @property
    def traced_drift(self) -> int:
        return self.traced_after - self.traced_before

    @property
    def work_memory(self) -> int:
        """Peak of one click above the steady state, without the answer itself."""
        return self.traced_peak - self.traced_before - self.answer


def measure_drift(
    bundle: Bundle | Path,
    calls: int = 500,
    warmup: int = 30,
    threads: int | None = None,
    on_call: Callable[[], None] = lambda: None,
) -> Drift:
    """Clicks `calls` times on one encoded picture, at a new place each time, and drops every answer.

    Args:
        bundle: SAM 2 bundle.
        calls: Measured clicks.
        warmup: Clicks before, during which arenas and caches fill.
        threads: CPU threads of the engine.
        on_call: Called after each measured click; must not keep memory.
    """
    import psutil

    predictor = Sam2ImagePredictor.open(bundle, threads=threads)
    height, width = 540, 960
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    places = rng.uniform((0, 0), (width - 1, height - 1), (warmup + calls, 2))
    embedding = predictor.encode(picture)
    process = psutil.Process()

    def click(place: np.ndarray) -> int:
        answer = predictor.predict(embedding, [Prompt(points=place[None], labels=[1])], multimask=True)
        return answer.masks.nbytes + answer.scores.nbytes

    tracemalloc.start()
    try:
        for place in places[:warmup]:
            size = click(place)
        gc.collect()
        rss_before, traced_before = process.memory_info().rss, tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for place in places[warmup:]:
            click(place)
            on_call()
        peak = tracemalloc.get_traced_memory()[1]
        gc.collect()
        rss_after, traced_after = process.memory_info().rss, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    predictor.close()
    return Drift(calls, rss_before, rss_after, traced_before, traced_after, peak, size)
