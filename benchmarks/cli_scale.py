"""`pixano-edge bench startup`, `graphs` and `scaling`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.bundle.store import DEMO_NAMES, demo_path
from pixano_edge.engine.cli.options import open_bundle
from pixano_edge.engine.cli.output import JsonOption, bytes_text, print_table, progress
from pixano_edge.engine.errors import EdgeError, MissingDependencyError

from .cli_models import random_detector, random_sam2, tell_left_out
from .cli_report import OutputOption, report_figures
from .report import environment

SizeOption = Annotated[
    str | None, typer.Option(help="Random SAM 2.1 instead: demo, tiny, small, base-plus, large; needs torch.")
]
SideOption = Annotated[int | None, typer.Option(help="Side of its input; default: 256 for demo, 1024 for others.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="CPU threads of the engine.")]


def startup(
    bundle: Annotated[
        list[str] | None,
        typer.Option(help="Bundle folder, or a name in the store; may be repeated. Default: all demo bundles."),
    ] = None,
    size: SizeOption = None,
    image_size: SideOption = None,
    starts: Annotated[int, typer.Option(min=1, help="Starts of the server; the median counts.")] = 5,
    threads: ThreadsOption = 2,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cold start of `serve` until its models are ready, first request against later ones, import time, peak memory.

    Bars of the project stand beside the figures. With --size a random SAM 2.1 and a random OWLv2 are served.
    """
    if importlib.util.find_spec("fastapi") is None:
        raise MissingDependencyError("fastapi", "server", "The server")
    if importlib.util.find_spec("skimage") is None:
        raise MissingDependencyError("skimage", "benchmarks", "The photo")
    from .startup import COLUMNS, measure, module_rows, table_rows

    facts = environment(threads)
    with progress("Preparing", None, enabled=not as_json) as steps:
        demo = not bundle and size is None
        if bundle:
            bundles = [open_bundle(name) for name in bundle]
        elif size is not None:
            steps.label("making the bundles")
            bundles = [random_sam2(size, image_size), random_detector("demo" if size == "demo" else "base")]
        else:
            bundles = [Bundle.open(demo_path(name)) for name in DEMO_NAMES]
        out = measure(bundles, starts=starts, threads=threads, demo=demo, step=steps.label)

    def show() -> None:
        print_table(COLUMNS, table_rows(out), title=f"Start-up with {', '.join(out['models'])}", right=COLUMNS[1:3])
        memory = out["memory"]
        first = out["cold_start"]["very_first"]
        typer.echo(f"the very first start, without bytecode and before golden samples were run: {first:.2f} s")
        typer.echo(
            f"memory: server without a model {bytes_text(memory['idle'])}, empty process with all libraries "
            f"{bytes_text(memory['empty'])}, weights {bytes_text(memory['weights'])}, activations "
            f"{bytes_text(memory['activations'])}, bound tensors {bytes_text(memory['bindings'])}"
        )
        typer.echo()
        print_table(("module", "own ms"), module_rows(out), title="Slowest imports, one run", right=("own ms",))

    report_figures({**out, "environment": facts}, show, as_json, output)


def graphs(
    bundle: Annotated[str | None, typer.Option(help="Bundle folder, or a name in the store.")] = None,
    size: SizeOption = None,
    image_size: SideOption = None,
    precision: Annotated[str, typer.Option(help="Variant whose files take part beside fp32's.")] = "fp32",
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each graph and contender.")] = 20,
    threads: ThreadsOption = 2,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every graph of a bundle by itself: the engine next to stock ONNX Runtime and OpenVINO on the same file.

    Inputs are those that the model really gives its graphs: a click, a frame tracked with a full memory bank, a
    detection.
    """
    from .graphs import BASELINE, COLUMNS, measure, table_rows, to_dicts

    if importlib.util.find_spec("skimage") is None:
        raise MissingDependencyError("skimage", "benchmarks", "The photo")
    facts = environment(threads)
    with progress("Preparing", None, enabled=not as_json) as steps:
        opened = random_sam2(size, image_size) if size is not None else open_bundle(bundle or "sam2-demo")
        rows, left_out = measure(opened, rounds=rounds, threads=threads, precision=precision, step=steps.label)
    tell_left_out(left_out)
    content = {
        "benchmark": "graphs", "bundle": opened.manifest.name, "precision": precision, "rounds": rounds,
        "baseline": BASELINE, "rows": to_dicts(rows), "left_out": left_out, "environment": facts,
    }  # fmt: skip
    report_figures(
        content,
        lambda: print_table(COLUMNS, table_rows(rows), title=opened.manifest.name, right=COLUMNS[2:]),
        as_json,
        output,
    )


def scaling(
    bundle: Annotated[str, typer.Option(help="A SAM 2 that tracks: folder, or a name in the store.")] = "sam2-demo",
    axis: Annotated[
        list[str] | None,
        typer.Option(
            help="picture, input (needs torch), prompts, objects, frames, clients or threads; may be repeated. "
            "Default: all."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Short axes and few rounds.")] = False,
    threads: ThreadsOption = 2,
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the plots, as one HTML page.")] = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """How times grow with the picture, the model's input, prompts, objects, frames, clients and threads.

    A line a + b * x is fitted through each curve (b * x^2 for the input, b / x for threads) and told with its R2.
    """
    from .fitting import COLUMNS, curve_rows
    from .scaling import AXES, QUICK, Extent, measure

    if importlib.util.find_spec("skimage") is None:
        raise MissingDependencyError("skimage", "benchmarks", "The photo")
    axes = list(dict.fromkeys(axis or AXES))
    left_out: dict[str, str] = {}
    for name, module, extra in (("input", "torch", "export"), ("clients", "fastapi", "server")):
        if name in axes and importlib.util.find_spec(module) is None:
            if axis:
                raise MissingDependencyError(module, extra, f"The axis '{name}'")
            axes.remove(name)
            left_out[name] = f"needs '{module}': pip install 'pixano-edge[{extra}]'"
    facts = environment(threads)
    with progress("Preparing", None, enabled=not as_json) as steps:
        opened = open_bundle(bundle)
        curves, missing = measure(opened, axes, QUICK if quick else Extent(), threads, steps.label)
    left_out |= missing
    tell_left_out(left_out)
    if axis and missing:
        raise EdgeError(
            f"Axis {sorted(missing)} could not be measured: {next(iter(missing.values()))}", "Leave it out."
        )
    content: dict[str, Any] = {
        "benchmark": "scaling", "bundle": opened.manifest.name, "quick": quick, "curves": curves, "left_out": left_out,
        "environment": facts,
    }  # fmt: skip

    if page is not None:
        _write_page(page, content, axes)
    report_figures(
        content,
        lambda: print_table(COLUMNS, curve_rows(curves), title=opened.manifest.name),
        as_json,
        output,
    )


def _write_page(path: Path, content: dict[str, Any], axes: list[str]) -> None:
    """The curves as a page of their own."""
    from .cli_all import write_text
    from .page import to_page
    from .power_mode import read_power_mode
    from .readings import read_scaling
    from .results import Part, Run

    read = read_scaling(content)
    command = "pixano-edge bench scaling" + "".join(f" --axis {name}" for name in axes)
    part = Part(
        "scaling", read.title, "passed", "", command, 0.0, figures=tuple(read.figures), left_out=read.left_out,
        curves=tuple(read.curves),
    )  # fmt: skip
    settings = {"size": content["bundle"], "quick": content["quick"], "command": command}
    facts = {**content["environment"], "power": read_power_mode()}
    write_text(path, to_page(Run(settings, facts, (part,))))


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command(name="startup")(startup)
    app.command(name="graphs")(graphs)
    app.command(name="scaling")(scaling)
