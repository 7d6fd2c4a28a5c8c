"""Plots as inline SVG without scripts: bars of contenders, points with a fitted line. Colours come from the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 760
LABEL = 230
ROW = 24
NUMBERS = 170


@dataclass(frozen=True)
class BarRow:
    """One bar.

    Attributes:
        label: Left of it.
        value: Its length, 0 or more.
        high: End of the thin line (p90); None for no line.
        text: Right of it.
        ours: Drawn in the accent colour.
    """

    label: str
    value: float
    high: float | None
    text: str
    ours: bool


def bars(title: str, rows: Sequence[BarRow]) -> str:
    """Horizontal bars from zero, one per row, in the order given."""
    room = WIDTH - LABEL - NUMBERS
    most = max((max(row.value, row.high or 0) for row in rows), default=0) or 1
    height = ROW * len(rows) + 6
    parts = [_open(height, title)]
    for index, row in enumerate(rows):
        y = index * ROW + 4
        length = max(1.0, room * row.value / most)
        kind = "ours" if row.ours else "other"
        parts.append(f'<text x="{LABEL - 8}" y="{y + 14}" class="label" text-anchor="end">{escape(row.label)}</text>')
        parts.append(f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="18" rx="2" class="{kind}"/>')
        end = length
        if row.high is not None and row.high > row.value:
            end = room * row.high / most
            parts.append(f'<path d="M{LABEL + length:.1f} {y + 9}H{LABEL + end:.1f}m0 -4v8" class="whisker"/>')
        parts.append(f'<text x="{LABEL + end + 7:.1f}" y="{y + 14}" class="value">{escape(row.text)}</text>')
    return "".join([*parts, "</svg>"])


def curve(
    title: str,
    points: Sequence[tuple[float, float]],
    line: Sequence[tuple[float, float]],
    x_label: str,
    y_label: str,
    height: int = 240,
) -> str:
    """Measured points and a fitted line, both axes from zero.

    Args:
        title: For those who cannot see it.
        points: (x, y), 0 or more.
        line: (x, y) of the fit, in order; may be empty.
        x_label: With unit.
        y_label: With unit.
        height: Of the plot.
    """
    left, right, top, bottom = 64, 20, 14, 44
    every = [*points, *line]
    x_most = _round_up(max((x for x, _ in every), default=1))
    y_most = _round_up(max((y for _, y in every), default=1))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (WIDTH - left - right) * x / x_most,
            height - bottom - (height - top - bottom) * y / y_most,
        )

    parts = [_open(height, title)]
    for step in range(5):
        x, y = x_most * step / 4, y_most * step / 4
        px, py = at(x, y)
        parts.append(f'<path d="M{left} {py:.1f}H{WIDTH - right}" class="grid"/>')
        parts.append(f'<text x="{left - 8}" y="{py + 4:.1f}" class="value" text-anchor="end">{y:g}</text>')
        parts.append(f'<text x="{px:.1f}" y="{height - bottom + 17}" class="value" text-anchor="middle">{x:g}</text>')
    if line:
        path = "L".join("{:.1f} {:.1f}".format(*at(x, y)) for x, y in line)
        parts.append(f'<path d="M{path}" class="fit"/>')
    parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="4" class="ours"/>'.format(*at(x, y)) for x, y in points]
    middle = (left + WIDTH - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 6}" class="label" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text x="{left}" y="10" class="label" text-anchor="middle">{escape(y_label)}</text>')
    return "".join([*parts, "</svg>"])


def _open(height: int, title: str) -> str:
    text = escape(title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{text}"><title>{text}</title>'


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5 and 10 times a power of ten, so that quarters of an axis are round."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 10) if step * power >= value * (1 - 1e-9))
