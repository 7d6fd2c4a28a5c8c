"""The predictor on a real GPU, with the demo bundle; run with ``pytest -m gpu``.

TensorRT's tests need engines of the demo bundle: ``pixano-edge build sam2-demo``; they are skipped with the reason.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.errors import BundleError, DeviceError, MissingDependencyError
from pixano_edge.engine.models.opening import locate
from pixano_edge.engine.models.sam2.cache import EmbeddingCache
from pixano_edge.engine.models.sam2.opening import IMAGE_GRAPHS
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2.verify import verify_bundle
from pixano_edge.engine.models.verdicts import VerdictStore
from pixano_edge.engine.runtime import open_device
from tests.engine.models.sam2.test_cache import run_all
from tests.support.make_preprocess_reference import procedural_image
from tests.support.system import resident as resident_bytes

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
CLICK = Prompt(points=[[30, 40]])
BOX = Prompt(box=[20, 20, 70, 60])


@pytest.fixture(scope="module", params=["onnxruntime", "tensorrt"])
def backend(request: pytest.FixtureRequest, demo_bundle: Path) -> str:
    device = open_device(DEVICE)
    try:
        locate(Bundle.open(demo_bundle), request.param, "fp32", device.info(), IMAGE_GRAPHS)
    except (BundleError, DeviceError, MissingDependencyError) as error:
        pytest.skip(str(error))
    finally:
        device.close()
    return str(request.param)


@pytest.fixture(scope="module")
def predictor(demo_bundle: Path, backend: str) -> Iterator[Sam2ImagePredictor]:
    with Sam2ImagePredictor.open(demo_bundle, device=DEVICE, backend=backend, precision="fp32", prove=False) as opened:
        yield opened


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_golden_samples(demo_bundle: Path, backend: str, precision: str) -> None:
    try:
        report = verify_bundle(demo_bundle, DEVICE, backend, precision)
    except DeviceError as error:
        if "no engine" not in error.message:
            raise
        pytest.skip(str(error))
    assert report.passed, report.problems
    assert report.device == DEVICE


def test_recorded_equals_eager(demo_bundle: Path, backend: str, predictor: Sam2ImagePredictor) -> None:
    images = [procedural_image(60 + 8 * i, 90) for i in range(3)]
    with Sam2ImagePredictor.open(
        demo_bundle, device=DEVICE, backend=backend, precision="fp32", prove=False, capture=False
    ) as eager:
        for image in [*images, *images]:
            for prompts in ([CLICK], [BOX], [CLICK, CLICK, BOX]):
                for _ in range(3):  # so that unusual shapes are recorded too
                    got = predictor.predict(image, prompts, return_logits=True)
                want = eager.predict(image, prompts, return_logits=True)
                assert got.low_res_logits is not None
                assert want.low_res_logits is not None
                np.testing.assert_allclose(got.low_res_logits, want.low_res_logits, rtol=1e-4, atol=1e-4)
                np.testing.assert_allclose(got.scores, want.scores, rtol=1e-4, atol=1e-5)


class Waits:
    """Counts what makes the host wait for the stream."""

    def __init__(self, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[str] = []
        for name in ("synchronize", "download", "elapsed"):
            monkeypatch.setattr(device, name, self._counted(name, getattr(device, name)))

    def _counted(self, name: str, plain: Any) -> Any:
        def call(*args: Any) -> Any:
            self.found.append(name)
            return plain(*args)

        return call


def test_the_host_waits_once(predictor: Sam2ImagePredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    device = predictor._device
    for _ in range(4):
        predictor.predict(procedural_image(61, 91), [CLICK])
    waits = Waits(device, monkeypatch)
    predictor.predict(procedural_image(61, 91), [CLICK])
    assert waits.found == ["synchronize"], "features from the cache"
    waits.found.clear()
    predictor.predict(procedural_image(62, 92), [CLICK])
    assert waits.found == ["synchronize"], "encoder and decoder"
    waits.found.clear()
    predictor.encode(procedural_image(63, 93))
    assert waits.found == []


def test_1000_predictions_take_no_more_memory(demo_bundle: Path, backend: str) -> None:
    images = [procedural_image(60 + i, 90) for i in range(6)]
    with Sam2ImagePredictor.open(
        demo_bundle, device=DEVICE, backend=backend, precision="fp32", prove=False, cache=EmbeddingCache(4 << 20)
    ) as predictor:

        def run(count: int) -> None:
            for i in range(count):
                predictor.predict(images[i % len(images)], [CLICK if i % 3 else BOX])

        run(100)
        gc.collect()
        resident, free = resident_bytes(), predictor._device.info().memory_free
        run(1000)
        gc.collect()
        assert resident_bytes() - resident < 16 << 20
        now = predictor._device.info().memory_free
        if free is not None and now is not None:
            assert free - now < 16 << 20


def test_threads(predictor: Sam2ImagePredictor) -> None:
    images = [procedural_image(50 + i, 70) for i in range(4)]
    expected = [predictor.predict(image, [CLICK]) for image in images]
    wrong: list[int] = []

    def work() -> None:
        rng = np.random.default_rng(threading.get_ident() % 2**32)
        for _ in range(50):
            index = int(rng.integers(len(images)))
            if not np.allclose(predictor.predict(images[index], [CLICK]).scores, expected[index].scores, atol=1e-5):
                wrong.append(index)

    run_all([work] * 4)
    assert not wrong


def test_the_first_load_proves_and_the_second_one_knows(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = VerdictStore(tmp_path)
    with Sam2ImagePredictor.open(demo_bundle, device=DEVICE, verdicts=store) as predictor:
        first = predictor.info()
    assert list(tmp_path.iterdir())
    assert first["warm_up"]["seconds"] > 0
    monkeypatch.setattr("pixano_edge.engine.models.sam2.verify.verify_bundle", None)
    with Sam2ImagePredictor.open(demo_bundle, device=DEVICE, verdicts=store) as predictor:
        second = predictor.info()
    assert (first["backend"], first["precision"]) == (second["backend"], second["precision"])
