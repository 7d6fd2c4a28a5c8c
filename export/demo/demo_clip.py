"""Makes the clip that `pixano-edge demo` tracks: a held-out clip as a video, with clicks and true masks.

Run from the repository root: ``python -m pixano_edge.export.demo.demo_clip engine/assets/demo``. The photographs in the
textures are the ones in the scikit-image wheel, all CC0 or in the public domain.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer

from pixano_edge.engine.models.rle import encode_rle
from pixano_edge.export.demo.clips import Clip, first_prompts, generate_clip

LENGTH = 40
FPS = 12
FIRST_SEED = 100_000  # neither training nor the quality table looks at these
OBJECTS = 3
HIDDEN = 3


def suits(clip: Clip) -> bool:
    """Whether a clip shows what tracking is about: at least three objects to ask for, one of which is hidden entirely
    for at least three frames and comes back."""
    tracks = [np.asarray(clip.visible(p.index).any((1, 2))) for p in first_prompts(clip)]
    gone = [[i for i, seen in enumerate(track) if not seen] for track in tracks]
    return len(tracks) >= OBJECTS and any(len(g) >= HIDDEN and g[-1] < len(clip.images) - 4 for g in gone)


def chosen_seed() -> int:
    """The first held-out seed whose clip suits; no model's answers are looked at."""
    return next(seed for seed in itertools.count(FIRST_SEED) if suits(generate_clip(seed, "heldout", LENGTH)))


def make_clip(folder: Path) -> Path:
    """Writes ``clip.mp4`` and ``clip.json`` with, per object, its words, a click on the first frame and its true mask
    on every frame; returns the video. Equal versions of OpenCV give equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    seed = chosen_seed()
    clip = generate_clip(seed, "heldout", LENGTH)
    objects: list[dict[str, Any]] = []
    for prompt in first_prompts(clip):
        actor = clip.script.actors[prompt.index]
        counts = [encode_rle(mask)["counts"].decode("ascii") for mask in clip.visible(prompt.index)]
        name = f"{actor.color} {actor.pattern} {actor.shape}"
        objects.append({"name": name, "click": list(prompt.click), "truth": counts})
    path = folder / "clip.mp4"
    height, width = clip.images.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), FPS, (width, height))
    if not writer.isOpened():
        raise OSError("this OpenCV cannot write MP4 files")
    for image in clip.images:
        writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    writer.release()
    content = {"file": path.name, "seed": seed, "frames": LENGTH, "fps": FPS, "size": [height, width]}
    text = json.dumps({**content, "objects": objects}, indent=1) + "\n"
    (folder / "clip.json").write_text(text, encoding="utf-8")
    return path


def main(folder: Annotated[Path, typer.Argument(help="Folder to write to.")]) -> None:
    """Write the demo's clip."""
    typer.echo(str(make_clip(folder)))


if __name__ == "__main__":
    typer.run(main)
