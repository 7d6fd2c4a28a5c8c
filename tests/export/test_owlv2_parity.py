"""Parity of OWLv2 and OWL-ViT with transformers, and mistakes that it must catch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import owlv2 as contract
from pixano_edge.engine.models.owlv2 import detector as engine_detector
from pixano_edge.engine.models.owlv2 import scores
from pixano_edge.engine.models.owlv2.detector import Owlv2Detector
from pixano_edge.engine.models.resampling import Scratch
from pixano_edge.export.detection import parity
from pixano_edge.export.owlv2 import graphs
from pixano_edge.export.owlv2.checkpoint import load
from pixano_edge.export.owlv2.family import OwlFamily, as_detections, ask_model
from pixano_edge.export.parity import Runner, onnx_runner
from pixano_edge.export.photos import Photo, default_photos

SHAPES = ((0, 0, 399, 599), (0, 0, 399, 150), (100, 0, 61, 599), (3, 5, 127, 128))
"""Parts of one photo: as it is, tall, very wide, odd and nearly square; top, left, height, width."""


@pytest.fixture(scope="module", params=["owlv2", "owlvit"])
def family(request: pytest.FixtureRequest) -> OwlFamily:
    folder = request.getfixturevalue({"owlv2": "owl_checkpoint", "owlvit": "owlvit_checkpoint"}[request.param])
    return OwlFamily(load(folder, request.param))


@pytest.fixture(scope="module")
def files(family: OwlFamily, request: pytest.FixtureRequest) -> dict[str, Path]:
    bundle = Bundle.open(request.getfixturevalue({"owlv2": "owl_bundle", "owlvit": "owlvit_bundle"}[family.family]))
    return {graph: bundle.graph_path(graph, "fp32") for graph in family.specs}


@pytest.fixture(scope="module")
def suite(family: OwlFamily) -> parity.Suite:
    coffee = default_photos()[0].pixels
    photos = [Photo(f"{h}x{w}", np.ascontiguousarray(coffee[y : y + h, x : x + w])) for y, x, h, w in SHAPES]
    return parity.build_suite(family, photos, None)


def measure(
    family: OwlFamily, files: dict[str, Path], suite: parity.Suite, run: Runner | None = None
) -> parity.VariantParity:
    with family.open(files, 1, True) as detector:
        return parity.compare(family, run or onnx_runner(files, 1), detector, suite, "fp32")


def test_tensors_and_detections_at_several_shapes(
    family: OwlFamily, files: dict[str, Path], suite: parity.Suite
) -> None:
    found = measure(family, files, suite)
    assert found.problems() == []
    assert {(t.graph, t.tensor) for t in found.tensors} == {
        (g.name, t.name) for g in family.specs.values() for t in g.outputs
    }
    assert max(t.max_rel for t in found.tensors) < 1e-5
    assert found.detections.boxes > 100
    assert found.detections.max_score < 1e-4
    # What agrees must not be trivial: several classes, boxes of many sizes, scores that differ.
    answers = [a.detect(t) for a, t in zip(suite.answers, suite.thresholds)]
    assert len({int(label) for answer in answers for label in answer.labels}) > 3
    assert np.std(np.concatenate([a.scores for a in answers])) > 0.02


def _swap_channels(patch: pytest.MonkeyPatch) -> None:
    real = engine_detector.preprocess
    patch.setattr(engine_detector, "preprocess", lambda image, *rest: real(image[:, :, ::-1], *rest))


def _gray_padding(patch: pytest.MonkeyPatch) -> None:
    real = engine_detector.preprocess

    def padded(image: Any, *rest: Any) -> None:
        side = max(image.shape[:2])
        gray = np.full((side, side, 3), 128, np.uint8)
        gray[: image.shape[0], : image.shape[1]] = image
        real(gray, *rest)

    patch.setattr(engine_detector, "preprocess", padded)


def _own_sides(patch: pytest.MonkeyPatch) -> None:
    """Width and height where OWLv2 has the long side, and the other way round."""
    side = {contract.OWLV2: lambda s: (s[1], s[0], s[1], s[0]), contract.OWLVIT: lambda s: (max(s),) * 4}
    patch.setattr(scores, "box_scale", lambda size, c: np.array(side[c.family](size), np.float32))


def _y_before_x(patch: pytest.MonkeyPatch) -> None:
    real = scores.corners
    patch.setattr(scores, "corners", lambda boxes: real(boxes)[:, [1, 0, 3, 2]])


def _corners_for_centres(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scores, "corners", lambda boxes: boxes)


def _lengths_kept(patch: pytest.MonkeyPatch) -> None:
    real = engine_detector.class_logits

    def raw(features: Any, embeds: Any, scratch: Scratch) -> Any:
        flat = scores.ImageFeatures(**{**features.__dict__, "inverse": np.ones_like(features.inverse)})
        return real(flat, embeds, scratch)

    patch.setattr(engine_detector, "class_logits", raw)


def _shift_after_scale(patch: pytest.MonkeyPatch) -> None:
    def wrong(features: Any, embeds: Any, scratch: Scratch) -> Any:
        return features.class_embeds @ embeds.T * features.inverse * features.scale + features.shift

    patch.setattr(engine_detector, "class_logits", wrong)


def _padding_with_the_end(patch: pytest.MonkeyPatch) -> None:
    """Must NOT be seen: what follows the end token has no influence."""
    real = Owlv2Detector._run_text_encoder

    def padded(self: Owlv2Detector, ids: Any) -> Any:
        return real(self, np.where(ids == self.constants.pad_token, self.constants.end_token, ids).astype(np.int32))

    patch.setattr(Owlv2Detector, "_run_text_encoder", padded)


def _classes_turned(patch: pytest.MonkeyPatch) -> None:
    real = Owlv2Detector._run_text_encoder
    patch.setattr(Owlv2Detector, "_run_text_encoder", lambda self, ids: real(self, ids)[::-1].copy())


@pytest.mark.parametrize(
    "mistake",
    [
        _swap_channels,
        _gray_padding,
        _own_sides,
        _y_before_x,
        _corners_for_centres,
        _lengths_kept,
        _shift_after_scale,
        _classes_turned,
    ],
)
def test_mistakes_of_the_pipeline_are_seen(
    mistake: Callable[[pytest.MonkeyPatch], None],
    family: OwlFamily,
    files: dict[str, Path],
    suite: parity.Suite,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistake(monkeypatch)
    assert any("detections" in p for p in measure(family, files, suite).problems())


def test_what_follows_the_end_of_a_text_has_no_influence(
    family: OwlFamily, files: dict[str, Path], suite: parity.Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    _padding_with_the_end(monkeypatch)
    assert measure(family, files, suite).problems() == []


def torch_runner(family: OwlFamily, modules: dict[str, Any]) -> Runner:
    """Export wrappers in PyTorch, for mistakes that are easier to plant in a module than in a file."""

    def call(graph: str, feeds: parity.Arrays) -> parity.Arrays:
        spec = family.specs[graph]
        with torch.no_grad():
            values = modules[graph](*(torch.from_numpy(feeds[t.name]) for t in spec.inputs))
        values = values if isinstance(values, tuple) else (values,)
        return {t.name: v.numpy() for t, v in zip(spec.outputs, values)}

    return call


@contextmanager
def planted(modules: dict[str, Any], mistake: str) -> Iterator[None]:
    image, text = modules[contract.IMAGE_ENCODER], modules[contract.TEXT_ENCODER]
    if mistake == "no mask":
        text.causal = torch.zeros_like(text.causal)
    elif mistake == "turned mask":
        text.causal = text.causal.transpose(2, 3)
    elif mistake == "first token pooled":
        text.end_token = text.end_token - 1  # the start: the first token is pooled
    elif mistake == "position shifted":
        text.position = text.position.roll(1, dims=1)
    elif mistake == "no box bias":
        image.box_bias = torch.zeros_like(image.box_bias)
    elif mistake == "box bias transposed":
        side = int(len(image.box_bias) ** 0.5)
        image.box_bias = image.box_bias.reshape(side, side, 4).transpose(0, 1).reshape(-1, 4)
    elif mistake == "no class token":
        image.merged_norm = torch.nn.Identity()
    else:
        assert mistake == "objectness of another head"
        if image.objectness_head is None:
            pytest.skip("OWL-ViT has none")
        head = torch.nn.Sequential(image.box_head, torch.nn.Linear(4, 1))
        image.objectness_head = head
    yield


@pytest.mark.parametrize(
    "mistake",
    [
        "no mask",
        "turned mask",
        "first token pooled",
        "position shifted",
        "no box bias",
        "box bias transposed",
        "no class token",
        "objectness of another head",
    ],
)
def test_mistakes_of_the_graphs_are_seen(
    mistake: str, family: OwlFamily, files: dict[str, Path], suite: parity.Suite
) -> None:
    modules = dict(family.modules())
    run = torch_runner(family, modules)
    with planted(modules, mistake):
        problems = measure(family, files, suite, run).problems()
    assert any("relative error" in p for p in problems)


def test_like_an_example_as_transformers(family: OwlFamily, files: dict[str, Path]) -> None:
    """`image_guided_detection` of the stock model on two pictures, with its own choice of the embedding."""
    loaded = family.loaded
    one, two = (p.pixels for p in default_photos())
    pixels = [loaded.images(Image.fromarray(p), return_tensors="pt")["pixel_values"] for p in (one, two)]
    with torch.no_grad():
        output = loaded.model.image_guided_detection(pixel_values=pixels[0], query_pixel_values=pixels[1])
    size = (one.shape[0], one.shape[1])
    (wanted,) = loaded.images.post_process_image_guided_detection(
        output, threshold=0.0, nms_threshold=0.3, target_sizes=torch.tensor([size])
    )
    expected = as_detections(
        wanted["boxes"], wanted["scores"], torch.zeros(len(wanted["scores"]), dtype=torch.int64), size, ("example",)
    )
    with family.open(files, 1, True) as detector:
        found = detector.detect_like(one, two)
    agreement = parity.Agreement()
    agreement.add(found, expected, 0.0)
    assert agreement.problems() == []
    assert len(expected) > 3


def test_objectness_chooses_the_example(
    family: OwlFamily, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control: without it, or with another choice, the answer is another one."""
    one, two = (p.pixels for p in default_photos())
    with family.open(files, 1, True) as detector:
        right = detector.detect_like(one, two)
        features = detector.image_features(two)
        chosen = scores.example_query(features, (two.shape[0], two.shape[1]), detector.constants, None)
        monkeypatch.setattr(engine_detector, "example_query", lambda *rest: (chosen + 7) % len(features.boxes))
        wrong = detector.detect_like(one, two)
    agreement = parity.Agreement()
    agreement.add(wrong, right, 0.0)
    assert agreement.problems()


def test_the_mask_of_transformers_says_the_same_as_no_mask(family: OwlFamily) -> None:
    """The contract has no attention mask; transformers' answer does not depend on it either."""
    loaded = family.loaded
    pixels = torch.zeros(1, 3, loaded.constants.image_size, loaded.constants.image_size)
    with_mask = ask_model(loaded, pixels, ["cat", "a coffee cup"]).tensors[contract.TEXT_EMBEDS]
    ids = torch.from_numpy(ask_model(loaded, pixels, ["cat", "a coffee cup"]).tensors[contract.INPUT_IDS])
    base = graphs.backbone(loaded.model)
    with torch.no_grad():
        text = base.get_text_features(ids, torch.ones_like(ids)).pooler_output
        without = graphs.unit(text, 0.0).numpy()
    assert np.abs(with_mask - without).max() < 1e-5


@pytest.mark.parametrize(("scores_of", "count"), [((0.9, 0.8, 0.7, 0.6, 0.3, 0.29), 4), ((0.5,), 0), ((), 0)])
def test_the_threshold_lies_in_the_widest_gap(scores_of: tuple[float, ...], count: int) -> None:
    values = np.array(scores_of, np.float32)
    threshold = parity.choose_threshold(values)
    if count:
        assert (values > threshold).sum() == count
    else:
        assert threshold == 0.0
