"""Mask quality of the demo bundle on held-out scenes, next to flood fill and GrabCut with the same prompts.

One click: the best of three masks by predicted IoU, as `pixano-edge segment` answers it. Box: the single-mask output.
Torch is not used; scenes need scikit-image for its photographs.
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
from pixano_edge.engine.cli.prompts import ParsedPrompt
from pixano_edge.engine.cli.segment import find_masks
from pixano_edge.engine.models.masks import mask_iou
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor

from .metrics import bootstrap_mean
from .seeds import FIRST_SEED

GOOD = 0.9
KINDS = ("click", "box")


@dataclass(frozen=True)
class Sample:
    """IoU of one answer: which scene, which shape was asked for, by whom and how."""

    scene: int
    shape: str
    method: str
    kind: str
    iou: float


@dataclass(frozen=True)
class Summary:
    """Mean IoU of one method and kind of prompt, its 95 % interval over scenes, and the share above `GOOD`."""

    method: str
    kind: str
    mean: float
    low: float
    high: float
    good: float
    prompts: int


@dataclass(frozen=True)
class Quality:
    """All summaries, the mean per shape (``{kind: {shape: {method: mean}}}``), and how they were taken."""

    scenes: int
    prompts: int
    bundle: str
    summaries: list[Summary]
    shapes: dict[str, dict[str, dict[str, float]]]

    def lead(self, kind: str) -> float:
        """Points of mean IoU (0..1) by which the model leads the better baseline."""
        model = next(s.mean for s in self.summaries if s.kind == kind and s.method == self.bundle)
        return model - max(s.mean for s in self.summaries if s.kind == kind and s.method != self.bundle)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"lead": {kind: self.lead(kind) for kind in KINDS}}


def _baselines() -> dict[str, dict[str, Callable[[Any, Any], npt.NDArray[np.bool_]]]]:
    from pixano_edge.export.demo.baselines import flood_fill, grabcut

    return {
        "click": {
            "flood fill": lambda image, p: flood_fill(image, click=p.click),
            "GrabCut": lambda image, p: grabcut(image, click=p.click),
        },
        "box": {
            "flood fill": lambda image, p: flood_fill(image, box=p.box),
            "GrabCut": lambda image, p: grabcut(image, box=p.box),
        },
    }


def scene_samples(predictor: Sam2ImagePredictor, name: str, seed: int, size: int) -> list[Sample]:
    """Every evaluated object of one held-out scene, asked for by click and by box, answered by model and baselines."""
    from pixano_edge.export.demo.scenes import generate_scene, held_out_prompts

    scene = generate_scene(seed, "heldout", size)
    prompts = held_out_prompts(scene)
    if not prompts:
        return []
    embedding = predictor.encode(scene.image)
    asked = {
        "click": [ParsedPrompt(points=[(float(p.click[0]), float(p.click[1]))], labels=[1]) for p in prompts],
        "box": [
            ParsedPrompt(box=(float(p.box[0]), float(p.box[1]), float(p.box[2]), float(p.box[3]))) for p in prompts
        ],
    }
    samples = []
    for kind, baselines in _baselines().items():
        answers = find_masks(predictor, embedding, asked[kind])
        for prompt, answer in zip(prompts, answers, strict=True):
            target = scene.objects[prompt.index]
            samples.append(Sample(seed, target.shape, name, kind, mask_iou(answer.mask, target.visible)))
            for method, baseline in baselines.items():
                mask = baseline(scene.image, prompt)
                samples.append(Sample(seed, target.shape, method, kind, mask_iou(mask, target.visible)))
    return samples


def summarise(samples: Sequence[Sample], scenes: int, bundle: str) -> Quality:
    """Means, intervals and the breakdown per shape; the model first, then the baselines in order of appearance."""
    methods = list(dict.fromkeys(s.method for s in samples))
    summaries = []
    shapes: dict[str, dict[str, dict[str, float]]] = {}
    for kind in KINDS:
        of_kind = [s for s in samples if s.kind == kind]
        for method in methods:
            own = [s for s in of_kind if s.method == method]
            values = np.array([s.iou for s in own])
            low, high = bootstrap_mean(values, groups=[s.scene for s in own])
            good = float((values > GOOD).mean())
            summaries.append(Summary(method, kind, float(values.mean()), low, high, good, len(own)))
        shapes[kind] = {
            shape: {
                method: float(np.mean([s.iou for s in of_kind if s.shape == shape and s.method == method]))
                for method in methods
            }
            for shape in sorted({s.shape for s in of_kind})
        }
    prompts = sum(1 for s in samples if s.method == bundle and s.kind == KINDS[0])
    return Quality(scenes, prompts, bundle, summaries, shapes)


def evaluate(
    bundle: Path | str,
    scenes: int = 500,
    first: int = FIRST_SEED,
    size: int | None = None,
    *,
    precision: str = "auto",
    jobs: int = 1,
    on_scene: Callable[[], None] = lambda: None,
) -> Quality:
    """Measures a bundle on held-out scenes `first`, `first` + 1, ...; equal arguments give equal figures.

    Args:
        bundle: Bundle folder.
        scenes: Number of scenes.
        first: First held-out seed.
        size: Side of the scenes in pixels; the generator's own size when None.
        precision: Variant of the bundle.
        jobs: Processes that share the scenes, each with one thread; the figures do not depend on it.
        on_scene: Called after each scene.
    """
    from pixano_edge.export.demo.scenes import SIZE

    name = Bundle.open(bundle).manifest.name
    work = (str(bundle), precision, size or SIZE)
    seeds = range(first, first + scenes)
    samples: list[Sample] = []
    if jobs == 1:
        _start_worker(*work)
        for seed in seeds:
            samples += _run_scene(seed)
            on_scene()
        _WORKER.pop("predictor").close()
        return summarise(samples, scenes, name)
    # Spawned, not forked: ONNX Runtime's and OpenCV's threads do not survive a fork.
    with mp.get_context("spawn").Pool(jobs, _start_worker, work) as pool:
        for answer in pool.imap(_run_scene, seeds):
            samples += answer
            on_scene()
    return summarise(samples, scenes, name)


_WORKER: dict[str, Any] = {}


def _start_worker(bundle: str, precision: str, size: int) -> None:
    """Opens the bundle once per process, on one thread."""
    cv2.setNumThreads(1)
    opened = Bundle.open(bundle)
    predictor = Sam2ImagePredictor.open(opened, precision=precision, threads=1)
    _WORKER.update(predictor=predictor, name=opened.manifest.name, size=size)


def _run_scene(seed: int) -> list[Sample]:
    return scene_samples(_WORKER["predictor"], _WORKER["name"], seed, _WORKER["size"])


def main_rows(quality: Quality) -> list[tuple[str, ...]]:
    """Cells of the table: method, then mean with interval and share above 0.9 for click and for box."""
    rows = []
    for method in dict.fromkeys(s.method for s in quality.summaries):
        cells = [method]
        for kind in KINDS:
            s = next(s for s in quality.summaries if s.method == method and s.kind == kind)
            cells += [f"{s.mean:.3f} ({s.low:.3f}-{s.high:.3f})", f"{100 * s.good:.0f} %"]
        rows.append(tuple(cells))
    return rows


MAIN_COLUMNS = ("method", "IoU, one click", "> 0.9", "IoU, box", "> 0.9")


def shape_rows(quality: Quality, kind: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and cells of the breakdown per shape for one kind of prompt."""
    methods = list(dict.fromkeys(s.method for s in quality.summaries))
    rows = [(shape, *(f"{means[m]:.3f}" for m in methods)) for shape, means in quality.shapes[kind].items()]
    return (f"shape ({kind})", *methods), rows
