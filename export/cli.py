"""`pixano-edge export`: from a checkpoint to a bundle."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pixano_edge.engine.errors import EdgeError, MissingDependencyError

if TYPE_CHECKING:
    from rich.console import Console

    from pixano_edge.engine.bundle.manifest import Manifest, ParityReport

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Export a checkpoint to a bundle that is proven equal to its PyTorch original.",
)
_NEEDED = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "safetensors")


@app.callback()
def main() -> None:
    """Export a checkpoint to a bundle that is proven equal to its PyTorch original."""


@app.command()
def sam2(
    checkpoint: Annotated[
        str, typer.Argument(help="Hub id (facebook/sam2.1-hiera-tiny), transformers folder, or original .pt file.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle to make.")],
    name: Annotated[str | None, typer.Option(help="Name in the bundle; from the checkpoint by default.")] = None,
    variants: Annotated[str, typer.Option(help="fp32, or fp32,fp16.")] = "fp32,fp16",
    photos: Annotated[
        Path | None, typer.Option(help="Folder of photos to measure parity on; synthetic pictures by default.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="SPDX identifier of the weights' licence.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle at the output folder.")] = False,
) -> None:
    """Export SAM 2 / 2.1 image segmentation (every size).

    Writes the image encoder and the mask decoder as ONNX, measures them against PyTorch on photos, and leaves no
    bundle when they differ.
    """
    from rich.console import Console

    console = Console()
    errors = Console(stderr=True)
    try:
        absent = next((m for m in _NEEDED if importlib.util.find_spec(m) is None), None)
        if absent:
            raise MissingDependencyError(absent, "export", "Exporting")
        bundle = _export_sam2(console, checkpoint, output, name, variants, photos, licence, revision, force)
    except EdgeError as error:
        report = getattr(error, "report", None)
        if report is not None:
            print_parity(errors, report)
        errors.print(f"Error: {error.message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        if error.action:
            errors.print(error.action, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(f"Bundle: {bundle}", markup=False, highlight=False, soft_wrap=True)


def _export_sam2(
    console: Console,
    checkpoint: str,
    output: Path,
    name: str | None,
    variants: str,
    photos: Path | None,
    licence: str | None,
    revision: str | None,
    force: bool,
) -> Path:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from pixano_edge.engine.bundle import Bundle
    from pixano_edge.export.photos import find_photos
    from pixano_edge.export.sam2 import export_sam2

    files = find_photos(photos) if photos else None
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Starting", total=None)

        def progress(step: str, done: int, total: int) -> None:
            bar.update(task, description=step, completed=done, total=total)

        bundle = export_sam2(
            checkpoint,
            output,
            name=name,
            variants=[v.strip() for v in variants.split(",") if v.strip()],
            photos=files,
            progress=progress,
            revision=revision,
            licence=licence,
            force=force,
        )
    print_summary(console, Bundle.open(bundle).manifest)
    return bundle


def print_summary(console: Console, manifest: Manifest) -> None:
    """Prints architecture, licence, parity and notes of a new bundle."""
    console.print(
        f"{manifest.name}: {manifest.source.architecture}", style="bold", markup=False, highlight=False, soft_wrap=True
    )
    known = manifest.licence.spdx != "unknown"
    console.print(
        f"Licence of the weights: {manifest.licence.spdx} ({manifest.licence.text})",
        style=None if known else "yellow",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if manifest.parity:
        print_parity(console, manifest.parity)
    for note in manifest.notes:
        console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)


def print_parity(console: Console, report: ParityReport) -> None:
    """Prints the figures of a parity report as two tables."""
    from rich.table import Table

    tensors = Table(title=f"Against {report.reference}", title_justify="left")
    for heading in ("variant", "graph", "tensor", "max error", "relative"):
        tensors.add_column(heading, justify="right" if heading in ("max error", "relative") else "left")
    for t in report.tensors:
        tensors.add_row(t.variant, t.graph, t.tensor, f"{t.max_abs:.2e}", f"{t.max_rel:.2e}")
    masks = Table(title=f"Masks on {', '.join(report.inputs)}", title_justify="left")
    for heading in ("variant", "pictures", "prompts", "mean IoU", "lowest IoU"):
        masks.add_column(heading, justify="left" if heading == "variant" else "right")
    for m in report.masks:
        masks.add_row(m.variant, str(m.images), str(m.prompts), f"{m.mean_iou:.5f}", f"{m.min_iou:.5f}")
    console.print(tensors)
    console.print(masks)
    console.print("Parity: passed" if report.passed else "Parity: FAILED", style="bold", highlight=False)
