"""Clicks through their own graphs on the CPU: the mask decoder's answers, which prompts run there, what is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.errors import BundleError, DeviceError
from pixano_edge.engine.models.chain import Chain
from pixano_edge.engine.models.sam2 import clicks
from pixano_edge.engine.models.sam2.cache import EmbeddingCache
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor, Sam2Prediction
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.runtime.base import Binding
from tests.support.make_preprocess_reference import procedural_image

IMAGE = procedural_image(90, 120)
POINT, BOX = Prompt(points=[[30, 40]]), Prompt(box=[10, 10, 60, 70])
CROWD = Prompt(points=[[5 * i, 4 * i] for i in range(sam2.MAX_CLICK_POINTS)])


@pytest.fixture(scope="module")
def plain_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle as older versions made it."""
    folder = tmp_path_factory.mktemp("older") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest.pop("cpu_graphs").values():
        del manifest["files"][entry["file"]]
        (folder / entry["file"]).unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Iterator[Sam2ImagePredictor]:
    with Sam2ImagePredictor.open(tiny_bundle, device="cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(plain_bundle: Path) -> Iterator[Sam2ImagePredictor]:
    with Sam2ImagePredictor.open(plain_bundle, device="cpu", threads=1) as opened:
        yield opened


def ask(predictor: Sam2ImagePredictor, *prompts: Prompt, image: np.ndarray = IMAGE) -> Sam2Prediction:
    return predictor.predict(image, prompts, return_logits=True)


def distance(a: Sam2Prediction, b: Sam2Prediction) -> float:
    assert a.low_res_logits is not None
    assert b.low_res_logits is not None
    return float(np.abs(a.low_res_logits - b.low_res_logits).max() / np.abs(b.low_res_logits).max())


def masked(predictor: Sam2ImagePredictor) -> Prompt:
    logits = ask(predictor, BOX).low_res_logits
    assert logits is not None
    return Prompt(points=[[30, 40]], mask_input=logits[0, 0])


def test_answers_are_the_mask_decoders(predictor: Sam2ImagePredictor, plain: Sam2ImagePredictor) -> None:
    for prompts in ([POINT], [BOX], [POINT, Prompt(points=[[80, 20]])], [Prompt()], [masked(plain)], [CROWD]):
        got, want = ask(predictor, *prompts), ask(plain, *prompts)
        assert distance(got, want) < 1e-5
        assert np.allclose(got.scores, want.scores, atol=1e-5)
        assert np.allclose(got.object_scores, want.object_scores, atol=1e-4)
    assert distance(ask(predictor, POINT), ask(plain, BOX)) > 1e-2


def test_which_prompts_run_where(predictor: Sam2ImagePredictor, plain: Sam2ImagePredictor) -> None:
    def counts() -> tuple[int, int]:
        info = json.loads(json.dumps(predictor.info()))
        return info["clicks"]["runs"], predictor.runs[1]

    mask = masked(plain)
    for prompts, own in (([POINT], 1), ([POINT, POINT], 1), ([mask], 1), ([CROWD], 0), ([mask, POINT], 0)):
        before = counts()
        ask(predictor, *prompts)
        assert (counts()[0] - before[0], counts()[1] - before[1]) == (own, 1)


def test_older_bundles_and_other_precisions_run_the_mask_decoder(
    plain: Sam2ImagePredictor, predictor: Sam2ImagePredictor, tiny_bundle: Path
) -> None:
    assert (plain.info()["clicks"], plain.info()["cpu_graphs"]) == (None, [])
    assert predictor.info()["cpu_graphs"] == sorted(clicks.GRAPHS)
    with Sam2ImagePredictor.open(tiny_bundle, device="cpu", precision="fp16", threads=1) as half:
        assert half.info()["clicks"] is None


def test_an_image_is_prepared_once_and_few_are_kept(predictor: Sam2ImagePredictor, plain: Sam2ImagePredictor) -> None:
    images = [procedural_image(60 + i, 70) for i in range(clicks.KEPT_IMAGES + 1)]
    ask(predictor, POINT)  # makes the sessions' own buffers
    predictor.shrink()
    start, before = predictor.info()["clicks"]["images_prepared"], predictor.memory()
    for _ in range(2):
        for image in images[:2]:
            ask(predictor, POINT, image=image)
    assert predictor.info()["clicks"]["images_prepared"] == start + 2
    answers = [ask(predictor, POINT, image=image) for image in images]
    assert predictor.info()["clicks"]["images_kept"] == clicks.KEPT_IMAGES
    kept, use = predictor.info()["clicks"]["bytes_kept"], predictor.memory()
    one = kept // clicks.KEPT_IMAGES
    assert (use.bindings or 0) - (before.bindings or 0) == one > 0
    assert use.caches == predictor.cache.stats().bytes + kept - one
    again = ask(predictor, POINT, image=images[0])  # its buffers went to another image meanwhile
    assert np.array_equal(again.masks, answers[0].masks)
    for image, answer in zip(images, answers):
        assert distance(answer, ask(plain, POINT, image=image)) < 1e-5


def test_what_is_kept_of_more_images_comes_out_of_the_caches_budget(tiny_bundle: Path) -> None:
    images = [procedural_image(60 + i, 70) for i in range(clicks.KEPT_IMAGES)]
    cache = EmbeddingCache()
    with Sam2ImagePredictor.open(tiny_bundle, device="cpu", threads=1, cache=cache) as predictor:

        def click_on_all() -> tuple[int, int]:
            for image in images:
                ask(predictor, POINT, image=image)
                use = predictor.memory()
                assert (use.caches or 0) <= cache.max_bytes
            info = predictor.info()
            return info["cache"]["entries"], info["clicks"]["images_kept"]

        ask(predictor, POINT, image=images[0])
        features, kept = cache.stats().bytes, predictor.info()["clicks"]["bytes_kept"]
        assert click_on_all() == (4, 4)
        assert cache.stats().bytes == 4 * features
        predictor.shrink()
        assert (predictor.memory().caches, predictor.info()["clicks"]["images_kept"]) == (0, 0)
        cache.max_bytes = 2 * kept + 2 * features  # one more image's in the lendable half, the rest for features
        assert click_on_all() == ((kept + 2 * features) // features, 2)
        predictor.shrink()
        cache.max_bytes = 2 * kept - 1
        assert click_on_all() == (cache.max_bytes // features, 1)
    assert cache.lend(cache.max_bytes // 2), "everything was given back"


def test_a_failed_preparation_is_made_again(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Sam2ImagePredictor.open(tiny_bundle, device="cpu", threads=1) as predictor:
        answer = ask(predictor, POINT)
        other = procedural_image(61, 70)
        real = Chain.launch

        def fails(chain: Chain, binding: Binding) -> None:
            real(chain, binding)
            if binding.session.spec.name == sam2.IMAGE_PREPARE:
                raise DeviceError("it failed", "")

        with monkeypatch.context() as patched:
            patched.setattr(Chain, "launch", fails)
            with pytest.raises(DeviceError, match="it failed"):
                ask(predictor, POINT, image=other)
        prepared = predictor.info()["clicks"]["images_prepared"]
        ask(predictor, POINT, image=other)
        assert predictor.info()["clicks"]["images_prepared"] == prepared + 1
        assert predictor.info()["clicks"]["images_kept"] == 2
        assert np.array_equal(ask(predictor, POINT).masks, answer.masks)


def test_features_of_a_client(predictor: Sam2ImagePredictor, plain: Sam2ImagePredictor) -> None:
    kept = predictor.encode(IMAGE)
    sent = predictor.embedding_from_arrays(kept.image_embed, kept.high_res, kept.original_size)
    assert np.array_equal(predictor.predict(sent, [POINT]).masks, ask(predictor, POINT).masks)
    assert kept.image_embed.shape == plain.encode(IMAGE).image_embed.shape


def test_unknown_cpu_graphs_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "newer")
    path = tmp_path / "newer" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["cpu_graphs"]["abacus"] = manifest["cpu_graphs"]["click_decoder"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="abacus"):
        Bundle.open(tmp_path / "newer")
