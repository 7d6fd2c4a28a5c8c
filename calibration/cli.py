"""`pixano-edge calibrate`: a smaller, faster variant of a bundle within an accuracy budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pixano_edge.engine.cli.options import ThreadsOption, open_bundle
from pixano_edge.engine.cli.output import JsonOption, bytes_text, milliseconds, note, print_json, print_table, progress
from pixano_edge.engine.errors import CalibrationError, MissingDependencyError

if TYPE_CHECKING:
    from .result import CalibrationResult, VariantResult
    from .run import Step

app = typer.Typer(rich_markup_mode=None)

PRECISIONS = ("int8", "fp16", "bf16", "int4", "auto")


@app.command("calibrate")
def calibrate_command(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, or a name in the local store.")],
    data: Annotated[
        Path,
        typer.Option(
            help="What the model will see: a folder of pictures, a video, a COCO JSON beside its pictures, or the "
            "folder of a Pixano dataset. With --video also a folder of videos or of folders of frames."
        ),
    ],
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = "int8",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Metric and the lowest mean on held-out data, for example 'mask_iou>=0.98' (SAM 2), 'j>=0.95' (with "
            "--video), 'ap>=0.9' (detectors), 'exact>=0.95' (answers in text); agreement with fp32. Default: 0.97, "
            "0.95, 0.9 and 0.95."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for a copy with the variant.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Add the variant to the bundle itself.")] = False,
    held_out: Annotated[
        Path | None, typer.Option(help="Other data to judge on; by default a third of --data is kept for that.")
    ] = None,
    graphs: Annotated[str, typer.Option(help="Graphs that may change, separated by commas; default: all.")] = "",
    video: Annotated[bool, typer.Option("--video", help="SAM 2: calibrate and judge tracking, on clips.")] = False,
    classes: Annotated[str, typer.Option(help="Detectors: what is asked for, separated by commas.")] = "",
    threshold: Annotated[float, typer.Option(help="Detectors: score from which fp32's boxes count.")] = 0.3,
    question: Annotated[list[str] | None, typer.Option(help="Answers in text: what is asked; repeat it.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the variant; the precision by default.")] = None,
    method: Annotated[
        str, typer.Option(help="auto, minmax, entropy, percentile or mse; auto takes the best for each tensor.")
    ] = "auto",
    smooth: Annotated[
        str, typer.Option(help="Move scales from channels into weights: search, none, or a strength such as 0.5.")
    ] = "search",
    samples: Annotated[int, typer.Option(min=2, help="Most pictures or clips.")] = 64,
    search_samples: Annotated[int, typer.Option(min=1, help="Samples that layers are chosen by.")] = 12,
    clip_length: Annotated[int, typer.Option(min=2, help="Frames of a clip.")] = 60,
    allow_few: Annotated[bool, typer.Option("--allow-few", help="Take fewer than 8 pictures.")] = False,
    threads: ThreadsOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of samples and prompts.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with what an interrupted run of the same left.")
    ] = True,
    replace: Annotated[
        bool, typer.Option("--replace", help="Also replace a variant of this name that was exported.")
    ] = False,
    work: Annotated[Path | None, typer.Option(help="Folder for what a resumed run needs.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for the report, HTML and JSON.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Judge and report, but publish nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a variant that is smaller and faster, and prove it on held-out data; without proof nothing is published.

    Ranges are taken on real data, the largest set of layers within the budget is searched for by the task's own metric,
    and the result is compared with fp32 on data that it was not fitted to.
    """
    _check_installed()
    from .data import open_data
    from .result import Budget
    from .run import Request, calibrate
    from .tasks import open_task
    from .tasks.base import TaskOptions
    from .work import work_folder

    if precision not in PRECISIONS:
        raise CalibrationError(f"There is no precision '{precision}' to calibrate.", f"Use {', '.join(PRECISIONS)}.")
    if (output is None) == (not in_place) and not dry_run:
        raise CalibrationError("Say where the variant goes.", "Give --output FOLDER for a copy, or --in-place.")
    opened = open_bundle(bundle)
    with progress("Reading data", None, enabled=not as_json) as bar:
        limits: dict[str, Any] = {"limit": samples, "clip_length": clip_length, "seed": seed}
        limits["frames"] = work_folder(work)
        found = open_data(data, clips=video, allow_few=allow_few, on_file=bar.step, **limits)
        other = None
        if held_out is not None:
            other = open_data(held_out, clips=video, allow_few=True, on_file=bar.step, **limits)
    for warning in (*found.warnings, *(other.warnings if other else ())):
        note(f"Warning: {warning}")
    if found.skipped:
        note(
            f"{len(found.skipped)} file(s) left out: " + "; ".join(f"{s.name} ({s.reason})" for s in found.skipped[:5])
        )
    options = TaskOptions(
        threads=threads,
        seed=seed,
        video=video,
        classes=_listed(classes) or found.classes,
        threshold=threshold,
        questions=tuple(question or ()),
    )
    wanted = Budget.parse(budget) if budget else _usual(open_task(opened, options))
    request = Request(
        data=found,
        held_out=other,
        budget=wanted,
        options=options,
        destination=output or opened.root,
        graphs=_listed(graphs),
        precision=precision,
        name=name,
        method=method,
        smooth=_strength(smooth),
        search_samples=search_samples,
        work=work,
        resume=resume,
        replace=replace,
        dry_run=dry_run,
        command=_command(),
    )
    with progress("Calibrating", None, enabled=not as_json) as bar:
        outcome = calibrate(opened, request, _show(bar))
    if report is not None:
        from .report import write_report

        write_report(outcome.result, report)
    if as_json:
        print_json({**outcome.result.to_dict(), "published": outcome.bundle is not None})
    else:
        _print(outcome.result)
    refused = [v for v in outcome.result.variants if not v.passed]
    if refused and outcome.bundle is None:
        problems = "; ".join(refused[-1].problems)
        raise CalibrationError(
            f"The variant '{refused[-1].name}' was not published: {problems}.",
            "Give data like what the model will see, more of them, or a lower budget; --report FOLDER shows where it "
            "is lost. What was measured is kept, so that the same command with another --budget is quick.",
        )
    if outcome.bundle is not None and not as_json:
        typer.echo(f"\nIn {outcome.bundle.root}; use it with: --precision {outcome.result.variants[-1].precision}")


def _show(bar: Any) -> Step:
    """Moves the bar; a step is never counted twice, whatever the order of the calls."""

    def step(what: str, done: int, of: int) -> None:
        bar.label(f"{what} {done}/{of}" if of else what)

    return step


def _print(result: CalibrationResult) -> None:
    for variant in result.variants:
        _print_variant(variant)
    for text in result.notes:
        typer.echo(f"Note: {text}")


def _print_variant(variant: VariantResult) -> None:
    held = variant.held_out
    typer.echo(
        f"{variant.name}: {variant.budget.metric} {held.mean:.4f} on {len(held.samples)} held-out samples, lowest "
        f"{min(s.value for s in held.samples):.4f}; budget {variant.budget.at_least:g}"
        if held is not None
        else f"{variant.name}: not judged"
    )
    times = {full.what: (full, reduced) for full, reduced in zip(variant.fp32_speed, variant.speed)}
    rows = []
    for size in variant.graphs:
        full, reduced = times.get(size.graph, (None, None))
        rows.append(
            (
                size.graph,
                f"{size.layers} of {size.of_layers}",
                bytes_text(size.fp32_bytes),
                bytes_text(size.bytes),
                milliseconds(full.p50) if full else "",
                milliseconds(reduced.p50) if reduced else "",
            )
        )
    columns = ("graph", "layers", "fp32", variant.name, "fp32 p50", f"{variant.name} p50")
    print_table(columns, rows, right=columns[1:])
    kept = [b for b in variant.blocks if not b.quantised]
    if kept:
        print_table(("stays in fp32", "graph", "why"), [(b.name, b.graph, b.why) for b in kept[:20]])
    for text in (*variant.notes, *(f"FAILED: {p}" for p in variant.problems)):
        typer.echo(text)


def _usual(task: Any) -> Any:
    from .result import Budget

    return Budget(task.metric, task.usual)


def _strength(text: str) -> float | str | None:
    if text in ("search", "none"):
        return None if text == "none" else text
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 1:
        raise CalibrationError(f"'{text}' is no way to smooth.", "Use search, none, or a number between 0 and 1.")
    return found


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _command() -> str:
    """The command as it was given, files by their names alone."""
    words = [Path(word).name if "/" in word and Path(word).exists() else word for word in sys.argv[1:]]
    return " ".join(["pixano-edge", *words])


def _check_installed() -> None:
    import importlib.util

    for module, extra in (("onnx", "calibration"), ("onnxruntime", "cpu")):
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(module, extra, "Calibrating")
