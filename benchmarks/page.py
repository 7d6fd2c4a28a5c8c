"""One HTML page of a run, self-contained: inline SVG, light and dark, no scripts and nothing to load."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from .power_mode import power_text
from .report import environment_lines
from .results import Part, Run
from .svg import BarRow, bars, curve
from .texts import bar_text, busy_text, by_case, ratio_text, value_text

_STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1c2126;--dim:#5b6670;--line:#d9dee3;--ours:#1769c2;--other:#a9b4be;
--good:#1a7f4b;--bad:#c0362c;--code:#f3f5f7}
@media(prefers-color-scheme:dark){:root{--back:#14181c;--text:#e4e9ee;--dim:#98a4af;--line:#313a43;--ours:#5aa6f2;
--other:#5d6975;--good:#52c489;--bad:#f0766c;--code:#1e242a}}
body{background:var(--back);color:var(--text);font:15px/1.5 system-ui,sans-serif;max-width:900px;margin:0 auto;
padding:24px 16px 64px}
h1{font-size:26px}h2{font-size:20px;margin:40px 0 4px;border-top:1px solid var(--line);padding-top:20px}
h3{font-size:15px;margin:18px 0 4px}p,ul{margin:6px 0}.dim{color:var(--dim)}.good{color:var(--good)}
.bad{color:var(--bad);font-weight:600}
code{background:var(--code);padding:1px 5px;border-radius:4px;font-size:13px;overflow-wrap:anywhere}
table{border-collapse:collapse;font-size:13.5px;margin:8px 0;display:block;overflow-x:auto}
th,td{text-align:left;padding:3px 14px 3px 0;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
svg{width:100%;height:auto;display:block}svg text{fill:var(--text);font:12.5px system-ui,sans-serif}
svg .value{fill:var(--dim)}.ours{fill:var(--ours)}.other{fill:var(--other)}
.whisker{stroke:var(--text);fill:none;opacity:.7}.grid{stroke:var(--line);fill:none}
.fit{stroke:var(--dim);fill:none;stroke-width:1.5;stroke-dasharray:5 4}
"""

_STATUS = {
    "passed": ("good", "passed"),
    "wrong": ("bad", "a wrong answer"),
    "failed": ("bad", "failed"),
    "timed out": ("bad", "timed out"),
    "unavailable": ("bad", "not available here"),
    "skipped": ("dim", "skipped"),
}


_JUDGED = {True: '<span class="good">right</span>', False: '<span class="bad">wrong</span>', None: "not judged"}


def to_page(run: Run) -> str:
    """The page as text."""
    settings, facts = run.settings, run.environment
    quick = settings.get("quick")
    lines = [*environment_lines(facts), f"power: {power_text(facts['power'])}"]
    body = [
        "<h1>Pixano Edge: how fast, how right</h1>",
        f"<p>Size {_e(settings['size'])}; contenders take turns, so read ratios before times.</p>",
        '<p class="bad">A quick run: it shows that everything works, its times mean little.</p>' if quick else "",
        "".join(f'<p class="bad">Wrong answer: {_e(text)}</p>' for text in run.wrong),
        "<ul class='dim'>" + "".join(f"<li>{_e(line)}</li>" for line in lines) + "</ul>",
        f"<p>The whole run: <code>{_e(settings['command'])}</code></p>",
        _overview(run.parts),
        *(_part(part) for part in run.parts),
    ]
    title = f"Pixano Edge benchmark, {_e(facts['taken'])}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _overview(parts: Sequence[Part]) -> str:
    rows = []
    for part in parts:
        kind, word = _STATUS[part.status]
        judged = [c for c in part.checks if c.passed is not None]
        right = f"{sum(bool(c.passed) for c in judged)} of {len(judged)}"
        if unjudged := len(part.checks) - len(judged):
            right += f", {unjudged} not judged"
        rows.append([
            f'<a href="#{_e(part.name)}">{_e(part.name)}</a>', f'<span class="{kind}">{word}</span>',
            right if part.checks else "none", f"{part.seconds:.0f} s", busy_text(part.busy), _e(part.reason),
        ])  # fmt: skip
    return _table(("part", "state", "checks passed", "took", "others used", "why"), rows, (3,))


def _part(part: Part) -> str:
    kind, word = _STATUS[part.status]
    out = [
        f'<h2 id="{_e(part.name)}">{_e(part.title)}</h2>',
        f'<p><span class="{kind}">{word}</span> <code>{_e(part.command)}</code></p>',
        f'<p class="bad">{_e(part.reason)}</p>' if part.reason else "",
    ]
    if not part.curves:
        for case, figures in by_case(part.figures).items():
            rows = [
                BarRow(
                    f.contender,
                    f.value,
                    f.p90,
                    value_text(f.value, f.unit) + (f" · {ratio_text(f.ratio)}" if f.ratio else ""),
                    f.ours,
                )
                for f in figures
            ]
            out += [f"<h3>{_e(case)}</h3>", bars(case, rows)]
    out += [_curve(one) for one in part.curves]
    if part.figures:
        cells = [
            [
                _e(f.case), _e(f.contender), value_text(f.value, f.unit), value_text(f.p90, f.unit),
                value_text(f.p99, f.unit), str(f.count), ratio_text(f.ratio), _e(f.baseline),
            ]
            for f in part.figures
        ]  # fmt: skip
        head = ("case", "contender", "p50", "p90", "p99", "count", "ratio", "to")
        out.append("<details><summary>All figures</summary>" + _table(head, cells, (2, 3, 4, 5, 6)) + "</details>")
    if part.checks:
        cells = [
            [
                _JUDGED[c.passed],
                _e(c.contender), _e(c.what), "n/a" if c.value is None else f"{c.value:.3g}", f"{c.rule} {c.limit:g}",
                _e(c.reason),
            ]
            for c in part.checks
        ]  # fmt: skip
        out += ["<h3>Answers</h3>", _table(("", "contender", "compared", "found", "limit", ""), cells, (3, 4))]
    if part.bars:
        cells = [
            [_e(b.what), value_text(b.value, b.unit), f"{b.rule} {value_text(b.limit, b.unit)}", bar_text(b)]
            for b in part.bars
        ]
        out += ["<h3>The project's bars</h3>", _table(("bar", "measured", "wanted", ""), cells, (1, 2))]
    if part.left_out:
        items = "".join(f"<li><b>{_e(who)}</b>: {_e(why)}</li>" for who, why in part.left_out.items())
        out += ["<h3>Not measured</h3>", f"<ul>{items}</ul>"]
    return "".join(out)


def _curve(one: dict[str, Any]) -> str:
    points = [(p["x"], 1000 * p["seconds"]["p50"]) for p in one["points"]]
    fit = one["fit"]
    line = [] if fit is None else [(x, 1000 * y) for x, y in fit["line"]]
    text = "too few points for a fit" if fit is None else fit["text"]
    plot = curve(f"{one['case']} by {one['axis']}", points, line, f"{one['axis']} ({one['unit']})", "ms")
    return f"<h3>{_e(one['case'])} by {_e(one['axis'])}</h3>{plot}<p class='dim'>{_e(text)}</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Cells are HTML already."""

    def row(cells: Sequence[str], tag: str) -> str:
        inside = "".join(
            f'<{tag} class="n">{c}</{tag}>' if i in right else f"<{tag}>{c}</{tag}>" for i, c in enumerate(cells)
        )
        return f"<tr>{inside}</tr>"

    return f"<table>{row(head, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def _e(value: object) -> str:
    return escape(str(value), quote=True)
