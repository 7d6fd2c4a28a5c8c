"""The golden clip on the box: it passes on what ships, and anything that answers wrongly is caught and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.errors import BundleError, DeviceError
from pixano_edge.engine.models.sam2 import verify as verify_module
from pixano_edge.engine.models.sam2.diagnosis import tolerances
from pixano_edge.engine.models.sam2.verify import VerifyReport, judge, verify_bundle
from pixano_edge.engine.models.sam2_video import check
from pixano_edge.engine.models.sam2_video.bank import ObjectBank

CHAIN = ("memory_encoder", "memory_attention", "track_decoder")


def run(bundle: Path, precision: str = "fp32") -> VerifyReport:
    return verify_bundle(bundle, "cpu", precision=precision, threads=1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_passes_and_names_every_output(demo_bundle: Path, precision: str) -> None:
    report = run(demo_bundle, precision)
    assert report.passed, report.problems
    assert report.warnings == []
    bundle = Bundle.open(demo_bundle)
    tracked = {t.name: t for t in report.tensors if t.graph in CHAIN}
    assert set(tracked) == {f"{g}.{t.name}" for g in CHAIN for t in bundle.specs[g].outputs}
    assert list(dict.fromkeys(t.graph for t in tracked.values())) == list(CHAIN)
    limits = tolerances(bundle, precision)
    for name, tensor in tracked.items():
        assert tensor.tolerance == limits[name]
        # In fp16 a score that happens to lie near 0 on this clip has no meaningful relative error.
        assert tensor.max_rel <= limits[name] or (precision == "fp16" and tensor.max_abs < 1e-2)
    assert report.clip is not None
    assert (report.clip.objects, report.clip.frames) == (2, 6)
    assert report.clip.min_iou >= (0.999 if precision == "fp32" else 0.95)
    assert json.loads(json.dumps(report.to_dict()))["clip"]["frames"] == 6


def test_an_image_bundle_has_no_clip(tiny_bundle: Path) -> None:
    report = run(tiny_bundle)
    assert report.passed
    assert report.clip is None
    assert not any("." in t.name for t in report.tensors)


def test_progress_counts_the_clip(demo_bundle: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_bundle(demo_bundle, "cpu", threads=1, progress=lambda *now: seen.append(now))
    assert seen == [(i, report.samples + 1) for i in range(1, report.samples + 2)]


VALUES = [
    "memory_encoder.memory_features_values",
    "memory_encoder.object_pointer_values",
    "memory_attention.tracked_embed_values",
    "track_decoder.masks_values",
    "track_decoder.mask_tokens_values",
]


@pytest.mark.parametrize("key", VALUES)
def test_every_stored_output_counts(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    def bend(arrays: dict[str, Any]) -> None:
        arrays[key] = arrays[key] + np.float32(2e-2) * np.abs(arrays[key]).max()

    change_clip(monkeypatch, bend)
    report = run(demo_bundle)
    assert not report.passed
    assert report.suspect is not None
    assert report.suspect.graph == key.partition(".")[0]


INPUTS = ["mask_logits", "object_score_logits", "binarize", "mask_token", "memory", "memory_time", "pointers"]


@pytest.mark.parametrize("key", INPUTS)
def test_every_stored_input_counts(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    def bend(arrays: dict[str, Any]) -> None:
        if key == "binarize":
            arrays[key] = 1 - arrays[key]
        elif key == "memory_time":
            arrays[key] = (arrays[key] + 1) % 7
        elif key == "memory":
            arrays[key] = arrays[key] & np.uint16(0x8000)  # zeros
        else:
            arrays[key] = -arrays[key] if key == "object_score_logits" else np.roll(arrays[key], 3, axis=-1)

    change_clip(monkeypatch, bend)
    assert not run(demo_bundle).passed


@pytest.mark.parametrize("key", ["windows", "prompt_points", "prompt_boxes", "masks"])
def test_every_part_of_the_clip_counts(tracking_bundle: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    def bend(arrays: dict[str, Any]) -> None:
        if key == "windows":
            arrays[key] = arrays[key][::-1]
        elif key == "masks":
            arrays[key] = arrays[key][:, ::-1]  # the other object
        else:
            arrays[key] = arrays[key] * np.float32(0.6)

    change_clip(monkeypatch, bend)
    assert any(p.startswith("tracked clip: lowest IoU") for p in run(tracking_bundle).problems)


def test_a_tracker_that_remembers_wrongly_is_caught(tracking_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are right, so only the clip can tell. The tiny bundle's memory matters in its masks."""
    assert run(tracking_bundle).passed
    original = ObjectBank.select
    monkeypatch.setattr(
        ObjectBank, "select", lambda self, frame, reverse, frames: original(self, frame - 1, reverse, frames)
    )
    report = run(tracking_bundle)
    assert [p.partition(":")[0] for p in report.problems] == ["tracked clip"]


def lose(arrays: dict[str, Any]) -> None:
    del arrays["prompt_frame"]


def shorten(arrays: dict[str, Any]) -> None:
    arrays["masks"] = arrays["masks"][:3]


def leave_the_picture(arrays: dict[str, Any]) -> None:
    arrays["windows"] = arrays["windows"] + np.int32(10_000)


def other_width(arrays: dict[str, Any]) -> None:
    arrays["mask_token"] = arrays["mask_token"][:, :8]


def out_of_range(arrays: dict[str, Any]) -> None:
    arrays["track_decoder.masks_index"] = arrays["track_decoder.masks_index"] + 10**9


def late_frame(arrays: dict[str, Any]) -> None:
    arrays["passes"] = arrays["passes"] + np.int32(99)


@pytest.mark.parametrize("damage", [lose, shorten, leave_the_picture, other_width, out_of_range, late_frame])
def test_malformed_clips(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[..., None]) -> None:
    change_clip(monkeypatch, damage)
    with pytest.raises(BundleError, match="golden clip 'golden-clip'"):
        run(demo_bundle)


def test_bars_of_the_clip() -> None:
    def report(precision: str, mean: float, low: float) -> VerifyReport:
        clip = check.ClipCheck(6, 2, 12, mean, low)
        return VerifyReport("b", "cpu", "stub", precision, 1, [], 1.0, 1.0, 0.0, clip)

    assert judge(report("fp32", 1.0, 0.9991)) == []
    assert judge(report("fp32", 1.0, 0.998)) == ["tracked clip: lowest IoU 0.9980 < 0.999"]
    assert judge(report("fp16", 0.991, 0.5)) == []
    assert judge(report("fp16", 0.989, 0.9)) == ["tracked clip: mean IoU 0.9890 < 0.99"]
    assert judge(report("fp16", float("nan"), 0.9))


def test_engines_that_were_not_built_are_a_warning(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's engines are built graph by graph; with another back end a missing file is an error."""

    def absent(*_: object, **__: object) -> None:
        raise DeviceError("no engine of graph 'memory_attention'", "Build it.")

    monkeypatch.setattr(check, "open_video_sessions", absent)
    with pytest.raises(DeviceError, match="no engine"):
        run(demo_bundle)
    monkeypatch.setattr(verify_module, "TENSORRT", "onnxruntime")
    report = run(demo_bundle)
    assert report.clip is None
    assert report.warnings == ["Tracking was not checked: no engine of graph 'memory_attention'"]


def change_clip(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    load = Bundle.load_npz

    def changed(self: Bundle, rel: str) -> dict[str, Any]:
        arrays = load(self, rel)
        if "clip" in rel:
            change(arrays)
        return arrays

    monkeypatch.setattr(Bundle, "load_npz", changed)
