"""Exact answers of the demo language model to held-out questions, next to each type's most frequent answer.

What is asked, and how answers are judged, is in `export/demo/vqa_eval.py`. Torch is not used; scenes need scikit-image
for their photographs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from pixano_edge.engine.bundle import Bundle

CAPTION = "caption"
COLUMNS = ("questions", "asked", "exact answers", "most frequent answer")
NAMES = {
    "color": "what colour",
    "count": "how many",
    "exists": "is there",
    "where": "where",
    "what": "what is",
    "all": "all questions",
    CAPTION: "captions, whole",
}


@dataclass(frozen=True)
class Line:
    """One type of question: shares in [0, 1], with the 95 % interval of Wilson (1927) around `exact`."""

    kind: str
    asked: int
    exact: float
    low: float
    high: float
    majority: float
    majority_answer: str


@dataclass(frozen=True)
class DescribeQuality:
    """All lines, the answers that were wrong, and how they were taken."""

    bundle: str
    precision: str
    first: int
    lines: list[Line]
    wrong: list[dict[str, str]]

    def of(self, kind: str = "all") -> Line:
        """One line."""
        return next(line for line in self.lines if line.kind == kind)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count`."""
    z2 = 1.96**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = 1.96 / (1 + z2 / count) * sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(
    bundle: Path | str,
    questions: int = 500,
    first: int | None = None,
    captions: int = 100,
    *,
    precision: str = "auto",
    threads: int | None = None,
    on_answer: Callable[[], None] = lambda: None,
) -> DescribeQuality:
    """Asks a bundle about held-out scenes, greedily; equal arguments give equal figures.

    Args:
        bundle: Bundle folder.
        questions: How many, of all types alike, each about a scene of its own.
        first: Seed of the first scene; None for that of the table.
        captions: More scenes, whose whole caption has to be right; they are not among the questions.
        precision: Variant of the bundle.
        threads: Threads of one inference.
        on_answer: Called after each answer.
    """
    from pixano_edge.engine.models.decoder.base import GenerationOptions
    from pixano_edge.engine.models.decoder.opening import open_vlm
    from pixano_edge.engine.models.text.messages import read_conversation
    from pixano_edge.export.demo.vqa_eval import FIRST_SEED, cases, judge

    first = FIRST_SEED if first is None else first
    asked = cases(questions, first)
    described = cases(captions, first + 10_000, (CAPTION,))
    opened = Bundle.open(bundle)
    options = GenerationOptions(max_new_tokens=120)
    answers = []
    with open_vlm(opened, precision=precision, threads=threads) as model:
        for case in (*asked, *described):
            conversation = read_conversation(case.question.text, [case.image])
            answers.append(model.generate(conversation, [case.image], options).text.strip())
            on_answer()
        used = str(model.info()["precision"])
    rows = judge(answers[: len(asked)], asked)
    rows += judge(answers[len(asked) :], described)[:-1]
    lines = [Line(r.kind, r.asked, r.exact, *wilson(r.exact, r.asked), r.majority, r.majority_answer) for r in rows]
    wrong = [
        {"kind": c.question.kind, "question": c.question.text, "answer": said, "right": c.question.answer}
        for said, c in zip(answers, (*asked, *described), strict=True)
        if said != c.question.answer
    ]
    return DescribeQuality(opened.manifest.name, used, first, lines, wrong)


def table_rows(quality: DescribeQuality) -> list[tuple[str, ...]]:
    """Cells of the table."""
    return [
        (
            NAMES[line.kind],
            str(line.asked),
            f"{100 * line.exact:.1f} % ({100 * line.low:.1f}-{100 * line.high:.1f})",
            f"{100 * line.majority:.1f} %",
        )
        for line in quality.lines
    ]
