"""The predictor's work on a GPU's stream, seen by the recording device: order, waits, recordings, memory, threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.errors import DeviceError
from pixano_edge.engine.models.chain import CAPTURE_AFTER
from pixano_edge.engine.models.sam2.cache import EmbeddingCache
from pixano_edge.engine.models.sam2.predictor import WARM_UP_POINTS, Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.runtime import Buffer, StubDevice, StubSession
from tests.engine.models.sam2.fake import CONSTANTS, SPECS, decode, encode, fake_predictor
from tests.engine.models.sam2.test_cache import run_all
from tests.engine.models.sam2.test_predictor import image

CLICK = Prompt(points=[[70, 40]])
BOX = Prompt(box=[30, 20, 60, 90])
ENTRY = 4 * (32 * 8 * 8 + 4 * 32 * 32 + 8 * 16 * 16)
"""Bytes of one image's features."""


def on_gpu(
    cache: EmbeddingCache | None = None, *, captures: bool = True, discrete: bool = True, **kwargs: Any
) -> tuple[Sam2ImagePredictor, StubDevice]:
    device = StubDevice("cuda:0", deferred=True, discrete=discrete, captures=captures)
    predictor = Sam2ImagePredictor(
        StubSession(SPECS[sam2.IMAGE_ENCODER], device, encode, capturable=True),
        StubSession(SPECS[sam2.MASK_DECODER], device, decode, capturable=True),
        CONSTANTS,
        bundle_hash="fake",
        variant="fp32",
        cache=cache,
        **kwargs,
    )
    return predictor, device


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("masks", "scores", "object_scores"))


@pytest.fixture(params=["eager", "recorded", "unified"])
def gpu(request: pytest.FixtureRequest) -> tuple[Sam2ImagePredictor, StubDevice]:
    predictor, device = on_gpu(captures=request.param != "eager", discrete=request.param != "unified")
    predictor.warm_up()
    return predictor, device


def test_same_answers_as_on_a_cpu(gpu: tuple[Sam2ImagePredictor, StubDevice]) -> None:
    predictor, _ = gpu
    reference = fake_predictor()
    mask = np.full((32, 32), 20, np.float32)
    asked: list[list[Prompt]] = [[CLICK], [BOX], [CLICK, BOX, CLICK], [Prompt(points=[[9, 9]], mask_input=mask)]]
    for value in (0, 40, 0, 80):
        for prompts in [*asked, *asked]:  # the mask of the last one must not linger in the next
            assert same(predictor.predict(image(value), prompts), reference.predict(image(value), prompts))


def test_one_wait_from_pixels_to_masks(gpu: tuple[Sam2ImagePredictor, StubDevice]) -> None:
    predictor, device = gpu
    device.calls.clear()
    predictor.predict(image(7), [CLICK])
    assert device.ops.count("synchronize") == 1
    assert device.ops[-1] == "synchronize"
    assert "wait_on_host" not in device.ops
    device.calls.clear()
    predictor.predict(image(7), [CLICK, BOX, CLICK])
    assert device.ops.count("synchronize") == 2, "one per batch: two clicks, one box"


def test_order_on_the_stream() -> None:
    predictor, device = on_gpu(captures=False)
    predictor.warm_up()
    device.calls.clear()
    predictor.predict(image(7), [CLICK])
    encoder, decoder = ("launch", sam2.IMAGE_ENCODER), ("launch", sam2.MASK_DECODER)
    at, after = device.calls.index(encoder), device.calls.index(decoder)
    # Pixels up, a mark for their staging memory, the encoder, a mark for the features; then the prompt (its mask
    # input is zeros already), the decoder, its three outputs, the wait.
    assert [c[0] for c in device.calls[: at + 2]] == ["copy", "record", "launch", "record"]
    assert [c[0] for c in device.calls[at + 2 : after]] == ["copy"] * 3
    assert [c[0] for c in device.calls[after:]] == ["launch", "copy", "copy", "copy", "synchronize"]
    assert "wait" not in device.ops, "one stream needs no marks between its own launches"
    pixels = device.calls[0][2]
    device.calls.clear()
    predictor.predict(image(8), [CLICK])
    assert next(c[2] for c in device.calls if c[0] == "copy") == pixels, "the same page-locked memory"
    assert "host_empty" not in device.ops


def test_features_stay_on_the_device() -> None:
    predictor, device = on_gpu(captures=False)
    embedding = predictor.encode(image())
    assert all(b.array is None for b in embedding.features.buffers.values())
    features = {b.pointer for b in embedding.features.buffers.values()}
    device.calls.clear()
    predictor.predict(embedding, [CLICK])
    assert not [c for c in device.calls if c[0] == "copy" and features & set(c[1:])]
    assert predictor.cache.stats().bytes == ENTRY


def test_nothing_is_read_early() -> None:
    predictor, device = on_gpu(captures=False)
    predictor.encode(image())
    assert device.pending == 2, "the upload and the encoder are only queued"
    embedding = predictor.encode(image())
    assert device.pending == 2, "from the cache"
    assert np.array_equal(embedding.image_embed, fake_predictor().encode(image()).image_embed)
    assert device.pending == 0
    predictor.encode(image(1), wait=True)
    assert device.pending == 0


def test_images_in_a_row_do_not_overwrite_each_other() -> None:
    for captures in (False, True):
        predictor, device = on_gpu(captures=captures)
        held = [predictor.encode(image(40 * i)) for i in range(5)]
        assert "synchronize" not in device.ops
        for i, embedding in enumerate(held):
            expected = fake_predictor().encode(image(40 * i))
            assert np.array_equal(embedding.high_res[0], expected.high_res[0])


def test_recording() -> None:
    predictor, device = on_gpu()
    assert predictor.warm_up() > 0
    assert [c[2] for c in device.calls if c[0] == "capture"] == [
        (sam2.IMAGE_ENCODER,),
        *[(sam2.MASK_DECODER,)] * len(WARM_UP_POINTS),
    ]
    device.calls.clear()
    predictor.predict(image(3), [CLICK])
    assert "launch" not in device.ops
    assert [c[1] for c in device.calls if c[0] == "replay"] == [1, 2]
    # 1 upload of pixels, 3 copies to the cache's buffers, 3 uploads of the prompt, 3 outputs down; the decoder reads
    # what the encoder has just written, so nothing is copied for it.
    assert device.ops.count("copy") == 10
    device.calls.clear()
    predictor.predict(image(3), [CLICK])
    assert device.ops.count("copy") == 6, "another click on the same image moves the prompt and the masks alone"
    predictor.predict(image(4), [BOX])
    device.calls.clear()
    predictor.predict(image(3), [CLICK])
    assert device.ops.count("copy") == 9, "back to the first image: its features come from the cache"
    info = json.loads(json.dumps(predictor.info()))
    assert info["stream"]["recorded"] == 1 + len(WARM_UP_POINTS)
    assert info["warm_up"]["seconds"] > 0
    assert len(info["warm_up"]["shapes"]) == len(WARM_UP_POINTS)
    assert info["warnings"] == []


def test_an_unusual_shape_is_recorded_when_it_comes_again() -> None:
    predictor, device = on_gpu()
    predictor.warm_up()
    device.calls.clear()
    prompt = Prompt(points=[[10, 10]] * 5)
    for _ in range(CAPTURE_AFTER + 1):
        predictor.predict(image(), [prompt])
    assert device.ops.count("capture") == 1


def test_recording_can_be_switched_off() -> None:
    predictor, device = on_gpu(capture=False)
    predictor.warm_up()
    predictor.predict(image(), [CLICK])
    assert not {"capture", "replay"} & set(device.ops)
    assert predictor.info()["stream"]["capture"] == "switched off"


def test_a_failed_recording_is_a_warning() -> None:
    predictor, device = on_gpu()

    def fail(work: Callable[[], None], **_: bool) -> Any:
        raise DeviceError("no graphs today.", "")

    device.capture = fail  # type: ignore[method-assign,assignment]
    predictor.warm_up()
    assert same(predictor.predict(image(), [CLICK]), fake_predictor().predict(image(), [CLICK]))
    assert [w for w in predictor.info()["warnings"] if "no graphs today" in w]


def test_features_of_another_stream_are_waited_for_by_the_stream() -> None:
    """Two models of one bundle with one cache: each has a stream of its own."""
    cache = EmbeddingCache()
    (first, one), (second, two) = (on_gpu(cache, captures=False) for _ in range(2))
    first.encode(image())
    (mark,) = [c[1] for c in one.calls[-1:]]
    answer = second.predict(image(), [CLICK])
    assert second.runs == (0, 1)
    assert ("wait", mark) in two.calls
    assert same(answer, fake_predictor().predict(image(), [CLICK]))
    assert "synchronize" not in one.ops, "the host does not wait for it"
    embedding = second.encode(image())
    assert np.array_equal(embedding.image_embed, fake_predictor().encode(image()).image_embed)


def test_closing_one_model_leaves_the_other_one_working() -> None:
    cache = EmbeddingCache()
    (first, _), (second, two) = (on_gpu(cache) for _ in range(2))
    for predictor in (first, second):
        predictor.warm_up()
        predictor.predict(image(), [CLICK])
    first.encode(image(1))
    second.encode(image(2))
    first.close()
    assert cache.stats().entries == 1, "what the closed stream wrote went with it"
    two.calls.clear()
    assert same(second.predict(image(), [CLICK]), fake_predictor().predict(image(), [CLICK]))
    assert second.runs[0] == CAPTURE_AFTER + 1 + 2
    with pytest.raises(DeviceError, match="closed"):
        first.encode(image())


def test_close_waits_and_frees() -> None:
    predictor, device = on_gpu()
    predictor.warm_up()
    predictor.encode(image())
    device.calls.clear()
    predictor.close()
    assert device.ops == ["synchronize", *["close graph"] * (1 + len(WARM_UP_POINTS))]
    assert device.pending == 0
    predictor.close()
    assert predictor.cache.stats().entries == 0


def test_close_frees_everything_on_a_broken_device(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, device = on_gpu()
    predictor.warm_up()
    closed: list[str] = []
    predictor._opened.callback(closed.append, "session")

    def broken() -> None:
        raise DeviceError("illegal memory access.", "")

    monkeypatch.setattr(device, "synchronize", broken)
    with pytest.raises(DeviceError, match="illegal"):
        predictor.close()
    assert closed == ["session"]
    assert device.ops.count("close graph") == 1 + len(WARM_UP_POINTS)


def test_two_threads() -> None:
    predictor, _ = on_gpu(EmbeddingCache(3 * ENTRY))
    clicks = [[10, 20], [80, 30], [40, 140], [60, 70]]
    reference = fake_predictor()
    expected = {
        (i, j): reference.predict(image(40 * i), [Prompt(points=[c] * (1 + j))])
        for i in range(4)
        for j, c in enumerate(clicks)
    }
    embeds = [reference.encode(image(40 * i)).image_embed for i in range(4)]
    wrong: list[tuple[int, int]] = []

    def work() -> None:
        rng = np.random.default_rng(threading.get_ident() % 2**32)
        for _ in range(25):
            i, j = int(rng.integers(4)), int(rng.integers(4))
            answer = predictor.predict(image(40 * i), [Prompt(points=[clicks[j]] * (1 + j))])
            if not same(answer, expected[i, j]):
                wrong.append((i, j))
            embed = predictor.encode(image(40 * i)).image_embed
            if not np.array_equal(embed, embeds[i]):
                wrong.append((i, -1))

    run_all([work] * 4)
    assert not wrong
    assert predictor.info()["warnings"] == []


def test_client_features_are_uploaded(gpu: tuple[Sam2ImagePredictor, StubDevice]) -> None:
    predictor, device = gpu
    kept = fake_predictor().encode(image())
    embed, high = kept.image_embed, list(kept.high_res)
    device.calls.clear()
    embedding = predictor.embedding_from_arrays(embed, high, image().shape[:2])
    assert "synchronize" not in device.ops
    embed[:] = 0  # the caller may reuse its arrays
    for array in high:
        array[:] = 0
    expected = fake_predictor().predict(image(), [CLICK])
    assert same(predictor.predict(embedding, [CLICK]), expected)
    assert predictor.cache.stats().entries == 0


@pytest.mark.parametrize("discrete", [False, True])
def test_the_mask_input_is_zeros_unless_one_is_given(discrete: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory may hold anything, NaN too, and an earlier click's mask must be gone."""
    predictor, device = on_gpu(captures=False, discrete=discrete)
    plain = device.empty

    def dirty(shape: Any, dtype: Any) -> Buffer:
        buffer = plain(shape, dtype)
        device.memory(buffer).view(np.uint8)[...] = 0xFF
        return buffer

    monkeypatch.setattr(device, "empty", dirty)
    mask = np.full((32, 32), 20, np.float32)
    for prompt in (CLICK, CLICK, Prompt(points=[[70, 40]], mask_input=mask), CLICK, CLICK):
        assert same(predictor.predict(image(), [prompt]), fake_predictor().predict(image(), [prompt]))
        held = device.memory(predictor._decoder.prepare({"P": 1, "N": 2}).inputs[sam2.MASK_INPUT])
        assert (held == (0 if prompt.mask_input is None else 20)).all()


def test_a_failed_encoder_run_leaves_earlier_images_right(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, device = on_gpu()
    predictor.warm_up()
    held = predictor.encode(image())
    predictor.predict(held, [CLICK])

    def fail(binding: Any) -> None:
        for buffer in predictor._images.fixed().buffers.values():
            device.memory(buffer)[...] = 99  # half done
        raise DeviceError("the launch failed.", "")

    with monkeypatch.context() as broken:
        broken.setattr(predictor._chain, "launch", fail)
        with pytest.raises(DeviceError, match="launch failed"):
            predictor.encode(image(1))
    assert same(predictor.predict(held, [CLICK]), fake_predictor().predict(image(), [CLICK]))
    assert same(predictor.predict(image(1), [CLICK]), fake_predictor().predict(image(1), [CLICK]))
