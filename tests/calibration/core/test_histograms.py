"""Histograms: every value is counted, in any order and in any parts, and they survive a file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from pixano_edge.calibration.histograms import BINS, ROWS, Histogram, Rows
from pixano_edge.engine.errors import CalibrationError


def _filled(*batches: np.ndarray, axis: int | None = None) -> Histogram:
    histogram = Histogram(axis)
    for batch in batches:
        histogram.update(batch)
    return histogram


def _same(one: Histogram, other: Histogram) -> bool:
    a, b = one.arrays(), other.arrays()
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def _batches() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [(random.standard_normal((5, 7)) * scale).astype(np.float32) for scale in (0.001, 1, 64, 3e4, 0.5)]


def test_counts_are_those_of_numpy() -> None:
    values = np.concatenate([b.ravel() for b in _batches()] + [np.zeros(9, np.float32)])
    histogram = _filled(values)
    expected, _ = np.histogram(np.abs(values[values != 0]), BINS, (0, histogram.limit))
    assert np.array_equal(histogram.counts, expected)
    assert (histogram.count, histogram.zeros) == (len(values), 9)
    assert (histogram.minimum, histogram.maximum) == (values.min(), values.max())
    assert histogram.limit / 2 <= histogram.largest < histogram.limit
    assert histogram.subnormal == int(((np.abs(values) < 2.0**-14) & (values != 0)).sum())


def test_order_and_parts_do_not_matter() -> None:
    batches = _batches()
    together = _filled(*batches, axis=-1)
    assert _same(together, _filled(*batches[::-1], axis=-1))
    merged = Histogram(-1)
    for batch in batches:
        merged.merge(_filled(batch, axis=-1))
    assert _same(together, merged)
    small = _filled(batches[0], axis=-1)  # a million times narrower than what is merged into it
    small.merge(_filled(*batches[1:], axis=-1))
    assert _same(together, small)


def test_a_power_of_two_is_in_the_same_bin_before_and_after_widening() -> None:
    one, two = np.array([1.0], np.float32), np.array([2.0], np.float32)
    assert _same(_filled(one, two), _filled(two, one))


def test_channels_are_their_own_peaks() -> None:
    values = np.array([[[1, -5], [3, 2]], [[0, 4], [-7, 1]]], np.float32)
    channels = _filled(values, axis=1).channels
    assert channels is not None
    assert channels.tolist() == [5, 7]
    with pytest.raises(CalibrationError, match="2 channels and then 3"):
        _filled(values, np.ones((2, 3), np.float32), axis=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        _filled(np.array([1, bad, 2], np.float32))


def test_zeros_and_nothing() -> None:
    assert Histogram().largest == 0
    zeros = _filled(np.zeros(8, np.float32), np.zeros((0, 3), np.float32))
    assert (zeros.largest, zeros.zeros, zeros.count, zeros.limit) == (0, 8, 8, 0)


def test_a_file_gives_back_the_same(tmp_path: Path) -> None:
    histogram = _filled(*_batches(), axis=0)
    np.savez(tmp_path / "h.npz", **histogram.arrays())
    with np.load(tmp_path / "h.npz") as file:
        assert _same(histogram, Histogram.from_arrays(dict(file)))
        damaged = dict(file)
    damaged["counts"] = damaged["counts"] + 1
    with pytest.raises(CalibrationError, match="add up"):
        Histogram.from_arrays(damaged)


def test_rows_are_bounded_and_repeatable() -> None:
    values = np.arange(5000, dtype=np.float32).reshape(2, -1, 2)
    chosen = []
    for _ in range(2):
        rows = Rows()
        rows.update(values, 0)
        rows.update(values + 5000, 1)
        chosen.append(rows.values)
    assert chosen[0].shape == (ROWS, 2)
    assert np.array_equal(*chosen)
    assert (chosen[0][:, 1] - chosen[0][:, 0] == 1).all()
    assert 0.3 < (chosen[0] >= 5000).mean() < 0.7
