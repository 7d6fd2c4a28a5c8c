"""The embedding cache: budget, order, single flight, and buffers that are never recycled while in use."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from pixano_edge.engine.contracts.base import TensorSpec
from pixano_edge.engine.models.sam2.cache import EmbeddingCache, EmbeddingKey, Features, pixel_digest
from pixano_edge.engine.runtime import CpuDevice

DEVICE = CpuDevice()
SPECS = (TensorSpec("a", "float32", (1, 4, 8)), TensorSpec("b", "float32", (1, 2, 16)))
NBYTES = 2 * 32 * 4


def key(name: str, bundle: str = "bundle") -> EmbeddingKey:
    return EmbeddingKey(bundle, "fp32", "stub@cpu", name.encode())


def maker(cache: EmbeddingCache, made: list[str], name: str) -> Callable[[], Features]:
    def create() -> Features:
        made.append(name)
        features = cache.pool.take(DEVICE, SPECS)
        for buffer in features.buffers.values():
            buffer.host()[:] = ord(name[0])
        return features

    return create


def get(cache: EmbeddingCache, made: list[str], name: str, bundle: str = "bundle") -> Features:
    return cache.get_or_create(key(name, bundle), NBYTES, maker(cache, made, name))


def test_hit_and_least_recently_used() -> None:
    cache, made = EmbeddingCache(3 * NBYTES), []
    for name in "abcadb":  # d evicts b, the oldest use; b comes back and evicts c
        assert get(cache, made, name).buffers["a"].host().flat[0] == ord(name)
    assert made == list("abcdb")
    stats = cache.stats()
    assert (stats.entries, stats.bytes, stats.hits, stats.misses, stats.evictions) == (3, 3 * NBYTES, 1, 5, 2)
    get(cache, made, "a")
    assert made == list("abcdb")


def test_every_part_of_the_key_counts() -> None:
    cache, made = EmbeddingCache(), []
    base = key("a")
    variants = (
        base,
        base._replace(bundle_hash="other"),
        base._replace(variant="fp16"),
        base._replace(backend="stub@cuda:0"),
        base._replace(digest=b"b"),
    )
    for one in variants:
        cache.get_or_create(one, NBYTES, maker(cache, made, "a"))
    assert len(made) == len(variants)


def test_evicted_buffers_are_reused_and_nothing_new_is_allocated() -> None:
    cache, made = EmbeddingCache(2 * NBYTES), []
    for i in range(20):
        get(cache, made, chr(ord("a") + i))
    assert cache.pool.allocated == 2


def test_buffers_in_use_are_not_recycled() -> None:
    cache, made = EmbeddingCache(NBYTES), []
    held = get(cache, made, "a")
    for name in "bcdefg":
        get(cache, made, name)
    assert (held.buffers["a"].host() == ord("a")).all()
    assert cache.pool.allocated == 2
    pointer = held.buffers["a"].pointer
    del held
    gc.collect()
    others = [get(cache, made, name) for name in "hi"]
    assert pointer in {features.buffers["a"].pointer for features in others}
    assert cache.pool.allocated == 2


def test_too_large_entries_and_no_budget() -> None:
    for budget in (0, NBYTES - 1):
        cache, made = EmbeddingCache(budget), []
        get(cache, made, "a")
        get(cache, made, "a")
        assert made == ["a", "a"]
        assert cache.stats().entries == 0


def test_one_computation_for_many_threads() -> None:
    cache, made = EmbeddingCache(), []
    barrier = threading.Barrier(6)
    results: list[Features] = []

    def slow() -> Features:
        time.sleep(0.05)
        return maker(cache, made, "a")()

    def work() -> None:
        barrier.wait()
        results.append(cache.get_or_create(key("a"), NBYTES, slow))

    run_all([work] * 6)
    assert made == ["a"]
    assert len({id(r) for r in results}) == 1
    assert cache.stats().hits == 5


def test_waiting_threads_share_an_entry_that_does_not_fit() -> None:
    cache, made = EmbeddingCache(0), []
    started, release = threading.Event(), threading.Event()
    results: list[Features] = []

    def slow() -> Features:
        started.set()
        release.wait(5)
        return maker(cache, made, "a")()

    def first() -> None:
        results.append(cache.get_or_create(key("a"), NBYTES, slow))

    def second() -> None:
        started.wait(5)
        threading.Timer(0.05, release.set).start()
        results.append(get(cache, made, "a"))

    run_all([first, second])
    assert made == ["a"]


def test_a_failure_reaches_its_caller_and_the_next_thread_computes() -> None:
    cache, made = EmbeddingCache(), []
    started, release = threading.Event(), threading.Event()
    errors: list[str] = []

    def failing() -> Features:
        started.set()
        release.wait(5)
        raise RuntimeError("encoder")

    def first() -> None:
        try:
            cache.get_or_create(key("a"), NBYTES, failing)
        except RuntimeError as error:
            errors.append(str(error))

    def second() -> None:
        started.wait(5)
        threading.Timer(0.05, release.set).start()
        assert get(cache, made, "a").nbytes == NBYTES

    run_all([first, second])
    assert errors == ["encoder"]
    assert made == ["a"]
    assert cache.stats().bytes == NBYTES


def test_drop_bundle_and_clear() -> None:
    cache, made = EmbeddingCache(), []
    get(cache, made, "a", "one")
    get(cache, made, "b", "two")
    get(cache, made, "c", "one")
    assert cache.drop_bundle("one") == 2
    assert cache.stats().bytes == NBYTES
    get(cache, made, "b", "two")
    assert made == list("abc")
    cache.clear()
    assert cache.stats().entries == 0


def test_many_threads_never_see_another_image() -> None:
    cache, made = EmbeddingCache(2 * NBYTES), []
    wrong: list[str] = []

    def work(seed: int) -> Callable[[], None]:
        def run() -> None:
            rng = np.random.default_rng(seed)
            for _ in range(150):
                name = "abcdefg"[rng.integers(7)]
                features = get(cache, made, name)
                if not all((b.host() == ord(name)).all() for b in features.buffers.values()):
                    wrong.append(name)

        return run

    run_all([work(seed) for seed in range(4)])
    assert not wrong
    assert cache.stats().bytes <= 2 * NBYTES
    # Two spare sets are kept: threads that let go of more at once free some, which are allocated again.
    assert cache.pool.allocated < len(made) / 4


def test_digest_depends_on_pixels_and_shape_only() -> None:
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    other = image.copy()
    other[3, 5, 2] ^= 1
    assert pixel_digest(image) == pixel_digest(image.copy())
    assert pixel_digest(image) == pixel_digest(np.asfortranarray(image))
    assert len({pixel_digest(i) for i in (image, other, image.reshape(6, 4, 3), image.transpose(1, 0, 2))}) == 4


def run_all(functions: list[Callable[[], None]]) -> None:
    """Runs each function on its own thread; an exception in one fails the test."""
    errors: list[BaseException] = []

    def guard(function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:  # noqa: BLE001 (handed to the test's own thread)
            errors.append(error)

    threads = [threading.Thread(target=guard, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    if errors:
        pytest.fail(repr(errors[0]))
