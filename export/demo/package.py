"""Makes the demo bundle that ships with the package, from the checkpoint that ships with the source.

Run from the repository root: ``python -m pixano_edge.export.demo.package``. It rounds the checkpoint's weights to half
precision (where they are not already), exports images and video in fp32 and fp16, and puts the bundle into
``engine/assets/sam2-demo``. After another training run: ``--trained FOLDER`` takes that run's checkpoint first. With
``--cpu-graphs`` the bundle stays as it is but for its graphs for CPUs, which are made anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file

from pixano_edge.engine.bundle.store import DEMO_NAME
from pixano_edge.engine.errors import ExportError
from pixano_edge.export.demo.scenes import generate_scene
from pixano_edge.export.photos import Photo
from pixano_edge.export.sam2 import export_sam2
from pixano_edge.export.sam2.cpu_graphs import add_cpu_graphs

CHECKPOINT = Path("export/demo/checkpoints") / DEMO_NAME
BUNDLE = Path("engine/assets") / DEMO_NAME
# Held-out seeds that neither training, the quality table nor the demo's pictures look at.
SEEDS = (900_001, 900_002, 900_003)
MAX_BYTES = 15_000_000
"""Largest size of the bundle in the package."""


def scene_photos(seeds: Sequence[int] = SEEDS) -> list[Photo]:
    """Held-out scenes for parity and golden samples: the model knows no photos."""
    origin = "a drawn scene of pixano-edge over textures in the public domain or under CC0"
    return [Photo(f"scene{s}", np.ascontiguousarray(generate_scene(s, "heldout").image), origin) for s in seeds]


def round_checkpoint(source: Path, target: Path) -> float:
    """Writes a checkpoint with its weights rounded to fp16, and stored so.

    The graphs of a rounded checkpoint in fp32 and fp16 share their weights, so the bundle is half as large; what the
    rounding costs is in the model that is measured, not in the export.

    Args:
        source: Folder in transformers' format, one safetensors file.
        target: Folder to write; may be the same.

    Returns:
        Largest change of a weight relative to the largest weight of its tensor.

    Raises:
        ExportError: A weight is beyond fp16's range.
    """
    weights = load_file(source / "model.safetensors")
    rounded, worst = {}, 0.0
    for name, value in weights.items():
        half = value.to(torch.float16) if value.is_floating_point() else value
        if not torch.isfinite(half).all():
            raise ExportError(f"'{name}' has weights beyond 65504.", "Such a model cannot be stored in half precision.")
        change = (half.to(value.dtype) - value).abs().max() / value.abs().max().clamp(min=1e-12)
        worst = max(worst, float(change))
        rounded[name] = half.contiguous()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float16"
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if source.resolve() != target.resolve() and file.is_file():
            shutil.copyfile(file, target / file.name)
    save_file(rounded, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return worst


def package(checkpoint: Path, bundle: Path, threads: int | None = None) -> Path:
    """Rounds `checkpoint` in place and exports it to `bundle`, which is replaced.

    Raises:
        ExportError: The bundle is larger than `MAX_BYTES`; or as `export_sam2`, and the old bundle stays.
    """
    change = round_checkpoint(checkpoint, checkpoint)
    typer.echo(f"Weights rounded to fp16: largest change {change:.1e} of a tensor's largest weight.")
    export_sam2(
        checkpoint,
        bundle,
        photos=scene_photos(),
        licence="Apache-2.0",
        threads=threads,
        force=True,
        progress=_say,
    )
    check_size(bundle)
    return bundle


def _say(name: str, done: int, total: int) -> None:
    typer.echo(f"{done + 1}/{total} {name}")


def check_size(bundle: Path) -> int:
    """Bytes of a bundle; raises ExportError if they are more than `MAX_BYTES`."""
    size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    typer.echo(f"{bundle}: {size} bytes")
    if size > MAX_BYTES:
        raise ExportError(
            f"The bundle has {size} bytes, more than {MAX_BYTES}.", "A smaller model is needed in the package."
        )
    return size


def main(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint in the source; rounded in place.")] = CHECKPOINT,
    bundle: Annotated[Path, typer.Option(help="Bundle to replace.")] = BUNDLE,
    trained: Annotated[Path | None, typer.Option(help="A newly trained checkpoint, which replaces the former.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of ONNX Runtime while measuring.")] = None,
    cpu_graphs: Annotated[bool, typer.Option("--cpu-graphs", help="Only renew the bundle's graphs for CPUs.")] = False,
) -> None:
    """Make the packaged demo bundle anew."""
    if cpu_graphs:
        add_cpu_graphs(bundle, checkpoint, threads=threads, progress=_say)
        check_size(bundle)
        return
    if trained is not None:
        round_checkpoint(trained, checkpoint)
    package(checkpoint, bundle, threads)


if __name__ == "__main__":
    typer.run(main)
