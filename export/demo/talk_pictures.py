"""Makes the pictures that `pixano-edge demo` asks about: held-out scenes with questions and their right answers.

Run from the repository root: ``python -m pixano_edge.export.demo.talk_pictures engine/assets/demo``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from pixano_edge.export.demo.files import write_list, write_png
from pixano_edge.export.demo.questions import TYPES, ask
from pixano_edge.export.demo.vqa_scenes import talk_scene

# Held-out seeds that neither training nor the table of answers looks at; no model's answers were looked at in choosing.
SEEDS: tuple[int, ...] = (900_011, 900_012, 900_013)


def make_pictures(folder: Path, seeds: Sequence[int] = SEEDS) -> list[Path]:
    """Writes one PNG per seed and ``talk.json`` with a question of every type and a caption for each.

    Args:
        folder: Where to write; made when it is not there.
        seeds: Held-out seeds.

    Returns:
        The pictures written. Equal arguments give equal files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[dict[str, Any]] = []
    paths = []
    for number, seed in enumerate(seeds, 1):
        scene = talk_scene(seed, "heldout")
        rng = np.random.default_rng([43, seed])
        asked = [question for kind in (*TYPES, "caption") if (question := ask(scene, kind, rng)) is not None]
        path = folder / f"talk-{number}.png"
        paths.append(write_png(path, scene.image))
        questions = [{"question": q.text, "answer": q.answer} for q in asked]
        pictures.append({"file": path.name, "seed": seed, "questions": questions})
    write_list(folder / "talk.json", pictures)
    return paths


def main(folder: Annotated[Path, typer.Argument(help="Folder to write to.")]) -> None:
    """Write the pictures and questions of the demo's language model."""
    for path in make_pictures(folder):
        typer.echo(str(path))


if __name__ == "__main__":
    typer.run(main)
