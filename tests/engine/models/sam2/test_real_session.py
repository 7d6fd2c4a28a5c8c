"""The predictor on ONNX Runtime: opening, cache, threads and memory in the steady state."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.errors import BundleError, DeviceError
from pixano_edge.engine.models.sam2.cache import EmbeddingCache
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from tests.engine.models.sam2.test_cache import run_all
from tests.support.make_preprocess_reference import procedural_image


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Iterator[Sam2ImagePredictor]:
    with Sam2ImagePredictor.open(tiny_bundle, threads=1) as opened:
        yield opened


def test_info_and_precision(tiny_bundle: Path, predictor: Sam2ImagePredictor) -> None:
    info = json.loads(json.dumps(predictor.info()))
    assert (info["precision"], info["device"], info["backend"]) == ("fp32", "cpu", "onnxruntime")
    assert "fp32" in info["precision_reason"]
    with Sam2ImagePredictor.open(Bundle.open(tiny_bundle), precision="fp16", threads=1) as half:
        assert half.info()["precision"] == "fp16"
        masks = half.predict(procedural_image(60, 90), [Prompt(points=[[30, 30]])]).masks
    full = predictor.predict(procedural_image(60, 90), [Prompt(points=[[30, 30]])]).masks
    assert np.count_nonzero(masks != full) < 0.02 * full.size


def test_what_cannot_be_opened(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="int8"):
        Sam2ImagePredictor.open(tiny_bundle, precision="int8")
    with pytest.raises(DeviceError):
        Sam2ImagePredictor.open(tiny_bundle, device="cuda:0")
    with pytest.raises(DeviceError):
        Sam2ImagePredictor.open(tiny_bundle, backend="abacus")
    with pytest.raises(BundleError):
        Sam2ImagePredictor.open(tmp_path / "nothing")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bundle, broken)
    graph = Bundle.open(broken).graph_path("mask_decoder")
    graph.write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(BundleError):
        Sam2ImagePredictor.open(broken)


def test_second_click_costs_only_the_decoder(predictor: Sam2ImagePredictor) -> None:
    image = procedural_image(97, 61)
    encoded, decoded = predictor.runs
    for click in range(3):
        predictor.predict(image.copy(), [Prompt(points=[[click, 5]])])
    assert predictor.runs == (encoded + 1, decoded + 3)


def test_recycled_buffers_give_the_right_answer(tiny_bundle: Path) -> None:
    """A cache with room for one image: every encode writes into the buffers of the image before."""
    images = [procedural_image(50 + i, 70) for i in range(4)]
    with Sam2ImagePredictor.open(tiny_bundle, threads=1) as fresh:
        expected = [fresh.predict(i, [Prompt(points=[[30, 20]])]) for i in images]
        entry = fresh.cache.stats().bytes // 4
    cache = EmbeddingCache(entry)
    with Sam2ImagePredictor.open(tiny_bundle, threads=1, cache=cache) as predictor:
        held = predictor.encode(images[0])
        for _ in range(3):
            for image, want in zip(images, expected):
                got = predictor.predict(image, [Prompt(points=[[30, 20]])])
                assert np.array_equal(got.masks, want.masks)
                assert np.array_equal(got.scores, want.scores)
        kept = predictor.predict(held, [Prompt(points=[[30, 20]])])
        assert np.array_equal(kept.scores, expected[0].scores)
    assert cache.pool.allocated <= 3
    assert cache.stats().entries == 1


def test_threads(tiny_bundle: Path) -> None:
    images = [procedural_image(50 + i, 70) for i in range(3)]
    wrong: list[int] = []
    with Sam2ImagePredictor.open(tiny_bundle, threads=1, cache=EmbeddingCache(1 << 17)) as predictor:
        expected = [predictor.predict(i, [Prompt(points=[[30, 20]])]) for i in images]

        def work() -> None:
            rng = np.random.default_rng(threading.get_ident() % 2**32)
            for _ in range(15):
                index = int(rng.integers(3))
                got = predictor.predict(images[index], [Prompt(points=[[30, 20]])])
                if not np.array_equal(got.scores, expected[index].scores):
                    wrong.append(index)

        run_all([work] * 4)
    assert not wrong


def test_memory_stands_still_over_500_clicks(predictor: Sam2ImagePredictor) -> None:
    image = procedural_image(540, 960)
    embedding = predictor.encode(image)
    out = np.empty((1, 3, 540, 960), np.bool_)

    def click(count: int) -> None:
        for i in range(count):
            predictor.predict(embedding, [Prompt(points=[[10 + i, 40]], labels=[1])], out=out)

    click(50)
    grown = []
    for _ in range(3):  # other tests' threads may grow the process once; a leak grows every time
        gc.collect()
        resident = psutil.Process().memory_info().rss
        click(500)
        grown.append(psutil.Process().memory_info().rss - resident)
    assert min(grown) < 4 << 20
    tracemalloc.start()
    try:
        for _ in range(50):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            click(1)
            # One low-resolution mask has 4 KB, the mask of the photo 518 KB.
            assert tracemalloc.get_traced_memory()[1] - before < 8 * 1024
        gc.collect()  # empties the interpreter's own free lists
        assert tracemalloc.get_traced_memory()[0] < 16 * 1024
    finally:
        tracemalloc.stop()


def test_closing_frees_the_files(tiny_bundle: Path) -> None:
    predictor = Sam2ImagePredictor.open(tiny_bundle, threads=1)
    embedding = predictor.encode(procedural_image(20, 30))
    predictor.close()
    predictor.close()
    with pytest.raises(DeviceError, match="closed"):
        predictor.predict(embedding, [Prompt()])
    assert embedding.image_embed.shape == (1, 32, 8, 8)  # still readable
