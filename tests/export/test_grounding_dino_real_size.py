"""Grounding DINO with Swin-T and BERT-base at its real size, with seeded weights: parity on real photos, TensorRT.

Minutes: 900 queries over some 20,000 places, in PyTorch and in ONNX Runtime.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="exporting needs pixano-edge[export]")

from PIL import Image

from pixano_edge.engine.contracts import grounding_dino as contract
from pixano_edge.engine.models.detection.base import Detections
from pixano_edge.engine.models.grounding_dino.postprocess import find, merge
from pixano_edge.engine.models.grounding_dino.preprocess import preprocess, resized_size
from pixano_edge.export import tensorrt_rtx
from pixano_edge.export.detection.parity import FEWEST, choose_threshold
from pixano_edge.export.grounding_dino import parity
from pixano_edge.export.operators import check_tensorrt_10_3
from pixano_edge.export.photos import default_photos
from tests.engine.models.grounding_dino.test_detector import same
from tests.support.grounding_dino import Exported, export_model, plain, swin_tiny_config

pytestmark = pytest.mark.slow

CLASSES = ["a cat", "remote control", "lamp", "bed", "picture on the wall", "coffee cup"]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_model(plain(swin_tiny_config()), tmp_path_factory.mktemp("real"))


def pictures(bedroom: Path) -> list[np.ndarray]:
    """A wide frame, a tall one, and one of odd size."""
    frame = np.asarray(Image.open(bedroom / "00000.jpg").convert("RGB"))
    cat = default_photos()[1].pixels
    return [frame, np.ascontiguousarray(frame[:, 200:501]), cat]


def test_parity_on_real_photos(real: Exported, bedroom: Path) -> None:
    detector = real.open()
    (caption,) = detector.captioner.captions(CLASSES)
    for image in pictures(bedroom):
        pixels = np.empty((1, 3, *resized_size(image.shape[0], image.shape[1], real.constants)), np.float32)
        preprocess(image, real.constants, pixels)
        wanted = parity.reference(real.model, pixels, caption)
        with detector.run(image, caption) as (logits, boxes):
            agreement = parity.compare(wanted, logits, boxes)
        assert agreement.passed, (image.shape, agreement)
        # Of these weights a dot scores best as often as a word, so PyTorch's answers take the engine's last step.
        size = (image.shape[0], image.shape[1])
        answers = (wanted.logits, wanted.boxes, caption.labels, caption.edges, size)
        box = choose_threshold(find(*answers, 0.0, 0.0).scores)
        found = detector.detect(image, CLASSES, box_threshold=box, text_threshold=0.0)
        assert len(found) >= FEWEST
        if not agreement.swapped:
            best = merge([find(*answers, box, 0.0)])
            assert same(found, Detections(best.boxes, best.scores, best.labels, tuple(CLASSES)))


def test_graphs_are_what_tensorrt_takes(real: Exported) -> None:
    for file in real.files.values():
        assert check_tensorrt_10_3(onnx.load(file)) == []


@pytest.mark.skipif(tensorrt_rtx.missing_module() is not None, reason="needs pixano-edge[tensorrt-rtx]")
@pytest.mark.parametrize("graph", [contract.TEXT_ENCODER, contract.DETECTOR])
def test_tensorrt_builds(real: Exported, graph: str) -> None:
    assert tensorrt_rtx.check_build(real.files[graph], real.specs[graph], ("SM89",)).engine_bytes > 0
