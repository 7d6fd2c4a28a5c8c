"""How the demo's language model is judged: exact answers to held-out questions, beside the most frequent answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pixano_edge.export.demo.questions import TYPES, Question, ask
from pixano_edge.export.demo.vqa_scenes import talk_scene

FIRST_SEED = 700_000
"""Held-out scenes are drawn from here on; validation during training uses others."""
QUESTIONS = 500
Answer = Callable[[NDArray[np.uint8], str], str]
"""A picture (H, W, 3) uint8 RGB and a question to the text of the answer."""


@dataclass(frozen=True)
class Case:
    """A held-out scene's picture and what is asked about it."""

    image: NDArray[np.uint8]
    question: Question


def cases(count: int = QUESTIONS, first: int = FIRST_SEED, kinds: Sequence[str] = TYPES) -> list[Case]:
    """``count`` questions, as many of each type, each about a scene of its own; deterministic."""
    found: list[Case] = []
    seed = first
    while len(found) < count:
        scene = talk_scene(seed, "heldout")
        question = ask(scene, kinds[len(found) % len(kinds)], np.random.default_rng([41, seed]))
        if question is not None:
            found.append(Case(scene.image, question))
        seed += 1
    return found


@dataclass(frozen=True)
class Row:
    """One line of the table: shares in [0, 1] of ``asked`` questions of a ``kind``."""

    kind: str
    asked: int
    exact: float
    majority: float
    majority_answer: str


def judge(answers: Sequence[str], asked: Sequence[Case]) -> list[Row]:
    """A row for each type, and last one for all. ``answers`` count where they are the right one, word for word; the
    baseline gives each type's most frequent answer among these very questions, which no guess can beat."""
    rows: list[Row] = []
    kinds = list(dict.fromkeys(case.question.kind for case in asked))
    for kind in kinds:
        pairs = [(a, c.question.answer) for a, c in zip(answers, asked, strict=True) if c.question.kind == kind]
        word, times = Counter(right for _, right in pairs).most_common(1)[0]
        exact = sum(said == right for said, right in pairs) / len(pairs)
        rows.append(Row(kind, len(pairs), exact, times / len(pairs), word))
    whole = len(asked)
    exact = sum(row.exact * row.asked for row in rows) / whole
    majority = sum(row.majority * row.asked for row in rows) / whole
    return [*rows, Row("all", whole, exact, majority, "")]


def line(rows: Sequence[Row]) -> str:
    """One line for a log."""
    return "  ".join(f"{row.kind} {100 * row.exact:.1f}" for row in rows)
