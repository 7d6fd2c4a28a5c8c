"""Figures in words, the same on the page, in README and on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pixano_edge.engine.cli.output import bytes_text

from .results import Bar, Figure, Part


def value_text(value: float | None, unit: str) -> str:
    """``12.3 ms``, ``14.5/s``, ``3.4 MB``, ``1.25x``."""
    if value is None:
        return "n/a"
    if unit == "s":
        milli = 1000 * value
        if milli >= 10_000:
            return f"{value:.1f} s"
        return f"{milli:.0f} ms" if milli >= 100 else f"{milli:.1f} ms" if milli >= 1 else f"{milli:.2f} ms"
    if unit == "B":
        return f"-{bytes_text(-value)}" if value < 0 else bytes_text(value)
    return f"{value:.2f}x" if unit == "x" else f"{value:.1f}/s" if unit == "1/s" else f"{value:g} {unit}".strip()


def ratio_text(ratio: float | None) -> str:
    """``1.25x``, or ``n/a``."""
    return "n/a" if ratio is None else f"{ratio:.2f}x"


def bar_text(bar: Bar) -> str:
    """``met``, ``missed`` or ``not measured``."""
    return {True: "met", False: "missed", None: "not measured"}[bar.met]


def busy_text(busy: float | None) -> str:
    """``3 % of the CPUs``, or that it is not known."""
    return "unknown" if busy is None else f"{100 * busy:.0f} % of the CPUs"


def by_case(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    """Figures by case, in their order."""
    found: dict[str, list[Figure]] = {}
    for figure in figures:
        found.setdefault(figure.case, []).append(figure)
    return found


def fastest_other(figures: Sequence[Figure]) -> Figure | None:
    """The best of those who are not this project; None without any."""
    others = [f for f in figures if not f.ours]
    return min(others, key=lambda f: -f.value if f.higher else f.value, default=None)


def lead(ours: Figure, other: Figure) -> float:
    """How many times better `ours` is."""
    return ours.value / other.value if ours.higher else other.value / ours.value


def busiest(parts: Iterable[Part]) -> float | None:
    """Largest share of the CPUs that others took during a part; None where no part tells."""
    return max((p.busy for p in parts if p.busy is not None), default=None)
