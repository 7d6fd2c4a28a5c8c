"""Blocks of README that runs' figures are printed in, each between two markers that name the file they come from."""

from __future__ import annotations

import re
from pathlib import Path

from pixano_edge.engine.errors import EdgeError

from .power_mode import power_text
from .report import environment_lines, markdown
from .results import ENDED, Part, Run, check_text
from .texts import bar_text, busiest, by_case, fastest_other, lead, value_text

BEGIN = "<!-- bench: {file} -->"
END = "<!-- /bench -->"
_BLOCK = re.compile(r"<!-- bench: (?P<file>[^>\n]+?) -->\n(?P<body>.*?)<!-- /bench -->", re.DOTALL)

BUSY = 0.05
"""Most of the CPUs that others may have used during figures that are published."""


def to_block(run: Run, file: str) -> str:
    """Markdown of a run, without the markers.

    Args:
        run: The figures.
        file: Where they are kept, as README names it.
    """
    facts = run.environment
    lines = [*environment_lines(facts), f"power: {power_text(facts['power'])}"]
    busy = busiest(run.parts)
    said = "" if busy is None else f" Others used at most {100 * busy:.0f} % of the CPUs meanwhile."
    out = [
        f"Taken by `{run.settings['command']}`; all figures are in [{Path(file).name}]({file}). Contenders take turns "
        f"in one process.{said} Times are p50 / p90 / p99.\n",
        *(f"- {line}" for line in lines),
        "",
    ]
    for part in run.parts:
        out += [f"**{part.title}** (`{part.command}`)\n"]
        if part.status not in ENDED:
            out += [f"No figures: {part.status}. {part.reason}\n"]
            continue
        out += [_table(part), *_remarks(part), ""]
    return "\n".join(out).rstrip() + "\n"


def _table(part: Part) -> str:
    rows = []
    compared = False
    for case, figures in by_case(part.figures).items():
        ours = [f for f in figures if f.ours]
        other = fastest_other(figures)
        compared = compared or other is not None
        for figure in ours:
            times = [figure.value, figure.p90, figure.p99] if figure.p90 is not None else [figure.value]
            cells = [case, figure.contender, " / ".join(value_text(t, figure.unit) for t in times)]
            if other is None:
                rows.append([*cells, "", "", ""])
            else:
                base = next((f for f in figures if f.contender == figure.baseline), None)
                rows.append([
                    *cells,
                    "" if base is None else f"{value_text(base.value, base.unit)}, {lead(figure, base):.2f}x",
                    other.contender,
                    f"{value_text(other.value, other.unit)}, {lead(figure, other):.2f}x",
                ])  # fmt: skip
    head = ["case", "contender", "time"]
    if not compared:
        return markdown(head, [row[:3] for row in rows])
    baseline = next((f.baseline for f in part.figures if f.baseline), "baseline")
    return markdown([*head, f"{baseline}, we are", "fastest other", "it takes, we are"], rows)


def _remarks(part: Part) -> list[str]:
    judged = [c for c in part.checks if c.passed is not None]
    said = []
    if judged:
        right = sum(bool(c.passed) for c in judged)
        said.append(f"{right} of {len(judged)} accuracy checks passed.")
        said += [f"**Wrong**: {check_text(c)}." for c in judged if not c.passed]
    if unjudged := [c for c in part.checks if c.passed is None]:
        said.append(f"{len(unjudged)} answer(s) were not judged: {unjudged[0].reason}.")
    said += [f"{b.what}: {value_text(b.value, b.unit)}, bar {b.rule} {value_text(b.limit, b.unit)}: {bar_text(b)}."
             for b in part.bars]  # fmt: skip
    said += [f"Not measured: {who} ({why})." for who, why in part.left_out.items()]
    return ["", *(f"- {one}" for one in said)] if said else []


def check_publishable(run: Run, *, busy_ok: bool = False) -> None:
    """Refuses what should not be published.

    Args:
        run: The figures.
        busy_ok: Whether others may have used the machine.

    Raises:
        EdgeError: A quick run, a wrong answer, or a machine that others used.
    """
    if run.settings.get("quick"):
        raise EdgeError("These are figures of a quick run.", "Take them again without --quick.")
    if run.wrong:
        raise EdgeError(f"An answer is wrong: {run.wrong[0]}.", "Mend it, then take the figures again.")
    busy = busiest(run.parts)
    if busy is not None and busy > BUSY and not busy_ok:
        raise EdgeError(
            f"Others used {100 * busy:.0f} % of the CPUs while the figures were taken.",
            "Take them on a quiet machine, or publish them with that remark: --busy-ok.",
        )


def embedded(text: str) -> dict[str, str]:
    """The blocks in a text: content by file.

    Raises:
        EdgeError: Two of the same file.
    """
    found = list(_BLOCK.finditer(text))
    blocks = {match["file"]: match["body"] for match in found}
    if len(blocks) < len(found):
        raise EdgeError("Two blocks show figures of the same file.", "Leave one of them.")
    return blocks


def replaced(text: str, run: Run, file: str) -> str:
    """The text with the block of a file made anew; a single block takes the place of one with another file's name.

    Raises:
        EdgeError: It has no such block, or two.
    """
    blocks = embedded(text)
    if file not in blocks and len(blocks) != 1:
        raise EdgeError(
            "There is no place for the figures.",
            f"Put these two lines where they belong: {BEGIN.format(file=file)} and {END}",
        )
    block = f"{BEGIN.format(file=file)}\n{to_block(run, file)}{END}"
    wanted = file if file in blocks else next(iter(blocks))
    return _BLOCK.sub(lambda match: block if match["file"] == wanted else match[0], text)
