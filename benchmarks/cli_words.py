"""`pixano-edge bench detect` and `describe`: detection by name, and text about a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixano_edge.engine.cli.output import JsonOption, print_table, progress

from .cli_models import check_picture, check_torch, open_pair, read_picture, tell_left_out, tell_random, told
from .cli_report import CompileOption, OutputOption, report_figures
from .report import environment
from .torch_options import Beside


def _export_detector(checkpoint: Path, folder: Path) -> Path:
    from .detector_checkpoints import export_detector

    return export_detector(checkpoint, folder)


def _export_smolvlm(checkpoint: Path, folder: Path) -> Path:
    from .vlm_checkpoints import export_smolvlm

    return export_smolvlm(checkpoint, folder)


def detect(
    checkpoint: Annotated[
        Path | None, typer.Option(help="OWLv2, OWL-ViT or Grounding DINO checkpoint folder in transformers' format.")
    ] = None,
    bundle: Annotated[
        str | None, typer.Option(help="Bundle of that checkpoint; without --checkpoint only the engine is timed.")
    ] = None,
    family: Annotated[
        str, typer.Option(help="Random model without --checkpoint and --bundle: owlv2 or grounding-dino.")
    ] = "owlv2",
    size: Annotated[
        str, typer.Option(help="Its size: demo, small, base (OWLv2); demo, small, tiny, base (Grounding DINO).")
    ] = "demo",
    image_size: Annotated[
        int | None, typer.Option(help="Side of its input, or shortest edge; default: that of the size.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="'A, B, ...'", help="What to look for; default: eight things.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Image to search; default: a photo of scikit-image.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Calls per contender and case.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each contender.")] = 2,
    precision: Annotated[str, typer.Option(help="Variant of the bundle.")] = "auto",
    compiled: CompileOption = False,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Detection by name, from picture to boxes, next to transformers (fp32 and bf16), taken in turns.

    The first call with a list of classes is timed apart from calls with its features kept. Final boxes are compared
    with those of transformers in fp32. Without --checkpoint a model with seeded random weights is made and exported
    once into the cache; speed does not depend on the weights.
    """
    from pixano_edge.engine.cli.detect import parse_classes

    from .detect import ACCURACY_COLUMNS, CLASSES, COLUMNS, accuracy_rows, measure, table_rows

    check_torch(bundle)
    check_picture(picture)
    facts = environment(threads)
    with progress("Preparing", None, enabled=not as_json) as steps:

        def make() -> Path:
            from .detector_checkpoints import random_detector

            return random_detector(family, size, image_size)

        opened, checkpoint = open_pair(bundle, checkpoint, make, steps.label, _export_detector)
        image = read_picture(picture)
        wanted = parse_classes(classes, []) or CLASSES
        beside = Beside(compiled)
        figures = measure(
            opened,
            checkpoint,
            image,
            wanted,
            rounds=rounds,
            threads=threads,
            precision=precision,
            beside=beside,
            step=steps.label,
        )
    tell_random(opened, "boxes are arbitrary and touchier than real ones")
    tell_left_out(beside.left_out)
    side = opened.manifest.preprocess.image_size

    def show() -> None:
        title = (
            f"{opened.manifest.name}, input {side} px, {len(wanted)} classes, picture {image.shape[1]}x{image.shape[0]}"
        )
        print_table(COLUMNS, table_rows(figures), title=title, right=COLUMNS[2:])
        if figures.accuracy:
            typer.echo()
            title = f"Boxes next to PyTorch fp32, at threshold {figures.accuracy[0].threshold:.3f}"
            print_table(ACCURACY_COLUMNS, accuracy_rows(figures), title=title, right=ACCURACY_COLUMNS[1:])

    content = {"benchmark": "detect", "bundle": opened.manifest.name, "rounds": rounds, "classes": list(wanted)}
    report_figures({**content, **told(beside), **figures.to_dict(), "environment": facts}, show, as_json, output)


def describe(
    checkpoint: Annotated[
        Path | None, typer.Option(help="SmolVLM or Idefics3 checkpoint folder in transformers' format.")
    ] = None,
    bundle: Annotated[
        str | None, typer.Option(help="Bundle of that checkpoint; without --checkpoint only the engine is timed.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="Random model without --checkpoint and --bundle: tiny, 256M or 500M.")
    ] = "256M",
    picture: Annotated[Path | None, typer.Option(help="Image to ask about; default: a photo of scikit-image.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Answers per contender and case.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each contender.")] = 2,
    precision: Annotated[
        list[str] | None, typer.Option("--precision", "-p", help="Variants of the bundle; default: all it has.")
    ] = None,
    genai_python: Annotated[
        Path | None,
        typer.Option(help="Python that has onnxruntime-genai and what its builder needs: adds it, text alone."),
    ] = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Text about a picture: time to the first token and tokens per second, next to transformers (fp32 and bf16).

    Beside them stands what the measured speed of memory allows. Without --checkpoint a model with seeded random weights
    is made and exported once into the cache; speed does not depend on the weights.
    """
    from .describe import ACCURACY_COLUMNS, COLUMNS, accuracy_rows, bound_lines, measure, table_rows

    check_torch(bundle)
    check_picture(picture)
    facts = environment(threads)
    with progress("Preparing", None, enabled=not as_json) as steps:

        def make() -> Path:
            from .vlm_checkpoints import random_smolvlm

            return random_smolvlm(size)

        opened, checkpoint = open_pair(bundle, checkpoint, make, steps.label, _export_smolvlm)
        image = read_picture(picture)
        figures = measure(
            opened,
            checkpoint,
            image,
            tokens=tokens,
            rounds=rounds,
            threads=threads,
            precisions=precision or opened.variants(),
            genai_python=genai_python,
            step=steps.label,
        )
    tell_random(opened, "answers mean nothing")
    tell_left_out(figures.left_out)

    def show() -> None:
        title = f"{opened.manifest.name}, {tokens} tokens, picture {image.shape[1]}x{image.shape[0]}, {threads} threads"
        print_table(COLUMNS, table_rows(figures), title=title, right=COLUMNS[2:])
        for line in bound_lines(figures):
            typer.echo(line)
        if figures.accuracy:
            typer.echo()
            title = "Next to PyTorch fp32, over its own tokens"
            print_table(ACCURACY_COLUMNS, accuracy_rows(figures), title=title, right=ACCURACY_COLUMNS[1:])

    content = {"benchmark": "describe", "bundle": opened.manifest.name, "rounds": rounds, "tokens": tokens}
    report_figures({**content, **figures.to_dict(), "environment": facts}, show, as_json, output)


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (detect, describe):
        app.command()(command)
