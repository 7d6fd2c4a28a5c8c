"""The report's page: one HTML file that asks nothing of the network, runs no script, and follows the system's theme."""

from __future__ import annotations

import base64
from collections.abc import Collection, Sequence
from html import escape

from pixano_edge.engine.errors import EdgeError

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page: what is in it."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f4f6f8; --surface: #fff; --sunk: #e8ecf0; --line: #d3d9e0; --text: #171c22; --muted: #56606c;
  --accent: #1b62d6; --good: #12813b; --good-soft: #e4f5ea; --bad: #b3261e; --bad-soft: #fdecea; --warn: #8a5a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0e1115; --surface: #161b21; --sunk: #0a0d10; --line: #2b333d; --text: #e7eaee; --muted: #9ba7b4;
    --accent: #6ea8ff; --good: #4cc47a; --good-soft: #12291b; --bad: #ff9a90; --bad-soft: #331a18; --warn: #f0b64c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.25rem; margin: 40px 0 12px; }
h3 { font-size: 1rem; margin: 28px 0 8px; }
p { margin: 8px 0; max-width: 46em; }
code { font-size: .9em; background: var(--sunk); padding: 1px 4px; border-radius: 3px; overflow-wrap: anywhere; }
.muted { color: var(--muted); }
.lead { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; padding: 0; list-style: none; }
.lead li {
  flex: 1 1 300px; background: var(--surface); border: 1px solid var(--line); border-left: 6px solid var(--good);
  border-radius: 6px; padding: 12px 16px;
}
.lead li.failed { border-left-color: var(--bad); }
.lead strong { display: block; font-size: 1.15rem; }
.verdict { font-weight: 600; white-space: nowrap; }
.verdict.passed { color: var(--good); }
.verdict.failed { color: var(--bad); }
.problems, .notes { margin: 8px 0; padding: 10px 16px 10px 32px; border-radius: 6px; }
.problems { background: var(--bad-soft); border: 1px solid var(--bad); }
.notes { background: var(--surface); border: 1px solid var(--line); }
.scroll { overflow-x: auto; background: var(--surface); border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; padding: 8px 12px; color: var(--muted); }
th, td { padding: 6px 12px; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border-top: 0; border-bottom: 1px solid var(--line); white-space: nowrap; font-weight: 600; }
.right { text-align: right; white-space: nowrap; }
details { margin: 12px 0; }
summary { cursor: pointer; padding: 4px 0; color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 3px; }
.plot {
  overflow-x: auto; padding: 12px; background: var(--surface); border: 1px solid var(--line); border-radius: 6px;
}
svg { display: block; width: 100%; height: auto; }
.plot svg { min-width: 680px; }
svg text { fill: var(--text); font-size: 12px; font-family: inherit; }
svg .grid { stroke: var(--line); } svg .budget { stroke: var(--warn); stroke-width: 1.5; stroke-dasharray: 5 3; }
svg .good { fill: var(--good); } svg .bad { fill: var(--bad); } svg .accent { fill: var(--accent); }
svg .muted { fill: var(--muted); }
.key {
  display: flex; flex-wrap: wrap; gap: 4px 16px; padding: 0; margin: 8px 0; list-style: none; color: var(--muted);
}
.key span { display: inline-block; width: 12px; height: 12px; margin-right: 6px; border-radius: 2px; }
.key .good { background: var(--good); } .key .bad { background: var(--bad); }
.key .accent { background: var(--accent); } .key .muted { background: var(--muted); }
.grid-of { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 12px; }
.card { background: var(--surface); border: 1px solid var(--line); border-radius: 6px; padding: 10px; margin: 0; }
.card figcaption, .card p { font-size: .85rem; overflow-wrap: anywhere; margin: 4px 0; }
.pair {
  margin: 0 0 16px; padding: 12px; background: var(--surface); border: 1px solid var(--line); border-radius: 6px;
}
.pair > div { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin-top: 8px; }
.pair figure { margin: 0; } .pair figcaption { color: var(--muted); font-size: .85rem; }
.pair img {
  width: 100%; max-height: 420px; object-fit: contain; border-radius: 4px; display: block; background: var(--sunk);
}
.pair blockquote {
  margin: 4px 0; padding: 6px 10px; background: var(--sunk); border-radius: 4px; white-space: pre-wrap;
  overflow-wrap: anywhere;
}
@media print { details > * { display: block; } .scroll { overflow: visible; } }
"""


def document(title: str, body: Sequence[str]) -> str:
    """A whole page. `body` is HTML, everything else is escaped."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = (), caption: str = "") -> str:
    """A table that scrolls in itself where it is too wide; it can be reached and scrolled with the keyboard.

    Args:
        columns: Headings.
        rows: Cells; text is escaped, `Markup` is not.
        right: Headings of the columns that are aligned to the right.
        caption: Above; empty for none.
    """
    sides = [' class="right"' if column in right else "" for column in columns]
    head = "".join(f'<th scope="col"{side}>{escape(column)}</th>' for column, side in zip(columns, sides, strict=True))
    lines = []
    for row in rows:
        cells = [
            f"<th scope='row'{side}>{_cell(cell)}</th>" if index == 0 else f"<td{side}>{_cell(cell)}</td>"
            for index, (cell, side) in enumerate(zip(row, sides, strict=True))
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    label = escape(caption or ", ".join(columns))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>{told}<thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


class Markup(str):
    """HTML that this module made: a cell of this type is not escaped again."""


def verdict(passed: bool, text: str) -> Markup:
    """A word that is coloured, and says the same without colours."""
    return Markup(f'<span class="verdict {"passed" if passed else "failed"}">{escape(text)}</span>')


def items(kind: str, texts: Sequence[str]) -> str:
    """A list of remarks; nothing for none."""
    return f'<ul class="{kind}">' + "".join(f"<li>{escape(t)}</li>" for t in texts) + "</ul>" if texts else ""


def key(entries: Sequence[tuple[str, str]]) -> str:
    """What the colours of a plot mean: classes and words."""
    return (
        '<ul class="key">'
        + "".join(f'<li><span class="{kind}"></span>{escape(text)}</li>' for kind, text in entries)
        + "</ul>"
    )


def folded(summary: str, content: str) -> str:
    """Content that is shown on demand."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def picture(png: bytes, told: str) -> str:
    """A picture inside the page; raises EdgeError when it is no PNG."""
    if not png.startswith(PNG_SIGNATURE):
        raise EdgeError(f"The picture '{told}' is no PNG.", "Encode it with cv2.imencode('.png', ...).")
    data = base64.b64encode(png).decode("ascii")
    return f'<img loading="lazy" src="data:image/png;base64,{data}" alt="{escape(told)}">'


def _cell(cell: str) -> str:
    return cell if isinstance(cell, Markup) else escape(cell)
