"""Tracking on a real GPU with ONNX Runtime; run with ``pytest -m gpu``. Not run on a GPU yet.

The demo bundle where it tracks, else a tiny one that is exported here (which needs ``pixano-edge[export]``).
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.errors import DeviceError
from pixano_edge.engine.models.masks import mask_iou
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.model import Sam2VideoModel
from pixano_edge.engine.models.sam2_video.tracker import ObjectResult, VideoTracker
from tests.support.tracking import moving_squares

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
CLICK = Prompt(points=[[25, 35]])
BOX = Prompt(box=[80, 38, 120, 72])
FIX = Prompt(points=[[60, 35], [5, 90]], labels=[1, 0])


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path, request: pytest.FixtureRequest) -> Bundle:
    demo = Bundle.open(demo_bundle)
    if sam2.VIDEO in demo.manifest.constants:
        return demo
    return Bundle.open(request.getfixturevalue("tracking_bundle"))


@pytest.fixture(scope="module")
def on_gpu(bundle: Bundle) -> Iterator[Sam2VideoModel]:
    try:
        model = Sam2VideoModel.open(bundle, DEVICE, "onnxruntime", "fp32", prove=False)
    except DeviceError as error:
        pytest.skip(str(error))
    with model:
        yield model


def everything(model: Sam2VideoModel) -> list[ObjectResult]:
    """Click, box, forward, a correction, a late mask, backward past a prompt that lies ahead."""
    frames = moving_squares(30)
    mask = np.zeros((96, 144), bool)
    mask[20:52, 70:100] = True
    with model.track(frames) as tracker:
        seen = [tracker.add_prompt(1, 3, CLICK), tracker.add_prompt(2, 3, BOX)]
        for result in tracker.propagate():
            seen += result.objects
        seen.append(tracker.add_prompt(1, 15, FIX))
        seen.append(tracker.add_mask(3, 20, mask))
        for result in itertools.chain(tracker.propagate(15, 29), tracker.propagate(20, 0)):
            seen += result.objects
    return seen


def test_equals_the_cpu(bundle: Bundle, on_gpu: Sam2VideoModel) -> None:
    with Sam2VideoModel.open(bundle, "cpu", precision="fp32") as on_cpu:
        want = everything(on_cpu)
    got = everything(on_gpu)
    assert len(got) == len(want) > 120
    for a, b in zip(got, want):
        assert a.object_id == b.object_id
        assert a.score == pytest.approx(b.score, rel=1e-3, abs=1e-3)
        # A pixel on the border of a mask of some hundred may fall on either side.
        assert mask_iou(a.mask, b.mask) >= 0.999 or np.count_nonzero(a.mask != b.mask) <= 1
    assert sum(r.mask.any() for r in want) > 60, "empty masks would agree whatever the graphs do"


class Waits:
    """Counts what makes the host wait for the stream."""

    def __init__(self, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[str] = []
        for name in ("synchronize", "download", "elapsed", "wait_on_host"):
            monkeypatch.setattr(device, name, self._counted(name, getattr(device, name)))

    def _counted(self, name: str, plain: Any) -> Any:
        def call(*args: Any) -> Any:
            self.found.append(name)
            return plain(*args)

        return call


def started(model: Sam2VideoModel, length: int, **options: Any) -> VideoTracker:
    frames = moving_squares(48)
    tracker = model.track([frames[i % 48] for i in range(length)], **options)
    tracker.add_prompt(1, 0, CLICK)
    tracker.add_prompt(2, 0, BOX)
    return tracker


@pytest.mark.parametrize("history", [False, True])
def test_the_host_waits_once_per_frame(on_gpu: Sam2VideoModel, history: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(on_gpu, 60, history=history) as tracker:
        results = tracker.propagate()
        for _ in range(45):
            next(results)
        waits = Waits(on_gpu.predictor.chain.device, monkeypatch)
        for _ in range(10):
            waits.found.clear()
            next(results)
            assert waits.found == ["synchronize"]


def test_two_hundred_frames_take_no_more_memory(on_gpu: Sam2VideoModel) -> None:
    device = on_gpu.predictor.chain.device
    with started(on_gpu, 260) as tracker:
        results = tracker.propagate()
        for _ in range(50):  # the bank is full, shapes stand still, launches are recorded
            next(results)
        gc.collect()
        resident, free, maps = psutil.Process().memory_info().rss, device.info().memory_free, tracker.maps
        runs, recorded = on_gpu.runs, on_gpu.info()["stream"]["recorded"]
        for _ in range(200):
            next(results)
        gc.collect()
        assert psutil.Process().memory_info().rss - resident < 16 << 20
        now = device.info().memory_free
        if free is not None and now is not None:
            assert free - now < 16 << 20
        assert tracker.maps == maps
        assert on_gpu.info()["stream"]["recorded"] == recorded
        done = {name: count - runs[name] for name, count in on_gpu.runs.items()}
        assert done == {
            sam2.IMAGE_ENCODER: 200,
            sam2.MASK_DECODER: 0,
            sam2_video.MEMORY_ATTENTION: 200,
            sam2_video.TRACK_DECODER: 200,
            sam2_video.MEMORY_ENCODER: 200,
        }
