"""Ranges: against a search by brute force, on distributions whose best range is known."""

from __future__ import annotations

import numpy as np
import pytest

from pixano_edge.calibration.calibrators import (
    AS_GOOD,
    CLIP_WEIGHT,
    METHODS,
    Range,
    choose,
    clipped,
    expected_error,
    percentile,
)
from pixano_edge.calibration.histograms import Histogram
from pixano_edge.engine.errors import CalibrationError


def _histogram(values: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.update(values.astype(np.float32))
    return histogram


def _error(values: np.ndarray, amax: float, bits: int = 8) -> float:
    top = 2 ** (bits - 1) - 1
    scale = amax / top
    return float(np.mean((np.clip(np.rint(values / scale), -top, top) * scale - values) ** 2))


NORMAL = np.random.default_rng(0).standard_normal(50_000)
LAPLACE = np.random.default_rng(0).laplace(size=50_000)
SPIKE = np.concatenate([NORMAL, np.full(3, 60.0)])


@pytest.mark.parametrize(
    "values", [NORMAL, LAPLACE, SPIKE, np.maximum(NORMAL, 0)], ids=["normal", "laplace", "spike", "relu"]
)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_expected_error_is_the_real_one(values: np.ndarray, bits: int) -> None:
    histogram = _histogram(values)
    for share in (1.0, 0.5, 0.2):
        amax = share * histogram.largest
        assert expected_error(histogram, amax, bits) == pytest.approx(_error(values, amax, bits), rel=0.05)


@pytest.mark.parametrize("values", [NORMAL, LAPLACE, SPIKE], ids=["normal", "laplace", "spike"])
@pytest.mark.parametrize("bits", [8, 4])
def test_mse_is_as_good_as_brute_force(values: np.ndarray, bits: int) -> None:
    largest = float(np.abs(values).max())
    best = min(_error(values, amax, bits) for amax in np.geomspace(largest / 50, largest, 400))
    assert _error(values, choose(_histogram(values), "mse", bits).amax, bits) <= 1.05 * best


@pytest.mark.parametrize("values", [NORMAL, LAPLACE, SPIKE], ids=["normal", "laplace", "spike"])
def test_auto_is_the_best_of_all_methods_where_clipping_counts_more(values: np.ndarray) -> None:
    histogram = _histogram(values)

    def cost(amax: float) -> float:
        return expected_error(histogram, amax, 8, CLIP_WEIGHT)

    auto = choose(histogram)
    assert all(cost(auto.amax) <= AS_GOOD * cost(choose(histogram, method).amax) for method in METHODS)
    assert auto.mse == pytest.approx(_error(values, auto.amax), rel=0.05)
    assert auto.amax >= choose(histogram, "mse").amax


def test_what_is_clipped_counts_more() -> None:
    histogram = _histogram(LAPLACE)
    assert expected_error(histogram, 3.0, 8, 8.0) > 4 * expected_error(histogram, 3.0)
    assert expected_error(histogram, histogram.largest, 8, 8.0) == pytest.approx(
        expected_error(histogram, histogram.largest), rel=1e-4
    )


def test_auto_keeps_all_of_a_range_where_clipping_gains_nothing() -> None:
    assert choose(_histogram(np.random.default_rng(0).uniform(-2, 2, 50_000))).method == "minmax"


def test_four_bits_clip_a_long_tail() -> None:
    found = choose(_histogram(LAPLACE), "auto", 4)
    assert found.amax < 0.7 * np.abs(LAPLACE).max()
    assert found.clipped_fraction > 0


def test_entropy_ignores_a_far_spike_and_keeps_a_normal_distribution() -> None:
    assert choose(_histogram(SPIKE), "entropy").amax < 12
    assert choose(_histogram(NORMAL), "entropy").amax > 2.5


def test_percentiles_are_those_of_numpy() -> None:
    histogram = _histogram(LAPLACE)
    for share in (90.0, 99.0, 99.9):
        assert percentile(histogram, share) == pytest.approx(np.percentile(np.abs(LAPLACE), share), rel=0.02)
    assert choose(histogram, "percentile:99").clipped_fraction == pytest.approx(0.01, abs=0.001)
    assert choose(histogram, "percentile:100").amax == pytest.approx(np.abs(LAPLACE).max(), rel=1e-3)


def test_zeros_change_nothing_but_the_percentiles() -> None:
    sparse = np.concatenate([LAPLACE, np.zeros(200_000)])
    for method in ("mse", "entropy", "minmax"):
        assert choose(_histogram(sparse), method).amax == choose(_histogram(LAPLACE), method).amax
    assert percentile(_histogram(sparse), 90) < percentile(_histogram(LAPLACE), 90)


def test_the_scale_is_symmetric() -> None:
    found = Range(12.7, "minmax", 0.0, 0.0)
    assert found.scale() == pytest.approx(0.1)
    assert found.scale(4) == pytest.approx(12.7 / 7)
    assert clipped(_histogram(NORMAL), 1e9) == 0


@pytest.mark.parametrize(
    ("method", "bits", "match"),
    [
        ("best", 8, "Unknown"),
        ("mse:3", 8, "Unknown"),
        ("percentile:3", 8, "percentile"),
        ("percentile:x", 8, "percentile"),
        ("auto", 1, "bits"),
    ],
)
def test_nonsense_is_refused(method: str, bits: int, match: str) -> None:
    with pytest.raises(CalibrationError, match=match):
        choose(_histogram(NORMAL), method, bits)


def test_a_tensor_of_zeros_has_no_range() -> None:
    with pytest.raises(CalibrationError, match="was 0"):
        choose(_histogram(np.zeros(5)))
