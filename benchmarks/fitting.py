"""How a time grows with something: points, and a line ``a + b * f(x)`` through them with its R2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .metrics import latency

FORMS: dict[str, Callable[[float], float]] = {"x": lambda x: x, "x^2": lambda x: x * x, "1/x": lambda x: 1 / x}
"""What `f` may be."""

LEAST_POINTS = 3


@dataclass(frozen=True)
class Fit:
    """``seconds = a + b * form(x)``.

    Attributes:
        form: Key of `FORMS`.
        a: Seconds that do not depend on x.
        b: Seconds for each unit.
        r2: Share of the variance of the points that the line explains; 1 for points that are all alike.
        worst: Largest distance of a point from the line, over the point.
    """

    form: str
    a: float
    b: float
    r2: float
    worst: float

    def at(self, x: float) -> float:
        """Seconds."""
        return self.a + self.b * FORMS[self.form](x)

    def text(self, unit: str) -> str:
        """For people."""
        term = {"x": f"{unit}", "x^2": f"({unit})^2", "1/x": f"1/{unit}"}[self.form]
        return (
            f"{1000 * self.a:.3g} ms + {1000 * self.b:.3g} ms * {term}; R2 {self.r2:.3f}, "
            f"off by {100 * self.worst:.0f} % at most"
        )


def fit(points: Mapping[float, float], form: str = "x") -> Fit | None:
    """Least squares, each distance taken relative to its point, so that small values count as much as large ones.

    Args:
        points: x -> seconds, above 0.
        form: Key of `FORMS`.

    Returns:
        None with fewer than `LEAST_POINTS` points.
    """
    if len(points) < LEAST_POINTS:
        return None
    x, y = np.array([FORMS[form](v) for v in points]), np.array(list(points.values()))
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones(len(y)), rcond=None)
    off = a + b * x - y
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float((off**2).sum()) / spread if spread else 1.0
    return Fit(form, float(a), float(b), r2, float((np.abs(off) / y).max()))


def make_curve(
    case: str, axis: str, unit: str, seconds: Mapping[float, Sequence[float]], form: str = "x"
) -> dict[str, Any]:
    """One curve as it stands in the file.

    Args:
        case: What was timed.
        axis: What grew.
        unit: Of x, one of it.
        seconds: x -> measured times.
        form: See `FORMS`.
    """
    times = {x: latency(values) for x, values in seconds.items()}
    found = fit({x: t.p50 for x, t in times.items()}, form)
    told = None
    if found is not None:
        low, high = min(times), max(times)
        steps = [low + (high - low) * i / 40 for i in range(41)]
        told = {**asdict(found), "text": found.text(unit), "line": [(x, found.at(x)) for x in steps]}
    points = [{"x": x, "seconds": asdict(t)} for x, t in times.items()]
    return {"case": case, "axis": axis, "unit": unit, "points": points, "fit": told}


def curve_rows(curves: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a table: case, axis, p50 by x, and the fit in words."""
    return [
        (
            c["case"], c["axis"],
            ", ".join(f"{p['x']:g}: {1000 * p['seconds']['p50']:.1f}" for p in c["points"]),
            "too few points" if c["fit"] is None else c["fit"]["text"],
        )
        for c in curves
    ]  # fmt: skip


COLUMNS = ("case", "by", "p50 ms", "fit")
