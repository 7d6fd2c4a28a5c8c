"""What a bundle's manifest tells about calibrated variants, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from .output import print_table

COLUMNS = ("variant", "metric", "held out", "worst", "budget", "samples", "data", "calibrated", "method")


def print_calibrations(entries: Sequence[Mapping[str, Any]]) -> None:
    """Prints the manifest's ``calibrations``, JSON-ready; nothing for none."""
    if not entries:
        return
    rows = [
        (
            e["variant"],
            e["metric"],
            f"{e['held_out']:.4f}",
            f"{e['worst']:.4f}",
            f"{e['budget']:g}",
            f"{e['calibration_samples']} + {e['held_out_samples']} held out",
            e["data"],
            str(e["created"])[:10],
            e["method"],
        )
        for e in entries
    ]
    typer.echo("\nCalibrated, and judged against fp32's answers on held-out data:")
    print_table(COLUMNS, rows, right=COLUMNS[2:5])
    for e in entries:
        if e["report"]:
            typer.echo(f"{e['variant']}: every figure is in {e['report']}")
