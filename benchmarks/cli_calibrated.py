"""`pixano-edge bench calibrated`: what calibration costs on the demo bundles, with the truth known."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from pixano_edge.engine.cli.options import ThreadsOption, resolve_bundle
from pixano_edge.engine.cli.output import JsonOption, progress
from pixano_edge.engine.errors import CalibrationError, MissingDependencyError

from .cli_report import OutputOption, report_figures
from .report import environment, markdown
from .seeds import FIRST_SEED


def calibrated(
    bundle: Annotated[str, typer.Option(help="Folder of a demo bundle with the variant.")],
    precision: Annotated[str, typer.Option(help="Of the variant.")] = "int8",
    scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes, or clips.")] = 200,
    first: Annotated[int, typer.Option(min=0, help="Seed of the first held-out scene.")] = FIRST_SEED,
    clips: Annotated[bool, typer.Option("--clips", help="SAM 2: track clips.")] = False,
    frames: Annotated[int, typer.Option(min=2, help="Frames of a clip.")] = 60,
    threads: ThreadsOption = 1,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a calibrated variant with fp32 against the truth of held-out scenes; more than a point lost is an error.

    Needs no torch. Equal arguments give equal figures; the table is Markdown. Make the variant with:
    python -m pixano_edge.export.demo.write_scenes --out scenes --coco, then
    pixano-edge calibrate sam2-demo --data scenes --output sam2-int8.
    """
    if importlib.util.find_spec("skimage") is None:
        raise MissingDependencyError("skimage", "benchmarks", "The textures of the scenes")
    from .calibrated import BAR, COLUMNS, compare, table_rows

    with progress("Clips" if clips else "Scenes", scenes, enabled=not as_json) as steps:
        found = compare(
            resolve_bundle(bundle),
            precision,
            scenes,
            first,
            clips=clips,
            frames=frames,
            threads=threads,
            on_scene=steps.step,
        )

    def show() -> None:
        what = "clips" if clips else "scenes"
        typer.echo(f"{found.scenes} held-out {what} from seed {first}; 95 % intervals of the difference over {what}\n")
        typer.echo(markdown(COLUMNS, table_rows(found)))

    content = {"benchmark": "calibrated", "first": first, **found.to_dict()}
    report_figures({**content, "environment": environment(threads)}, show, as_json, output)
    if not found.passed:
        raise CalibrationError(
            f"'{precision}' loses more than {100 * BAR:.0f} point.", "Calibrate with a higher --budget."
        )
