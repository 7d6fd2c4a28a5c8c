"""Figures: percentiles, relative error, bootstrap intervals. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating] | Sequence[float]


def relative_error(value: npt.NDArray[np.floating], reference: npt.NDArray[np.floating]) -> float:
    """max |value - reference| / max |reference|, as in the manifests' parity reports."""
    if value.shape != reference.shape:
        raise ValueError(f"relative_error compares one shape, got {value.shape} and {reference.shape}")
    scale = float(np.abs(reference).max(initial=0.0))
    worst = float(np.abs(value.astype(np.float64) - reference).max(initial=0.0))
    return worst / scale if scale else (0.0 if worst == 0 else float("inf"))


@dataclass(frozen=True)
class Latency:
    """Seconds: percentiles of `count` measured calls (linear interpolation between ranks)."""

    p50: float
    p90: float
    p99: float
    mean: float
    count: int


def latency(seconds: Floats) -> Latency:
    """Percentiles of measured times in seconds; raises ValueError for none."""
    values = np.asarray(seconds, np.float64)
    if not values.size:
        raise ValueError("no measurement to summarise")
    p50, p90, p99 = (float(v) for v in np.percentile(values, (50, 90, 99)))
    return Latency(p50, p90, p99, float(values.mean()), int(values.size))


def bootstrap_mean(
    values: Floats, groups: Sequence[int] | None = None, samples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean by the percentile bootstrap (Efron 1979).

    Args:
        values: One figure per prompt.
        groups: Scene of each figure. Scenes are drawn whole, since objects of one scene are not independent;
            without it every figure is drawn on its own.
        samples: Number of draws.
        level: Share of the draws inside the interval.
        seed: Seed of the draws; equal input gives equal output.

    Returns:
        Lower and upper end; both the mean when there is only one group.
    """
    array = np.asarray(values, np.float64)
    if not array.size:
        raise ValueError("no figure to summarise")
    labels = np.arange(len(array)) if groups is None else np.asarray(groups)
    _, inverse = np.unique(labels, return_inverse=True)
    sums = np.bincount(inverse, weights=array)
    counts = np.bincount(inverse)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(sums), size=(samples, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, (50 * (1 - level), 50 * (1 + level)))
    return float(low), float(high)
