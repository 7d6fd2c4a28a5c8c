"""Detection by name, from picture to boxes: the first call, calls with the text kept, next to transformers.

Contenders take turns as in `segment`. Their final boxes are compared with those of transformers in fp32, at a threshold
in the widest gap between scores, so that it is no chance which boxes are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.models.detection.base import Detections
from pixano_edge.engine.models.detection.matching import Agreement

from .detect_contenders import EngineDetections, TorchDetections
from .metrics import Latency, latency
from .segment import REFERENCE, interleave
from .torch_options import FAILURES, Beside, first_line, use_best_threads

FIRST = "first call"
CACHED = "next picture, text kept"
SAME = "same picture, text kept"

CLASSES = ("cat", "remote", "coffee cup", "spoon", "table", "person", "bed", "lamp")
"""Asked for when the user names none: few enough for one caption of Grounding DINO, short enough for OWLv2."""


@dataclass(frozen=True)
class Row:
    """One contender in one case.

    Attributes:
        case: `FIRST`, `CACHED` or `SAME`.
        contender: Who.
        seconds: Percentiles of a whole call.
        ratio: Reference's p50 over this p50 (above 1: faster than transformers in fp32); None without it.
        texts: Lists of classes whose features were computed in the timed and warm-up calls; None for transformers,
            which computes them in every call.
    """

    case: str
    contender: str
    seconds: Latency
    ratio: float | None
    texts: int | None


@dataclass(frozen=True)
class Accuracy:
    """Final boxes of one contender against those of transformers in fp32.

    Attributes:
        contender: Who.
        threshold: That both were asked with.
        boxes: Of the reference.
        unmatched: Boxes of either side without a partner of the same class.
        worst_box: Largest distance of a corner of a pair, in pixels.
        worst_score: Largest difference of the scores of a pair.
    """

    contender: str
    threshold: float
    boxes: int
    unmatched: int
    worst_box: float
    worst_score: float


@dataclass(frozen=True)
class Figures:
    """Everything that `measure` found; `left_out` says why a contender is missing."""

    rows: list[Row]
    accuracy: list[Accuracy]
    left_out: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, times in seconds."""
        return asdict(self)


Contender = EngineDetections | TorchDetections


def measure(
    bundle: Bundle,
    checkpoint: Path | None,
    picture: npt.NDArray[np.uint8],
    classes: Sequence[str] = CLASSES,
    *,
    rounds: int,
    threads: int,
    precision: str = "auto",
    beside: Beside | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> Figures:
    """Times and compares every contender.

    Args:
        bundle: Exported from `checkpoint`.
        checkpoint: Folder in transformers' format; None leaves transformers and the accuracy out.
        picture: (H, W, 3) uint8 RGB.
        classes: What to look for.
        rounds: Calls per contender and case.
        threads: CPU threads of each contender; PyTorch takes fewer where that is faster.
        precision: Variant of the bundle.
        beside: Who else takes part.
        step: Told what is about to be timed.

    Raises:
        PromptError: The engine refuses the classes, or they are more than transformers asks for at once.
    """
    step("loading")
    beside = beside or Beside()
    left_out = beside.left_out
    with ExitStack() as opened:
        engine = EngineDetections(bundle, picture, classes, threads, precision)
        opened.callback(engine.close)
        engine.answer()  # classes that it refuses would be a bare error of transformers below
        contenders: dict[str, Contender] = {f"pixano-edge {engine.precision}": engine}
        for name, dtype, compiled in _torch_kinds(beside.compiled) if checkpoint is not None else ():
            threads_now = beside.torch_threads or threads
            try:
                one = TorchDetections(bundle, checkpoint, picture, classes, threads_now, dtype, compiled)  # type: ignore[arg-type]
                one.first()
            except FAILURES as error:  # transformers has operators without bfloat16
                if name == REFERENCE:
                    raise
                left_out[name] = first_line(error)
                continue
            contenders[name] = one
            if name == REFERENCE:
                beside.torch_threads = use_best_threads(one.first, threads)
        rows: list[Row] = []
        cases: list[tuple[str, Callable[[Contender], Callable[[], object] | None]]] = [
            (FIRST, lambda c: c.first),
            (CACHED, lambda c: c.cached),
            (SAME, lambda c: c.same),
        ]
        for case, pick in cases:
            if pick(engine) is None:
                continue
            step(case)
            before = engine.texts
            calls = {name: call for name, who in contenders.items() if (call := pick(who)) is not None}
            seconds = {name: latency(values) for name, values in interleave(calls, rounds).items()}
            reference = seconds.get(REFERENCE)
            for name, who in contenders.items():
                ratio = reference.p50 / seconds[name].p50 if reference else None
                texts = who.texts - before if isinstance(who, EngineDetections) else None
                rows.append(Row(case, name, seconds[name], ratio, texts))
        return Figures(rows, compare(contenders), left_out)


def _torch_kinds(compiled: bool) -> list[tuple[str, str, bool]]:
    """Name, dtype and whether compiled; the reference first."""
    kinds = [(REFERENCE, "float32", False), ("PyTorch bf16", "bfloat16", False)]
    return kinds + [(f"{name}, compiled", dtype, True) for name, dtype, _ in kinds if compiled]


def compare(contenders: dict[str, Contender]) -> list[Accuracy]:
    """Final boxes of all contenders against the reference's; nothing without it."""
    if REFERENCE not in contenders:
        return []
    from pixano_edge.export.detection.parity import choose_threshold

    threshold = choose_threshold(contenders[REFERENCE].answer(0.0).scores)
    want = contenders[REFERENCE].answer(threshold)
    others = {name: one for name, one in contenders.items() if name != REFERENCE}
    return [accuracy(name, one.answer(threshold), want, threshold) for name, one in others.items()]


def accuracy(contender: str, got: Detections, want: Detections, threshold: float) -> Accuracy:
    """How far one answer is from the reference's."""
    found = Agreement()
    found.add(got, want, threshold)
    return Accuracy(contender, threshold, found.boxes, found.unmatched, found.max_box, found.max_score)


COLUMNS = ("case", "contender", "p50 ms", "p90 ms", "p99 ms", "vs torch fp32", "text encoded")
ACCURACY_COLUMNS = ("contender", "boxes", "without a partner", "worst corner", "worst score")


def table_rows(figures: Figures) -> list[tuple[str, ...]]:
    """Cells of the table of times; the ratio is above 1 where the contender is faster than transformers in fp32."""
    return [
        (
            row.case,
            row.contender,
            *(f"{1000 * s:.1f}" for s in (row.seconds.p50, row.seconds.p90, row.seconds.p99)),
            "n/a" if row.ratio is None else f"{row.ratio:.2f}x",
            "in each call" if row.texts is None else f"{row.texts} times",
        )
        for row in figures.rows
    ]


def accuracy_rows(figures: Figures) -> list[tuple[str, ...]]:
    """Cells of the table of accuracy."""
    return [
        (a.contender, f"{a.boxes}", f"{a.unmatched}", f"{a.worst_box:.2f} px", f"{a.worst_score:.1e}")
        for a in figures.accuracy
    ]
