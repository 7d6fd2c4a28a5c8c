"""The predictor's own rules on a fake network: coordinates, selection, cache use, threads, closing, bad input."""

from __future__ import annotations

import gc
import json
import threading
import tracemalloc
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.errors import DeviceError, ImageError, PromptError
from pixano_edge.engine.models.masks import mask_box
from pixano_edge.engine.models.sam2 import predictor as module
from pixano_edge.engine.models.sam2.cache import EmbeddingCache
from pixano_edge.engine.models.sam2.postprocess import LOGIT_CLAMP
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.runtime import StubDevice, StubSession
from tests.engine.models.sam2.fake import CONSTANTS, SPECS, decode, encode, fake_predictor
from tests.engine.models.sam2.test_cache import run_all

HEIGHT, WIDTH = 161, 97


def image(value: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray[Any, np.dtype[np.uint8]]:
    y, x = np.mgrid[:height, :width]
    return np.stack([x + value, y, x + y], axis=2).astype(np.uint8)


@pytest.mark.parametrize("deferred", [False, True])
def test_the_mask_is_where_the_click_was(deferred: bool) -> None:
    answer = fake_predictor(deferred=deferred).predict(image(), [Prompt(points=[[70, 40]])])
    assert answer.masks.shape == (1, 3, HEIGHT, WIDTH)
    assert answer.masks.dtype == np.bool_
    box = mask_box(answer.masks[0, 0])
    assert box is not None
    # A disc of 4 cells, one cell is 97/32 x 161/32 pixels.
    expected = (70 - 12.1, 40 - 20.1, 70 + 12.1, 40 + 20.1)
    assert np.abs(np.subtract(box, expected)).max() < 3


def test_multimask_order_and_single_mask() -> None:
    predictor = fake_predictor()
    several = predictor.predict(image(), [Prompt(points=[[70, 40]])])
    assert several.mask_indices.tolist() == [[1, 2, 3]]
    assert several.scores.argmax() == 1  # not sorted by score
    single = predictor.predict(image(), [Prompt(points=[[70, 40]])], multimask=False)
    assert single.masks.shape == (1, 1, HEIGHT, WIDTH)
    assert single.mask_indices.tolist() == [[0]]
    assert single.low_res_logits is None


def test_unstable_single_mask_falls_back() -> None:
    predictor = fake_predictor()
    device = predictor._device
    assert isinstance(device, StubDevice)

    def flat(inputs: dict[str, Any]) -> Mapping[str, Any]:
        outputs = dict(decode(inputs))
        outputs[sam2.MASKS] = outputs[sam2.MASKS] * np.array([1e-3, 1, 1, 1], np.float32)[None, :, None, None]
        return outputs

    unstable = Sam2ImagePredictor(
        StubSession(SPECS[sam2.IMAGE_ENCODER], device, encode),
        StubSession(SPECS[sam2.MASK_DECODER], device, flat),
        CONSTANTS,
        bundle_hash="fake",
        variant="fp32",
    )
    answer = unstable.predict(image(), [Prompt(points=[[70, 40]])], multimask=False)
    assert answer.mask_indices.tolist() == [[2]]
    assert answer.scores[0, 0] == pytest.approx(0.9, abs=0.02)


def test_logits_are_clamped_copies_and_feed_the_next_click() -> None:
    predictor = fake_predictor()
    answer = predictor.predict(image(), [Prompt(points=[[70, 40]])], return_logits=True)
    logits = answer.low_res_logits
    assert logits is not None
    assert logits.shape == (1, 3, 32, 32)
    assert logits.max() > 10
    assert logits.min() == -LOGIT_CLAMP
    kept = logits.copy()
    prompt = Prompt(points=[[10, 100]], mask_input=logits[0, 2])
    with_mask = predictor.predict(image(), [prompt], multimask=False, return_logits=True)
    assert np.array_equal(logits, kept)
    without = predictor.predict(image(), [replace(prompt, mask_input=None)], multimask=False, return_logits=True)
    assert with_mask.low_res_logits is not None
    assert without.low_res_logits is not None
    assert np.abs(with_mask.low_res_logits - without.low_res_logits).max() > 1  # the mask does not linger


def test_mixed_prompts_answer_in_order() -> None:
    predictor = fake_predictor()
    prompts = [Prompt(points=[[10 * i, 15 * i]] * (1 + i % 3), labels=[1] * (1 + i % 3)) for i in range(1, 9)]
    prompts += [Prompt(box=[30, 20, 60, 90]), Prompt()]
    together = predictor.predict(image(), prompts, return_logits=True, max_batch=2)
    for index, prompt in enumerate(prompts):
        alone = predictor.predict(image(), [prompt], return_logits=True)
        for field in ("masks", "scores", "object_scores", "mask_indices", "low_res_logits"):
            assert np.array_equal(getattr(together, field)[index], getattr(alone, field)[0]), (index, field)
    assert together.object_scores[-1] == 0


def test_second_click_runs_only_the_decoder() -> None:
    predictor = fake_predictor()
    for click in range(4):
        predictor.predict(image(), [Prompt(points=[[click, 5]])])
    assert predictor.runs == (1, 4)
    predictor.predict(image(1), [Prompt()])
    assert predictor.runs == (2, 5)


def test_predictors_share_a_cache_per_bundle() -> None:
    cache = EmbeddingCache()
    first, second = fake_predictor(cache=cache), fake_predictor(cache=cache)
    other = fake_predictor(cache=cache, bundle_hash="other")
    for predictor in (first, second, other):
        predictor.encode(image())
    assert [p.runs[0] for p in (first, second, other)] == [1, 0, 1]


def test_embeddings_go_out_and_come_back() -> None:
    predictor = fake_predictor()
    embedding = predictor.encode(image())
    expected = predictor.predict(embedding, [Prompt(points=[[70, 40]])])
    arrays = embedding.image_embed, list(embedding.high_res)
    assert [a.shape for a in (arrays[0], *arrays[1])] == [(1, 32, 8, 8), (1, 4, 32, 32), (1, 8, 16, 16)]
    arrays[0][0, 0, 0, 0] += 0  # owned and writable
    entries = predictor.cache.stats().entries
    for squeeze in (False, True):
        sent = [a[0] if squeeze else a for a in (arrays[0], *arrays[1])]
        back = predictor.embedding_from_arrays(sent[0], sent[1:], (HEIGHT, WIDTH))
        answer = predictor.predict(back, [Prompt(points=[[70, 40]])])
        assert np.array_equal(answer.masks, expected.masks)
        assert np.array_equal(answer.scores, expected.scores)
    assert predictor.cache.stats().entries == entries
    assert predictor.runs[0] == 1
    assert np.array_equal(embedding.image_embed, arrays[0])


def test_wrong_embeddings() -> None:
    predictor = fake_predictor()
    embedding = predictor.encode(image())
    embed, high = embedding.image_embed, list(embedding.high_res)
    size = (HEIGHT, WIDTH)
    nan = np.full_like(embed, np.nan)
    bad: list[tuple[Any, Any, Any]] = [
        (embed, high[:1], size),
        (embed, [], size),
        (embed, None, size),
        (None, high, size),
        (embed, high[::-1], size),
        (embed[:, :16], high, size),
        (embed.astype(np.float64), high, size),
        (embed.tolist(), high, size),
        (nan, high, size),
        (embed, [high[0], high[1] * np.float32(np.inf)], size),
        (embed, high, (0, 5)),
        (embed, high, (5,)),
    ]
    for image_embed, high_res, original in bad:
        with pytest.raises(PromptError):
            predictor.embedding_from_arrays(image_embed, high_res, original)
    with pytest.raises(PromptError, match="another model"):
        fake_predictor(bundle_hash="other").predict(embedding, [Prompt()])


def test_bad_input_and_then_it_still_works() -> None:
    predictor = fake_predictor()
    for source, prompts in [
        (image(), []),
        (image(), [Prompt(points=[[1, 2]], labels=[1, 1])]),
        (image(), [Prompt(points=[[float("nan"), 2]])]),
        (image(), [Prompt(points=[[5000, 2]])]),
    ]:
        with pytest.raises(PromptError):
            predictor.predict(source, prompts)
    assert predictor.runs == (0, 0)  # prompts are checked before the image is encoded
    for source in (np.zeros((5, 5), np.uint8), image().astype(np.float32), np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(ImageError):
            predictor.predict(source, [Prompt()])  # type: ignore[arg-type]
    assert predictor.predict(image(), [Prompt()]).masks.shape == (1, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_tiny_images(size: tuple[int, int]) -> None:
    answer = fake_predictor().predict(image(0, *size), [Prompt(points=[[0, 0]])])
    assert answer.masks.shape == (1, 3, *size)


def test_out_is_written_in_place() -> None:
    predictor = fake_predictor()
    expected = predictor.predict(image(), [Prompt(points=[[70, 40]])] * 2)
    out = np.empty((2, 3, HEIGHT, WIDTH), np.bool_)
    answer = predictor.predict(image(), [Prompt(points=[[70, 40]])] * 2, out=out)
    assert answer.masks is out
    assert np.array_equal(out, expected.masks)
    frozen = out.copy()
    frozen.flags.writeable = False
    for wrong in (out[:1], out.astype(np.uint8), frozen, np.asfortranarray(out)):
        with pytest.raises(PromptError, match="'out'"):
            predictor.predict(image(), [Prompt()] * 2, out=wrong)  # type: ignore[arg-type]


def test_oversized_answers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 3 * HEIGHT * WIDTH)
    predictor = fake_predictor()
    predictor.predict(image(), [Prompt()])
    with pytest.raises(PromptError, match="GiB"):
        predictor.predict(image(), [Prompt()] * 2)


def test_work_memory_of_a_huge_image_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEPT_BYTES", 4 * HEIGHT * WIDTH)
    predictor = fake_predictor()
    predictor.predict(image(), [Prompt()])
    assert "large" in predictor._decoder_scratch._flat
    predictor.predict(image(0, HEIGHT + 1, WIDTH), [Prompt()])
    assert "large" not in predictor._decoder_scratch._flat


def test_info_is_json() -> None:
    predictor = fake_predictor()
    predictor.encode(image())
    info = json.loads(json.dumps(predictor.info()))
    assert info["family"] == "sam2"
    assert info["cache"]["entries"] == 1


def test_threads_get_their_own_answers() -> None:
    predictor = fake_predictor(cache=EmbeddingCache(100_000))  # three entries: evictions happen
    clicks = [[10, 20], [80, 30], [40, 140], [60, 70]]
    expected = {
        (i, j): predictor.predict(image(40 * i), [Prompt(points=[c])]) for i in range(4) for j, c in enumerate(clicks)
    }
    wrong: list[tuple[int, int]] = []

    def work() -> None:
        rng = np.random.default_rng(threading.get_ident() % 2**32)
        for _ in range(25):
            i, j = int(rng.integers(4)), int(rng.integers(4))
            answer = predictor.predict(image(40 * i), [Prompt(points=[clicks[j]])])
            same = np.array_equal(answer.masks, expected[i, j].masks)
            if not same or not np.array_equal(answer.scores, expected[i, j].scores):
                wrong.append((i, j))

    run_all([work] * 4)
    assert not wrong


def test_two_threads_encode_the_same_image_once() -> None:
    predictor = fake_predictor()
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        predictor.predict(image(), [Prompt(points=[[1, 1]])])

    run_all([work] * 4)
    assert predictor.runs == (1, 4)


def test_close_waits_for_the_call_under_way() -> None:
    started, release = threading.Event(), threading.Event()
    order: list[str] = []

    def slow(inputs: dict[str, Any]) -> Mapping[str, Any]:
        started.set()
        release.wait(5)
        order.append("decoded")
        return decode(inputs)

    device = StubDevice()
    predictor = Sam2ImagePredictor(
        StubSession(SPECS[sam2.IMAGE_ENCODER], device, encode),
        StubSession(SPECS[sam2.MASK_DECODER], device, slow),
        CONSTANTS,
        bundle_hash="fake",
        variant="fp32",
    )

    def click() -> None:
        assert predictor.predict(image(), [Prompt(points=[[70, 40]])]).masks.any()

    def close() -> None:
        started.wait(5)
        threading.Timer(0.05, release.set).start()
        predictor.close()
        order.append("closed")

    run_all([click, close])
    assert order == ["decoded", "closed"]
    predictor.close()  # twice is fine
    for call in (lambda: predictor.predict(image(), [Prompt()]), lambda: predictor.encode(image(9))):
        with pytest.raises(DeviceError, match="closed"):
            call()


def test_a_click_allocates_nothing_of_tensor_size() -> None:
    from tests.engine.models.sam2.quiet import quiet_predictor

    predictor = quiet_predictor()
    picture = image(0, 540, 960)
    prompts = [Prompt(points=[[70, 40]], labels=[1])]
    out = np.empty((1, 3, 540, 960), np.bool_)
    embedding = predictor.encode(picture)
    predictor.predict(embedding, prompts, out=out)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for click in range(5):
            predictor.predict(embedding, [Prompt(points=[[70 + click, 40]], labels=[1])], out=out)
        peak = tracemalloc.get_traced_memory()[1] - before
        assert peak < 16 * 1024  # one low-resolution mask has 4 KB, one mask of the image 518 KB
        tracemalloc.reset_peak()
        predictor.predict(embedding, prompts)
        assert tracemalloc.get_traced_memory()[1] - before < out.nbytes + 16 * 1024
    finally:
        tracemalloc.stop()


def test_idle_sessions_keep_no_features() -> None:
    """What the cache evicted, or a client sent, is freed although the sessions ran on it last."""
    predictor = fake_predictor()
    embedding = predictor.encode(image())
    arrays = [embedding.image_embed.copy(), *(f.copy() for f in embedding.high_res)]
    predictor.predict(embedding, [Prompt(points=[[70, 40]])])
    cached = weakref.ref(embedding.features.buffers[sam2.HIGH_RES_0].array)
    sent = weakref.ref(arrays[1])
    theirs = predictor.embedding_from_arrays(arrays[0], arrays[1:], (HEIGHT, WIDTH))
    predictor.predict(theirs, [Prompt(points=[[70, 40]] * 2)])
    del embedding, theirs, arrays
    predictor.cache.clear()
    predictor.cache.pool.clear()  # where the buffers went with their last user
    gc.collect()
    assert cached() is None
    assert sent() is None
