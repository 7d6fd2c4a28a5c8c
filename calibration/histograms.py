"""What is kept of a tensor while real data passes through a graph: a histogram of its magnitudes and a few of its rows.

Both are bounded whatever the number of values, and neither depends on the order in which batches arrive: the range of
a histogram is always a power of two, so that widening it merges pairs of bins exactly, and rows are kept by a random
key, the smallest ones (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir", with equal weights).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixano_edge.engine.errors import CalibrationError

BINS = 2048
"""As many as TensorRT's and ONNX Runtime's entropy calibrators work with."""
SMALLEST_NORMAL = 2.0**-14
"""Of fp16; what is smaller loses bits there."""
ROW_BYTES = 1 << 20
"""Most bytes of rows kept per tensor."""
ROWS = 512


class Histogram:
    """Magnitudes of a tensor's values.

    Args:
        axis: Axis of the channels, whose largest magnitudes are kept one by one; None: they are not.

    Attributes:
        counts: (2048,) int64, values by magnitude in equal bins over [0, limit); exact zeros are not among them.
        limit: A power of two, more than every magnitude; 0 until the first value that is not 0.
        minimum, maximum: Smallest and largest value; inf and -inf until there is one.
        count: Number of values.
        zeros: How many of them were exactly 0.
        subnormal: How many of them were not 0 and smaller than fp16's smallest normal number.
        channels: (C,) float32, largest magnitude by channel; None without `axis` or before the first value.
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.limit = 0.0
        self.minimum, self.maximum = math.inf, -math.inf
        self.count = self.zeros = self.subnormal = 0
        self.channels: NDArray[np.float32] | None = None

    @property
    def largest(self) -> float:
        """Largest magnitude; 0 before the first value."""
        return max(-self.minimum, self.maximum, 0.0) if self.count else 0.0

    @property
    def centres(self) -> NDArray[np.float64]:
        """(2048,) magnitudes in the middle of the bins."""
        return np.asarray((np.arange(BINS) + 0.5) * (self.limit / BINS), np.float64)

    def update(self, values: NDArray[Any]) -> None:
        """Adds the values of a tensor of any shape.

        Raises:
            CalibrationError: A value is not finite, or the number of channels differs from before.
        """
        if values.size == 0:
            return
        # One bin count of a wide tensor needs several copies of it; slices of a few MB need little.
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError("A tensor has values that are not finite.", "Check the graph and the pictures.")
        largest = max(-low, high)
        if largest > 0:
            self._widen(_limit(largest))
        flat = values.reshape(-1)
        for start in range(0, flat.size, 1 << 20):
            self._count(flat[start : start + (1 << 20)])
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.count += values.size
        if self.axis is not None and values.ndim > 0:
            others = tuple(i for i in range(values.ndim) if i != self.axis % values.ndim)
            peaks = np.maximum(values.max(axis=others), -values.min(axis=others)).astype(np.float32)
            self._peak(peaks)

    def reach(self, magnitude: float) -> None:
        """Says that a magnitude was seen elsewhere, which widens the range and counts nowhere."""
        if magnitude > self.largest:
            self._widen(_limit(magnitude))
            self.maximum = magnitude

    def merge(self, other: Histogram) -> None:
        """Adds what another histogram of the same tensor counted.

        Raises:
            CalibrationError: It has other channels.
        """
        if other.axis != self.axis:
            raise CalibrationError(f"Channels are on axis {self.axis} and {other.axis}.", "Merge like with like.")
        if other.limit > 0:
            self._widen(other.limit)
            step = round(self.limit / other.limit)
            kept = BINS // step if step <= BINS else 0
            if kept:
                self.counts[:kept] += other.counts.reshape(kept, -1).sum(axis=1)
            else:
                self.counts[0] += other.counts.sum()
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.count += other.count
        self.zeros += other.zeros
        self.subnormal += other.subnormal
        if other.channels is not None:
            self._peak(other.channels)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, for an npz file; `from_arrays` reads them back."""
        numbers = [self.limit, self.minimum, self.maximum]
        totals = [self.count, self.zeros, self.subnormal, 0 if self.axis is None else 1, self.axis or 0]
        found = {"counts": self.counts, "numbers": np.array(numbers), "totals": np.array(totals, np.int64)}
        return found if self.channels is None else {**found, "channels": self.channels}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Histogram:
        """Undoes `arrays`.

        Raises:
            CalibrationError: They are no histogram's.
        """
        try:
            count, zeros, subnormal, has_axis, axis = (int(v) for v in arrays["totals"])
            made = cls(axis if has_axis else None)
            made.limit, made.minimum, made.maximum = (float(v) for v in arrays["numbers"])
            made.counts = np.array(arrays["counts"], np.int64)
        except (KeyError, ValueError) as error:
            raise CalibrationError(
                f"A stored histogram is damaged: {error}.", "Delete it and collect again."
            ) from error
        made.count, made.zeros, made.subnormal = count, zeros, subnormal
        made.channels = arrays.get("channels")
        if made.counts.shape != (BINS,) or made.counts.sum() + zeros != count:
            raise CalibrationError("A stored histogram does not add up.", "Delete it and collect again.")
        return made

    def _count(self, values: NDArray[Any]) -> None:
        zeros = values.size - int(np.count_nonzero(values))
        self.zeros += zeros
        if self.limit == 0:
            return
        magnitudes = np.abs(values, dtype=np.float64)
        self.subnormal += int(np.count_nonzero(magnitudes < SMALLEST_NORMAL)) - zeros
        # A product with a power of two is exact, so bins do not depend on the order of the batches.
        bins = (magnitudes * (BINS / self.limit)).astype(np.int64)
        self.counts += np.bincount(bins, minlength=BINS)
        self.counts[0] -= zeros

    def _widen(self, limit: float) -> None:
        if self.limit == 0:
            self.limit = limit
        while self.limit < limit:
            self.counts[: BINS // 2] = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[BINS // 2 :] = 0
            self.limit *= 2

    def _peak(self, peaks: NDArray[np.float32]) -> None:
        if self.channels is not None and self.channels.shape != peaks.shape:
            raise CalibrationError(
                f"A tensor has {len(self.channels)} channels and then {len(peaks)}.",
                "Its channels are on another axis; report this.",
            )
        self.channels = peaks if self.channels is None else np.maximum(self.channels, peaks)


class Rows:
    """A random choice of a tensor's rows (its last axis), at most `ROWS` of them and `ROW_BYTES` in all.

    Attributes:
        values: (R, C) float32.
        keys: (R,) float64, what they were chosen by.
    """

    def __init__(self) -> None:
        self.values: NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self.keys: NDArray[np.float64] = np.zeros(0)

    def update(self, values: NDArray[Any], seed: int) -> None:
        """Adds the rows of a tensor of shape (..., C).

        Args:
            values: At least one axis.
            seed: Another one for every batch; the same batch and seed give the same rows.
        """
        rows = values.reshape(-1, values.shape[-1])
        keys = np.random.default_rng(seed).random(len(rows))
        kept = min(ROWS, max(8, ROW_BYTES // (4 * rows.shape[1])))
        if len(rows) > kept:
            chosen = np.sort(np.argpartition(keys, kept)[:kept])
            rows, keys = rows[chosen], keys[chosen]
        if len(self.keys):
            rows, keys = np.concatenate([self.values, rows]), np.concatenate([self.keys, keys])
        order = np.argsort(keys, kind="stable")[:kept]
        self.values, self.keys = np.ascontiguousarray(rows[order], np.float32), keys[order]


def _limit(largest: float) -> float:
    """The smallest power of two above a magnitude."""
    return math.ldexp(1.0, math.frexp(largest)[1])
