"""The whole generator against a plain one in PyTorch (`automatic_reference`), on the trained demo model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pixano_edge.engine.models.images import decode_image
from pixano_edge.engine.models.sam2.automatic import AutomaticMask, AutomaticOptions, generate_masks
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor

torch = pytest.importorskip("torch", reason="parity needs PyTorch")

from tests.support.automatic_reference import Mistake, Reference, reference_masks  # noqa: E402

ROOT = Path(__file__).resolve().parents[4]
BORDERLINE = 2e-3
"""Logits this near the threshold may fall on either side; the largest ones are around 20."""
NEAR = 1e-4
"""Of scores."""


@pytest.fixture(scope="module")
def predictor(demo_bundle: Path) -> Iterator[Sam2ImagePredictor]:
    with Sam2ImagePredictor.open(demo_bundle, threads=1, backend="onnxruntime", precision="fp32") as opened:
        yield opened


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import Sam2Model

    torch.set_num_threads(1)
    return Sam2Model.from_pretrained(ROOT / "export" / "demo" / "checkpoints" / "sam2-demo").eval()


def scene(number: int, size: tuple[int, int] = (512, 512)) -> Any:
    """A demo picture, stretched to (height, width)."""
    image = decode_image(ROOT / "engine" / "assets" / "demo" / f"scene-{number}.png")
    return image if size == (512, 512) else cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)


def differences(got: Sequence[AutomaticMask], want: Sequence[Reference]) -> list[str]:
    """What tells two answers apart, beyond borderline pixels; both in order."""
    problems = [] if len(got) == len(want) else [f"{len(got)} masks for {len(want)}"]
    for number, (a, b) in enumerate(zip(got, want)):
        wrong = np.argwhere(a.mask != b.mask.numpy())
        far = [p for p in wrong.tolist() if not abs(float(b.logits[tuple(p)])) < BORDERLINE]
        if far:
            problems.append(f"mask {number}: {len(far)} pixels")
        if not wrong.size and a.box != b.box:
            problems.append(f"mask {number}: box {a.box} for {b.box}")
        if abs(a.predicted_iou - b.score) > NEAR or abs(a.stability_score - b.stability) > 1e-3:
            problems.append(
                f"mask {number}: scores {a.predicted_iou}, {a.stability_score} for {b.score}, {b.stability}"
            )
        if not np.allclose(a.point, b.point, atol=1e-6) or a.crop_box != b.crop:
            problems.append(f"mask {number}: from {a.point} in {a.crop_box} for {b.point} in {b.crop}")
    return problems


def lenient(**changes: Any) -> AutomaticOptions:
    """The small model is trained on whole scenes, so little of a crop passes upstream's thresholds."""
    return AutomaticOptions(**{"points_per_side": 8, "pred_iou_thresh": 0.7, "stability_score_thresh": 0.85, **changes})


CASES: dict[str, tuple[int, tuple[int, int], AutomaticOptions]] = {
    "whole image": (1, (512, 512), lenient(points_per_side=12)),
    "one layer of crops": (2, (512, 512), lenient(crop_n_layers=1)),
    "two layers of crops": (3, (512, 512), lenient(crop_n_layers=2, crop_n_points_downscale_factor=2)),
    "portrait, other overlap and thresholds": (
        4,
        (480, 331),
        lenient(crop_n_layers=1, crop_overlap_ratio=0.1, box_nms_thresh=0.5, crop_nms_thresh=0.9, pred_iou_thresh=0.5),
    ),
    "second pass": (1, (512, 512), lenient(points_per_side=4, use_m2m=True, crop_n_layers=1)),
    "one mask per click": (2, (512, 512), lenient(multimask_output=False)),
    "small regions": (3, (150, 150), lenient(min_mask_region_area=60, crop_n_layers=1, stability_score_thresh=0.6)),
}


@pytest.mark.parametrize("name", CASES)
def test_same_masks_in_the_same_order(predictor: Sam2ImagePredictor, model: Any, name: str) -> None:
    number, size, options = CASES[name]
    image = scene(number, size)
    want = reference_masks(model, image, options)
    got = generate_masks(predictor, image, options)
    assert len(want) >= 5
    assert not differences(got, want)
    if options.crop_n_layers:
        assert any(m.crop_box != (0, 0, size[1], size[0]) for m in got)


MISTAKES: list[tuple[Mistake, str]] = [
    ("crops pasted at the corner", "one layer of crops"),
    ("crops pasted a pixel off", "one layer of crops"),
    ("edge filter off", "one layer of crops"),
    ("larger crops preferred", "one layer of crops"),
    ("no suppression between crops", "one layer of crops"),
    ("no suppression within crops", "whole image"),
    ("stability of the low-resolution mask", "whole image"),
    ("stability filter off", "whole image"),
    ("no second pass", "second pass"),
    ("changed masks preferred", "small regions"),
    ("small regions left", "small regions"),
]


@pytest.mark.parametrize(("mistake", "case"), MISTAKES)
def test_mistakes_would_be_caught(predictor: Sam2ImagePredictor, model: Any, mistake: Mistake, case: str) -> None:
    number, size, options = CASES[case]
    image = scene(number, size)
    assert differences(generate_masks(predictor, image, options), reference_masks(model, image, options, mistake))
