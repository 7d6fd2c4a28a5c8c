"""The report's plots as inline SVG. Colours come from the page's variables, so that they follow its theme.

Every plot has a title and a description in words, for readers who do not see it; the figures are in tables beside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pixano_edge.calibration.result import TensorRange

GOOD, BAD, ACCENT = "good", "bad", "accent"
"""Classes of marks; the style sheet gives them colours."""


@dataclass(frozen=True)
class Dot:
    """One variant in `scatter`.

    Attributes:
        label: Its name.
        x: Size relative to fp32.
        y: Value of the metric.
        kind: One of the classes above.
    """

    label: str
    x: float
    y: float
    kind: str


@dataclass(frozen=True)
class Bar:
    """One row of `bars`.

    Attributes:
        label: In front.
        value: Length, 0 or more; NaN draws none.
        text: Behind.
        kind: One of the classes above.
    """

    label: str
    value: float
    text: str
    kind: str


def scatter(dots: Sequence[Dot], bar: float, metric: str) -> str:
    """Accuracy over size, with the budget as a line. Dots that are not finite are left out."""
    width, height, left, right, top, bottom = 980, 320, 64, 24, 16, 44
    shown = [dot for dot in dots if math.isfinite(dot.x) and math.isfinite(dot.y)]
    low = min([bar, *(dot.y for dot in shown)])
    low = max(0.0, low - max(0.15 * (1 - low), 0.002))
    top_x = max([1.0, *(dot.x for dot in shown)]) * 1.05

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + x / top_x * (width - left - right)
        return across, top + (1 - y) / (1 - low or 1) * (height - top - bottom)

    marks = []
    for tick in ticks(low, 1.0):
        _, y = at(0, tick)
        marks.append(_line(left, y, width - right, y, "grid"))
        marks.append(_text(left - 8, y + 4, f"{tick:g}", "end"))
    for share in ticks(0.0, top_x, 7):
        x, _ = at(share, low)
        marks.append(_text(x, height - bottom + 18, f"{100 * share:g} %", "middle"))
    _, level = at(0, bar)
    marks.append(_line(left, level, width - right, level, "budget"))
    marks.append(_text(left + 6, level + 15, f"budget {bar:g}", "start"))
    for dot in shown:
        x, y = at(dot.x, dot.y)
        marks.append(f'<circle class="{dot.kind}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
        end = x > width - right - 160
        marks.append(_text(x - 11 if end else x + 11, y + 4, f"{dot.label} {dot.y:.4f}", "end" if end else "start"))
    marks.append(_text((left + width - right) / 2, height - 6, "size relative to fp32", "middle"))
    told = "; ".join(f"{dot.label}: {dot.y:.4f} at {100 * dot.x:.0f} % of the size" for dot in shown)
    return _svg(width, height, f"{metric} over size", f"The budget is {bar:g}. {told}", marks)


def bars(rows: Sequence[Bar], title: str, most: float | None = None) -> str:
    """Horizontal bars, one row each.

    Args:
        rows: From top to bottom.
        title: In words.
        most: Value that takes the whole width; the largest of the rows if None.
    """
    left, right, step, width = 290, 90, 22, 980
    height = step * len(rows) + 8
    finite = [row.value for row in rows if math.isfinite(row.value)]
    whole = most if most is not None else max(finite, default=0)
    marks = []
    for index, row in enumerate(rows):
        y = 4 + index * step
        marks.append(_text(left - 8, y + 15, shortened(row.label, 42), "end", row.label))
        length = 0.0
        if math.isfinite(row.value) and whole > 0:
            length = max(1.5, min(1.0, row.value / whole) * (width - left - right)) if row.value > 0 else 0.0
        marks.append(f'<rect class="{row.kind}" x="{left}" y="{y + 4}" width="{length:.1f}" height="14" rx="2"/>')
        marks.append(_text(left + length + 6, y + 15, row.text, "start"))
    told = "; ".join(f"{row.label}: {row.text}" for row in rows)
    return _svg(width, height, title, told, marks)


def histogram(held: TensorRange) -> str:
    """How many |values| lie where, on a logarithmic scale, and the range that was chosen."""
    width, height, bottom, top = 320, 100, 18, 14
    most = max(held.counts, default=0)
    marks = []
    if most > 0 and held.limit > 0:
        step = width / len(held.counts)
        for index, count in enumerate(held.counts):
            if not count:
                continue
            tall = max(1.0, math.log1p(count) / math.log1p(most) * (height - bottom - top))
            beyond = index / len(held.counts) * held.limit >= held.amax
            marks.append(
                f'<rect class="{BAD if beyond else ACCENT}" x="{index * step:.2f}" y="{height - bottom - tall:.1f}" '
                f'width="{max(step - 0.5, 0.5):.2f}" height="{tall:.1f}"/>'
            )
        inside = math.isfinite(held.amax) and held.amax <= held.limit
        x = width * held.amax / held.limit if inside else float(width)
        marks.append(_line(x, 4, x, height - bottom, "budget"))
    marks.append(_line(0, height - bottom, width, height - bottom, "grid"))
    marks.append(_text(0, height - 4, "0", "start"))
    marks.append(_text(width, height - 4, f"{held.limit:.3g}", "end"))
    told = f"|values| up to {held.limit:.3g}; chosen {held.amax:.3g}; {100 * held.clipped:.3g} % are clipped"
    return _svg(width, height, f"Values of {held.name}", told, marks)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two others, some `about` of them."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def shortened(text: str, length: int) -> str:
    """A text with its middle left out where it is too long."""
    if len(text) <= length:
        return text
    front = (length - 1) // 3
    return f"{text[:front]}…{text[len(text) - (length - 1 - front) :]}"


def _svg(width: int, height: int, title: str, told: str, marks: Sequence[str]) -> str:
    # The width is a limit, not a size: on a narrow screen the plot shrinks.
    return (
        f'<svg role="img" viewBox="0 0 {width} {height}" style="max-width:{width}px">'
        f"<title>{escape(title)}</title><desc>{escape(told)}</desc>{''.join(marks)}</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, whole: str = "") -> str:
    tip = f"<title>{escape(whole)}</title>" if whole and whole != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{tip}{escape(text)}</text>'
