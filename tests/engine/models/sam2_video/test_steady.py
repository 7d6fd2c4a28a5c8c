"""The steady state of a long clip: constant work, no allocation of a tensor's size, flat memory, flat time."""

from __future__ import annotations

import gc
import statistics
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.model import Sam2VideoModel
from pixano_edge.engine.models.sam2_video.tracker import VideoTracker
from pixano_edge.engine.runtime import CpuDevice
from pixano_edge.engine.runtime.base import Session
from tests.engine.models.sam2.quiet import QuietSession
from tests.engine.models.sam2_video.fake import VIDEO
from tests.support.tracking import moving_squares

CLICK = Prompt(points=[[25, 35]])
BOX = Prompt(box=[80, 38, 120, 72])
FULL = 34
"""See test_stream."""


class Repeated:
    """A clip of any length from few frames in memory, as `open_frames` takes it."""

    def __init__(self, count: int, period: int = 60) -> None:
        self._frames = moving_squares(period)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        return self._frames[index % len(self._frames)]


class Work:
    """What one frame makes the engine do: launches with their sizes, and bytes copied and allocated by the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: Counter[Any] = Counter()
        run, empty, copy, upload = QuietSession._run_impl, CpuDevice.empty, CpuDevice.copy, CpuDevice.upload

        def counted_run(session: Any, binding: Any) -> None:
            self.done[("launch", session.spec.name, *binding.shapes.values())] += 1
            session_run[type(session)](session, binding)

        from pixano_edge.engine.runtime.ort import OrtSession

        session_run = {QuietSession: run, OrtSession: OrtSession._run_impl}
        for kind in session_run:
            monkeypatch.setattr(kind, "_run_impl", counted_run)

        def counted_empty(device: Any, shape: Any, dtype: Any) -> Any:
            self.done["allocated"] += int(np.prod(shape)) * np.dtype(dtype).itemsize
            return empty(device, shape, dtype)

        def counted_copy(device: Any, target: Any, source: Any) -> None:
            self.done["copied"] += target.nbytes
            copy(device, target, source)

        def counted_upload(device: Any, target: Any, source: Any) -> None:
            self.done["written"] += target.nbytes
            upload(device, target, source)

        monkeypatch.setattr(CpuDevice, "empty", counted_empty)
        monkeypatch.setattr(CpuDevice, "copy", counted_copy)
        monkeypatch.setattr(CpuDevice, "upload", counted_upload)

    def take(self) -> Counter[Any]:
        """Counts since the last call."""
        done, self.done = self.done, Counter()
        return done


def quiet_model() -> Sam2VideoModel:
    """Graphs that compute nothing, of a size at which every tensor is large: a mask has 64 KB, a map as much."""
    constants = sam2.Sam2Constants(image_size=512, hidden_dim=64)
    device = CpuDevice()
    specs = {**sam2.graphs(constants), **sam2_video.graphs(constants, VIDEO)}
    sessions: dict[str, Session] = {name: QuietSession(spec, device) for name, spec in specs.items()}
    predictor = Sam2ImagePredictor(
        sessions[sam2.IMAGE_ENCODER], sessions[sam2.MASK_DECODER], constants, bundle_hash="quiet", variant="fp32"
    )
    return Sam2VideoModel(predictor, sessions, VIDEO)


def start(model: Sam2VideoModel, length: int, objects: int, **options: Any) -> VideoTracker:
    tracker = model.track(Repeated(length), **options)  # type: ignore[arg-type]
    for number in range(objects):
        tracker.add_prompt(number + 1, 0, BOX if number % 2 else CLICK)
    return tracker


@pytest.mark.parametrize("history", [False, True])
def test_nothing_of_a_tensors_size_is_allocated(history: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    tracker = start(quiet_model(), FULL + 40, 3, history=history)
    results = tracker.propagate()
    for _ in range(FULL + 2):
        next(results)
    work.take()
    answer = 3 * 96 * 144  # the masks, which are the caller's
    tracemalloc.start()
    try:
        next(results)
        counts, peaks = [], []
        for _ in range(20):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            next(results)
            peaks.append(tracemalloc.get_traced_memory()[1] - before - answer)
            counts.append(work.take())
    finally:
        tracemalloc.stop()
    # 23 buffers for each object are bound by objects of some hundred bytes; the smallest tensor has 64 KB.
    assert max(peaks) < 24 << 10, peaks
    assert all(count["allocated"] == 0 for count in counts)
    assert all(count == counts[1] for count in counts[1:])
    assert {key[1] for key in counts[1] if key[0] == "launch"} == {
        sam2.IMAGE_ENCODER,
        sam2_video.MEMORY_ATTENTION,
        sam2_video.TRACK_DECODER,
        sam2_video.MEMORY_ENCODER,
    }
    tracker.close()


def follow(
    bundle: Path | Bundle, frames: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[float], list[Any], list[int], Any]:
    """Tracks two objects; seconds, work and resident bytes of each frame."""
    process = psutil.Process()
    seconds, counts, resident = [], [], []
    work = Work(monkeypatch)
    with Sam2VideoModel.open(bundle, "cpu", threads=1) as model, start(model, frames, 2) as tracker:
        results = tracker.propagate()
        begin = time.perf_counter()
        for _ in results:
            seconds.append(time.perf_counter() - begin)
            counts.append(work.take())
            resident.append(process.memory_info().rss)
            begin = time.perf_counter()
        held = (tracker.maps, tracker._pool.free)
    gc.collect()
    return seconds, counts, resident, held


def check_flat(frames: int, counts: list[Any], resident: list[int], held: tuple[int, int]) -> None:
    assert len(counts) == frames
    assert all(count == counts[FULL + 5] for count in counts[FULL + 5 :]), "the same work on every frame"
    # 15 near the prompt, 16 recent ones and the prompt itself; one on its way out; two objects.
    assert held[0] <= 2 * (15 + 16 + 2)
    early, late = statistics.median(resident[FULL + 5 : FULL + 25]), statistics.median(resident[-20:])
    assert late - early < 20 << 20, f"{(late - early) / 2**20:.1f} MiB"


def test_work_and_memory_stand_still(tracking_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, counts, resident, held = follow(tracking_bundle, 100, monkeypatch)
    check_flat(100, counts, resident, held)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["tracking_bundle", "demo_bundle"])
def test_five_hundred_frames(which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with time; three tries, since another process may take the cores for a while."""
    bundle = Bundle.open(request.getfixturevalue(which))
    if sam2.VIDEO not in bundle.manifest.constants:
        pytest.skip("the demo bundle of this tree does not track")
    drift = []
    for _ in range(3):
        seconds, counts, resident, held = follow(bundle, 500, monkeypatch)
        check_flat(500, counts, resident, held)
        drift.append(statistics.median(seconds[450:]) / statistics.median(seconds[50:100]) - 1)
        if abs(drift[-1]) < 0.15:
            return
    raise AssertionError(f"frames 450-500 against 50-100: {drift}")
