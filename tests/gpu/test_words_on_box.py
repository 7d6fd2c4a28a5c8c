"""Detectors, language models and the whole provider on a real GPU, with the packaged demos; run with ``pytest -m gpu``.

What the CPU answers is the reference: it was compared with PyTorch when the demos were made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.models.decoder.base import GenerationOptions
from pixano_edge.engine.models.decoder.opening import open_vlm
from pixano_edge.engine.models.detection.base import Detections
from pixano_edge.engine.models.detection.opening import open_detector
from pixano_edge.engine.models.images import decode_image
from pixano_edge.engine.models.text.messages import read_conversation
from pixano_edge.engine.models.verify import verify_bundle
from pixano_edge.engine.provider.edge import EdgeProvider
from pixano_edge.engine.provider.types import (
    ImageMaskGenerationInput,
    ImageZeroShotDetectionInput,
    InferenceTask,
    ModelConfig,
    TextImageConditionalGenerationInput,
)
from tests.engine.provider.fakes import FolderStore, data_uri

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda:0"
BACKEND = "onnxruntime"
DETECTORS = ("grounding-dino-demo", "owlv2-demo")
WORDS = ("grounding-dino-demo", "owlv2-demo", "smolvlm-demo")
CLASSES = ["red circle", "striped square", "star", "triangle", "zebra"]


def asset(name: str) -> Path:
    return ROOT / "engine" / "assets" / name


def picture(name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return decode_image(asset(f"demo/{name}").read_bytes())


def variants(name: str) -> list[str]:
    return [p for p in ("fp32", "fp16") if p in Bundle.open(asset(name), verify=False).variants()]


@pytest.mark.parametrize(("name", "precision"), [(name, p) for name in WORDS for p in variants(name)])
def test_golden_samples(name: str, precision: str) -> None:
    report = verify_bundle(asset(name), DEVICE, BACKEND, precision)
    assert report.passed, report.problems
    assert report.device == DEVICE


def assert_alike(got: Detections, want: Detections) -> None:
    assert got.names() == want.names()
    np.testing.assert_allclose(got.boxes, want.boxes, atol=1.0)
    np.testing.assert_allclose(got.scores, want.scores, atol=1e-3)


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_are_those_of_the_cpu(name: str) -> None:
    options: dict[str, Any] = {"backend": BACKEND, "precision": "fp32", "prove": False}
    with (
        open_detector(asset(name), device="cpu", **options) as cpu,
        open_detector(asset(name), device=DEVICE, **options) as gpu,
    ):
        assert gpu.info()["device"] == DEVICE
        found = 0
        for scene in ("scene-1.png", "scene-2.png", "scene-3.png"):
            image = picture(scene)
            for view in (image, image[:180], np.ascontiguousarray(image[:, 20:200])):
                for classes in (CLASSES, CLASSES[:1], CLASSES):
                    want = cpu.detect(view, classes, box_threshold=0.3, text_threshold=0.3)
                    assert_alike(gpu.detect(view, classes, box_threshold=0.3, text_threshold=0.3), want)
                    found += len(want)
        assert found > 10


def test_words_are_those_of_the_cpu_in_half_precision() -> None:
    options: dict[str, Any] = {"backend": BACKEND, "precision": "fp16", "prove": False}
    answers: dict[str, list[str]] = {}
    for device in ("cpu", DEVICE):
        with open_vlm(asset("smolvlm-demo"), device=device, **options) as model:
            answers[device] = [
                model.generate(
                    read_conversation(question, [None]), [picture(scene)], GenerationOptions(max_new_tokens=24)
                ).text
                for scene in ("talk-1.png", "talk-2.png", "talk-3.png")
                for question in ("Describe the image.", "How many objects are there?", "How many objects are there?")
            ]
    assert answers[DEVICE] == answers["cpu"]
    assert len(set(answers[DEVICE])) > 2


async def test_the_provider_serves_masks_and_words_from_the_gpu(tmp_path: Path) -> None:
    provider = EdgeProvider(store=FolderStore(tmp_path), device=DEVICE)
    try:
        for name, task in (
            ("sam2-demo", InferenceTask.MASK_GENERATION),
            ("grounding-dino-demo", InferenceTask.OBJECT_DETECTION),
            ("smolvlm-demo", InferenceTask.TEXT_GENERATION),
        ):
            await provider.instantiate_model("edge", ModelConfig(name, task.value, asset(name)))
        scene = data_uri(asset("demo/scene-1.png").read_bytes())
        found = await provider.image_zero_shot_detection(
            ImageZeroShotDetectionInput(scene, "grounding-dino-demo", CLASSES, 0.3, 0.3)
        )
        assert found.data.boxes
        masks = await provider.image_mask_generation(
            ImageMaskGenerationInput(scene, "sam2-demo", boxes=found.data.boxes, multimask_output=False)
        )
        assert len(masks.data.masks) == len(found.data.boxes)
        talk = data_uri(asset("demo/talk-1.png").read_bytes())
        said = await provider.text_image_conditional_generation(
            TextImageConditionalGenerationInput("smolvlm-demo", "Describe the image.", [talk], temperature=0.0)
        )
        assert said.data.generated_text
        info = await provider.get_server_info()
        assert info.gpus_used == [0]
        assert info.num_gpus >= 1
        assert not [warning for warning in info.warnings if "compute shapes" not in warning], info.warnings
    finally:
        await provider.close()
