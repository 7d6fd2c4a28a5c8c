"""`pixano-edge bench`: speed beside PyTorch, quality beside baselines, memory over many clicks."""

from __future__ import annotations

import typer

from . import cli_all, cli_calibrated, cli_quality, cli_sam2, cli_scale, cli_words

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def _bench() -> None:
    """Measure speed, memory and mask quality."""


cli_sam2.register(app)
cli_words.register(app)
app.command(name="quality")(cli_quality.quality)
app.command(name="track-quality")(cli_quality.track_quality)
app.command(name="describe-quality")(cli_quality.describe_quality)
app.command(name="detect-quality")(cli_quality.detect_quality)
app.command(name="calibrated")(cli_calibrated.calibrated)
cli_all.register(app)
cli_scale.register(app)
