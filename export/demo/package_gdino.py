"""Makes the bundle of the demo's Grounding DINO that ships with the package, from the checkpoint in the source.

Run from the repository root: ``python -m pixano_edge.export.demo.package_gdino``. After another training run:
``--trained FOLDER`` takes that run's checkpoint first, its scores calibrated and its queries' boxes kept as they start
(:mod:`.calibrate_gdino`). Weights are rounded to half precision, as for the demo's SAM 2 (:mod:`.package`), and the
bundle goes into ``engine/assets/grounding-dino-demo``: in fp32 only, to keep the package small.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import GroundingDinoForObjectDetection

from pixano_edge.export.demo.calibrate_gdino import calibrate, keep_boxes
from pixano_edge.export.demo.gdino_model import build_processor, build_tokenizer
from pixano_edge.export.demo.package import check_size, round_checkpoint, scene_photos
from pixano_edge.export.demo.package_owlv2 import CLASSES
from pixano_edge.export.grounding_dino import export_grounding_dino

NAME = "grounding-dino-demo"
CHECKPOINT = Path("export/demo/checkpoints") / NAME
BUNDLE = Path("engine/assets") / NAME


def package(checkpoint: Path, bundle: Path, threads: int | None = None) -> Path:
    """Rounds `checkpoint` in place and exports it to `bundle`, which is replaced.

    Raises:
        ExportError: The bundle is too large; or as `export_grounding_dino`, and the old bundle stays.
    """
    change = round_checkpoint(checkpoint, checkpoint)
    typer.echo(f"Weights rounded to fp16: largest change {change:.1e} of a tensor's largest weight.")
    export_grounding_dino(
        checkpoint,
        bundle,
        licence="Apache-2.0",
        name=NAME,
        variants=("fp32",),
        photos=scene_photos(),
        classes=CLASSES,
        threads=threads,
        force=True,
        progress=lambda name, done, total: typer.echo(f"{done + 1}/{total} {name}"),
    )
    check_size(bundle)
    return bundle


def take(trained: Path, checkpoint: Path) -> None:
    """Writes a trained checkpoint, calibrated and rounded, to `checkpoint`, which is replaced."""
    kind: Any = GroundingDinoForObjectDetection
    model = kind.from_pretrained(trained, dtype=torch.float32)
    tokenizer = build_tokenizer()
    keep_boxes(model)
    threshold = calibrate(model, tokenizer)
    typer.echo(f"Scores calibrated: {threshold:.3f} is now 0.5.")
    with tempfile.TemporaryDirectory() as work:
        model.save_pretrained(work)
        build_processor(tokenizer).save_pretrained(work)
        round_checkpoint(Path(work), checkpoint)


def main(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint in the source; rounded in place.")] = CHECKPOINT,
    bundle: Annotated[Path, typer.Option(help="Bundle to replace.")] = BUNDLE,
    trained: Annotated[Path | None, typer.Option(help="A newly trained checkpoint, which replaces the former.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of ONNX Runtime while measuring.")] = None,
) -> None:
    """Make the packaged Grounding DINO's bundle anew."""
    if trained is not None:
        take(trained, checkpoint)
    package(checkpoint, bundle, threads)


if __name__ == "__main__":
    typer.run(main)
