"""What the commands of `pixano-edge bench` share: where figures go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pixano_edge.engine.cli.output import note, print_json

from .report import environment_lines, write_json

OutputOption = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Also write all figures to this file, as JSON.")
]

CompileOption = Annotated[
    bool, typer.Option("--compile", help="Have torch.compile beside plain PyTorch; compiling takes minutes.")
]


def report_figures(content: dict[str, Any], show: Callable[[], None], as_json: bool, output: Path | None) -> None:
    """Prints the figures, as JSON or by `show` with the environment below, and writes the file that was asked for."""
    if as_json:
        print_json(content)
    else:
        show()
        typer.echo("\n" + "\n".join(environment_lines(content["environment"])))
    if output is not None:
        write_json(output, content)
        note(f"Figures written to {output}")
