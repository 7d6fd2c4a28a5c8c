"""Metrics against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pixano_edge.benchmarks.metrics import bootstrap_mean, latency, relative_error


def test_latency_percentiles_by_hand():
    figures = latency([0.1 * k for k in range(1, 12)])  # 0.1 .. 1.1: rank k is exact at 10 % steps
    assert figures.p50 == pytest.approx(0.6)
    assert figures.p90 == pytest.approx(1.0)
    assert figures.p99 == pytest.approx(1.09)
    assert figures.mean == pytest.approx(0.6)
    assert figures.count == 11
    assert latency([2.0]).p99 == 2.0
    with pytest.raises(ValueError, match="no measurement"):
        latency([])


def test_relative_error_by_hand():
    reference = np.array([0.0, -4.0, 2.0], np.float32)
    assert relative_error(np.array([0.0, -4.0, 3.0], np.float32), reference) == pytest.approx(0.25)
    assert relative_error(reference, reference) == 0.0
    zero = np.zeros(2, np.float32)
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero + 1, zero) == float("inf")
    with pytest.raises(ValueError, match="one shape"):
        relative_error(zero, reference)


def test_bootstrap_covers_the_mean_and_is_deterministic():
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    low, high = bootstrap_mean(values)
    assert low < values.mean() < high
    # normal theory: half width 1.96 * sd / sqrt(n)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    assert bootstrap_mean(values) == (low, high)
    assert bootstrap_mean(values, seed=1) != (low, high)


def test_bootstrap_draws_whole_scenes():
    # Ten scenes of forty equal figures: only ten independent observations, so the interval must be wider.
    values = np.repeat(np.linspace(0, 1, 10), 40)
    alone = bootstrap_mean(values)
    grouped = bootstrap_mean(values, groups=np.repeat(np.arange(10), 40).tolist())
    assert grouped[1] - grouped[0] > 3 * (alone[1] - alone[0])
    assert bootstrap_mean([0.5, 0.7], groups=[3, 3]) == (0.6, 0.6)
