"""From outputs to detections: scores, boxes, the example's embedding; against transformers' own post-processing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.contracts.owlv2 import OwlConstants
from pixano_edge.engine.errors import PromptError
from pixano_edge.engine.models.owlv2.scores import (
    ImageFeatures,
    class_logits,
    example_query,
    find,
    find_like,
    sigmoid,
)
from pixano_edge.engine.models.resampling import Scratch

CLASSES = ("cat", "dog", "bird")
SIZE = (90, 160)


def features(seed: int = 0, queries: int = 60, objectness: bool = True) -> ImageFeatures:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    boxes = rng.uniform((0, 0, 0.05, 0.05), (1, 1, 0.6, 0.6), (queries, 4)).astype(np.float32)
    return ImageFeatures.of(
        boxes,
        normal(queries, 16),
        normal(queries, 1) * np.float32(0.2),
        np.abs(normal(queries, 1)) + 3,
        normal(queries) if objectness else None,
    )


def texts(count: int = 3) -> Any:
    embeds = np.random.default_rng(1).standard_normal((count, 16)).astype(np.float32)
    return embeds / np.linalg.norm(embeds, axis=1, keepdims=True)


def test_logits_are_scaled_shifted_cosines() -> None:
    f, t = features(), texts()
    unit = f.class_embeds / (np.linalg.norm(f.class_embeds, axis=1, keepdims=True) + 1e-6)
    wanted = (unit @ t.T + f.shift) * f.scale
    assert np.abs(class_logits(f, t, Scratch()) - wanted).max() < 1e-5


@pytest.mark.parametrize("family", ["owlv2", "owlvit"])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.0])
def test_detections_as_the_processor(family: str, threshold: float) -> None:
    torch = pytest.importorskip("torch")
    from tests.support.make_owl_reference import processor

    f, constants = features(), OwlConstants(family=family)
    logits = class_logits(f, texts(), Scratch())
    output = SimpleNamespace(logits=torch.from_numpy(logits[None]), pred_boxes=torch.from_numpy(f.boxes[None]))
    (wanted,) = processor(family, 32).post_process_object_detection(output, threshold, [SIZE])
    order = torch.argsort(wanted["scores"], descending=True, stable=True)
    boxes = np.clip(wanted["boxes"][order].numpy(), 0, (160, 90, 160, 90))
    seen = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    found = find(f, logits, SIZE, constants, CLASSES, threshold, None, None)
    assert np.abs(found.boxes - boxes[seen]).max(initial=0) < 1e-3
    assert np.abs(found.scores - wanted["scores"][order].numpy()[seen]).max(initial=0) < 1e-6
    assert found.labels.tolist() == wanted["labels"][order].numpy()[seen].tolist()
    if family == "owlv2" and threshold == 0:
        assert not seen.all()  # some lie in what was added below


def test_the_limit_and_nms() -> None:
    f, constants = features(), OwlConstants()
    logits = class_logits(f, texts(), Scratch())
    whole = find(f, logits, SIZE, constants, CLASSES, 0.2, None, None)
    few = find(f, logits, SIZE, constants, CLASSES, 0.2, None, 5)
    assert np.array_equal(few.boxes, whole.boxes[:5])
    thinned = find(f, logits, SIZE, constants, CLASSES, 0.2, 0.3, None)
    assert 0 < len(thinned) < len(whole)
    assert np.all(np.diff(thinned.scores) <= 0)
    assert few.boxes.base is None  # the caller's own


def test_equal_names_go_to_the_first() -> None:
    f = features()
    embeds = texts(1)[[0, 0]]
    found = find(f, class_logits(f, embeds, Scratch()), SIZE, OwlConstants(), ("cat", "cat"), 0.0, None, None)
    assert set(found.labels.tolist()) == {0}


@pytest.mark.parametrize("family", ["owlv2", "owlvit"])
@pytest.mark.parametrize(("threshold", "nms"), [(0.0, 0.3), (0.5, 0.3), (0.0, 1.0), (0.4, 0.7), (0.999, 0.3)])
def test_detections_like_an_example_as_the_processor(family: str, threshold: float, nms: float) -> None:
    torch = pytest.importorskip("torch")
    from tests.support.make_owl_reference import processor

    f, constants = features(), OwlConstants(family=family)
    logits = class_logits(f, texts(1), Scratch()).copy()
    output = SimpleNamespace(
        logits=torch.from_numpy(logits[None].copy()), target_pred_boxes=torch.from_numpy(f.boxes[None])
    )
    (wanted,) = processor(family, 32).post_process_image_guided_detection(
        output, threshold=threshold, nms_threshold=nms, target_sizes=torch.tensor([SIZE])
    )
    order = torch.argsort(wanted["scores"], descending=True, stable=True)
    boxes = np.clip(wanted["boxes"][order].numpy(), 0, (160, 90, 160, 90))
    seen = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    found = find_like(f, logits, SIZE, constants, "it", threshold, nms if nms < 1 else None, None)
    assert found.names() == ["it"] * len(found)
    assert np.abs(found.boxes - boxes[seen]).max(initial=0) < 1e-3
    assert np.abs(found.scores - wanted["scores"][order].numpy()[seen]).max(initial=0) < 1e-5


def test_example_without_a_box() -> None:
    f = features()
    assert f.objectness is not None
    assert example_query(f, SIZE, OwlConstants(), None) == int(f.objectness.argmax())


def test_example_with_a_box_takes_a_box_there() -> None:
    """Of the boxes that overlap best, the one least like the mean."""
    f = features(queries=5)
    f.boxes[:] = [
        [0.2, 0.2, 0.2, 0.2],
        [0.21, 0.2, 0.2, 0.2],
        [0.8, 0.3, 0.2, 0.2],
        [0.5, 0.5, 1, 1],
        [0.9, 0.9, 0.1, 0.1],
    ]
    side = max(SIZE)
    box = np.array([0.1, 0.1, 0.3, 0.3]) * side
    similar = f.class_embeds[:2] @ f.class_embeds.mean(axis=0)
    assert example_query(f, SIZE, OwlConstants(), box) == int(similar.argmin())
    away = np.array([0.55, 0.05, 0.6, 0.1]) * side  # overlaps nothing but the whole picture
    assert example_query(f, SIZE, OwlConstants(), away) == 3
    f.boxes[3] = [0.05, 0.9, 0.02, 0.02]
    assert example_query(f, SIZE, OwlConstants(), away) == 2  # the nearest


@pytest.mark.parametrize(
    "box", [(10, 10, 10, 20), (20, 10, 10, 20), (float("nan"), 0, 5, 5), (200, 10, 220, 30), (1, 2, 3)]
)
def test_boxes_that_are_none(box: tuple[float, ...]) -> None:
    with pytest.raises(PromptError):
        example_query(features(), SIZE, OwlConstants(), np.array(box, np.float64))


def test_sigmoid_does_not_warn() -> None:
    with np.errstate(all="raise", under="ignore"):
        values = sigmoid(np.array([-1e4, -50, 0, 50, 1e4], np.float32))
    assert values.tolist() == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-9)
