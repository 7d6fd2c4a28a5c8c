"""`pixano-edge bench segment`, `track`, `serve`, `gpu` and `memory`: what SAM 2 takes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pixano_edge.engine.cli.options import ThreadsOption, open_bundle
from pixano_edge.engine.cli.output import JsonOption, bytes_text, note, print_table, progress

from .cli_models import check_torch, open_pair, random_sam2, side_of, tell_left_out, tell_random, told
from .cli_report import CompileOption, OutputOption, report_figures
from .report import environment
from .torch_options import Beside

MASKS = "masks are arbitrary and touchier than real ones"


def _random(size: str, side: int, *, video: bool = False) -> Path:
    from .checkpoints import random_checkpoint

    return random_checkpoint(size, side, video=video)


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
    compiled: CompileOption = False,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Encoder, decoder and whole-click times next to PyTorch (transformers, fp32 and bf16), taken in turns.

    Without --checkpoint a SAM 2.1 with seeded random weights is made and exported once into the cache; speed does not
    depend on the weights. Without torch only the engine and plain ONNX Runtime are timed, on --bundle.
    """
    from .segment import COLUMNS, measure, table_rows, to_dicts

    check_torch(bundle)
    facts = environment(threads)
    with progress("Preparing", None, enabled=not as_json) as steps:
        opened, checkpoint = open_pair(bundle, checkpoint, lambda: _random(size, image_size), steps.label)
        beside = Beside(compiled)
        rows = measure(opened, checkpoint, rounds=rounds, threads=threads, beside=beside, step=steps.label)
    tell_left_out(beside.left_out)
    tell_random(opened, MASKS)
    title = f"{opened.manifest.name}, input {opened.manifest.preprocess.image_size} px"
    content = {"benchmark": "segment", "bundle": opened.manifest.name, "rounds": rounds, "rows": to_dicts(rows)}
    report_figures(
        {**content, **told(beside), "environment": facts},
        lambda: print_table(COLUMNS, table_rows(rows), title=title, right=COLUMNS[2:]),
        as_json,
        output,
    )


def track(
    checkpoint: Annotated[
        Path | None, typer.Option(help="SAM 2 video checkpoint folder in transformers' format.")
    ] = None,
    bundle: Annotated[
        str | None, typer.Option(help="Bundle of that checkpoint; without --checkpoint only the engine is timed.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="Random model without --checkpoint: demo, tiny, small, base-plus, large.")
    ] = "demo",
    image_size: Annotated[
        int | None, typer.Option(help="Side of the random model's input; default: 256 for demo, 1024 for others.")
    ] = None,
    objects: Annotated[
        list[int] | None, typer.Option("--objects", min=1, max=64, help="Numbers of objects; default: 1, 2, 4, 8.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed frames per contender and number of objects.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Frames of each before that.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each contender.")] = 2,
    compiled: CompileOption = False,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tracking, per frame, next to PyTorch's video predictor (transformers, fp32 and bf16), taken in turns.

    Every contender has a full memory bank and tracks 1, 2, 4 and 8 objects; a line fitted through its times tells what
    a frame costs and what each object adds. Masks are compared on the last frame. The demo model gets the demo's clip,
    others blobs of colour. Without --checkpoint a model with seeded random weights is made and exported once into the
    cache.
    """
    from .track import COLUMNS, costs, measure, table_rows, to_dicts

    check_torch(bundle)
    facts = environment(threads)
    with progress("Preparing", None, enabled=not as_json) as steps:
        side = side_of(size, image_size)
        opened, checkpoint = open_pair(bundle, checkpoint, lambda: _random(size, side, video=True), steps.label)
        counts = sorted(set(objects or (1, 2, 4, 8)))
        beside = Beside(compiled)
        rows = measure(
            opened,
            checkpoint,
            objects=counts,
            rounds=rounds,
            warmup=warmup,
            threads=threads,
            beside=beside,
            step=steps.label,
        )
    tell_left_out(beside.left_out)
    tell_random(opened, MASKS)
    if checkpoint is not None and all(row.mask_iou is None for row in rows):
        note("No object is seen on the last frame, so nothing tells whether the answers agree.")
    fits = costs(rows)

    def show() -> None:
        title = f"{opened.manifest.name}, input {opened.manifest.preprocess.image_size} px, one frame with a full bank"
        print_table(COLUMNS, table_rows(rows), title=title, right=COLUMNS[2:])
        for fit in fits:
            typer.echo(fit.text())

    content = {"benchmark": "track", "bundle": opened.manifest.name, "rounds": rounds, "rows": to_dicts(rows)}
    more = {"costs": [asdict(fit) for fit in fits], **told(beside)}
    report_figures({**content, **more, "environment": facts}, show, as_json, output)


def serve(
    bundle: Annotated[
        str | None, typer.Option(help="Bundle of a SAM 2 that tracks; without it a random SAM 2.1 is made.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="Random SAM 2.1 without --bundle: demo, tiny, small, base-plus, large.")
    ] = "tiny",
    image_size: Annotated[
        int | None, typer.Option(help="Side of its input; default: 256 for demo, 1024 for others.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed requests of each kind.")] = 50,
    clients: Annotated[
        list[int] | None, typer.Option("--clients", min=1, max=64, help="Clients at once; default: 1, 4, 16.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each number of clients.")] = 15.0,
    clicks: Annotated[int, typer.Option(min=0, help="Clicks while a clip is tracked; 0 leaves that out.")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the engine.")] = 2,
    device: Annotated[str, typer.Option(help="Of the engine: cpu or cuda:N.")] = "cpu",
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """What HTTP adds to the engine: the requests of Pixano's page, many clients at once, clicks during tracking.

    The server runs in a process of its own, the engine in this one; both get the same requests on a photo of 2
    megapixels, in turns. The overhead of a request is its time less what the engine took for it, as its answer tells.
    """
    from .clicks import clicks_while_tracking, wait_text
    from .serve import COLUMNS, LOAD_COLUMNS, load, load_rows, measure, table_rows, to_dicts

    facts = environment(threads)
    with progress("Preparing", None, enabled=not as_json) as steps:
        if bundle is None:
            steps.label("making the bundle")
        opened = random_sam2(size, image_size) if bundle is None else open_bundle(bundle)
        rows = measure(opened, rounds=rounds, threads=threads, device=device, step=steps.label)
        loads = load(
            opened, clients=clients or (1, 4, 16), seconds=seconds, threads=threads, device=device, step=steps.label
        )
        wait = None
        if clicks:
            wait = clicks_while_tracking(opened, clicks=clicks, threads=threads, device=device, step=steps.label)

    def show() -> None:
        title = f"{opened.manifest.name} on {device}, photo of 2 megapixels; times in ms, sizes in MB"
        print_table(COLUMNS, table_rows(rows), title=title, right=COLUMNS[1:])
        print_table(LOAD_COLUMNS, load_rows(loads), title="clicks without echo, closed loop", right=LOAD_COLUMNS)
        if wait is not None:
            typer.echo(wait_text(wait))

    content = {
        "benchmark": "serve",
        "bundle": opened.manifest.name,
        "rounds": rounds,
        "device": device,
        "rows": to_dicts(rows),
    }
    more = {"load": to_dicts(loads), "while_tracking": None if wait is None else asdict(wait)}
    report_figures({**content, **more, "environment": facts}, show, as_json, output)


def gpu(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, or a name in the local store.")] = "sam2-demo",
    device: Annotated[str, typer.Option(help="cuda:N.")] = "cuda:0",
    precision: Annotated[
        list[str] | None, typer.Option("--precision", "-p", help="Variants to take; default: fp32 and fp16.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The checkpoint in transformers' format, for the comparison with PyTorch.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls per contender and case.")] = 50,
    power_seconds: Annotated[float, typer.Option(min=0, help="Load per contender for the power; 0: no power.")] = 2.0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Encoder, decoder and whole click on a GPU: ONNX Runtime and TensorRT, eager and as recorded graphs, and PyTorch.

    Prints wall clock and the GPU's own clock, first runs, memory and power. Refuses on a machine without a GPU.
    """
    from .gpu import COLUMNS, START_COLUMNS, measure_gpu, require_gpu, start_rows, table_rows

    require_gpu(device)
    opened = open_bundle(bundle)
    facts = environment(None)
    with progress("Preparing", None, enabled=not as_json) as steps:
        figures = measure_gpu(
            opened,
            device,
            precisions=precision or ("fp32", "fp16"),
            checkpoint=checkpoint,
            rounds=rounds,
            power_seconds=power_seconds,
            step=steps.label,
        )

    def show() -> None:
        gpu = figures.device
        title = f"{opened.manifest.name}, input {opened.manifest.preprocess.image_size} px, on {gpu.name}"
        print_table(COLUMNS, table_rows(figures), title=title, right=COLUMNS[2:])
        typer.echo()
        print_table(START_COLUMNS, start_rows(figures), title="First run, memory, power", right=START_COLUMNS[1:])
        for name, why in figures.skipped.items():
            typer.echo(f"not measured: {name}: {why}")
        for name, said in figures.warnings.items():
            for text in said:
                typer.echo(f"warning: {name}: {text}")

    content = {"benchmark": "gpu", "bundle": opened.manifest.name, "rounds": rounds, **figures.to_dict()}
    report_figures({**content, "environment": facts}, show, as_json, output)


def memory(
    bundle: Annotated[str, typer.Option(help="Bundle folder, or a name in the local store.")] = "sam2-demo",
    calls: Annotated[int, typer.Option(min=1, help="Clicks.")] = 500,
    threads: ThreadsOption = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Memory over many clicks on one picture: resident set, Python allocations, work memory per click."""
    from .memory import measure_drift

    opened = open_bundle(bundle)
    facts = environment(threads)
    with progress("Clicks", calls, enabled=not as_json) as steps:
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

    def show() -> None:
        print_table(columns, rows, title=opened.manifest.name, right=columns[1:])
        typer.echo(
            f"one answer (owned by the caller): {bytes_text(drift.answer)}; "
            f"work memory of a click beyond it: {drift.work_memory} B"
        )

    content = {**asdict(drift), "rss_drift": drift.rss_drift, "traced_drift": drift.traced_drift}
    report_figures(
        {"benchmark": "memory", "bundle": opened.manifest.name, **content, "environment": facts}, show, as_json, output
    )


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (segment, track, serve, gpu, memory):
        app.command()(command)
