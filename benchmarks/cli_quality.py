"""The commands of `pixano-edge bench` that judge the packaged demo models beside baselines; see `cli`."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from pixano_edge.engine.cli.options import ThreadsOption, resolve_bundle
from pixano_edge.engine.cli.output import JsonOption, progress
from pixano_edge.engine.errors import MissingDependencyError

from .cli_report import OutputOption, report_figures
from .report import environment, markdown
from .seeds import FIRST_SEED


def quality(
    bundle: Annotated[str, typer.Option(help="Bundle folder, or a name in the local store.")] = "sam2-demo",
    scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes.")] = 500,
    first: Annotated[int, typer.Option(min=0, help="Seed of the first held-out scene.")] = FIRST_SEED,
    precision: Annotated[str, typer.Option(help="Variant of the bundle.")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the scenes, one thread each.")] = 1,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Mask quality on held-out synthetic scenes, next to flood fill and GrabCut with the same prompts.

    Needs no torch. Equal arguments give equal figures; the table is Markdown.
    """
    if importlib.util.find_spec("skimage") is None:
        raise MissingDependencyError("skimage", "benchmarks", "The textures of the scenes")
    from .quality import KINDS, MAIN_COLUMNS, evaluate, main_rows, shape_rows

    folder = resolve_bundle(bundle)
    with progress("Scenes", scenes, enabled=not as_json) as steps:
        result = evaluate(folder, scenes, first, precision=precision, jobs=jobs, on_scene=steps.step)

    def show() -> None:
        typer.echo(
            f"{result.prompts} objects on {result.scenes} held-out scenes from seed {first}; "
            "95 % intervals by bootstrap over scenes\n"
        )
        typer.echo(markdown(MAIN_COLUMNS, main_rows(result)))
        for kind in KINDS:
            typer.echo("\n" + markdown(*shape_rows(result, kind)))
        for kind in KINDS:
            typer.echo(f"\nlead over the better baseline, {kind}: {100 * result.lead(kind):.1f} points", nl=False)
        typer.echo()

    content = {"benchmark": "quality", "first": first, **result.to_dict()}
    report_figures({**content, "environment": environment(1)}, show, as_json, output)


def track_quality(
    bundle: Annotated[str, typer.Option(help="Bundle folder, or a name in the local store.")] = "sam2-demo",
    clips: Annotated[int, typer.Option(min=1, help="Held-out clips.")] = 100,
    first: Annotated[int, typer.Option(min=0, help="Seed of the first held-out clip.")] = FIRST_SEED,
    frames: Annotated[int, typer.Option(min=2, help="Frames of a clip.")] = 60,
    precision: Annotated[str, typer.Option(help="Variant of the bundle.")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the clips, one thread each.")] = 1,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tracking from one click on held-out synthetic clips, next to keeping the first mask and to optical flow.

    Needs no torch. Equal arguments give equal figures; the table is Markdown.
    """
    if importlib.util.find_spec("skimage") is None:
        raise MissingDependencyError("skimage", "benchmarks", "The textures of the clips")
    from .tracking_quality import COLUMNS, evaluate, table_rows

    folder = resolve_bundle(bundle)
    with progress("Clips", clips, enabled=not as_json) as steps:
        result = evaluate(folder, clips, first, frames, precision=precision, jobs=jobs, on_clip=steps.step)

    def show() -> None:
        typer.echo(
            f"{result.objects} objects on {result.clips} held-out clips of {result.frames} frames from seed {first}, "
            "one click on the first frame; J over the frames after it, 95 % intervals by bootstrap over clips\n"
        )
        typer.echo(markdown(COLUMNS, table_rows(result)))
        for method, lead in result.leads().items():
            typer.echo(f"\nlead over {method}: {100 * lead:.1f} points", nl=False)
        typer.echo()

    content = {"benchmark": "track-quality", "first": first, **result.to_dict()}
    report_figures({**content, "environment": environment(1)}, show, as_json, output)


def describe_quality(
    bundle: Annotated[str, typer.Option(help="Bundle folder, or a name in the local store.")] = "smolvlm-demo",
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions, of all types alike.")] = 500,
    captions: Annotated[int, typer.Option(min=1, help="Captions that have to be right as a whole.")] = 100,
    precision: Annotated[str, typer.Option(help="Variant of the bundle.")] = "auto",
    threads: ThreadsOption = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Exact answers to questions about held-out synthetic scenes, next to each type's most frequent answer.

    Needs no torch. Equal arguments give equal figures; the table is Markdown.
    """
    if importlib.util.find_spec("skimage") is None:
        raise MissingDependencyError("skimage", "benchmarks", "The textures of the scenes")
    from .describe_quality import COLUMNS, evaluate, table_rows

    folder = resolve_bundle(bundle)
    with progress("Answers", questions + captions, enabled=not as_json) as steps:
        result = evaluate(
            folder, questions, captions=captions, precision=precision, threads=threads, on_answer=steps.step
        )

    def show() -> None:
        typer.echo(
            f"{result.bundle}, {result.precision}; greedy answers, right word for word; 95 % intervals (Wilson)\n"
        )
        typer.echo(markdown(COLUMNS, table_rows(result)))

    content = {"benchmark": "describe-quality", **result.to_dict()}
    report_figures({**content, "environment": environment(threads)}, show, as_json, output)


def detect_quality(
    bundle: Annotated[
        list[str] | None,
        typer.Option(
            help="Bundle folder, or a name in the local store; may be repeated. Default: both detectors of the package."
        ),
    ] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes.")] = 500,
    first: Annotated[int, typer.Option(min=0, help="Seed of the first held-out scene.")] = FIRST_SEED,
    precision: Annotated[str, typer.Option(help="Variant of the bundles.")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the scenes, one thread each.")] = 1,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Detection by words on held-out synthetic scenes, next to colours and contours with the same questions.

    As many phrases that are true of nothing are asked for as true ones. Needs no torch. Equal arguments give equal
    figures; the table is Markdown.
    """
    if importlib.util.find_spec("skimage") is None:
        raise MissingDependencyError("skimage", "benchmarks", "The textures of the scenes")
    from .detection_quality import BASELINE, COLUMNS, DEMOS, evaluate, table_rows

    folders = [resolve_bundle(name) for name in bundle or DEMOS]
    with progress("Scenes", scenes, enabled=not as_json) as steps:
        result = evaluate(folders, scenes, first, precision=precision, jobs=jobs, on_scene=steps.step)

    def show() -> None:
        every = result.of(result.bundle)
        typer.echo(
            f"{every.objects} true answers to {every.phrases} phrases on {result.scenes} held-out scenes from seed "
            f"{first}, {every.absent} phrases asked for in vain; 95 % intervals by jackknife over scenes\n"
        )
        typer.echo(markdown(COLUMNS, table_rows(result)))
        for name in result.bundles:
            typer.echo(f"\n{name}: lead over {BASELINE} {100 * result.lead(bundle=name):.1f} points of AP50", nl=False)
        typer.echo()

    content = {"benchmark": "detect-quality", "first": first, **result.to_dict()}
    report_figures({**content, "environment": environment(1)}, show, as_json, output)
