"""From a histogram of magnitudes to the range that symmetric int8 covers.

- ``minmax``: the largest magnitude; clips nothing.
- ``percentile``: the magnitude below which 99.99 % of the values lie; ``percentile:99.9`` and others likewise (Wu et
  al. 2020, "Integer Quantization for Deep Learning Inference", arXiv:2004.09602, section 4).
- ``entropy``: the range whose quantised distribution has the smallest Kullback-Leibler divergence from the real one
  (Migacz 2017, "8-bit inference with TensorRT", GTC; ``onnxruntime/quantization/calibrate.py`` has the same search).
- ``mse``: the range with the smallest expected squared error.
- ``auto``: of all these, the one with the smallest expected squared error when clipping counts more than rounding
  does; ``minmax`` where it is as good.

Exact zeros are left out of every search: whatever the range, they are kept exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pixano_edge.calibration.histograms import BINS, Histogram
from pixano_edge.engine.errors import CalibrationError

METHODS = ("auto", "minmax", "entropy", "percentile", "mse")
PERCENTILES = (99.9, 99.99, 99.999)
CLIP_WEIGHT = 8.0
"""What a clipped value's squared error counts in `auto`. Rounding errors are as often up as down and average out over
the products that a value goes into; clipping always takes away, and from those values that say most. With 1, features
of the demo SAM 2 err more than without any clipping; with 64, those of the demo OWLv2 err as without."""
AS_GOOD = 1.01
"""`auto` keeps ``minmax`` unless its error is more than this times the best one's: what was not seen is not clipped."""
_PARTS = 2
"""Places per bin at which the rounding error is evaluated."""


@dataclass(frozen=True)
class Range:
    """What a quantised tensor covers.

    Attributes:
        amax: Largest magnitude that is not clipped, above 0.
        method: How it was found; of ``auto``, which one won.
        clipped_fraction: Share of the observed values beyond it.
        mse: Expected squared error of a value.
    """

    amax: float
    method: str
    clipped_fraction: float
    mse: float

    def scale(self, bits: int = 8) -> float:
        """Step of the quantised values."""
        return self.amax / levels(bits)


def levels(bits: int) -> int:
    """Largest quantised value: 127 for 8 bits. The range is symmetric, so -128 is not used."""
    return 2 ** (bits - 1) - 1


def choose(histogram: Histogram, method: str = "auto", bits: int = 8) -> Range:
    """Finds the range of a tensor.

    Args:
        histogram: Of its values.
        method: See the module; ``percentile:P`` for a percentile of one's own.
        bits: 2 to 16.

    Raises:
        CalibrationError: The tensor was always 0 or never seen, or there is no such method.
    """
    if not 2 <= bits <= 16:
        raise CalibrationError(f"Cannot quantise to {bits} bits.", "Use 2 to 16.")
    largest = histogram.largest
    if largest == 0:
        raise CalibrationError("A tensor was 0 on all of the data.", "Use other data, or leave its layer in float.")
    name, _, argument = method.partition(":")
    if name not in METHODS or (argument and name != "percentile"):
        raise CalibrationError(f"Unknown calibration method '{method}'.", f"Known: {', '.join(METHODS)}.")
    if name == "auto":
        found = {"minmax": largest, "entropy": _entropy(histogram, bits), "mse": _smallest_error(histogram, bits)}
        found |= {f"percentile:{p}": percentile(histogram, p) for p in PERCENTILES}
        errors = {key: expected_error(histogram, amax, bits, CLIP_WEIGHT) for key, amax in found.items()}
        best = min(errors, key=lambda key: errors[key])
        chosen = "minmax" if errors["minmax"] <= AS_GOOD * errors[best] else best
        amax = found[chosen]
        return Range(amax, chosen, clipped(histogram, amax), expected_error(histogram, amax, bits))
    if name == "minmax":
        amax = largest
    elif name == "percentile":
        amax = percentile(histogram, _share(argument or "99.99"))
    else:
        amax = _entropy(histogram, bits) if name == "entropy" else _smallest_error(histogram, bits)
    return Range(amax, method, clipped(histogram, amax), expected_error(histogram, amax, bits))


def percentile(histogram: Histogram, share: float) -> float:
    """The magnitude that `share` percent of the values do not exceed, zeros included; above 0."""
    below = histogram.zeros + np.cumsum(histogram.counts)
    index = int(np.searchsorted(below, share / 100 * histogram.count))
    return min(histogram.largest, (index + 1) * histogram.limit / BINS)


def clipped(histogram: Histogram, amax: float) -> float:
    """Share of the values whose bin lies beyond `amax`."""
    if amax >= histogram.largest:
        return 0.0
    first = int(np.ceil(amax / histogram.limit * BINS))
    return float(histogram.counts[first:].sum() / histogram.count)


def expected_error(histogram: Histogram, amax: float, bits: int = 8, clip_weight: float = 1.0) -> float:
    """Mean squared error of quantising the values to ``[-amax, amax]``, zeros included.

    Args:
        histogram: Of the values.
        amax: End of the range.
        bits: Of the quantised values.
        clip_weight: What the squared error of a value beyond the range counts.
    """
    offsets = (np.arange(BINS * _PARTS) + 0.5) * (histogram.limit / BINS / _PARTS)
    scale = amax / levels(bits)
    error = np.minimum(np.rint(offsets / scale), levels(bits)) * scale - offsets
    squared = error**2
    squared[offsets > amax] *= clip_weight
    per_bin = squared.reshape(BINS, _PARTS).mean(axis=1)
    return float(per_bin @ histogram.counts / histogram.count)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 50 <= share <= 100:
        raise CalibrationError(f"'{text}' is no percentile to clip at.", "Use a number from 50 to 100, such as 99.99.")
    return share


def _smallest_error(histogram: Histogram, bits: int) -> float:
    """The best of 30 ranges from 1/50 of the largest magnitude to all of it, then of 9 around it."""
    largest = histogram.largest
    ranges = np.geomspace(largest / 50, largest, 30)
    for _ in (0, 1):
        errors = [expected_error(histogram, float(amax), bits) for amax in ranges]
        best = int(np.argmin(errors))
        found = float(ranges[best])
        ranges = np.linspace(ranges[max(best - 1, 0)], ranges[min(best + 1, len(ranges) - 1)], 9)
    return found


def _entropy(histogram: Histogram, bits: int) -> float:
    """The end of the bins that, quantised, tell most about all of them."""
    steps = levels(bits) + 1
    counts = histogram.counts.astype(np.float64)
    width = histogram.limit / BINS
    last = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else BINS
    if last <= steps:
        return histogram.largest
    ends = np.unique(np.linspace(steps, last, 64).astype(int))
    divergences = [_divergence(counts, int(end), steps) for end in ends]
    best = int(ends[int(np.argmin(divergences))])
    return min(histogram.largest, best * width)


def _divergence(counts: NDArray[np.float64], end: int, steps: int) -> float:
    """Of the bins up to `end`, the rest added to the last of them, from their quantisation to `steps` levels."""
    inside = counts[:end]
    real = inside.copy()
    real[-1] += counts[end:].sum()
    starts = (np.arange(steps) * end) // steps
    filled = (real > 0).astype(np.float64)
    held = np.add.reduceat(inside, starts)
    places = np.add.reduceat(filled, starts)
    mean = np.divide(held, places, out=np.zeros(steps), where=places > 0)
    quantised = np.repeat(mean, np.diff([*starts, end])) * filled
    total, quantised_total = real.sum(), quantised.sum()
    if quantised_total == 0:
        return float("inf")
    p, q = real[real > 0] / total, quantised[real > 0] / quantised_total
    # The clipped values may sit where nothing else does: such a range tells nothing of them.
    return float(np.sum(p * np.log(p / np.maximum(q, 1e-12))))
