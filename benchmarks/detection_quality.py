"""Detection quality of the demo detectors on held-out scenes, next to colours and contours with the same questions.

What is asked, and how answers are judged, is in `export/demo/detect_eval.py`. Torch is not used; scenes need
scikit-image for its photographs.
"""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle import Bundle

from .seeds import FIRST_SEED

BASELINE = "colours and contours"
DEMOS = ("grounding-dino-demo", "owlv2-demo")
"""Bundles of the package that know the words."""
GROUPS = 20
"""Groups of scenes behind the intervals."""


@dataclass(frozen=True)
class Row:
    """One method and kind of phrase: mean AP50 over phrases with its 95 % interval over scenes, AP50 of all boxes in
    one ranking, and the share of absent phrases that gave a box."""

    method: str
    kind: str
    ap50: float
    low: float
    high: float
    pooled: float
    alarm: float
    phrases: int
    objects: int
    absent: int


@dataclass(frozen=True)
class DetectionQuality:
    """All rows, and how they were taken; ``bundle`` is the first of the ``bundles`` that were measured."""

    scenes: int
    bundles: list[str]
    rows: list[Row]

    @property
    def bundle(self) -> str:
        return self.bundles[0]

    def of(self, method: str, kind: str = "all") -> Row:
        """One row."""
        return next(row for row in self.rows if (row.method, row.kind) == (method, kind))

    def lead(self, kind: str = "all", bundle: str | None = None) -> float:
        """Points of AP50 (0..1) by which a model, by default the first, leads the baseline."""
        return self.of(bundle or self.bundle, kind).ap50 - self.of(BASELINE, kind).ap50

    def to_dict(self) -> dict[str, Any]:
        kinds = {row.kind: None for row in self.rows}
        return asdict(self) | {"lead": {name: {kind: self.lead(kind, name) for kind in kinds} for name in self.bundles}}


def evaluate(
    bundles: Path | str | Sequence[Path | str],
    scenes: int = 500,
    first: int = FIRST_SEED,
    *,
    precision: str = "auto",
    jobs: int = 1,
    groups: int = GROUPS,
    on_scene: Callable[[], None] = lambda: None,
) -> DetectionQuality:
    """Measures bundles on held-out scenes `first`, `first` + 1, ...; equal arguments give equal figures.

    Args:
        bundles: Bundle folder, or several whose bundles have different names.
        scenes: Number of scenes.
        first: First held-out seed.
        precision: Variant of the bundles.
        jobs: Processes that share the scenes, each with one thread; the figures do not depend on it.
        groups: Groups of scenes behind the intervals.
        on_scene: Called after each scene.
    """
    folders = [str(b) for b in ([bundles] if isinstance(bundles, Path | str) else bundles)]
    names = [Bundle.open(folder).manifest.name for folder in folders]
    seeds = range(first, first + scenes)
    answers: list[dict[str, Any]] = []
    with _answers((folders, precision), seeds, jobs) as found:
        for answer in found:
            answers.append(answer)
            on_scene()
    rows = [row for method in (*names, BASELINE) for row in summarise(method, [a[method] for a in answers], groups)]
    return DetectionQuality(scenes, names, rows)


def summarise(method: str, scenes: Sequence[Any], groups: int) -> list[Row]:
    """Rows of one method, one for each kind of phrase and one for all, from the tallies of each scene.

    Intervals are 1.96 standard errors by the jackknife that leaves out one of `groups` groups of scenes at a time. (A
    bootstrap shows scenes twice, and with them boxes of equal score: average precision comes out too high.)
    """
    from pixano_edge.export.demo.detect_eval import merge
    from pixano_edge.export.demo.detect_eval import summarise as summaries

    count = min(groups, len(scenes))
    left: dict[str, list[float]] = {}
    for group in range(count if count > 1 else 0):
        for kind, summary in summaries(merge(s for i, s in enumerate(scenes) if i % count != group)).items():
            left.setdefault(kind, []).append(summary.ap50)
    rows = []
    for kind, s in summaries(merge(scenes)).items():
        values = np.array(left.get(kind, [s.ap50]))
        error = float(np.sqrt((count - 1) / count * ((values - values.mean()) ** 2).sum()))
        low, high = max(0.0, s.ap50 - 1.96 * error), min(1.0, s.ap50 + 1.96 * error)
        rows.append(Row(method, kind, s.ap50, low, high, s.pooled, s.alarm, s.phrases, s.objects, s.vain))
    return rows


@contextmanager
def _answers(work: tuple[list[str], str], seeds: range, jobs: int) -> Iterator[Iterable[dict[str, Any]]]:
    """The tallies of each scene, `{method: tallies}`, in the order of the seeds."""
    if jobs == 1:
        _start_worker(*work)
        try:
            yield map(_run_scene, seeds)
        finally:
            for detector in _WORKER.pop("detectors").values():
                detector.close()
        return
    # Spawned, not forked: ONNX Runtime's and OpenCV's threads do not survive a fork.
    with mp.get_context("spawn").Pool(jobs, _start_worker, work) as pool:
        yield pool.imap(_run_scene, seeds)


_WORKER: dict[str, Any] = {}


def _start_worker(bundles: list[str], precision: str) -> None:
    """Opens the bundles once per process, on one thread."""
    from pixano_edge.engine.models.detection.opening import open_detector

    cv2.setNumThreads(1)
    opened = [Bundle.open(bundle) for bundle in bundles]
    _WORKER["detectors"] = {b.manifest.name: open_detector(b, precision=precision, threads=1) for b in opened}


def _run_scene(seed: int) -> dict[str, Any]:
    from pixano_edge.export.demo.detect_baselines import ContourDetector
    from pixano_edge.export.demo.detect_eval import Tallies, ask
    from pixano_edge.export.demo.scenes import generate_scene

    scene = generate_scene(seed, "heldout")
    functions: dict[str, Any] = {name: _asker(detector) for name, detector in _WORKER["detectors"].items()}
    functions[BASELINE] = ContourDetector()
    answers: dict[str, Any] = {}
    for method, function in functions.items():
        answers[method] = Tallies()
        ask(function, scene, answers[method])
    return answers


def _asker(detector: Any) -> Any:
    """A detector as `detect_eval.Detect`."""

    def detect(
        image: npt.NDArray[np.uint8], classes: Sequence[str], threshold: float
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        found = detector.detect(image, classes, box_threshold=threshold, text_threshold=threshold)
        return found.boxes, found.scores, found.labels

    return detect


COLUMNS = ("method", "phrases", "AP50", "one ranking", "false alarms")
KIND_NAMES = {"shape": "circle", "color": "red circle", "pattern": "striped circle", "all": "all"}


def table_rows(quality: DetectionQuality) -> list[tuple[str, ...]]:
    """Cells of the table."""
    return [
        (
            row.method,
            f"{KIND_NAMES[row.kind]} ({row.phrases})",
            f"{row.ap50:.3f} ({row.low:.3f}-{row.high:.3f})",
            f"{row.pooled:.3f}",
            f"{100 * row.alarm:.1f} %",
        )
        for row in quality.rows
    ]
