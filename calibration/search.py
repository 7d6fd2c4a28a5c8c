"""Which blocks to quantise: groups first, the longest run of a ranking that fits, then what is left one by one.

What counts is the task's metric, not a tensor's error: an error that the next layers forget costs nothing. Losses of
blocks neither add up nor cancel in a way that one could rely on, so every step is a measurement:

1. All blocks together. Where that fits, it is the answer.
2. Each group (the layers of one transformer block, say) by itself. Its loss for each byte and operation that it saves
   ranks the groups.
3. Bisection for the longest start of the ranking that fits, as if losses only grew along it.
4. Greedy repair: each group behind it is added by itself and stays if the set still fits; of a group that does not, the
   blocks are measured alone and added one by one in the same way.

The result always fits on the samples that it was searched on; whether it is the largest such set nobody knows without
trying all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pixano_edge.engine.bundle.files import os_errors

REPAIRS = 24
"""Most groups and blocks that the repair tries beside the others."""
PROBES = 6
"""Most groups that are left out of the whole, one at a time, where the whole does not fit."""
TINY = 1e-5
"""Loss below which blocks differ by what they save alone."""


@dataclass(frozen=True, order=True)
class Unit:
    """A block of a graph, as the search sees it.

    Attributes:
        graph: Where it is.
        name: Of the block.
    """

    graph: str
    name: str


Units = frozenset[Unit]
Evaluate = Callable[[Units], float]
"""Mean of the metric with some blocks quantised; 1 is perfect."""


Group = tuple[Unit, ...]
"""Blocks that were measured together, in graph order."""


@dataclass
class Found:
    """What a search found.

    Attributes:
        chosen: The blocks to quantise.
        value: The metric with them, on the samples of the search.
        whole: The metric with all blocks.
        alone: With one group of blocks, or with one block of a group that did not fit.
        without: With all blocks but those of a group; of some groups only.
        why: Why a block is not among the chosen ones, in words.
        evaluations: Sets that were asked for.
    """

    chosen: Units
    value: float
    whole: float
    alone: dict[Group, float] = field(default_factory=dict)
    without: dict[Group, float] = field(default_factory=dict)
    why: dict[Unit, str] = field(default_factory=dict)
    evaluations: int = 0


class Scores:
    """Measured sets, kept on disk so that an interrupted search goes on where it stopped.

    Args:
        path: File; None keeps them in memory alone.
        key: What the measurements depend on; a file with another key is not used.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key = path, key
        self._known: dict[str, float] = {}
        self.measured = 0
        if path is not None:
            try:
                content = json.loads(path.read_text())
                if content["key"] == key:
                    self._known = {str(name): float(value) for name, value in content["scores"].items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                self._known = {}

    def get(self, units: Units, measure: Evaluate) -> float:
        """The value of a set, measured at the first request.

        Raises:
            BundleError: The file cannot be written.
        """
        name = json.dumps(sorted([u.graph, u.name] for u in units))
        if name not in self._known:
            self._known[name] = measure(units)
            self.measured += 1
            self._save()
        return self._known[name]

    def _save(self) -> None:
        if self._path is None:
            return
        with os_errors(f"writing '{self._path}'"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_name(f".{self._path.name}.part")
            try:
                partial.write_text(json.dumps({"key": self._key, "scores": self._known}))
                partial.replace(self._path)
            finally:
                partial.unlink(missing_ok=True)


def search(
    units: Sequence[Unit],
    group_of: Callable[[Unit], str],
    saving: Callable[[Unit], float],
    evaluate: Evaluate,
    target: float,
    *,
    refused: Collection[Unit] = (),
    metric: str = "metric",
    repairs: int = REPAIRS,
    probes: int = PROBES,
    on_step: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Found:
    """Finds a large set of blocks that keeps the metric.

    Args:
        units: The blocks, in graph order.
        group_of: What blocks of one graph are measured together.
        saving: What quantising a block saves, in any unit; above 0.
        evaluate: Measures a set; equal sets give equal values.
        target: Lowest value of the metric that fits.
        refused: Blocks that cannot be quantised at all; they are not measured.
        metric: Its name, for words.
        repairs: See `REPAIRS`.
        probes: See `PROBES`.
        on_step: Called before each measurement with what it is, how many were made and how many there may be.
    """
    groups: dict[tuple[str, str], list[Unit]] = {}
    for unit in units:
        if unit not in refused:
            groups.setdefault((unit.graph, group_of(unit)), []).append(unit)
    able = [unit for group in groups.values() for unit in group]
    if not able:
        return Found(frozenset(), 1.0, 1.0)
    work = _Work(evaluate, on_step, 1 + len(groups))
    names = {tuple(group): f"{graph} {name}" for (graph, name), group in groups.items()}
    whole = work.value(able, "all blocks")
    found = Found(frozenset(able), whole, whole)
    for group, name in names.items():
        found.alone[group] = work.value(group, f"{name} alone")
    if not whole >= target:
        work.limit += probes + len(groups).bit_length() + repairs
        for group in sorted(names, key=lambda g: -_loss(found.alone[g]))[:probes]:
            found.without[group] = work.value([u for u in able if u not in group], f"all but {names[group]}")
        _choose(found, list(names), saving, work, target, metric, repairs)
    found.evaluations = work.count
    return found


class _Work:
    """Measures and counts."""

    def __init__(self, evaluate: Evaluate, on_step: Callable[[str, int, int], None], limit: int) -> None:
        self.count, self.limit = 0, limit
        self._evaluate, self._on_step = evaluate, on_step

    def value(self, chosen: Collection[Unit], what: str) -> float:
        self._on_step(what, self.count, self.limit)
        self.count += 1
        return self._evaluate(frozenset(chosen))


def _choose(
    found: Found,
    groups: Sequence[Group],
    saving: Callable[[Unit], float],
    work: _Work,
    target: float,
    metric: str,
    repairs: int,
) -> None:
    """Bisection and repair; fills in what was chosen, its value, and why the others were not."""

    def cost(group: Group) -> tuple[float, float]:
        saved = sum(map(saving, group))
        return _loss(found.alone[group]) / saved, -saved

    ranked = sorted(groups, key=cost)
    fits, misses, best = 0, len(ranked), 1.0
    while misses - fits > 1:
        middle = (fits + misses) // 2
        got = work.value([u for g in ranked[:middle] for u in g], f"the {middle} cheapest groups")
        if got >= target:
            fits, best = middle, got
        else:
            misses = middle
    chosen = [unit for group in ranked[:fits] for unit in group]
    tried = 0
    waiting = list(ranked[fits:])
    while waiting:
        group = waiting.pop(0)
        name = group[0].name if len(group) == 1 else f"the group of {group[0].name}"
        if tried >= repairs:
            told = f"alone {metric} is {found.alone[group]:.4f}; not tried beside the others, {repairs} were"
            found.why |= dict.fromkeys(group, told)
            continue
        if not found.alone[group] >= target:
            told = f"alone, {metric} is {found.alone[group]:.4f}, below {target:.4f}"
        else:
            got = work.value([*chosen, *group], f"with {group[0].graph} {name}")
            tried += 1
            if got >= target:
                chosen += group
                best = got
                continue
            told = f"with it, {metric} of the variant is {got:.4f}, below {target:.4f}"
        if len(group) == 1:
            found.why[group[0]] = told
            continue
        parts: list[Group] = [(unit,) for unit in group]
        for part in parts:
            found.alone[part] = work.value(part, f"{part[0].graph} {part[0].name} alone")
        work.limit += len(parts)
        waiting = sorted(parts, key=cost) + waiting
    found.chosen, found.value = frozenset(chosen), best


def _loss(value: float) -> float:
    """What is missing to 1; infinite for a metric that is no number."""
    return max(1 - value, TINY) if math.isfinite(value) else math.inf
