"""Two runs next to each other: what became slower beyond noise, what became wrong, what was lost.

Where both runs timed the same baseline beside a case, the ratios to it are compared: whatever slowed the machine down
slowed both contenders. Elsewhere the medians are, and only on the same machine. A change counts when it exceeds the
threshold and three times the standard error of what is compared (`Figure.noise`, of all the medians involved).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pixano_edge.engine.errors import EdgeError

from .results import ENDED, Check, Figure, Part, Run, check_text
from .texts import value_text

Verdict = Literal["slower", "faster", "same", "too few", "other machine", "lost", "new"]

THRESHOLD = 0.05
"""Least change that counts."""
SIGMAS = 3.0


@dataclass(frozen=True)
class Change:
    """One figure of this project in both runs.

    Attributes:
        part, case, contender: Which.
        before: In the first run; None where it has none.
        after: In the second.
        worse: How many times worse the second is; None with a figure missing.
        noise: Share that `worse` may differ from 1 by chance; None where it is not known.
        by: ``ratio``, ``value`` or empty.
        verdict: The result.
    """

    part: str
    case: str
    contender: str
    before: Figure | None
    after: Figure | None
    worse: float | None
    noise: float | None
    by: str
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Of two runs.

    Attributes:
        changes: Of every figure of this project.
        wrong: Checks that fail in the second run, in words.
        lost: Parts with figures in the first run and none in the second, with the reason.
        notes: What limits the comparison.
    """

    changes: list[Change]
    wrong: list[str]
    lost: dict[str, str]
    notes: list[str]

    @property
    def regressed(self) -> bool:
        """Whether anything is slower beyond noise, wrong or lost."""
        return bool(self.wrong or self.lost) or any(c.verdict in ("slower", "lost") for c in self.changes)


def compare_runs(before: Run, after: Run, threshold: float = THRESHOLD) -> Comparison:
    """Compares.

    Args:
        before: The older run.
        after: The newer one.
        threshold: Least change that counts, as a share.

    Raises:
        EdgeError: They measured different things (size, threads, image size, quick).
    """
    for key in ("size", "image_size", "quick", "threads"):
        a, b = before.settings.get(key), after.settings.get(key)
        if a != b:
            raise EdgeError(f"The runs differ in '{key}': {a} and {b}.", "Compare runs of the same bench all command.")
    same, notes = _same_machine(before.environment, after.environment)
    if before.settings.get("quick"):
        notes.append("Quick runs have too few measurements to judge times; answers are compared all the same.")
    old, new = _figures(before), _figures(after)
    ended = {p.name for p in after.parts if p.status in ENDED}
    asked = {p.name for p in after.parts}
    changes = [
        _change(key, old, new, same, threshold)
        for key in dict.fromkeys((*old, *new))
        if key[0] in asked and (key[0] in ended or key not in old)
    ]
    lost = {
        p.name: next((q.reason or q.status for q in after.parts if q.name == p.name), "")
        for p in before.parts
        if p.status in ENDED and p.name in asked and p.name not in ended
    }
    if left := [p.name for p in before.parts if p.name not in asked]:
        notes.append(f"Not part of the second run: {', '.join(left)}.")
    return Comparison(changes, _wrong(before, after), lost, notes)


Key = tuple[str, str, str]


def _figures(run: Run) -> dict[Key, tuple[Figure, Part]]:
    return {(p.name, f.case, f.contender): (f, p) for p in run.parts for f in p.figures if f.ours}


def _change(
    key: Key, old: dict[Key, tuple[Figure, Part]], new: dict[Key, tuple[Figure, Part]], same: bool, threshold: float
) -> Change:
    if key not in new:
        return Change(*key, old[key][0], None, None, None, "", "lost")
    if key not in old:
        return Change(*key, None, new[key][0], None, None, "", "new")
    (a, part_a), (b, part_b) = old[key], new[key]
    noises = [a.noise, b.noise]
    if a.ratio and b.ratio and a.baseline == b.baseline:
        by, worse = "ratio", a.ratio / b.ratio
        noises += [_baseline(part, figure) for part, figure in ((part_a, a), (part_b, b))]
    else:
        by, worse = "value", (a.value / b.value if a.higher else b.value / a.value) if a.value and b.value else 1.0
        if not same:
            return Change(*key, a, b, worse, None, by, "other machine")
    if a.unit == "B":  # sizes have no noise that repeated measurement shows
        noises = [0.0]
    known = [n for n in noises if n is not None]
    if len(known) < len(noises):
        return Change(*key, a, b, worse, None, by, "too few")
    noise = sum(n * n for n in known) ** 0.5
    least = 1 + max(threshold, SIGMAS * noise)
    verdict: Verdict = "slower" if worse > least else "faster" if 1 / worse > least else "same"
    return Change(*key, a, b, worse, noise, by, verdict)


def _baseline(part: Part, figure: Figure) -> float | None:
    """Noise of the figure that another one's ratio refers to."""
    return next((f.noise for f in part.figures if f.case == figure.case and f.contender == figure.baseline), None)


def _wrong(before: Run, after: Run) -> list[str]:
    known: dict[tuple[str, str, str], Check] = {
        (p.name, c.contender, c.what): c for p in before.parts for c in p.checks
    }
    said = []
    for part in after.parts:
        for check in part.checks:
            if check.passed is False:
                old = known.get((part.name, check.contender, check.what))
                since = ", as before" if old is not None and old.passed is False else ""
                said.append(f"{part.name}: {check_text(check)}{since}")
    return said


def _same_machine(a: dict[str, Any], b: dict[str, Any]) -> tuple[bool, list[str]]:
    def machine(facts: dict[str, Any]) -> tuple[Any, ...]:
        host = facts["host"]
        return host["cpu"], host["usable_threads"], tuple(g["name"] for g in facts["gpus"])

    notes = []
    same = machine(a) == machine(b)
    if not same:
        notes.append("The runs are from different machines: only ratios to a common baseline are judged.")
    if a.get("power") != b.get("power"):
        notes.append("The power modes differ.")
    names = sorted({*a["versions"], *b["versions"]})
    changed = [f"{n} {a['versions'].get(n, '-')} -> {b['versions'].get(n, '-')}" for n in names
               if a["versions"].get(n) != b["versions"].get(n)]  # fmt: skip
    if changed:
        notes.append(f"Versions: {', '.join(changed)}.")
    return same, notes


COLUMNS = ("part", "case", "contender", "before", "after", "times worse", "noise", "by", "verdict")


def table_rows(found: Comparison, *, every: bool = False) -> list[tuple[str, ...]]:
    """Cells of the table; without `every` only what is not the same."""

    def text(figure: Figure | None) -> str:
        return "n/a" if figure is None else value_text(figure.value, figure.unit)

    return [
        (
            c.part, c.case, c.contender, text(c.before), text(c.after),
            "n/a" if c.worse is None else f"{c.worse:.2f}", "n/a" if c.noise is None else f"{100 * c.noise:.1f} %",
            c.by, c.verdict,
        )
        for c in found.changes if every or c.verdict != "same"
    ]  # fmt: skip
