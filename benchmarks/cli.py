"""`pixano-edge bench`: speed beside PyTorch, quality beside baselines, memory over many clicks."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pixano_edge.engine.cli.options import ThreadsOption, open_bundle
from pixano_edge.engine.cli.output import JsonOption, bytes_text, note, print_table, progress
from pixano_edge.engine.errors import MissingDependencyError

from . import cli_all, cli_calibrated, cli_quality, cli_scale
from .cli_report import CompileOption, OutputOption, report_figures
from .report import environment
from .torch_options import Beside

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def _bench() -> None:
    """Measure speed, memory and mask quality."""


def _tell(beside: Beside) -> None:
    """Who was not measured, as remarks."""
    for name, why in beside.left_out.items():
        note(f"Not measured: {name}: {why}")


def _told(beside: Beside) -> dict[str, Any]:
    """The same for the file."""
    return {"left_out": beside.left_out, "torch_threads": beside.torch_threads}


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
    compiled: CompileOption = False,
    output: OutputOption = None,
    as_json: JsonOption = False,
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
    with progress("Preparing", None, enabled=not as_json) as steps:
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
        beside = Beside(compiled)
        rows = measure(opened, checkpoint, rounds=rounds, threads=threads, beside=beside, step=steps.label)
    _tell(beside)
    if "-random" in opened.manifest.name:
        note("The weights are random: speed is that of the real size, masks are arbitrary and touchier than real ones.")
    title = f"{opened.manifest.name}, input {opened.manifest.preprocess.image_size} px"
    content = {"benchmark": "segment", "bundle": opened.manifest.name, "rounds": rounds, "rows": to_dicts(rows)}
    report_figures(
        {**content, **_told(beside), "environment": facts},
        lambda: print_table(COLUMNS, table_rows(rows), title=title, right=COLUMNS[2:]),
        as_json,
        output,
    )


@app.command()
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

    torch_here = all(importlib.util.find_spec(m) is not None for m in ("torch", "transformers"))
    if not torch_here and bundle is None:
        raise MissingDependencyError("torch", "export", "Making the bundle and the comparison with PyTorch")
    facts = environment(threads)
    with progress("Preparing", None, enabled=not as_json) as steps:
        if bundle is None:
            from .checkpoints import exported_bundle, random_checkpoint

            steps.label("making the random checkpoint")
            side = image_size or (256 if size == "demo" else 1024)
            checkpoint = checkpoint or random_checkpoint(size, side, video=True)
            steps.label("exporting the bundle")
            opened = open_bundle(str(exported_bundle(checkpoint)))
        else:
            opened = open_bundle(bundle)
        if not torch_here:
            note("PyTorch is not installed: no comparison. Install it with: pip install 'pixano-edge[export]'")
            checkpoint = None
        elif checkpoint is None:
            note("Without --checkpoint there is nothing to compare --bundle with.")
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
    _tell(beside)
    if "-random" in opened.manifest.name:
        note("The weights are random: speed is that of the real size, masks are arbitrary and touchier than real ones.")
    if checkpoint is not None and all(row.mask_iou is None for row in rows):
        note("No object is seen on the last frame, so nothing tells whether the answers agree.")
    fits = costs(rows)

    def show() -> None:
        title = f"{opened.manifest.name}, input {opened.manifest.preprocess.image_size} px, one frame with a full bank"
        print_table(COLUMNS, table_rows(rows), title=title, right=COLUMNS[2:])
        for fit in fits:
            typer.echo(fit.text())

    content = {"benchmark": "track", "bundle": opened.manifest.name, "rounds": rounds, "rows": to_dicts(rows)}
    more = {"costs": [asdict(fit) for fit in fits], **_told(beside)}
    report_figures({**content, **more, "environment": facts}, show, as_json, output)


@app.command()
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
            from .checkpoints import exported_bundle, random_checkpoint

            steps.label("making the random checkpoint")
            side = image_size or (256 if size == "demo" else 1024)
            checkpoint = random_checkpoint(size, side, video=True)
            steps.label("exporting the bundle")
            opened = open_bundle(str(exported_bundle(checkpoint)))
        else:
            opened = open_bundle(bundle)
        rows = measure(opened, rounds=rounds, threads=threads, step=steps.label)
        loads = load(opened, clients=clients or (1, 4, 16), seconds=seconds, threads=threads, step=steps.label)
        wait = clicks_while_tracking(opened, clicks=clicks, threads=threads, step=steps.label) if clicks else None

    def show() -> None:
        title = f"{opened.manifest.name}, photo of 2 megapixels; times in ms, sizes in MB"
        print_table(COLUMNS, table_rows(rows), title=title, right=COLUMNS[1:])
        print_table(LOAD_COLUMNS, load_rows(loads), title="clicks without echo, closed loop", right=LOAD_COLUMNS)
        if wait is not None:
            typer.echo(wait_text(wait))

    content = {"benchmark": "serve", "bundle": opened.manifest.name, "rounds": rounds, "rows": to_dicts(rows)}
    more = {"load": to_dicts(loads), "while_tracking": None if wait is None else asdict(wait)}
    report_figures({**content, **more, "environment": facts}, show, as_json, output)


@app.command()
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
    from pixano_edge.engine.models.images import decode_image

    from .detect import ACCURACY_COLUMNS, CLASSES, COLUMNS, accuracy_rows, measure, table_rows

    torch_here = all(importlib.util.find_spec(m) is not None for m in ("torch", "transformers"))
    if not torch_here and bundle is None:
        raise MissingDependencyError("torch", "export", "Making the bundle and the comparison with PyTorch")
    if picture is None and importlib.util.find_spec("skimage") is None:
        raise MissingDependencyError("skimage", "benchmarks", "The default picture")
    facts = environment(threads)
    with progress("Preparing", None, enabled=not as_json) as steps:
        if bundle is None:
            from .checkpoints import exported_bundle
            from .detector_checkpoints import export_detector, random_detector

            steps.label("making the random checkpoint")
            checkpoint = checkpoint or random_detector(family, size, image_size)
            steps.label("exporting the bundle")
            opened = open_bundle(str(exported_bundle(checkpoint, export_detector)))
        else:
            opened = open_bundle(bundle)
        if not torch_here:
            note("PyTorch is not installed: no comparison. Install it with: pip install 'pixano-edge[export]'")
            checkpoint = None
        elif checkpoint is None:
            note("Without --checkpoint there is nothing to compare --bundle with.")
        if picture is None:
            from skimage import data

            image = data.coffee()
        else:
            image = decode_image(picture)
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
    if "-random" in opened.manifest.name:
        note("The weights are random: speed is that of the real size, boxes are arbitrary and touchier than real ones.")
    _tell(beside)
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
    report_figures({**content, **_told(beside), **figures.to_dict(), "environment": facts}, show, as_json, output)


@app.command()
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
    from pixano_edge.engine.models.images import decode_image

    from .describe import ACCURACY_COLUMNS, COLUMNS, accuracy_rows, bound_lines, measure, table_rows

    torch_here = all(importlib.util.find_spec(m) is not None for m in ("torch", "transformers"))
    if not torch_here and bundle is None:
        raise MissingDependencyError("torch", "export", "Making the bundle and the comparison with PyTorch")
    if picture is None and importlib.util.find_spec("skimage") is None:
        raise MissingDependencyError("skimage", "benchmarks", "The default picture")
    facts = environment(threads)
    with progress("Preparing", None, enabled=not as_json) as steps:
        if bundle is None:
            from .checkpoints import exported_bundle
            from .vlm_checkpoints import export_smolvlm, random_smolvlm

            steps.label("making the random checkpoint")
            checkpoint = checkpoint or random_smolvlm(size)
            steps.label("exporting the bundle")
            opened = open_bundle(str(exported_bundle(checkpoint, export_smolvlm)))
        else:
            opened = open_bundle(bundle)
        if not torch_here:
            note("PyTorch is not installed: no comparison. Install it with: pip install 'pixano-edge[export]'")
            checkpoint = None
        elif checkpoint is None:
            note("Without --checkpoint there is nothing to compare --bundle with.")
        if picture is None:
            from skimage import data

            image = data.coffee()
        else:
            image = decode_image(picture)
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
    if "-random" in opened.manifest.name:
        note("The weights are random: speed is that of the real size, answers mean nothing.")
    for name, why in figures.left_out.items():
        note(f"Not measured: {name}: {why}")

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


@app.command()
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


@app.command()
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


app.command(name="quality")(cli_quality.quality)
app.command(name="track-quality")(cli_quality.track_quality)
app.command(name="describe-quality")(cli_quality.describe_quality)
app.command(name="detect-quality")(cli_quality.detect_quality)
app.command(name="calibrated")(cli_calibrated.calibrated)
cli_all.register(app)
cli_scale.register(app)
