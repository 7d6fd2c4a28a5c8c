"""How far a calibrated variant is from fp32 on held-out scenes whose truth is known, each object asked of both.

Calibration itself judges by agreement with fp32 on the user's data, where nobody knows the truth. The demo's scenes
have one: here the same questions are put to both variants and compared with it. Torch is not used; scenes need
scikit-image for its photographs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.prompts import ParsedPrompt
from pixano_edge.engine.cli.segment import find_masks
from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.models.detection.opening import FAMILIES as DETECTORS
from pixano_edge.engine.models.detection.opening import open_detector
from pixano_edge.engine.models.masks import mask_iou
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.model import Sam2VideoModel

from .metrics import bootstrap_mean
from .seeds import FIRST_SEED

BAR = 0.01
"""One point: what the variant may lose at most."""
FULL = "fp32"
GROUPS = 10


@dataclass(frozen=True)
class Row:
    """One metric of both variants, and their difference with its 95 % interval over scenes."""

    metric: str
    fp32: float
    variant: float
    low: float
    high: float
    count: int

    @property
    def difference(self) -> float:
        return self.variant - self.fp32


@dataclass(frozen=True)
class Comparison:
    """All rows of one bundle."""

    bundle: str
    precision: str
    scenes: int
    rows: list[Row]

    @property
    def passed(self) -> bool:
        """Whether no metric is more than `BAR` lower."""
        return all(row.difference >= -BAR for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed, "bar": BAR}


def compare(
    folder: Path | str,
    precision: str = "int8",
    scenes: int = 200,
    first: int = FIRST_SEED,
    *,
    clips: bool = False,
    frames: int = 60,
    threads: int | None = 1,
    on_scene: Callable[[], None] = lambda: None,
) -> Comparison:
    """Compares a variant of a bundle with fp32 on held-out scenes, or clips; equal arguments give equal figures.

    Args:
        folder: Of a demo bundle with the variant.
        precision: Of the variant.
        scenes: Number of scenes, or of clips.
        first: First held-out seed.
        clips: Track clips (SAM 2).
        frames: Of a clip.
        threads: Threads of one call.
        on_scene: Called after each.

    Raises:
        EdgeError: The bundle lacks a variant, or its family has no scenes here.
    """
    bundle = Bundle.open(folder)
    family, seeds = bundle.manifest.family, range(first, first + scenes)
    if family == "sam2":
        if clips:
            rows = list(_tracking(bundle, precision, seeds, frames, threads, on_scene))
        else:
            rows = list(_masks(bundle, precision, seeds, threads, on_scene))
    elif family in DETECTORS:
        rows = [_detection(bundle, precision, seeds, threads, on_scene)]
    else:
        raise EdgeError(f"There are no scenes for '{family}' here.", "Compare with: pixano-edge bench describe-quality")
    return Comparison(bundle.manifest.name, precision, scenes, rows)


def _masks(
    bundle: Bundle, precision: str, seeds: range, threads: int | None, on_scene: Callable[[], None]
) -> Iterator[Row]:
    from pixano_edge.export.demo.scenes import generate_scene, held_out_prompts

    found: dict[str, list[tuple[int, float, float]]] = {"IoU, one click": [], "IoU, box": []}
    with _sam2(bundle, FULL, threads) as full, _sam2(bundle, precision, threads) as reduced:
        for seed in seeds:
            scene = generate_scene(seed, "heldout")
            prompts = held_out_prompts(scene)
            asked = (
                [ParsedPrompt(points=[(float(p.click[0]), float(p.click[1]))], labels=[1]) for p in prompts],
                [ParsedPrompt(box=tuple(map(float, p.box))) for p in prompts],  # type: ignore[arg-type]
            )
            embeddings = [model.encode(scene.image, cached=False) for model in (full, reduced)] if prompts else []
            for kind, questions in zip(found, asked) if prompts else ():
                answers = [find_masks(m, e, questions) for m, e in zip((full, reduced), embeddings)]
                for prompt, *pair in zip(prompts, *answers):
                    truth = scene.objects[prompt.index].visible
                    one, other = (mask_iou(answer.mask, truth) for answer in pair)
                    found[kind].append((seed, one, other))
            on_scene()
    for kind, values in found.items():
        yield _paired(kind, values)


def _tracking(
    bundle: Bundle, precision: str, seeds: range, frames: int, threads: int | None, on_scene: Callable[[], None]
) -> Iterator[Row]:
    from pixano_edge.export.demo.clips import first_prompts, generate_clip

    found: list[tuple[int, float, float]] = []
    models = [Sam2VideoModel.open(bundle, "cpu", precision=p, threads=threads) for p in (FULL, precision)]
    try:
        for seed in seeds:
            clip = generate_clip(seed, "heldout", frames)
            prompts = first_prompts(clip)
            values: list[dict[int, list[float]]] = []
            for model in models if prompts else ():
                own: dict[int, list[float]] = {p.index: [] for p in prompts}
                with model.track(list(clip.images), history=False) as tracker:
                    for prompt in prompts:
                        tracker.add_prompt(prompt.index, 0, Prompt(points=[prompt.click], labels=[1]))
                    for result in tracker.propagate(0, frames - 1):
                        for item in result.objects:
                            truth = clip.labels[result.frame] == item.object_id
                            own[item.object_id].append(mask_iou(item.mask, truth))
                values.append(own)
            for prompt in prompts:
                one, other = (float(np.mean(own[prompt.index][1:])) for own in values)
                found.append((seed, one, other))
            on_scene()
    finally:
        for model in models:
            model.close()
    yield _paired(f"J, {frames} frames", found)


def _detection(bundle: Bundle, precision: str, seeds: range, threads: int | None, on_scene: Callable[[], None]) -> Row:
    from pixano_edge.export.demo.detect_eval import Tallies, ask, merge, summarise
    from pixano_edge.export.demo.scenes import generate_scene

    from .detection_quality import _asker

    tallies: list[list[Tallies]] = []
    detectors = [open_detector(bundle, device="cpu", precision=p, threads=threads) for p in (FULL, precision)]
    try:
        for seed in seeds:
            scene = generate_scene(seed, "heldout")
            own: list[Tallies] = [{}, {}]
            for detector, tally in zip(detectors, own):
                ask(_asker(detector), scene, tally)
            tallies.append(own)
            on_scene()
    finally:
        for detector in detectors:
            detector.close()

    def points(chosen: list[list[Tallies]]) -> tuple[float, float]:
        one, other = (summarise(merge(own[i] for own in chosen))["all"].ap50 for i in range(2))
        return one, other

    one, other = points(tallies)
    count = min(GROUPS, len(tallies))
    left = [points([t for i, t in enumerate(tallies) if i % count != g]) for g in range(count if count > 1 else 0)]
    differences = np.array([b - a for a, b in left] or [other - one])
    # Jackknife, as in `detection_quality.summarise`.
    error = float(np.sqrt((count - 1) / count * ((differences - differences.mean()) ** 2).sum()))
    difference = other - one
    objects = sum(t.objects for own in tallies for t in own[0].values())
    return Row("AP50, all phrases", one, other, difference - 1.96 * error, difference + 1.96 * error, objects)


def _sam2(bundle: Bundle, precision: str, threads: int | None) -> Sam2ImagePredictor:
    return Sam2ImagePredictor.open(bundle, device="cpu", precision=precision, threads=threads)


def _paired(metric: str, values: list[tuple[int, float, float]]) -> Row:
    if not values:
        raise EdgeError("None of the scenes shows an object to ask about.", "Take more --scenes.")
    low, high = bootstrap_mean([b - a for _, a, b in values], groups=[seed for seed, _, _ in values])
    one, other = (float(np.mean([v[i] for v in values])) for i in (1, 2))
    return Row(metric, one, other, low, high, len(values))


COLUMNS = ("bundle", "metric", "fp32", "variant", "difference in points", "objects")


def table_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Cells of the table."""
    return [
        (
            f"{comparison.bundle} {comparison.precision}",
            row.metric,
            f"{row.fp32:.4f}",
            f"{row.variant:.4f}",
            f"{100 * row.difference:+.2f} ({100 * row.low:+.2f} to {100 * row.high:+.2f})",
            str(row.count),
        )
        for row in comparison.rows
    ]
