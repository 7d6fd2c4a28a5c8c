"""Device memory of the predictor on the recording device: recycling, running out of it, and what it tells."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.errors import DeviceMemoryError
from pixano_edge.engine.models.sam2.cache import BufferPool, EmbeddingCache, FixedFeatures
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.runtime import Buffer, StubDevice
from tests.engine.models.sam2.fake import SPECS, fake_predictor
from tests.engine.models.sam2.test_predictor import image
from tests.engine.models.sam2.test_stream import BOX, CLICK, ENTRY, on_gpu, same


class Limited:
    """Lets a stub device run out of memory: a switch, and a number of successful allocations."""

    def __init__(self, device: StubDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        self._empty = device.empty
        monkeypatch.setattr(device, "empty", self.empty)

    def empty(self, shape: Any, dtype: Any) -> Buffer:
        if self.left is not None:
            if self.left == 0:
                raise DeviceMemoryError("out of memory: 12 MiB asked, 3 MiB free.", "")
            self.left -= 1
        return self._empty(shape, dtype)


@pytest.mark.parametrize("captures", [False, True])
def test_out_of_memory_while_encoding(captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, device = on_gpu(captures=captures)
    limit = Limited(device, monkeypatch)
    predictor.warm_up()
    held = [predictor.encode(image(i)) for i in range(3)]  # in use: their memory cannot be given back
    limit.left = 0
    with pytest.raises(DeviceMemoryError, match="No room on cuda:0") as caught:
        predictor.encode(image(9))
    assert "3 MiB free" in caught.value.message
    assert caught.value.action
    assert same(predictor.predict(held[1], [CLICK]), fake_predictor().predict(image(1), [CLICK]))
    del held
    gc.collect()
    # Still no new memory, but the features of others can go now.
    assert same(predictor.predict(image(9), [CLICK]), fake_predictor().predict(image(9), [CLICK]))
    assert [w for w in predictor.info()["warnings"] if "cache emptied" in w]


def test_out_of_memory_in_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, device = on_gpu()
    limit = Limited(device, monkeypatch)
    for allowed in range(7):
        limit.left = allowed
        with pytest.raises(DeviceMemoryError):
            predictor.predict(image(), [CLICK])
    limit.left = None
    assert same(predictor.predict(image(), [CLICK]), fake_predictor().predict(image(), [CLICK]))


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, device = on_gpu()
    predictor.warm_up()
    plain = device.empty

    def small_only(shape: Any, dtype: Any) -> Buffer:
        if shape[0] > 3:
            raise DeviceMemoryError("out of memory.", "")
        return plain(shape, dtype)

    monkeypatch.setattr(device, "empty", small_only)
    prompts = [Prompt(points=[[10 + i, 30]]) for i in range(11)]
    assert same(predictor.predict(image(), prompts), fake_predictor().predict(image(), prompts))
    assert [w for w in predictor.info()["warnings"] if "batch halved" in w]
    monkeypatch.setattr(device, "empty", lambda shape, dtype: small_only((9,), dtype))
    with pytest.raises(DeviceMemoryError):
        predictor.predict(image(), [Prompt(points=[[1, 1]] * 9)] * 2)


def test_memory_is_told() -> None:
    predictor, _ = on_gpu()
    predictor.warm_up()
    before = predictor.memory()
    predictor.encode(image())
    after = predictor.memory()
    assert after.caches == ENTRY
    assert before.caches == 0
    assert before.bindings is not None
    assert before.bindings >= ENTRY


def test_steady_state_allocates_nothing() -> None:
    predictor, device = on_gpu(EmbeddingCache(2 * ENTRY))
    predictor.warm_up()
    for i in range(4):
        predictor.predict(image(i), [CLICK])
    device.calls.clear()
    for i in range(200):
        predictor.predict(image(i % 5), [CLICK if i % 2 else BOX])
    assert not {"empty", "host_empty", "launch", "capture"} & set(device.ops)
    assert device.pending == 0


def test_buffers_are_recycled_by_their_own_stream_only() -> None:
    """Another stream would not know when the queued work of the first one on them is done."""
    cache = EmbeddingCache(ENTRY)
    (first, _), (second, two) = (on_gpu(cache, captures=False) for _ in range(2))
    for i in range(3):
        first.encode(image(i))
    second.encode(image(7))  # pushes out what the first one wrote
    held = second.encode(image(8))
    assert all(b.device is two for b in held.features.buffers.values())
    assert cache.pool.allocated <= 5


def test_fixed_features_are_copied_again_after_a_failed_run() -> None:
    device = StubDevice("cuda:0", deferred=True, discrete=True)
    pool = BufferPool()
    specs = SPECS[sam2.IMAGE_ENCODER].outputs
    features, fixed = pool.take(device, specs), FixedFeatures(device, specs)
    for expected in (3, 0):
        device.calls.clear()
        fixed.load(features)
        assert device.ops.count("copy") == expected
    fixed.invalidate()
    fixed.load(features)
    assert device.ops.count("copy") == 3
    fixed.load(pool.take(device, specs))
    assert device.ops.count("copy") == 6
