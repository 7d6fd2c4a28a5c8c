"""How well a bundle tracks held-out clips from one click, next to keeping its first mask and to optical flow.

J is the IoU of a mask with the truth, averaged over the frames after the first one and over objects; where an object
is hidden entirely, no mask counts as 1 and any mask as 0. The baselines start from the model's own answer to the
click, and once more from the true mask. Torch is not used; clips need scikit-image for its photographs.
"""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.models.masks import mask_iou
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.model import Sam2VideoModel

from .metrics import bootstrap_mean
from .seeds import FIRST_SEED

Mask = npt.NDArray[np.bool_]
LENGTH = 60
LATE = 10
COPY, FLOW = "copy of the first mask", "optical flow (DIS)"
TRUE = ", true first mask"


@dataclass(frozen=True)
class Track:
    """One object followed by one method.

    ``first`` is the IoU on the prompted frame; ``j`` the mean over the frames after it, ``late`` over the last ones.
    ``shown`` and ``hidden`` are lists of the IoU on frames where the object shows, and does not.
    """

    clip: int
    shape: str
    method: str
    first: float
    j: float
    late: float
    shown: list[float]
    hidden: list[float]


@dataclass(frozen=True)
class Row:
    """Means of one method, with the 95 % interval of J over clips; ``hidden`` is None where nothing was ever hidden."""

    method: str
    first: float
    j: float
    low: float
    high: float
    late: float
    shown: float
    hidden: float | None


@dataclass(frozen=True)
class TrackingQuality:
    """All rows, the bundle's first, and how they were taken."""

    bundle: str
    clips: int
    objects: int
    frames: int
    rows: list[Row]

    @property
    def model(self) -> Row:
        """The bundle's row."""
        return self.rows[0]

    def leads(self) -> dict[str, float]:
        """J of the bundle (0..1) less that of each baseline."""
        return {row.method: self.model.j - row.j for row in self.rows[1:]}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"leads": self.leads()}


def judge(clip: int, shape: str, method: str, masks: Sequence[Mask], truth: npt.NDArray[np.bool_]) -> Track:
    """Figures of one track: ``masks`` of all frames against ``truth`` (T, H, W)."""
    values = [mask_iou(mask, true) for mask, true in zip(masks, truth, strict=True)]
    there = np.asarray(truth.any((1, 2)))
    after = range(1, len(values))
    return Track(
        clip,
        shape,
        method,
        values[0],
        float(np.mean(values[1:])),
        float(np.mean(values[-LATE:])),
        [values[t] for t in after if there[t]],
        [values[t] for t in after if not there[t]],
    )


def clip_tracks(model: Sam2VideoModel, name: str, seed: int, length: int, size: int) -> list[Track]:
    """Every object that shows on the first frame of one held-out clip, followed by the model and the baselines."""
    from pixano_edge.export.demo.clips import first_prompts, generate_clip
    from pixano_edge.export.demo.track_baselines import copies, flow_maps, warped

    clip = generate_clip(seed, "heldout", length, size)
    prompts = first_prompts(clip)
    if not prompts:
        return []
    frames = list(clip.images)
    found: dict[int, list[Mask]] = {p.index: [] for p in prompts}
    with model.track(frames, history=False) as tracker:
        for prompt in prompts:
            tracker.add_prompt(prompt.index, 0, Prompt(points=[prompt.click], labels=[1]))
        for result in tracker.propagate(0, length - 1):
            for answer in result.objects:
                found[answer.object_id].append(answer.mask)
    maps = flow_maps(frames)
    tracks = []
    for index, masks in found.items():
        truth = clip.visible(index)
        contenders = {
            name: masks,
            COPY: copies(masks[0], length),
            FLOW: warped(masks[0], maps),
            COPY + TRUE: copies(truth[0], length),
            FLOW + TRUE: warped(truth[0], maps),
        }
        shape = clip.script.actors[index].shape
        tracks += [judge(seed, shape, method, answer, truth) for method, answer in contenders.items()]
    return tracks


def summarise(tracks: Sequence[Track], bundle: str, clips: int, frames: int) -> TrackingQuality:
    """One row per method, in order of appearance: the bundle first."""
    rows = []
    for method in dict.fromkeys(track.method for track in tracks):
        own = [track for track in tracks if track.method == method]
        low, high = bootstrap_mean([t.j for t in own], groups=[t.clip for t in own])
        hidden = [value for t in own for value in t.hidden]
        rows.append(
            Row(
                method,
                float(np.mean([t.first for t in own])),
                float(np.mean([t.j for t in own])),
                low,
                high,
                float(np.mean([t.late for t in own])),
                float(np.mean([value for t in own for value in t.shown])),
                float(np.mean(hidden)) if hidden else None,
            )
        )
    objects = sum(track.method == bundle for track in tracks)
    return TrackingQuality(bundle, clips, objects, frames, rows)


def evaluate(
    bundle: Path | str,
    clips: int = 100,
    first: int = FIRST_SEED,
    length: int = LENGTH,
    size: int | None = None,
    *,
    precision: str = "auto",
    jobs: int = 1,
    on_clip: Callable[[], None] = lambda: None,
) -> TrackingQuality:
    """Measures a bundle on held-out clips `first`, `first` + 1, ...; equal arguments give equal figures.

    Args:
        bundle: Bundle folder.
        clips: Number of clips.
        first: First held-out seed.
        length: Frames of a clip, at least 2.
        size: Side of the frames in pixels; the generator's own size when None.
        precision: Variant of the bundle.
        jobs: Processes that share the clips, each with one thread; the figures do not depend on it.
        on_clip: Called after each clip.

    Raises:
        BundleError: The bundle does not track.
    """
    from pixano_edge.export.demo.scenes import SIZE

    opened = Bundle.open(bundle)
    work = (str(bundle), precision, length, size or SIZE)
    seeds = range(first, first + clips)
    tracks: list[Track] = []
    if jobs == 1:
        _start_worker(*work)
        try:
            for seed in seeds:
                tracks += _run_clip(seed)
                on_clip()
        finally:
            _WORKER.pop("model").close()
        return summarise(tracks, opened.manifest.name, clips, length)
    Sam2VideoModel.open(opened, precision=precision, threads=1).close()  # a bundle that cannot track fails here
    # Spawned, not forked: ONNX Runtime's and OpenCV's threads do not survive a fork.
    with mp.get_context("spawn").Pool(jobs, _start_worker, work) as pool:
        for answer in pool.imap(_run_clip, seeds):
            tracks += answer
            on_clip()
    return summarise(tracks, opened.manifest.name, clips, length)


_WORKER: dict[str, Any] = {}


def _start_worker(bundle: str, precision: str, length: int, size: int) -> None:
    """Opens the bundle once per process, on one thread."""
    cv2.setNumThreads(1)
    opened = Bundle.open(bundle)
    model = Sam2VideoModel.open(opened, precision=precision, threads=1)
    _WORKER.update(model=model, name=opened.manifest.name, length=length, size=size)


def _run_clip(seed: int) -> list[Track]:
    return clip_tracks(_WORKER["model"], _WORKER["name"], seed, _WORKER["length"], _WORKER["size"])


COLUMNS = ("method", "first frame", "J", "last 10 frames", "object shows", "object hidden")


def table_rows(quality: TrackingQuality) -> list[tuple[str, ...]]:
    """Cells of the table, one row per method."""
    return [
        (
            row.method,
            f"{row.first:.3f}",
            f"{row.j:.3f} ({row.low:.3f}-{row.high:.3f})",
            f"{row.late:.3f}",
            f"{row.shown:.3f}",
            "n/a" if row.hidden is None else f"{row.hidden:.3f}",
        )
        for row in quality.rows
    ]
