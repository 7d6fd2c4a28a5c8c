"""Scenes to talk about: one to five shapes that stand free on a textured ground, each in its own ninth of the picture.

They are made of the parts of :mod:`.scenes`, and easier on purpose: what the demo's language model is to show is that a
picture's content reaches its answers, not that it finds hidden things.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pixano_edge.export.demo.scenes import Placement, degrade, paint, rasterise
from pixano_edge.export.demo.textures import COLORS, Split, background, object_texture

SIZE = 128
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent")
COLOR_NAMES: tuple[str, ...] = tuple(COLORS)
PATTERNS: tuple[str, ...] = ("plain", "striped", "dotted")
PLACES: tuple[str, ...] = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
MOST = 5
"""Objects of a scene at most."""
CLEAR = 70.0
"""How far, in levels of RGB, an object's colour is at least from the mean of the ground that it stands on."""
_SPLIT_KEY = {"train": 21, "heldout": 22}
_COLORLESS = ("black", "gray", "white")


@dataclass(frozen=True)
class Thing:
    """One object: its words and its ``place``, an index into :data:`PLACES`."""

    shape: str
    color: str
    place: int


@dataclass(frozen=True)
class TalkScene:
    """``image`` (SIZE, SIZE, 3) uint8 RGB, its things in reading order, and ``owner`` (SIZE, SIZE) int8, the index of
    the thing that shows at each pixel, -1 for none."""

    image: NDArray[np.uint8]
    things: tuple[Thing, ...]
    owner: NDArray[np.int8]


def talk_scene(seed: int, split: Split) -> TalkScene:
    """The scene of a seed, a pure function; the two splits draw from independent streams, photographs and noises."""
    rng = np.random.default_rng([_SPLIT_KEY[split], seed])
    image = background(rng, split, SIZE, SIZE)
    owner = np.full((SIZE, SIZE), -1, np.int8)
    cell = SIZE / 3
    places = sorted(int(p) for p in rng.permutation(len(PLACES))[: rng.integers(1, MOST + 1)])
    light = rng.uniform(0, 2 * np.pi)
    things: list[Thing] = []
    for index, place in enumerate(places):
        radius = cell * rng.uniform(0.33, 0.47)
        slack = cell / 2 - radius
        x = (place % 3 + 0.5) * cell + rng.uniform(-slack, slack)
        y = (place // 3 + 0.5) * cell + rng.uniform(-slack, slack)
        shape, color = _dress(rng, things, _ground(image, x, y, radius))
        pattern = "plain" if color in _COLORLESS else PATTERNS[int(rng.choice(3, p=[0.6, 0.2, 0.2]))]
        at = Placement(x, y, radius, radius, rng.uniform(0, 2 * np.pi))
        coverage = rasterise(shape, at, SIZE, SIZE)
        side = int(3 * radius) + 4
        texture = object_texture(rng, split, color, pattern, side, side)
        far = rng.uniform(1, 3)
        shadow = (far * np.cos(light), far * np.sin(light), rng.uniform(1, 3), rng.uniform(0.3, 0.7))
        paint(image, coverage, texture, at, shadow if rng.random() < 0.65 else None)
        owner[coverage > 127] = index
        things.append(Thing(shape, color, place))
    return TalkScene(degrade(rng, image), tuple(things), owner)


def _ground(image: NDArray[np.float32], x: float, y: float, radius: float) -> NDArray[np.float32]:
    """The mean colour (3,) of what an object would stand on."""
    y0, y1, x0, x1 = (int(np.clip(v, 0, SIZE)) for v in (y - radius, y + radius, x - radius, x + radius))
    return np.asarray(image[y0:y1, x0:x1].mean((0, 1)), np.float32)


def _dress(rng: np.random.Generator, others: list[Thing], ground: NDArray[np.float32]) -> tuple[str, str]:
    """A shape and a colour that is clear of the ground; now and then one of them is that of an earlier object, so that
    there is something to count."""
    shape = SHAPES[rng.integers(len(SHAPES))]
    if others and rng.random() < 0.3:
        shape = others[rng.integers(len(others))].shape
    clear = [n for n in COLOR_NAMES if np.abs(np.array(COLORS[n], np.float32) - ground).max() > CLEAR]
    worn = [thing.color for thing in others if thing.color in clear]
    if worn and rng.random() < 0.4:
        return shape, worn[rng.integers(len(worn))]
    return shape, clear[rng.integers(len(clear))]
