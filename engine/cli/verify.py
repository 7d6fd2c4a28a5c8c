"""`pixano-edge verify`: a bundle's golden samples on this machine, against PyTorch's answers stored in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import BackendOption, DeviceOption, PrecisionOption, ThreadsOption, open_bundle
from .output import JsonOption, print_json, print_table, progress

if TYPE_CHECKING:
    from ..models.sam2.verify import VerifyReport

app = typer.Typer(rich_markup_mode="markdown")


def _print(report: VerifyReport) -> None:
    title = f"{report.bundle}: {report.precision} on {report.device} through {report.backend}"
    rows = [(t.name, f"{t.max_rel:.1e}", f"{t.max_abs:.1e}") for t in report.tensors]
    columns = ("tensor", "relative error", "absolute error")
    print_table(columns, rows, title=title, right=columns[1:])
    typer.echo(
        f"\nmask IoU with PyTorch: mean {report.mean_iou:.4f}, lowest {report.min_iou:.4f} "
        f"({report.samples} samples, {report.seconds:.1f} s)"
    )
    for problem in report.problems:
        typer.secho("problem: ", fg=typer.colors.RED, bold=True, nl=False)
        typer.echo(problem)
    if report.passed:
        typer.secho("Passed.", fg=typer.colors.GREEN)
    else:
        typer.echo("Do not use this bundle here; try --precision fp32 or another --backend, or export it again.")


@app.command()
def verify(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, or a name in the local store.")],
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a bundle on this machine against its golden samples.

    Runs the whole pipeline as for a user and compares it with what PyTorch answered at export; torch is not needed.
    Ends with 1 when a figure misses its bar.
    """
    from ..models.sam2.verify import verify_bundle

    opened = open_bundle(bundle)
    with progress("Golden samples", len(opened.golden()), enabled=not as_json) as bar:
        report = verify_bundle(
            opened, device, backend, precision, threads=threads, progress=lambda done, of: bar.step()
        )
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report)
    if not report.passed:
        raise typer.Exit(1)
