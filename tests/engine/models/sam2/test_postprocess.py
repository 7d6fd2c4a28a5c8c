"""Which masks are chosen and how they are resized, against transformers and torch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.models.sam2.postprocess import (
    choose_masks,
    resize_logits,
    stability_score,
    write_mask,
)
from pixano_edge.engine.models.sam2.preprocess import Scratch

CONSTANTS = Sam2Constants(image_size=128, hidden_dim=32)
SIZES = [(540, 960), (161, 97), (1, 1), (1, 300), (20, 13), (16, 16), (32, 32), (64, 64), (1, 40000)]


def smooth(seed: int, side: int = 32, gain: float = 20.0) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng(seed).normal(size=(side, side)).astype(np.float32)
    return np.ascontiguousarray(cv2.GaussianBlur(noise, (0, 0), 2) * np.float32(gain))


@pytest.mark.parametrize("size", SIZES)
def test_resize_matches_torch(size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    logits = smooth(0)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None, None], size, mode="bilinear", align_corners=False
    )[0, 0].numpy()
    assert np.abs(resize_logits(logits, size, Scratch()) - expected).max() <= 1e-5 * np.abs(logits).max()
    out = np.empty(size, np.bool_)
    write_mask(logits, 0.5, out, Scratch())
    assert np.count_nonzero(out != (expected > 0.5)) <= 1e-4 * out.size
    if size == (161, 97):  # control: antialiasing, or a transposed size, would be seen
        assert np.count_nonzero(out != (expected > 0.0)) > 0.001 * out.size


def test_resize_reuses_its_memory() -> None:
    scratch = Scratch()
    first = resize_logits(smooth(0), (50, 60), scratch)
    assert np.shares_memory(first, resize_logits(smooth(1), (50, 60), scratch))


def stock(logits: Any, scores: Any, constants: Sam2Constants) -> tuple[Any, Any]:
    """transformers' own rule."""
    torch = pytest.importorskip("torch")
    from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder

    fake = SimpleNamespace(
        dynamic_multimask_stability_delta=constants.stability_delta,
        dynamic_multimask_stability_thresh=constants.stability_threshold,
    )
    fake._get_stability_scores = lambda x: Sam2MaskDecoder._get_stability_scores(fake, x)
    masks, iou = Sam2MaskDecoder._dynamic_multimask_via_stability(
        fake, torch.from_numpy(logits)[None, None], torch.from_numpy(scores)[None, None]
    )
    return masks[0, 0, 0].numpy(), iou[0, 0, 0].item()


@pytest.mark.parametrize("gain", [0.3, 1.0, 3.0, 30.0, 1000.0])
def test_single_mask_rule_matches_transformers(gain: float) -> None:
    fallbacks = 0
    for seed in range(8):
        logits = np.stack([smooth(4 * seed + i, gain=gain) for i in range(4)])
        scores = np.random.default_rng(seed).random(4).astype(np.float32)
        (pick,) = choose_masks(logits, scores, False, CONSTANTS, Scratch())
        masks, iou = stock(logits, scores, CONSTANTS)
        assert np.array_equal(logits[pick], masks)
        assert scores[pick] == np.float32(iou)
        fallbacks += pick != 0
    assert fallbacks == 8 if gain <= 1 else fallbacks == 0 if gain == 1000 else True


def test_threshold_itself_is_stable() -> None:
    logits = np.full((4, 10, 10), -1.0, np.float32)
    logits[0].flat[:98] = 1.0
    logits[0].flat[98:] = 0.0  # 98 of 100 above the upper threshold
    scores = np.array([0, 0.1, 0.3, 0.2], np.float32)
    assert choose_masks(logits, scores, False, CONSTANTS, Scratch()) == [0]
    assert choose_masks(logits, scores, False, replace(CONSTANTS, stability_threshold=0.9801), Scratch()) == [2]
    off = replace(CONSTANTS, stability_threshold=0.9801, dynamic_multimask_via_stability=False)
    assert choose_masks(logits, scores, False, off, Scratch()) == [0]


def test_empty_single_mask_is_stable() -> None:
    logits = np.full((4, 8, 8), -1.0, np.float32)
    assert stability_score(logits[0], 0.0, 0.05, Scratch()) == 1.0
    assert choose_masks(logits, np.ones(4, np.float32), False, CONSTANTS, Scratch()) == [0]


def test_multimask_keeps_model_order() -> None:
    logits, scores = np.zeros((4, 8, 8), np.float32), np.array([0.9, 0.1, 0.8, 0.5], np.float32)
    assert choose_masks(logits, scores, True, CONSTANTS, Scratch()) == [1, 2, 3]
