"""`pixano-edge bench all`, `compare`, `page` and `readme`: every benchmark in one run, and what is made of its file."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from pixano_edge.engine.cli.output import JsonOption, make_folder, note, print_json, print_table, progress, replacing
from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.machine import usable_cpus

from . import comparison, readme
from .cli_report import CompileOption, OutputOption
from .page import to_page
from .plan import MORE, PARTS, SIZES, Wanted
from .report import environment_lines, write_json
from .results import Run, read_run
from .texts import busiest, busy_text, by_case, fastest_other, lead, value_text

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="Figures that bench all wrote.")]


def run_everything(
    size: Annotated[str, typer.Option(help=f"Of the models: {', '.join(SIZES)}.")] = "demo",
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help=f"Only this part; may be repeated: {', '.join((*PARTS, *MORE))}."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds: shows that everything works.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each contender; default: all that may be used.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the SAM 2.1's input; default: 256 for demo, 1024 for others.")
    ] = None,
    compiled: CompileOption = False,
    limit: Annotated[
        float | None, typer.Option(min=1, help="Seconds for each part; default: 3600, with --quick 300.")
    ] = None,
    output: OutputOption = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write one HTML page.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run every benchmark, each next to what a user would run instead, and check the answers in the same run.

    Each part is a process of its own; one that fails or lacks something is told with the reason. Ends with 2 when an
    answer is wrong, with 1 when a part failed. What is only missing on this machine is no failure.
    """
    from .run_all import run_all

    wanted = Wanted(size, tuple(dict.fromkeys(only or ())), quick, threads or usable_cpus(), image_size, compiled)
    with progress("Benchmarks", None, enabled=not as_json) as steps:
        run = run_all(wanted, _typed(), limit=limit, say=steps.label)
    if output is not None:
        write_json(output, run.to_dict())
        note(f"Figures written to {output}")
    if page is not None:
        write_text(page, to_page(run))
    if as_json:
        print_json(run.to_dict())
    else:
        _show(run)
    if run.wrong:
        raise typer.Exit(2)
    if run.broken:
        raise typer.Exit(1)


def _typed() -> str:
    """The command as it was typed, with the name that a reader has."""
    words = sys.argv[1:]
    start = words.index("bench") if "bench" in words else 0
    return shlex.join(["pixano-edge", *words[start:]])


def _show(run: Run) -> None:
    rows: list[tuple[str, ...]] = []
    for part in run.parts:
        if not part.figures:
            rows.append((part.name, part.status, part.reason, "", "", ""))
        for case, figures in by_case(part.figures).items():
            other = fastest_other(figures)
            for ours in (f for f in figures if f.ours):
                beside = ("", "") if other is None else (other.contender, f"{lead(ours, other):.2f}x")
                rows.append((part.name, case, ours.contender, value_text(ours.value, ours.unit), *beside))
    columns = ("part", "case", "contender", "p50", "fastest other", "we are")
    print_table(columns, rows, title=f"Size {run.settings['size']}", right=("p50", "we are"))
    typer.echo()
    for part in run.parts:
        judged = [c for c in part.checks if c.passed is not None]
        right = sum(bool(c.passed) for c in judged)
        left = len(part.checks) - len(judged)
        more = f", {left} not judged" if left else ""
        typer.echo(f"{part.name}: {part.status}; {right} of {len(judged)} accuracy checks passed{more}")
        for who, why in part.left_out.items():
            typer.echo(f"  not measured: {who}: {why}")
    for text in run.wrong:
        typer.secho(f"WRONG: {text}", fg=typer.colors.RED)
    busy = busiest(run.parts)
    if busy is None or busy > readme.BUSY:
        typer.echo(f"Others used {busy_text(busy)} meanwhile: read the ratios, not the times.")
    typer.echo("\n" + "\n".join(environment_lines(run.environment)))


def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="Figures of bench all, the older ones.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="The newer ones.")],
    threshold: Annotated[
        float, typer.Option(min=0, help="Least change that counts, as a share; noise is counted on top.")
    ] = comparison.THRESHOLD,
    every: Annotated[bool, typer.Option("--all", help="Also list what is the same.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what became slower beyond noise, wrong, or lost between two runs; ends with 1 when anything did.

    Where both runs timed the same baseline, ratios to it are compared, so that a slow machine is no regression.
    """
    found = comparison.compare_runs(read_run(before), read_run(after), threshold)
    if as_json:
        print_json({
            "changes": found.changes, "wrong": found.wrong, "lost": found.lost, "notes": found.notes,
            "regressed": found.regressed,
        })  # fmt: skip
    else:
        rows = comparison.table_rows(found, every=every)
        if rows:
            right = ("before", "after", "times worse", "noise")
            print_table(comparison.COLUMNS, rows, title=f"{before} -> {after}", right=right)
        same = sum(c.verdict == "same" for c in found.changes)
        typer.echo(f"{same} of {len(found.changes)} figures are the same within noise and {100 * threshold:g} %.")
        for text in found.wrong:
            typer.secho(f"WRONG: {text}", fg=typer.colors.RED)
        for part, why in found.lost.items():
            typer.secho(f"LOST: {part}: {why}", fg=typer.colors.RED)
        for text in found.notes:
            typer.echo(f"note: {text}")
    if found.regressed:
        raise typer.Exit(1)


def make_page(
    file: FileArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page.")],
) -> None:
    """Write the HTML page of a run from its figures."""
    write_text(output, to_page(read_run(file)))


def make_readme(
    file: FileArgument,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="README.md", help="Put it between this file's markers.")
    ] = None,
    busy_ok: Annotated[
        bool, typer.Option("--busy-ok", help="Also where others used the machine; the text then says so.")
    ] = False,
) -> None:
    """Print the performance section of README from a run's figures, or write it between the markers there.

    Refuses quick runs, wrong answers, and figures that were taken while others used the machine.
    """
    run = read_run(file)
    readme.check_publishable(run, busy_ok=busy_ok)
    if write is None:
        typer.echo(readme.to_block(run, file.as_posix()), nl=False)
        return
    try:
        text = write.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeError(f"'{write}' cannot be read: {error}.", "Check the path.") from error
    name = file.resolve()
    folder = write.resolve().parent
    shown = name.relative_to(folder).as_posix() if name.is_relative_to(folder) else file.as_posix()
    write_text(write, readme.replaced(text, run, shown))


def write_text(path: Path, text: str) -> None:
    make_folder(path.parent)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    note(f"Written: {path}")


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(name="all")(run_everything)
    app.command(name="compare")(compare)
    app.command(name="page")(make_page)
    app.command(name="readme")(make_readme)
