"""Makes the pictures that `pixano-edge demo` segments: held-out scenes with prompts and true masks.

Run from the repository root: ``python -m pixano_edge.export.demo.pictures engine/assets/demo``. The photographs in the
textures are the ones in the scikit-image wheel, all CC0 or in the public domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pixano_edge.engine.models.rle import encode_rle
from pixano_edge.export.demo.files import write_list, write_png
from pixano_edge.export.demo.scenes import generate_scene, held_out_prompts

# Held-out seeds that neither training nor the quality table looks at, with at least three objects to ask about; no
# model's answers were looked at in choosing them.
SEEDS: tuple[int, ...] = (100_006, 100_010, 100_021, 100_026)
SIZE = 512


def make_pictures(folder: Path, seeds: Sequence[int] = SEEDS, size: int = SIZE) -> list[Path]:
    """Writes one PNG per seed and ``demo.json`` with, per object, its words, a click, a box and its true mask.

    Args:
        folder: Where to write; made when it is not there.
        seeds: Held-out seeds.
        size: Side of the pictures in pixels.

    Returns:
        The pictures written. Equal arguments give equal files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[dict[str, Any]] = []
    paths = []
    for number, seed in enumerate(seeds, 1):
        scene = generate_scene(seed, "heldout", size)
        objects = []
        for prompt in held_out_prompts(scene):
            truth = scene.objects[prompt.index]
            rle = encode_rle(truth.visible)
            objects.append(
                {
                    "name": f"{truth.color} {truth.pattern} {truth.shape}",
                    "click": list(prompt.click),
                    "box": list(prompt.box),
                    "truth": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
                }
            )
        path = folder / f"scene-{number}.png"
        paths.append(write_png(path, scene.image))
        pictures.append({"file": path.name, "seed": seed, "size": size, "objects": objects})
    write_list(folder / "demo.json", pictures)
    return paths


def main(folder: Annotated[Path, typer.Argument(help="Folder to write to.")]) -> None:
    """Write the demo's pictures and prompts."""
    for path in make_pictures(folder):
        typer.echo(str(path))


if __name__ == "__main__":
    typer.run(main)
