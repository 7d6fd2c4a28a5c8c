"""Writes training scenes of the demo as files, for example to calibrate the demo bundles on.

Run as ``python -m pixano_edge.export.demo.write_scenes --out DIR --count 64``. The scenes come from the training split:
none shares photographs or noise with the held-out ones that quality is measured on. ``--clips`` writes clips, a folder
of frames each, ``--coco`` a JSON with every object beside the pictures, ``--talk`` what the language model knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pixano_edge.engine.models.rle import encode_rle
from pixano_edge.export.demo.clips import generate_clip
from pixano_edge.export.demo.files import write_png
from pixano_edge.export.demo.scenes import SIZE, generate_scene, is_evaluated
from pixano_edge.export.demo.vqa_scenes import talk_scene

FIRST_SEED = 900_000_000
"""Beyond what training draws in practice (seeds count from 0), so that calibration sees other scenes, too."""


def write_scenes(
    folder: Path,
    count: int,
    *,
    first: int = FIRST_SEED,
    size: int = SIZE,
    coco: bool = False,
    on_scene: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Writes pictures ``scene-000000.png``...; equal arguments give equal files.

    Args:
        folder: Where to write; made when it is not there.
        count: Scenes.
        first: Seed of the first one.
        size: Side in pixels.
        coco: Also write ``scenes.json`` with the objects, categories such as ``red circle``.
        on_scene: Called after each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    images: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    names: dict[str, int] = {}
    for number in range(count):
        scene = generate_scene(first + number, "train", size)
        path = write_png(folder / f"scene-{number:06d}.png", scene.image)
        paths.append(path)
        images.append({"id": number, "file_name": path.name, "width": size, "height": size})
        for thing in scene.objects:
            if is_evaluated(thing):
                x0, y0, x1, y1 = thing.box
                rle = encode_rle(thing.visible)
                name = f"{thing.color} {thing.shape}"
                note = {
                    "id": len(notes),
                    "image_id": number,
                    "category_id": names.setdefault(name, len(names)),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                }
                notes.append(note)
        on_scene()
    if coco:
        categories = [{"id": index, "name": name} for name, index in names.items()]
        content = {"images": images, "annotations": notes, "categories": categories}
        (folder / "scenes.json").write_text(json.dumps(content), encoding="utf-8")
    return paths


def write_clips(
    folder: Path,
    count: int,
    *,
    first: int = FIRST_SEED,
    length: int = 60,
    size: int = SIZE,
    on_clip: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Writes clips as folders of frames ``clip-000000/000000.png``...; arguments as of `write_scenes`."""
    folders = []
    for number in range(count):
        clip = generate_clip(first + number, "train", length, size)
        place = folder / f"clip-{number:06d}"
        place.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(clip.images):
            write_png(place / f"{index:06d}.png", image)
        folders.append(place)
        on_clip()
    return folders


def write_talk(
    folder: Path, count: int, *, first: int = FIRST_SEED, on_scene: Callable[[], None] = lambda: None
) -> list[Path]:
    """Writes pictures ``talk-000000.png``... of scenes that the demo's language model was taught to talk about;
    arguments as of `write_scenes`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        paths.append(write_png(folder / f"talk-{number:06d}.png", talk_scene(first + number, "train").image))
        on_scene()
    return paths


def main(
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    count: Annotated[int, typer.Option(min=1, help="Scenes, or clips.")] = 64,
    clips: Annotated[bool, typer.Option("--clips", help="Write clips, a folder of frames each.")] = False,
    length: Annotated[int, typer.Option(min=2, help="Frames of a clip.")] = 60,
    size: Annotated[int, typer.Option(min=32, help="Side in pixels.")] = SIZE,
    coco: Annotated[bool, typer.Option("--coco", help="Also write scenes.json with every object.")] = False,
    talk: Annotated[bool, typer.Option("--talk", help="Write scenes of the language model, of its own size.")] = False,
) -> None:
    """Writes training scenes as PNG files."""
    if talk and (clips or coco):
        raise typer.BadParameter("--talk goes with neither --clips nor --coco")
    if talk:
        found = write_talk(out, count)
    elif clips:
        found = write_clips(out, count, length=length, size=size)
    else:
        found = write_scenes(out, count, size=size, coco=coco)
    typer.echo(f"{len(found)} {'clips' if clips else 'scenes'} in {out}")


if __name__ == "__main__":
    typer.run(main)
