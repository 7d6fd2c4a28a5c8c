"""Training scenes drawn once and kept in files, for trainings that show each of them several times.

Drawing a scene costs about as much as a small detector needs to learn from it, so a pool is drawn first, by several
processes, and every epoch shows all of it in other positions. A pool is a pure function of its seed and its size.
"""

from __future__ import annotations

import functools
import multiprocessing as mp
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixano_edge.export.demo.detect_batches import EASY, SLOTS, DetectBatch, fill
from pixano_edge.export.demo.scenes import SIZE, USUAL, generate_scene

CHUNK = 250
EASY_SHARE = 0.1
"""Share of the pool, at its start, with large shapes that stand free: they show soonest what the words mean."""
_FIELDS = ("images", "boxes", "words", "state", "owner")


@dataclass
class ScenePool(DetectBatch):
    """N scenes in one position, as a batch; arrays are read from files where they are used."""

    def __len__(self) -> int:
        return len(self.images)


def _shapes(count: int) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        "images": ((count, SIZE, SIZE, 3), "u1"),
        "boxes": ((count, SLOTS, 4), "<f4"),
        "words": ((count, SLOTS, 3), "<i8"),
        "state": ((count, SLOTS), "<i8"),
        "owner": ((count, SIZE // 4, SIZE // 4), "i1"),
    }


def _files(folder: Path, count: int, mode: Any) -> dict[str, NDArray[np.generic]]:
    """The pool's arrays, new ones for mode ``w+``."""
    made: dict[str, NDArray[np.generic]] = {}
    for name, (shape, dtype) in _shapes(count).items():
        new: dict[str, Any] = {"dtype": dtype, "shape": shape} if mode == "w+" else {}
        made[name] = np.lib.format.open_memmap(folder / f"{name}.npy", mode=mode, **new)
    return made


def _draw(chunk: int, folder: Path, count: int, seed: int) -> int:
    import cv2

    cv2.setNumThreads(1)
    out = DetectBatch(**_files(folder, count, "r+"))  # type: ignore[arg-type]
    for row in range(chunk * CHUNK, min(count, (chunk + 1) * CHUNK)):
        out.owner[row] = -1
        crowd = EASY if row < EASY_SHARE * count else USUAL
        fill(out, row, generate_scene(seed * 10**7 + row, "train", SIZE, crowd), 0)
    return chunk


def draw_pool(folder: Path, count: int, seed: int, processes: int = 2) -> None:
    """Draws `count` scenes into `folder`; goes on where an earlier call was stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "owner.npy").is_file():
        _files(folder, count, "w+")
    done = {int(path.stem) for path in folder.glob("*.done")}
    left = [chunk for chunk in range(-(-count // CHUNK)) if chunk not in done]
    if not left:
        return
    with mp.get_context("spawn").Pool(processes) as workers:
        for chunk in workers.imap_unordered(functools.partial(_draw, folder=folder, count=count, seed=seed), left):
            (folder / f"{chunk}.done").touch()


def open_pool(folder: Path) -> ScenePool:
    """A drawn pool, to read."""
    return ScenePool(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _FIELDS})
