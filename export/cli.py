"""`pixano-edge export`: from a checkpoint to a bundle."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
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


OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle to make.")]
NameOption = Annotated[str | None, typer.Option(help="Name in the bundle; from the checkpoint by default.")]
VariantsOption = Annotated[str, typer.Option(help="fp32, or fp32,fp16.")]
PhotosOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of photos to measure parity on, such as the model will see; two of them go into the bundle "
        "as golden samples. By default two CC0 photos of the scikit-image wheel."
    ),
]
LicenceOption = Annotated[
    str | None, typer.Option("--licence", "--license", help="SPDX identifier of the weights' licence.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a bundle at the output folder.")]
ClassesOption = Annotated[
    str | None,
    typer.Option(
        help="Class names to ask for while measuring, separated by commas; for a model that knows few words. "
        "By default things that the default photos show."
    ),
]


@app.command()
def sam2(
    checkpoint: Annotated[
        str, typer.Argument(help="Hub id (facebook/sam2.1-hiera-tiny), transformers folder, or original .pt file.")
    ],
    output: OutputOption,
    name: NameOption = None,
    variants: VariantsOption = "fp32,fp16",
    photos: PhotosOption = None,
    licence: LicenceOption = None,
    revision: RevisionOption = None,
    image_only: Annotated[
        bool, typer.Option("--image-only", help="Leave tracking out, where the checkpoint has it.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export SAM 2 / 2.1: image segmentation, and tracking where the checkpoint has it (every size).

    Writes the graphs as ONNX, measures them against PyTorch on photos and on a short clip, and leaves no bundle when
    they differ.
    """
    _check_installed()
    from pixano_edge.export.sam2.export import count_steps, export_sam2

    wanted = _variants(variants)
    options = _options(output, name, wanted, photos, licence, revision, force)
    _run(
        lambda step: export_sam2(checkpoint, image_only=image_only, progress=step, **options),
        count_steps(wanted, image_only),
        as_json,
    )


@app.command()
def owlv2(
    checkpoint: Annotated[
        str, typer.Argument(help="Hub id (google/owlv2-base-patch16-ensemble) or transformers folder.")
    ],
    output: OutputOption,
    name: NameOption = None,
    variants: VariantsOption = "fp32,fp16",
    photos: PhotosOption = None,
    classes: ClassesOption = None,
    licence: LicenceOption = None,
    revision: RevisionOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export OWLv2: zero-shot detection by names, or like an example.

    Writes the graphs as ONNX, measures tensors and final detections against PyTorch on photos, and leaves no bundle
    when they differ.
    """
    _export_detector("owlv2", checkpoint, output, name, variants, photos, classes, licence, revision, force, as_json)


@app.command()
def owlvit(
    checkpoint: Annotated[str, typer.Argument(help="Hub id (google/owlvit-base-patch32) or transformers folder.")],
    output: OutputOption,
    name: NameOption = None,
    variants: VariantsOption = "fp32,fp16",
    photos: PhotosOption = None,
    classes: ClassesOption = None,
    licence: LicenceOption = None,
    revision: RevisionOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export OWL-ViT, the forerunner of OWLv2: zero-shot detection by names, or like an example.

    Writes the graphs as ONNX, measures tensors and final detections against PyTorch on photos, and leaves no bundle
    when they differ.
    """
    _export_detector("owlvit", checkpoint, output, name, variants, photos, classes, licence, revision, force, as_json)


@app.command("grounding-dino")
def grounding_dino(
    checkpoint: Annotated[
        str, typer.Argument(help="Hub id (IDEA-Research/grounding-dino-tiny or -base) or transformers folder.")
    ],
    output: OutputOption,
    name: NameOption = None,
    variants: VariantsOption = "fp32,fp16",
    photos: PhotosOption = None,
    classes: ClassesOption = None,
    licence: LicenceOption = None,
    revision: RevisionOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export Grounding DINO: zero-shot detection by names, at any image size.

    Writes the graphs as ONNX, measures tensors and final detections against PyTorch on photos, and leaves no bundle
    when they differ.
    """
    _export_detector(
        "grounding-dino", checkpoint, output, name, variants, photos, classes, licence, revision, force, as_json
    )


VlmVariantsOption = Annotated[
    str, typer.Option("--variants", help="fp32, or with it fp16 and int4 (4-bit weights of the language model).")
]
QuestionOption = Annotated[
    list[str] | None,
    typer.Option("--question", help="What to ask about each photo while measuring; may be given several times."),
]


@app.command()
def smolvlm(
    checkpoint: Annotated[
        str, typer.Argument(help="Hub id (HuggingFaceTB/SmolVLM-256M-Instruct) or transformers folder.")
    ],
    output: OutputOption,
    name: NameOption = None,
    variants: VlmVariantsOption = "fp32,fp16",
    photos: PhotosOption = None,
    question: QuestionOption = None,
    licence: LicenceOption = None,
    revision: RevisionOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export SmolVLM, SmolVLM2 or Idefics3: answers in text about images.

    Writes the graphs as ONNX, measures features and the logits of every step of greedy answers against PyTorch, and
    leaves no bundle when they differ.
    """
    from pixano_edge.export.smolvlm import export_smolvlm

    _export_vlm(export_smolvlm, checkpoint, output, name, variants, photos, question, licence, revision, force, as_json)


@app.command("qwen2.5-vl")
def qwen2_5_vl(
    checkpoint: Annotated[str, typer.Argument(help="Hub id (Qwen/Qwen2.5-VL-3B-Instruct) or transformers folder.")],
    output: OutputOption,
    name: NameOption = None,
    variants: VlmVariantsOption = "fp32,fp16",
    photos: PhotosOption = None,
    question: QuestionOption = None,
    licence: LicenceOption = None,
    revision: RevisionOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export Qwen2.5-VL: answers in text about images of any size.

    Writes the graphs as ONNX, measures features and the logits of every step of greedy answers against PyTorch, and
    leaves no bundle when they differ.
    """
    from pixano_edge.export.qwen2_5_vl import export_qwen_vl

    _export_vlm(export_qwen_vl, checkpoint, output, name, variants, photos, question, licence, revision, force, as_json)


def _export_vlm(
    export: Callable[..., Path],
    checkpoint: str,
    output: Path,
    name: str | None,
    variants: str,
    photos: Path | None,
    question: list[str] | None,
    licence: str | None,
    revision: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """The command of any vision-language model."""
    _check_installed()
    from pixano_edge.export.vlm.export import count_steps

    wanted = _variants(variants)
    options = _options(output, name, wanted, photos, licence, revision, force)
    questions = [q for q in question or () if q.strip()] or None
    _run(lambda step: export(checkpoint, questions=questions, progress=step, **options), count_steps(wanted), as_json)


def _export_detector(
    family: str,
    checkpoint: str,
    output: Path,
    name: str | None,
    variants: str,
    photos: Path | None,
    classes: str | None,
    licence: str | None,
    revision: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """The command of any detector; `family` chooses who loads the checkpoint."""
    _check_installed()
    from pixano_edge.export.detection.export import count_steps
    from pixano_edge.export.grounding_dino import export_grounding_dino
    from pixano_edge.export.owlv2 import export_owl

    wanted = _variants(variants)
    options = _options(output, name, wanted, photos, licence, revision, force)
    asked = None if classes is None else [[c.strip() for c in classes.split(",") if c.strip()]]
    if asked == [[]]:
        raise typer.BadParameter("name at least one class", param_hint="--classes")

    def export(step: Callable[[str, int, int], None]) -> Path:
        if family == "grounding-dino":
            return export_grounding_dino(checkpoint, classes=asked, progress=step, **options)
        return export_owl(checkpoint, family=family, classes=asked, progress=step, **options)

    _run(export, count_steps(wanted), as_json)


def _check_installed() -> None:
    absent = next((m for m in _NEEDED if importlib.util.find_spec(m) is None), None)
    if absent:
        raise missing(absent, "Exporting")


def _variants(text: str) -> list[str]:
    return [v.strip() for v in text.split(",") if v.strip()]


def _options(
    output: Path,
    name: str | None,
    variants: list[str],
    photos: Path | None,
    licence: str | None,
    revision: str | None,
    force: bool,
) -> dict[str, Any]:
    """Arguments that the export of every family takes."""
    from pixano_edge.export.photos import find_photos

    return {
        "destination": output,
        "name": name,
        "variants": variants,
        "photos": find_photos(photos) if photos else None,
        "licence": licence,
        "revision": revision,
        "force": force,
    }


def _run(export: Callable[[Callable[[str, int, int], None]], Path], steps: int, as_json: bool) -> None:
    """Runs an export with a progress bar and prints what came of it; a failed parity is printed before it is raised."""
    from pixano_edge.engine.bundle import Bundle
    from pixano_edge.export.parity import ParityError

    with progress("Starting", steps, enabled=not as_json) as bar:

        def step(name: str, done: int, total: int) -> None:
            bar.label(name)
            bar.retotal(total)
            if done:
                bar.step()

        try:
            folder = export(step)
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
    if report.generations:
        print_table(
            ("variant", "answers", "tokens", "equal", "ties", "logits' error"),
            [(g.variant, g.prompts, g.tokens, g.equal, g.ties, f"{g.max_rel:.1e}") for g in report.generations],
            title=f"Greedy answers about {', '.join(report.inputs)}",
            right=("answers", "tokens", "equal", "ties", "logits' error"),
        )
    print_table(
        ("variant", "graph", "tensor", "max error", "relative"),
        [(t.variant, t.graph, t.tensor, f"{t.max_abs:.2e}", f"{t.max_rel:.2e}") for t in report.tensors],
        title=f"Against {report.reference}",
        right=("max error", "relative"),
    )
    if report.masks:
        columns = ("variant", "pictures", "prompts", "mean IoU", "lowest IoU")
        print_table(
            columns,
            [(m.variant, m.images, m.prompts, f"{m.mean_iou:.5f}", f"{m.min_iou:.5f}") for m in report.masks],
            title=f"Masks on {', '.join(report.inputs)}",
            right=columns[1:],
        )
    if report.detections:
        found = ("variant", "pictures", "classes", "boxes", "unmatched", "max box error", "max score error")
        print_table(
            found,
            [
                (d.variant, d.images, d.classes, d.boxes, d.unmatched, f"{d.max_box:.3f} px", f"{d.max_score:.1e}")
                for d in report.detections
            ],
            title=f"Detections on {', '.join(report.inputs)}",
            right=found[1:],
        )
    if report.clips:
        print_table(
            ("variant", "objects", "frames", "not empty", "mean IoU", "lowest IoU"),
            [(c.variant, c.objects, c.frames, c.shown, f"{c.mean_iou:.5f}", f"{c.min_iou:.5f}") for c in report.clips],
            title=f"Tracked clip, cut out of {report.inputs[0]}",
            right=("objects", "frames", "not empty", "mean IoU", "lowest IoU"),
        )
    typer.secho("Parity: passed" if report.passed else "Parity: FAILED", bold=True)
