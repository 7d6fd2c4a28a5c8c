"""`verify_bundle`: passes on what the exporter wrote, and catches a bundle or an engine that answers wrongly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.bundle import Bundle, GoldenSample
from pixano_edge.engine.errors import BundleError
from pixano_edge.engine.models.sam2 import verify as module
from pixano_edge.engine.models.sam2.verify import TensorError, VerifyReport, judge, verify_bundle


def test_full_precision_passes(tiny_bundle: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_bundle(tiny_bundle, threads=1, progress=lambda *now: seen.append(now))
    assert report.passed, report.problems
    assert report.precision == "fp32"
    assert report.min_iou >= 0.999
    assert [t.name for t in report.tensors][:2] == ["pixel_values", "image_embed"]
    assert max(t.max_rel for t in report.tensors) <= 1e-4
    assert report.samples == len(Bundle.open(tiny_bundle).golden()) > 0
    assert seen[-1] == (report.samples, report.samples)
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


def test_half_precision_is_judged_by_its_masks(tiny_bundle: Path) -> None:
    report = verify_bundle(Bundle.open(tiny_bundle), precision="fp16", threads=1)
    assert report.passed, report.problems
    assert max(t.max_rel for t in report.tensors) > 1e-4
    # The same figures at full precision would fail.
    report.precision = "fp32"
    assert judge(report)


def swap_channels(image: Any, *args: Any) -> None:
    PREPROCESS(image[:, :, ::-1], *args)


PREPROCESS = module.preprocess


@pytest.mark.parametrize("where", ["the check alone", "the predictor too"])
def test_wrong_preprocessing_is_caught(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(module, "preprocess", swap_channels)
    if where == "the predictor too":
        from pixano_edge.engine.models.sam2 import encoding

        monkeypatch.setattr(encoding, "preprocess", swap_channels)
    report = verify_bundle(tiny_bundle, threads=1)
    assert any("pixel_values" in p for p in report.problems)
    assert any("masks:" in p for p in report.problems) == (where == "the predictor too")


@pytest.mark.parametrize("key", ["image_embed_values", "low_res_logits", "iou_scores", "object_score_logits"])
def test_every_stored_tensor_counts(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    def bend(arrays: dict[str, Any]) -> None:
        arrays[key] = arrays[key] + np.float32(2e-3) * np.abs(arrays[key]).max()

    change_samples(monkeypatch, bend)
    assert not verify_bundle(tiny_bundle, threads=1).passed


@pytest.mark.parametrize("key", ["points", "labels", "boxes", "mask_input", "has_mask_input"])
def test_every_stored_prompt_counts(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    def bend(arrays: dict[str, Any]) -> None:
        if key == "labels":
            arrays[key] = np.where(arrays[key] >= 0, 1 - arrays[key], arrays[key])
        elif key == "has_mask_input":
            arrays[key] = 1 - arrays[key]
        elif key == "mask_input":
            # Moved, not scaled: the mask goes through a normalisation, which takes most of a scale away.
            arrays[key] = np.roll(arrays[key], 5, axis=-1)
        else:
            arrays[key] = arrays[key] * np.float32(0.8)

    change_samples(monkeypatch, bend)
    assert not verify_bundle(tiny_bundle, threads=1).passed


def remove(arrays: dict[str, Any]) -> None:
    del arrays["iou_scores"]


def shrink(arrays: dict[str, Any]) -> None:
    arrays["low_res_logits"] = arrays["low_res_logits"][:, :, :8]


def other_size(arrays: dict[str, Any]) -> None:
    arrays["original_size"] = arrays["original_size"][::-1] + 1


def far_point(arrays: dict[str, Any]) -> None:
    arrays["points"] = arrays["points"] + np.float32(1e6)


def out_of_range(arrays: dict[str, Any]) -> None:
    arrays["image_embed_index"] = arrays["image_embed_index"] + 10**9


@pytest.mark.parametrize("damage", [remove, shrink, other_size, far_point, out_of_range])
def test_malformed_samples(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[..., None]) -> None:
    change_samples(monkeypatch, damage)
    with pytest.raises(BundleError, match="Golden sample 'golden-0'"):
        verify_bundle(tiny_bundle, threads=1)


def test_no_samples(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bundle, "golden", lambda self: list[GoldenSample]())
    with pytest.raises(BundleError, match="no golden samples"):
        verify_bundle(tiny_bundle)


def report(precision: str, rel: float, mean: float, low: float) -> VerifyReport:
    tensors = [TensorError("pixel_values", 0, 0), TensorError("masks", rel, rel)]
    return VerifyReport("b", "cpu", "stub", precision, 1, tensors, mean, low, 0.0)


@pytest.mark.parametrize(
    ("precision", "rel", "mean", "low", "passes"),
    [
        ("fp32", 1e-5, 1.0, 0.9991, True),
        ("fp32", 2e-4, 1.0, 1.0, False),
        ("fp32", 1e-5, 1.0, 0.998, False),
        ("fp32", float("nan"), 1.0, 1.0, False),
        ("fp16", 1e-1, 0.991, 0.5, True),
        ("fp16", 1e-1, 0.989, 0.989, False),
        ("fp16", float("inf"), 1.0, 1.0, False),
        ("int8", 1e-1, 0.981, 0.9, True),
        ("int8", 1e-1, float("nan"), 0.9, False),
    ],
)
def test_bars(precision: str, rel: float, mean: float, low: float, passes: bool) -> None:
    assert (not judge(report(precision, rel, mean, low))) == passes


def test_nan_is_the_largest_error() -> None:
    error = TensorError("x")
    error.add(np.array([np.nan, 1.0]), np.array([1.0, 1.0]))
    assert error.max_abs == float("inf")


def change_samples(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    load = Bundle.load_npz

    def changed(self: Bundle, rel: str) -> dict[str, Any]:
        arrays = load(self, rel)
        change(arrays)
        return arrays

    monkeypatch.setattr(Bundle, "load_npz", changed)
