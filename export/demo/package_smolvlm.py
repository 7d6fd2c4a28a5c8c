"""Makes the demo language model's bundle that ships with the package, from the checkpoint that ships with the source.

Run from the repository root: ``python -m pixano_edge.export.demo.package_smolvlm``. After another training run:
``--trained FOLDER`` takes that run's checkpoint first. Weights are rounded to half precision, as for the demo's SAM 2
(:mod:`.package`), and the bundle goes into ``engine/assets/smolvlm-demo``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from pixano_edge.engine.errors import ExportError
from pixano_edge.export.demo.package import round_checkpoint
from pixano_edge.export.demo.vqa_scenes import talk_scene
from pixano_edge.export.photos import Photo
from pixano_edge.export.smolvlm import export_smolvlm

NAME = "smolvlm-demo"
CHECKPOINT = Path("export/demo/checkpoints") / NAME
BUNDLE = Path("engine/assets") / NAME
SEEDS = (900_001, 900_002, 900_003)
"""Held-out scenes that neither training nor the table of answers looks at."""
QUESTIONS = ("Describe the image.", "How many objects are there?", "What is in the center?")
MAX_BYTES = 20_000_000
"""Largest size of the bundle in the package."""


def talk_photos() -> list[Photo]:
    """Held-out scenes for parity and golden samples: the model knows no photos."""
    origin = "a drawn scene of pixano-edge over textures in the public domain or under CC0"
    return [Photo(f"talk{s}", np.ascontiguousarray(talk_scene(s, "heldout").image), origin) for s in SEEDS]


def package(checkpoint: Path, bundle: Path, threads: int | None = None) -> Path:
    """Rounds `checkpoint` in place and exports it to `bundle`, which is replaced.

    Raises:
        ExportError: The bundle is too large; or as `export_smolvlm`, and the old bundle stays.
    """
    change = round_checkpoint(checkpoint, checkpoint)
    typer.echo(f"Weights rounded to fp16: largest change {change:.1e} of a tensor's largest weight.")
    export_smolvlm(
        checkpoint,
        bundle,
        licence="Apache-2.0",
        name=NAME,
        photos=talk_photos(),
        questions=QUESTIONS,
        threads=threads,
        force=True,
        progress=lambda name, done, total: typer.echo(f"{done + 1}/{total} {name}"),
    )
    size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    typer.echo(f"{bundle}: {size} bytes")
    if size > MAX_BYTES:
        raise ExportError(f"The bundle has {size} bytes, more than {MAX_BYTES}.", "Train a smaller model.")
    return bundle


def main(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint in the source; rounded in place.")] = CHECKPOINT,
    bundle: Annotated[Path, typer.Option(help="Bundle to replace.")] = BUNDLE,
    trained: Annotated[Path | None, typer.Option(help="A newly trained checkpoint, which replaces the former.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of ONNX Runtime while measuring.")] = None,
) -> None:
    """Make the packaged language model's bundle anew."""
    if trained is not None:
        round_checkpoint(trained, checkpoint)
    package(checkpoint, bundle, threads)


if __name__ == "__main__":
    typer.run(main)
