"""The file that `pixano-edge bench all` writes: figures, checks and bars of every part, with what they depend on.

docs/benchmarks.md describes it. Times are in seconds, memory in bytes; a figure that was not taken is null.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from pixano_edge.engine.errors import EdgeError

SCHEMA = "pixano-edge-bench"
SCHEMA_VERSION = 1

OURS = "pixano-edge"
"""Contenders whose name begins so are this project's."""

PartStatus = Literal["passed", "wrong", "failed", "timed out", "unavailable", "skipped"]
ENDED = ("passed", "wrong")
"""Of a part that has figures; ``wrong``: an accuracy check failed."""

T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """One contender in one case.

    Attributes:
        case: What was measured.
        contender: Who; see `OURS`.
        value: Median, or the only value.
        unit: ``s``, ``1/s`` or ``B``.
        higher: Whether more is better.
        p90: Percentile; None where a figure has none.
        p99: Likewise.
        count: Measurements behind it.
        ratio: How many times better than `baseline` in the same case of the same run; None for no baseline.
        baseline: Contender that `ratio` refers to.
    """

    case: str
    contender: str
    value: float
    unit: str = "s"
    higher: bool = False
    p90: float | None = None
    p99: float | None = None
    count: int = 1
    ratio: float | None = None
    baseline: str = ""

    @property
    def ours(self) -> bool:
        return self.contender.startswith(OURS)

    @property
    def noise(self) -> float | None:
        """Standard error of the median over the median, from the distance of p50 and p90 as of a normal distribution;
        `UNKNOWN_NOISE` for a figure without percentiles, None with fewer than `LEAST_COUNT` measurements."""
        if self.count < LEAST_COUNT or self.value <= 0:
            return None
        if self.p90 is None:
            return UNKNOWN_NOISE
        sigma = abs(self.p90 - self.value) / 1.2816
        return float(1.2533 * sigma / self.count**0.5 / self.value)


LEAST_COUNT = 5
UNKNOWN_NOISE = 0.05
"""Assumed for medians of which no spread was kept."""


@dataclass(frozen=True)
class Check:
    """Whether an answer is right, judged in the run that timed it.

    Attributes:
        what: What was compared.
        contender: Whose answer.
        value: What was found; None where nothing could be compared.
        limit: The last value that is right.
        rule: ``<=`` or ``>=``.
        passed: None where it was not judged; `reason` says why.
        reason: For that.
    """

    what: str
    contender: str
    value: float | None
    limit: float
    rule: Literal["<=", ">="]
    passed: bool | None
    reason: str = ""


@dataclass(frozen=True)
class Bar:
    """What the project wants to reach; missing one is no error.

    Attributes:
        what: In words.
        value: Measured; None where it could not be.
        limit: The bar.
        rule: ``<=`` or ``>=``.
        unit: Of both; ``x`` for a ratio.
    """

    what: str
    value: float | None
    limit: float
    rule: Literal["<=", ">="]
    unit: str

    @property
    def met(self) -> bool | None:
        """None where it was not measured."""
        return None if self.value is None else holds(self.value, self.rule, self.limit)


@dataclass(frozen=True)
class Part:
    """One part of a run.

    Attributes:
        name: For example ``segment``.
        title: What was measured on what.
        status: See `PartStatus`.
        reason: Why it has no figures, or which check failed; empty for a part that passed.
        command: Repeats it.
        seconds: How long it ran.
        busy: CPUs that other programs kept busy meanwhile, of all CPUs; None where the system does not tell.
        figures: What was measured.
        checks: Of accuracy.
        bars: Of the project.
        left_out: Contender to the reason why it is missing.
        curves: Of `bench scaling`.
        raw: The part's own output.
    """

    name: str
    title: str
    status: PartStatus
    reason: str
    command: str
    seconds: float
    busy: float | None = None
    figures: tuple[Figure, ...] = ()
    checks: tuple[Check, ...] = ()
    bars: tuple[Bar, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    curves: tuple[dict[str, Any], ...] = ()
    raw: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A whole run.

    Attributes:
        settings: ``size``, ``quick``, ``threads``, and the command.
        environment: As of `report.environment`, with ``power`` as of `power_mode.read_power_mode`.
        parts: In order.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    parts: tuple[Part, ...]

    @property
    def wrong(self) -> list[str]:
        """Every failed check, in words."""
        return [f"{p.name}: {check_text(c)}" for p in self.parts for c in p.checks if c.passed is False]

    @property
    def broken(self) -> list[str]:
        """Parts that failed or hung."""
        return [p.name for p in self.parts if p.status in ("failed", "timed out")]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema": SCHEMA, "schema_version": SCHEMA_VERSION, "settings": self.settings,
            "environment": self.environment, "wrong": self.wrong, "parts": [asdict(part) for part in self.parts],
        }  # fmt: skip


def holds(value: float, rule: str, limit: float) -> bool:
    """Whether a value keeps a limit; NaN does not."""
    return value <= limit if rule == "<=" else value >= limit


def judge(what: str, contender: str, value: float | None, rule: Literal["<=", ">="], limit: float) -> Check:
    """A check; not judged where there is no value."""
    if value is None:
        return Check(what, contender, None, limit, rule, None, "nothing to compare with")
    return Check(what, contender, value, limit, rule, holds(value, rule, limit))


def check_text(check: Check) -> str:
    """``pixano-edge fp32: mask IoU, encoder: 0.9 (must be >= 0.999)``."""
    value = "not judged" if check.passed is None else f"{check.value:.3g}"
    tail = check.reason if check.passed is None else f"must be {check.rule} {check.limit:g}"
    return f"{check.contender}: {check.what}: {value} ({tail})"


def read_run(path: Path) -> Run:
    """Reads a file of `bench all`.

    Raises:
        EdgeError: It cannot be read, is no such file, or of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EdgeError(
            f"'{path}' cannot be read as figures: {error}.", "Give a file of: pixano-edge bench all -o"
        ) from error
    return parse_run(content, str(path))


def parse_run(content: Any, where: str) -> Run:
    """`read_run` for content that was read; `where` is named in errors."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise EdgeError(f"'{where}' holds no figures of bench all.", "Give a file of: pixano-edge bench all -o")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise EdgeError(
            f"'{where}' has schema version {content.get('schema_version')}, this pixano-edge reads {SCHEMA_VERSION}.",
            "Take the figures again with this version: pixano-edge bench all -o",
        )
    try:
        parts = tuple(_part(one) for one in content["parts"])
        return Run(dict(content["settings"]), dict(content["environment"]), parts)
    except (KeyError, TypeError, ValueError) as error:
        raise EdgeError(
            f"'{where}' is damaged: {error}.", "Take the figures again: pixano-edge bench all -o"
        ) from error


def _part(values: dict[str, Any]) -> Part:
    lists: dict[str, Sequence[Any]] = {
        "figures": [_make(Figure, v) for v in values["figures"]],
        "checks": [_make(Check, v) for v in values["checks"]],
        "bars": [_make(Bar, v) for v in values["bars"]],
        "curves": values["curves"],
    }
    return _make(Part, {**values, **{name: tuple(found) for name, found in lists.items()}})


def _make(kind: type[T], values: dict[str, Any]) -> T:
    """An object of a dataclass; raises TypeError for fields that are unknown or missing."""
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if missing := known - set(values):
        raise TypeError(f"{kind.__name__} lacks {sorted(missing)}")
    return kind(**values)
