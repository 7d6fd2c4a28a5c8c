"""How well a detector finds what it is asked for on held-out scenes: questions, matching, average precision.

A detector is any function of an image and class names, see :data:`Detect`; no torch here.

Each scene is asked once for every kind of phrase (shape; colour and shape; pattern and shape), since a detector of the
OWLv2 kind gives every box one label: the phrases of that kind that are true of its objects, and as many that are true
of none. AP50 is the area under the interpolated curve of precision over recall (PASCAL VOC 2010 and later) of one
phrase over all scenes that were asked for it, at an IoU of 0.5; the table's figure is the mean over phrases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pixano_edge.export.demo.scenes import Scene, generate_scene, is_evaluated
from pixano_edge.export.demo.words import KINDS, Phrase, all_phrases, phrases_of

Boxes = NDArray[np.float32]
Detect = Callable[[NDArray[np.uint8], Sequence[str], float], tuple[Boxes, NDArray[np.float32], NDArray[np.int64]]]
"""``detect(image, classes, threshold)``: boxes (N, 4) xyxy pixels, scores (N,) best first, labels (N,)."""

IOU = 0.5
LOWEST_SCORE = 0.02
"""Boxes below are not asked for: the tail of the curve."""
SHOWN_SCORE = 0.5
"""Where a false alarm is counted: a box of at least this score for a phrase that is true of nothing."""


@dataclass(frozen=True)
class Question:
    """What is asked of one scene in one call: phrases of one kind, the absent ones marked."""

    kind: str
    phrases: tuple[Phrase, ...]
    absent: tuple[bool, ...]


def questions(scene: Scene) -> tuple[Question, ...]:
    """One question of each kind; fixed by the scene's seed, the phrases in an order that tells nothing.

    Half of the absent phrases share a word with a present one where there are such.
    """
    rng = np.random.default_rng([5, scene.seed])
    shown = [obj for obj in scene.objects if is_evaluated(obj)]
    asked = []
    for kind in KINDS:
        present = sorted({p for obj in shown for p in phrases_of(obj) if p.kind == kind}, key=lambda p: p.text)
        if not present:
            continue
        absent = [p for p in all_phrases() if p.kind == kind and not any(p.matches(obj) for obj in scene.objects)]
        words = {word for phrase in present for word in phrase.text.split()}
        alike = [p for p in absent if words & set(p.text.split())]
        count = min(len(present), len(absent))
        chosen = [alike[i] for i in rng.permutation(len(alike))[: (count + 1) // 2]]
        rest = [p for p in absent if p not in chosen]
        chosen += [rest[i] for i in rng.permutation(len(rest))[: count - len(chosen)]]
        both = [(p, False) for p in present] + [(p, True) for p in chosen]
        both = [both[i] for i in rng.permutation(len(both))]
        asked.append(Question(kind, tuple(p for p, _ in both), tuple(a for _, a in both)))
    return tuple(asked)


def box_iou(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """IoU (N, M) of xyxy boxes (N, 4) and (M, 4)."""
    x, y = a.astype(np.float64).reshape(-1, 1, 4), b.astype(np.float64).reshape(1, -1, 4)
    both = np.clip(np.minimum(x[..., 2:], y[..., 2:]) - np.maximum(x[..., :2], y[..., :2]), 0, None).prod(-1)
    areas = (x[..., 2:] - x[..., :2]).prod(-1) + (y[..., 2:] - y[..., :2]).prod(-1)
    return both / np.maximum(areas - both, 1e-9)


@dataclass
class Tally:
    """What happened to one phrase: ``scores`` and ``hits`` of its boxes, the number of ``objects`` it is true of, how
    often it was asked for in ``vain`` and how often that gave an ``alarm``."""

    kind: str
    scores: list[float] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)
    objects: int = 0
    vain: int = 0
    alarms: int = 0


Tallies = dict[str, Tally]


def merge(parts: Iterable[Tallies]) -> Tallies:
    """The tallies of several runs as one; the parts are not changed."""
    total: Tallies = {}
    for part in parts:
        for text, tally in part.items():
            own = total.setdefault(text, Tally(tally.kind))
            own.scores += tally.scores
            own.hits += tally.hits
            own.objects += tally.objects
            own.vain += tally.vain
            own.alarms += tally.alarms
    return total


def judge(boxes: Boxes, scores: NDArray[np.float32], targets: Boxes, doubtful: Boxes) -> tuple[list[float], list[bool]]:
    """Scores and hits of the boxes of one phrase in one scene, best first.

    A box hits the free target that it overlaps most, by at least :data:`IOU`. A box that hits none but a ``doubtful``
    object (too little of it shows to be asked for) counts neither way.
    """
    free = np.ones(len(targets), bool)
    kept, hits = [], []
    overlap, unsure = box_iou(boxes, targets), box_iou(boxes, doubtful)
    for i in np.argsort(-scores, kind="stable"):
        candidates = np.where(free, overlap[i], -1.0)
        best = int(candidates.argmax()) if len(targets) else -1
        hit = best >= 0 and bool(candidates[best] >= IOU)
        if hit:
            free[best] = False
        elif len(doubtful) and unsure[i].max() >= IOU:
            continue
        kept.append(float(scores[i]))
        hits.append(hit)
    return kept, hits


def ask(detect: Detect, scene: Scene, tallies: Tallies) -> None:
    """Asks a detector all questions of a scene and adds what it answers to ``tallies``."""
    for question in questions(scene):
        boxes, scores, labels = detect(scene.image, [p.text for p in question.phrases], LOWEST_SCORE)
        for k, (phrase, absent) in enumerate(zip(question.phrases, question.absent, strict=True)):
            tally = tallies.setdefault(phrase.text, Tally(question.kind))
            true = [obj for obj in scene.objects if phrase.matches(obj)]
            targets = _boxes(obj.box for obj in true if is_evaluated(obj))
            doubtful = _boxes(obj.box for obj in true if not is_evaluated(obj))
            kept, hits = judge(boxes[labels == k], scores[labels == k], targets, doubtful)
            tally.scores += kept
            tally.hits += hits
            tally.objects += len(targets)
            tally.vain += absent
            tally.alarms += absent and any(score >= SHOWN_SCORE for score in kept)


def _boxes(boxes: Iterable[tuple[int, int, int, int]]) -> Boxes:
    return np.array(list(boxes), np.float32).reshape(-1, 4)


def measure(detect: Detect, seeds: Iterable[int]) -> dict[str, Summary]:
    """Asks a detector about held-out scenes and sums up, see :func:`summarise`."""
    tallies: Tallies = {}
    for seed in seeds:
        ask(detect, generate_scene(seed, "heldout"), tallies)
    return summarise(tallies)


def line(found: dict[str, Summary]) -> str:
    """Summaries in one line."""
    parts = [f"{kind} {s.ap50:.3f} (pooled {s.pooled:.3f})" for kind, s in found.items()]
    return f"AP50 {', '.join(parts)}, false alarms {found['all'].alarm:.3f}"


def average_precision(scores: Sequence[float], hits: Sequence[bool], objects: int) -> float:
    """Area under precision over recall, precision made non-increasing from the right; 0 without any box."""
    if not objects:
        raise ValueError("no object to find: average precision is not defined")
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    hit = np.asarray(hits, bool)[order]
    found = np.cumsum(hit)
    precision = found / np.arange(1, len(hit) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hit].sum() / objects)


@dataclass(frozen=True)
class Summary:
    """Figures of one kind of phrase, or of all: mean AP50 over ``phrases``, AP50 of all boxes in one ranking
    (``pooled``), ``objects`` asked for, and the share of absent phrases that gave a false ``alarm``."""

    kind: str
    ap50: float
    pooled: float
    alarm: float
    phrases: int
    objects: int
    vain: int


def summarise(tallies: Tallies) -> dict[str, Summary]:
    """A summary of each kind and of ``all``; phrases that are true of nothing anywhere only count as alarms."""
    found = {}
    for kind in (*KINDS, "all"):
        own = [tally for tally in tallies.values() if kind in (tally.kind, "all")]
        asked = [tally for tally in own if tally.objects]
        if not asked:
            continue
        means = [average_precision(t.scores, t.hits, t.objects) for t in asked]
        objects, vain = sum(t.objects for t in own), sum(t.vain for t in own)
        scores, hits = [s for t in own for s in t.scores], [h for t in own for h in t.hits]
        pooled = average_precision(scores, hits, objects)
        alarm = sum(t.alarms for t in own) / max(1, vain)
        found[kind] = Summary(kind, float(np.mean(means)), pooled, alarm, len(asked), objects, vain)
    return found
