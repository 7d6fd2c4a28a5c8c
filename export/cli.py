"""`pixano-edge export`: from a checkpoint to a bundle."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixano_edge.engine.cli.output import JsonOption, print_json, print_table, progress

from .extras import missing

if TYPE_CHECKING:
    from pixano_edge.engine.bundle.manifest import Manifest, ParityReport

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Export a checkpoint to a bundle that is proven equal to its PyTorch original.",
)
_NEEDED = ("torch", "transformers", "onnx", "onnxscript", "safetensors", "onnxruntime")


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
        Path | None,
        typer.Option(
            help="Folder of photos to measure parity on, such as the model will see; two of them go into the bundle "
            "as golden samples. By default two CC0 photos of the scikit-image wheel."
        ),
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="SPDX identifier of the weights' licence.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    image_only: Annotated[
        bool, typer.Option("--image-only", help="Leave tracking out, where the checkpoint has it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle at the output folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Export SAM 2 / 2.1: image segmentation, and tracking where the checkpoint has it (every size).

    Writes the graphs as ONNX, measures them against PyTorch on photos and on a short clip, and leaves no bundle when
    they differ.
    """
    absent = next((m for m in _NEEDED if importlib.util.find_spec(m) is None), None)
    if absent:
        raise missing(absent, "Exporting")
    from pixano_edge.engine.bundle import Bundle
    from pixano_edge.export.photos import find_photos
    from pixano_edge.export.sam2.export import count_steps, export_sam2
    from pixano_edge.export.sam2.parity import ParityError

    wanted = [v.strip() for v in variants.split(",") if v.strip()]
    with progress("Starting", count_steps(wanted, image_only), enabled=not as_json) as bar:

        def step(name: str, done: int, total: int) -> None:
            bar.label(name)
            bar.retotal(total)
            if done:
                bar.step()

        try:
            folder = export_sam2(
                checkpoint,
                output,
                name=name,
                variants=wanted,
                photos=find_photos(photos) if photos else None,
                progress=step,
                revision=revision,
                licence=licence,
                force=force,
                image_only=image_only,
            )
        except ParityError as error:
            if not as_json:
                print_parity(error.report)
            raise
    manifest = Bundle.open(folder).manifest
    if as_json:
        print_json(result(folder, manifest))
    else:
        print_summary(folder, manifest)


def warnings_of(manifest: Manifest) -> list[str]:
    """What the user should act on: an unknown licence, and operators that TensorRT 10.3 may refuse."""
    from pixano_edge.export.operators import FINDING

    found = [note for note in manifest.notes if note.startswith(FINDING)]
    if manifest.licence.spdx == "unknown":
        found.insert(0, f"The licence of the weights is unknown. {manifest.licence.text}")
    return found


def result(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What ``--json`` prints."""
    warnings = warnings_of(manifest)
    return {
        "bundle": folder,
        "name": manifest.name,
        "architecture": manifest.source.architecture,
        "licence": manifest.licence,
        "variants": sorted(
            {k for g in manifest.graphs.values() for k, v in g.variants.items() if v.target == "onnx"}, reverse=True
        ),
        "parity": manifest.parity,
        "warnings": warnings,
        "notes": [note for note in manifest.notes if note not in warnings],
    }


def print_summary(folder: Path, manifest: Manifest) -> None:
    """Prints architecture, licence, parity and notes of a new bundle; warnings go to stderr."""
    typer.secho(f"{manifest.name}: {manifest.source.architecture}", bold=True)
    typer.echo(f"Licence of the weights: {manifest.licence.spdx} ({manifest.licence.text})")
    if manifest.parity:
        print_parity(manifest.parity)
    warnings = warnings_of(manifest)
    for note in manifest.notes:
        if note not in warnings:
            typer.echo(f"Note: {note}")
    for warning in warnings:
        typer.secho("Warning: ", fg=typer.colors.YELLOW, bold=True, nl=False, err=True)
        typer.echo(warning, err=True)
    typer.echo(f"Bundle: {folder}")


def print_parity(report: ParityReport) -> None:
    """Prints the figures of a parity report as two tables."""
    print_table(
        ("variant", "graph", "tensor", "max error", "relative"),
        [(t.variant, t.graph, t.tensor, f"{t.max_abs:.2e}", f"{t.max_rel:.2e}") for t in report.tensors],
        title=f"Against {report.reference}",
        right=("max error", "relative"),
    )
    columns = ("variant", "pictures", "prompts", "mean IoU", "lowest IoU")
    print_table(
        columns,
        [(m.variant, m.images, m.prompts, f"{m.mean_iou:.5f}", f"{m.min_iou:.5f}") for m in report.masks],
        title=f"Masks on {', '.join(report.inputs)}",
        right=columns[1:],
    )
    if report.clips:
        print_table(
            ("variant", "objects", "frames", "not empty", "mean IoU", "lowest IoU"),
            [(c.variant, c.objects, c.frames, c.shown, f"{c.mean_iou:.5f}", f"{c.min_iou:.5f}") for c in report.clips],
            title=f"Tracked clip, cut out of {report.inputs[0]}",
            right=("objects", "frames", "not empty", "mean IoU", "lowest IoU"),
        )
    typer.secho("Parity: passed" if report.passed else "Parity: FAILED", bold=True)
