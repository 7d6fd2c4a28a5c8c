"""`pixano-edge verify`: a bundle's golden samples on this machine, against PyTorch's answers stored in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import BackendOption, DeviceOption, PrecisionOption, ThreadsOption, open_bundle
from .output import JsonOption, print_json, print_table, progress

if TYPE_CHECKING:
    from ..models.verdicts import Verdict
    from ..models.verify import Report

app = typer.Typer(rich_markup_mode="markdown")

_COLUMNS = ("tensor", "graph", "relative error", "tolerance", "absolute error")


def _print(report: Report, verdict: Verdict) -> None:
    title = f"{report.bundle}: {report.precision} on {report.device} through {report.backend}"
    if report.product and report.product != report.device:
        title += f" ({report.product}, compute capability {report.compute_capability}, driver {report.driver})"
    rows = [
        (t.name, t.graph, f"{t.max_rel:.1e}", "" if t.tolerance is None else f"{t.tolerance:.1e}", f"{t.max_abs:.1e}")
        for t in report.tensors
    ]
    print_table(_COLUMNS, rows, title=title, right=_COLUMNS[2:])
    typer.echo("")
    for line in report.figures():
        typer.echo(line)
    for warning in report.warnings:
        _line("warning: ", typer.colors.YELLOW, warning)
    for problem in report.problems:
        _line("problem: ", typer.colors.RED, problem)
    if report.passed:
        typer.secho("Passed.", fg=typer.colors.GREEN)
        return
    if report.suspect is not None:
        _line("look at: ", typer.colors.CYAN, report.suspect.text())
        for advice in report.suspect.advice:
            typer.echo(f"  {advice}")
    what = f"{report.backend} {report.precision} on {report.product or report.device}"
    if verdict.forced:
        typer.echo(f"Forced: {what} may be used all the same; every load of it will warn.")
    else:
        typer.echo(
            f"{what} is not used for this bundle from now on; 'verify --force' allows it, and so does --force of a "
            "single command. Or take --precision fp32 or another --backend, or export the bundle again."
        )


def _line(label: str, colour: str, text: str) -> None:
    typer.secho(label, fg=colour, bold=True, nl=False)
    typer.echo(text)


@app.command()
def verify(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, or a name in the local store.")],
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Keep what failed in use; every load of it then says so. Still ends with 1.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a bundle on this machine against its golden samples.

    Runs the whole pipeline as for a user and compares it with what PyTorch answered at export; torch is not needed.
    The verdict is kept for this bundle, back end, precision and device: what failed is not used until it passes or is
    forced. Ends with 1 when a figure misses its bar, and says which graph to look at.
    """
    from ..models.verdicts import VerdictStore
    from ..models.verify import record_verdict, verify_bundle

    opened = open_bundle(bundle)
    samples = len(opened.golden()) + (opened.manifest.golden_clip is not None)
    with progress("Golden samples", samples, enabled=not as_json) as bar:
        report = verify_bundle(
            opened, device, backend, precision, threads=threads, progress=lambda done, of: bar.step()
        )
    store = VerdictStore()
    verdict = record_verdict(report, store, forced=force)
    report.warnings += store.warnings
    if as_json:
        print_json({**report.to_dict(), "forced": verdict.forced})
    else:
        _print(report, verdict)
    if not report.passed:
        raise typer.Exit(1)
