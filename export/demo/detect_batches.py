"""Training batches for the small OWLv2: scenes with the boxes and words of their objects, prepared by a process."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pixano_edge.export.demo.prompts import prepared
from pixano_edge.export.demo.scenes import SHAPES, USUAL, Crowd, Scene, generate_scene, is_evaluated
from pixano_edge.export.demo.textures import COLORS, PATTERNS

SLOTS = 8
"""Most objects of a scene."""
BLOCK, USES = 9, 3
"""Batches that are made together, and how often each of their scenes is shown, in other positions: drawing scenes costs
as much as learning from them."""
HINT_PIXELS = 25
"""An object that is not asked for, and shows at least this, is left out of account; one that shows less is nothing."""

NOTHING, ASKED, UNSURE = 0, 1, 2
EASY_STEPS, EASY = 700, Crowd(near=0.4, small=0.04, camouflage=0.4)
"""The scenes of the first steps: shapes that are large and stand free show soonest what the words mean."""


@dataclass
class DetectBatch:
    """B scenes with up to 8 objects each.

    ``images`` (B, S, S, 3) uint8 RGB; ``boxes`` (B, 8, 4) float32 xyxy pixels around what shows; ``words`` (B, 8, 3)
    int64 indices into ``SHAPES``, ``COLORS`` and ``PATTERNS``; ``state`` (B, 8) int64: ``NOTHING``, ``ASKED`` (enough
    shows, it is to be found) or ``UNSURE``; ``owner`` (B, S/4, S/4) int8 index of the object that shows at each place,
    -1 for none.
    """

    images: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    words: NDArray[np.int64]
    state: NDArray[np.int64]
    owner: NDArray[np.int8]


def _empty(batch: int, size: int) -> DetectBatch:
    return DetectBatch(
        np.zeros((batch, size, size, 3), np.uint8),
        np.zeros((batch, SLOTS, 4), np.float32),
        np.zeros((batch, SLOTS, 3), np.int64),
        np.zeros((batch, SLOTS), np.int64),
        np.full((batch, size // 4, size // 4), -1, np.int8),
    )


def fill(out: DetectBatch, row: int, scene: Scene, turn: int) -> None:
    """Puts a scene into a row, in one of its 8 positions: ``turn`` % 4 quarter turns, mirrored from 4 on.

    Words stay true of turned and mirrored objects.
    """
    size = scene.image.shape[0]
    names = list(COLORS)
    out.images[row] = turned(scene.image, turn)
    for i, obj in enumerate(scene.objects):
        asked = is_evaluated(obj)
        shows = asked or int(np.count_nonzero(obj.visible)) >= HINT_PIXELS
        out.state[row, i] = ASKED if asked else UNSURE if shows else NOTHING
        out.words[row, i] = SHAPES.index(obj.shape), names.index(obj.color), PATTERNS.index(obj.pattern)
        if shows:
            out.boxes[row, i] = turned_box(obj.box, size, turn)
            out.owner[row][turned(obj.visible, turn)[2::4, 2::4]] = i


def turned(picture: NDArray[np.generic], turn: int) -> NDArray[np.generic]:
    """A square picture (S, S, ...) in one of its 8 positions, see :func:`fill`."""
    return np.rot90(picture[:, ::-1] if turn >= 4 else picture, turn % 4)


def turned_box(box: tuple[int, int, int, int], size: int, turn: int) -> tuple[int, int, int, int]:
    """Where :func:`turned` moves a box (xyxy, ends one past the last pixel)."""
    x0, y0, x1, y1 = box
    if turn >= 4:
        x0, x1 = size - x1, size - x0
    for _ in range(turn % 4):  # counter-clockwise: (x, y) goes to (y, size - x)
        x0, y0, x1, y1 = y0, size - x1, y1, size - x0
    return x0, y0, x1, y1


def make_block(block: int, seed: int, batch: int, size: int) -> list[DetectBatch]:
    """``BLOCK`` training batches, each scene shown ``USES`` times in different positions; a pure function."""
    rng = np.random.default_rng([11, seed, block])
    outs = [_empty(batch, size) for _ in range(BLOCK)]
    scenes = BLOCK * batch // USES
    crowd = EASY if block * BLOCK < EASY_STEPS else USUAL
    order = [use * scenes + rng.permutation(scenes) for use in range(USES)]
    for k in range(scenes):
        scene = generate_scene((seed * 10**7 + block) * scenes + k, "train", size, crowd)
        for places, turn in zip(order, rng.permutation(8), strict=False):
            fill(outs[places[k] // batch], int(places[k] % batch), scene, int(turn))
    return outs


def detect_batches(first: int, seed: int, batch: int, size: int) -> Iterator[DetectBatch]:
    """Batches ``first``, ``first + 1``, ... in order, prepared by one process that runs two blocks ahead."""
    blocks = prepared(functools.partial(make_block, seed=seed, batch=batch, size=size), first // BLOCK, 2)
    skip = first % BLOCK
    for block in blocks:
        yield from block[skip:]
        skip = 0
