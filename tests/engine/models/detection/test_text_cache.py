"""Features kept between requests: budget, order of dropping, one computation for many askers."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from pixano_edge.engine.models.detection.text_cache import TextCache


def features(value: float, count: int = 250) -> np.ndarray:
    return np.full(count, value, np.float32)  # 1000 bytes


def test_computes_once_and_drops_the_least_recently_used() -> None:
    cache, made = TextCache(3000), []

    def get(name: str) -> float:
        return float(cache.get_or_create(name, lambda: made.append(name) or features(len(made)))[0])

    first = [get(name) for name in "abc"]
    assert [get(name) for name in "abc"] == first
    get("a")
    get("d")  # b goes
    assert made == list("abcd")
    get("a")
    get("b")
    assert made == list("abcdb")
    stats = cache.stats()
    assert (stats.entries, stats.bytes, stats.evictions) == (3, 3000, 2)
    assert stats.to_dict()["hits"] == stats.hits == 5
    cache.clear()
    assert cache.stats().bytes == cache.stats().entries == 0


def test_what_is_larger_than_the_budget_is_answered_and_not_kept() -> None:
    cache = TextCache(500)
    assert cache.get_or_create("a", lambda: features(1))[0] == 1
    assert cache.stats().entries == 0


def test_many_askers_one_computation() -> None:
    cache, made, answers = TextCache(), [], []

    def create() -> np.ndarray:
        made.append(1)
        time.sleep(0.05)
        return features(7)

    threads = [threading.Thread(target=lambda: answers.append(cache.get_or_create("a", create)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert answers == [7] * 8


def test_an_error_is_not_kept() -> None:
    cache = TextCache()

    def fail() -> np.ndarray:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.get_or_create("a", fail)
    assert cache.get_or_create("a", lambda: features(1))[0] == 1
