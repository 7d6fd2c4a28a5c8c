"""`pixano-edge bench`: speed beside PyTorch, quality beside baselines, memory over many clicks."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pixano_edge.engine.cli.options import ThreadsOption, open_bundle, resolve_bundle
from pixano_edge.engine.cli.output import bytes_text, note, print_table, progress
from pixano_edge.engine.errors import MissingDependencyError

from .report import environment, environment_lines, markdown, write_json

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures to this file.")]


@app.callback()
def _bench() -> None:
    """Measure speed, memory and mask quality."""


def _print_environment(facts: dict[str, Any]) -> None:
    typer.echo("\n" + "\n".join(environment_lines(facts)))


def _save(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, content)
        note(f"Figures written to {path}")


@app.command()
def segment(
    checkpoint: Annotated[Path | None, typer.Option(help="SAM 2 checkpoint folder in transformers' format.")] = None,
    bundle: Annotated[
        str | None, typer.Option(help="Bundle of that checkpoint; without --checkpoint only the engine is timed.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="Random SAM 2.1 without --checkpoint: tiny, small, base-plus, large.")
    ] = "tiny",
    image_size: Annotated[int, typer.Option(help="Side of the model input of the random checkpoint.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Encoder calls per contender; five times as many clicks.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each contender.")] = 2,
    json_file: JsonFile = None,
) -> None:
    """Encoder, decoder and whole-click times next to PyTorch (transformers, fp32 and bf16), taken in turns.

    Without --checkpoint a SAM 2.1 with seeded random weights is made and exported once into the cache; speed does not
    depend on the weights. Without torch only the engine and plain ONNX Runtime are timed, on --bundle.
    """
    from .segment import COLUMNS, measure, table_rows, to_dicts

    torch_here = all(importlib.util.find_spec(m) is not None for m in ("torch", "transformers"))
    if not torch_here and bundle is None:
        raise MissingDependencyError("torch", "export", "Making the bundle and the comparison with PyTorch")
    facts = environment(threads)
    with progress("Preparing", None) as steps:
        if bundle is None:
            from .checkpoints import exported_bundle, random_checkpoint

            steps.label("making the random checkpoint")
            checkpoint = checkpoint or random_checkpoint(size, image_size)
            steps.label("exporting the bundle")
            opened = open_bundle(str(exported_bundle(checkpoint)))
        else:
            opened = open_bundle(bundle)
        if not torch_here:
            note("PyTorch is not installed: no comparison. Install it with: pip install 'pixano-edge[export]'")
            checkpoint = None
        elif checkpoint is None:
            note("Without --checkpoint there is nothing to compare --bundle with.")
        rows = measure(opened, checkpoint, rounds=rounds, threads=threads, step=steps.label)
    if "-random" in opened.manifest.name:
        note("The weights are random: speed is that of the real size, masks are arbitrary and touchier than real ones.")
    title = f"{opened.manifest.name}, input {opened.manifest.preprocess.image_size} px"
    print_table(COLUMNS, table_rows(rows), title=title, right=COLUMNS[2:])
    _print_environment(facts)
    content = {"benchmark": "segment", "bundle": opened.manifest.name, "rounds": rounds, "rows": to_dicts(rows)}
    _save(json_file, {**content, "environment": facts})


@app.command()
def quality(
    bundle: Annotated[str, typer.Option(help="Bundle folder, or a name in the local store.")] = "sam2-demo",
    scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes.")] = 500,
    first: Annotated[int, typer.Option(min=0, help="Seed of the first held-out scene.")] = 0,
    precision: Annotated[str, typer.Option(help="Variant of the bundle.")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the scenes, one thread each.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Mask quality on held-out synthetic scenes, next to flood fill and GrabCut with the same prompts.

    Needs no torch. Equal arguments give equal figures; the table is Markdown.
    """
    if importlib.util.find_spec("skimage") is None:
        raise MissingDependencyError("skimage", "benchmarks", "The textures of the scenes")
    from .quality import KINDS, MAIN_COLUMNS, evaluate, main_rows, shape_rows

    folder = resolve_bundle(bundle)
    with progress("Scenes", scenes) as steps:
        result = evaluate(folder, scenes, first, precision=precision, jobs=jobs, on_scene=steps.step)
    typer.echo(
        f"{result.prompts} objects on {result.scenes} held-out scenes; 95 % intervals by bootstrap over scenes\n"
    )
    typer.echo(markdown(MAIN_COLUMNS, main_rows(result)))
    for kind in KINDS:
        typer.echo("\n" + markdown(*shape_rows(result, kind)))
    for kind in KINDS:
        typer.echo(f"\nlead over the better baseline, {kind}: {100 * result.lead(kind):.1f} points", nl=False)
    typer.echo()
    facts = environment(1)
    _print_environment(facts)
    _save(json_file, {"benchmark": "quality", **result.to_dict(), "environment": facts})


@app.command()
def memory(
    bundle: Annotated[str, typer.Option(help="Bundle folder, or a name in the local store.")] = "sam2-demo",
    calls: Annotated[int, typer.Option(min=1, help="Clicks.")] = 500,
    threads: ThreadsOption = None,
    json_file: JsonFile = None,
) -> None:
    """Memory over many clicks on one picture: resident set, Python allocations, work memory per click."""
    from .memory import measure_drift

    opened = open_bundle(bundle)
    facts = environment(threads)
    with progress("Clicks", calls) as steps:
        drift = measure_drift(opened, calls, threads=threads, on_call=steps.step)
    rows = [
        ("resident set", bytes_text(drift.rss_before), bytes_text(drift.rss_after), f"{drift.rss_drift:+d} B"),
        (
            "Python and numpy",
            bytes_text(drift.traced_before),
            bytes_text(drift.traced_after),
            f"{drift.traced_drift:+d} B",
        ),
    ]
    columns = ("memory", "before", "after", f"drift over {calls} clicks")
    print_table(columns, rows, title=opened.manifest.name, right=columns[1:])
    typer.echo(
        f"one answer (owned by the caller): {bytes_text(drift.answer)}; "
        f"work memory of a click beyond it: {drift.work_memory} B"
    )
    _print_environment(facts)
    content = {**asdict(drift), "rss_drift": drift.rss_drift, "traced_drift": drift.traced_drift}
    _save(json_file, {"benchmark": "memory", "bundle": opened.manifest.name, **content, "environment": facts})
