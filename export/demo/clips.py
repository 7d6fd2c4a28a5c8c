"""Synthetic clips of moving shapes with exact masks: training and held-out data for tracking.

A clip is a pure function of ``(seed, split, length, size)`` and is made of the parts of :mod:`.scenes`. A
:class:`Script` holds everything that does not change (surfaces, paths, order of depth) and renders any frame on its
own, so that training pays only for the frames it looks at.

Difficulty, on purpose: shapes move, turn, grow and shrink, and bounce off the sides of the picture; most cross another
one, some dressed like it; in many clips a larger shape passes over one and hides it entirely for a while; half the
backgrounds pan slowly; the light drifts, and each frame has its own sensor noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from pixano_edge.export.demo.scenes import (
    MIN_VISIBLE_FRACTION,
    MIN_VISIBLE_PIXELS,
    SHAPES,
    SIZE,
    Crowd,
    Mask,
    Placement,
    Prompt,
    centre_click,
    mask_box,
    paint,
    rasterise,
    sample_placement,
)
from pixano_edge.export.demo.textures import COLORS, PATTERNS, Split, background, object_texture

LENGTH = 60
_CROWD = Crowd(small=0.05, radius=(32.0, 64.0), camouflage=0.5)
Labels = NDArray[np.int8]
_SPLIT_KEY = {"train": 11, "heldout": 12}  # other streams than those of the scenes
_COVERS = ("circle", "square", "hexagon", "heart", "rectangle", "ellipse")


@dataclass(frozen=True)
class Cast:
    """How a clip is filled; the defaults are the clips that everything is judged on.

    ``crowd`` gives extents, and the chances of being dressed alike and of camouflage at the first frame; ``objects``
    the range of their number; ``speed`` the range in pixels of a 256-pixel picture per frame; ``meet`` the chance of
    a path that crosses an earlier object's; ``hide`` the chance that a last, larger object passes over one of them.
    """

    crowd: Crowd = _CROWD
    objects: tuple[int, int] = (2, 4)
    speed: tuple[float, float] = (1.0, 4.0)
    meet: float = 0.7
    hide: float = 0.5


USUAL_CAST = Cast()


def bounce(position: float, low: float, high: float) -> float:
    """A coordinate that moves on a line, folded into [low, high] as by elastic walls."""
    span = high - low
    folded = (position - low) % (2 * span)
    return low + (folded if folded <= span else 2 * span - folded)


@dataclass(frozen=True)
class Course:
    """How an object moves: where it is at frame ``when`` (before bouncing), its velocity in pixels per frame, its
    sway (pixels, frames per period, phase), turn in radians per frame, and pulse (share of its extent, frames per
    period, phase)."""

    place: Placement
    when: float
    velocity: tuple[float, float]
    sway: tuple[float, float, float]
    turn: float
    pulse: tuple[float, float, float]

    def scale(self, frame: float) -> float:
        """Extent at a frame relative to ``place``."""
        share, period, phase = self.pulse
        return 1 + share * float(np.sin(2 * np.pi * frame / period + phase))

    def at(self, frame: float, size: int) -> Placement:
        """The placement at a frame of a square picture of ``size`` pixels."""
        steps = frame - self.when
        reach, period, phase = self.sway
        swing = reach * float(
            np.sin(2 * np.pi * frame / period + phase) - np.sin(2 * np.pi * self.when / period + phase)
        )
        vx, vy = self.velocity
        speed = max(float(np.hypot(vx, vy)), 1e-6)
        x = self.place.x + vx * steps - vy / speed * swing  # it sways across its way
        y = self.place.y + vy * steps + vx / speed * swing
        low, high = 0.06 * size, 0.94 * size
        scale = self.scale(frame)
        return Placement(
            bounce(x, low, high),
            bounce(y, low, high),
            self.place.half_width * scale,
            self.place.half_height * scale,
            self.place.angle + self.turn * frame,
        )


@dataclass(frozen=True)
class Actor:
    """One object: its words, its surface (h, w, 3) float32 in its own frame at scale 1, its course, its shadow."""

    shape: str
    color: str
    pattern: str
    texture: NDArray[np.float32]
    course: Course
    shadow: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class Script:
    """A clip before it is rendered: ``ground`` is larger than the picture by ``margin`` pixels on each side."""

    actors: tuple[Actor, ...]
    ground: NDArray[np.float32]
    margin: int
    pan: tuple[float, float]
    drift: tuple[float, float, float]
    slope: tuple[float, float]
    blur: float
    noise: float
    seed: int
    split: Split
    size: int

    def render(self, frame: int) -> tuple[NDArray[np.uint8], Labels]:
        """One frame: (size, size, 3) uint8 RGB, and (size, size) int8 with the object that shows, -1 for none."""
        size = self.size
        ox, oy = (bounce(self.margin + v * frame, 0, 2 * self.margin) for v in self.pan)
        shift = np.array([[1, 0, ox], [0, 1, oy]], np.float64)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        image = np.asarray(cv2.warpAffine(self.ground, shift, (size, size), flags=flags), np.float32)
        labels = np.full((size, size), -1, np.int8)
        for index, actor in enumerate(self.actors):
            place = actor.course.at(frame, size)
            coverage = rasterise(actor.shape, place, size, size)
            scale = actor.course.scale(frame)
            texture = actor.texture
            if abs(scale - 1) > 1e-3:
                texture = np.asarray(cv2.resize(texture, None, fx=scale, fy=scale), np.float32)
            paint(image, coverage, texture, place, actor.shadow)
            labels[coverage > 127] = index
        return self._expose(image, frame), labels

    def _expose(self, image: NDArray[np.float32], frame: int) -> NDArray[np.uint8]:
        """Light, blur and noise of one frame."""
        share, period, phase = self.drift
        level = 1 + share * np.sin(2 * np.pi * frame / period + phase)
        across = np.linspace(-1, 1, self.size, dtype=np.float32)
        light = level * (1 + self.slope[0] * across[None, :] + self.slope[1] * across[:, None])
        image = image * light[..., None].astype(np.float32)
        if self.blur:
            image = np.asarray(cv2.GaussianBlur(image, (0, 0), self.blur), np.float32)
        if self.noise:
            rng = np.random.default_rng([_SPLIT_KEY[self.split], self.seed, 1, frame])
            image = image + rng.standard_normal(image.shape, dtype=np.float32) * np.float32(self.noise)
        return np.clip(image + 0.5, 0, 255).astype(np.uint8)

    def labels(self, frame: int) -> Labels:
        """The labels of :meth:`render` alone, much faster."""
        labels = np.full((self.size, self.size), -1, np.int8)
        for index, actor in enumerate(self.actors):
            labels[rasterise(actor.shape, actor.course.at(frame, self.size), self.size, self.size) > 127] = index
        return labels

    def whole_areas(self, frame: int) -> list[int]:
        """Pixels of each object inside the picture, hidden or not."""
        places = [actor.course.at(frame, self.size) for actor in self.actors]
        covers = [rasterise(a.shape, p, self.size, self.size) for a, p in zip(self.actors, places, strict=True)]
        return [int(np.count_nonzero(cover > 127)) for cover in covers]


@dataclass(frozen=True)
class Clip:
    """``images`` (T, H, W, 3) uint8 RGB, ``labels`` (T, H, W) int8 index of the object that shows (-1: none)."""

    images: NDArray[np.uint8]
    labels: Labels
    script: Script

    def visible(self, index: int) -> Mask:
        """(T, H, W) bool, where an object shows."""
        return np.asarray(self.labels == index)


def _course(rng: np.random.Generator, place: Placement, when: float, cast: Cast, size: int) -> Course:
    unit = size / 256
    speed = rng.uniform(*cast.speed) * unit
    way = rng.uniform(0, 2 * np.pi)
    sway = (rng.uniform(0, 10) * unit if rng.random() < 0.5 else 0.0, rng.uniform(25, 60), rng.uniform(0, 2 * np.pi))
    turn = rng.uniform(-0.07, 0.07) if rng.random() < 0.7 else 0.0
    pulse = (rng.uniform(0.05, 0.22) if rng.random() < 0.5 else 0.0, rng.uniform(30, 80), rng.uniform(0, 2 * np.pi))
    return Course(place, when, (speed * np.cos(way), speed * np.sin(way)), sway, turn, pulse)


def _cover(rng: np.random.Generator, target: Actor, when: float, cast: Cast, size: int) -> tuple[str, Course]:
    """A shape and a course that pass over ``target`` at frame ``when``, large enough to hide it."""
    shape = _COVERS[rng.integers(len(_COVERS))]
    there = target.course.at(when, size)
    reach = max(there.half_width, there.half_height) * rng.uniform(1.15, 1.5)
    reach = float(np.clip(reach, 30 * size / 256, 84 * size / 256))
    flat = rng.uniform(0.75, 0.95) if shape in ("rectangle", "ellipse") else 1.0
    place = Placement(there.x, there.y, reach, reach * flat, rng.uniform(0, 2 * np.pi))
    course = _course(rng, place, when, cast, size)
    # From the side and not along: otherwise the two could travel together for the whole clip.
    vx, vy = target.course.velocity
    side = float(rng.choice((-1, 1))) * rng.uniform(0.35, 0.65) * np.pi
    heading = float(np.arctan2(vy, vx)) + side
    speed = rng.uniform(1.5, 3.5) * size / 256
    return shape, replace(course, velocity=(speed * float(np.cos(heading)), speed * float(np.sin(heading))))


def make_script(seed: int, split: Split, length: int = LENGTH, size: int = SIZE, cast: Cast = USUAL_CAST) -> Script:
    """The clip of a seed, ready to render.

    Args:
        seed: any non-negative integer; the two splits draw from independent streams.
        split: ``train`` or ``heldout``; decides photographs and noise families.
        length: frames; meetings are spread over it.
        size: side of the square picture in pixels.
        cast: how the clip is filled; held-out clips are judged at the default.
    """
    rng = np.random.default_rng([_SPLIT_KEY[split], seed])
    unit = size / 256
    margin = round(24 * unit)
    ground = background(rng, split, size + 2 * margin, size + 2 * margin)
    pan = (0.0, 0.0)
    if rng.random() < 0.5:
        way, pace = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.7) * unit
        pan = (float(pace * np.cos(way)), float(pace * np.sin(way)))
    light = rng.uniform(0, 2 * np.pi)
    names = list(COLORS)
    actors: list[Actor] = []
    count = int(rng.integers(cast.objects[0], cast.objects[1] + 1))
    for index in range(count + bool(rng.random() < cast.hide)):
        when = float(rng.uniform(0.2, 0.8) * length)
        color, pattern = names[rng.integers(len(names))], PATTERNS[rng.integers(len(PATTERNS))]
        other = actors[rng.integers(len(actors))] if actors else None
        if index >= count and other is not None:
            shape, course = _cover(rng, other, when, cast, size)
        else:
            shape = SHAPES[rng.integers(len(SHAPES))]
            x, y = rng.uniform(0.1, 0.9, 2) * size
            if other is not None and rng.random() < cast.meet:
                there = other.course.at(when, size)
                x, y = there.x + rng.uniform(-12, 12) * unit, there.y + rng.uniform(-12, 12) * unit
            else:
                when = 0.0
            course = _course(rng, sample_placement(rng, shape, size, x, y, cast.crowd), when, cast, size)
        if other is not None and rng.random() < cast.crowd.alike:
            color, pattern = other.color, other.pattern
        first = course.at(0, size)
        side = int(2 * np.hypot(course.place.half_width, course.place.half_height)) + 4
        second = None
        if rng.random() < cast.crowd.camouflage:
            row, column = int(np.clip(first.y, 8, size - 8)) + margin, int(np.clip(first.x, 8, size - 8)) + margin
            around = ground[row - 8 : row + 8, column - 8 : column + 8]
            second = np.asarray(around.mean((0, 1)), np.float32)
        texture = object_texture(rng, split, color, pattern, side, side, second)
        shadow = None
        if rng.random() < 0.65:
            far = rng.uniform(1.5, 6) * unit
            shadow = (far * np.cos(light), far * np.sin(light), rng.uniform(1, 4), rng.uniform(0.3, 0.7))
        actors.append(Actor(shape, color, pattern, texture, course, shadow))
    return Script(
        actors=tuple(actors),
        ground=ground,
        margin=margin,
        pan=pan,
        drift=(rng.uniform(0, 0.15), rng.uniform(30, 90), rng.uniform(0, 2 * np.pi)),
        slope=(rng.uniform(-0.25, 0.25), rng.uniform(-0.25, 0.25)) if rng.random() < 0.6 else (0.0, 0.0),
        blur=rng.uniform(0.4, 0.9) if rng.random() < 0.35 else 0.0,
        noise=rng.uniform(2, 9) if rng.random() < 0.6 else 0.0,
        seed=seed,
        split=split,
        size=size,
    )


def generate_clip(seed: int, split: Split, length: int = LENGTH, size: int = SIZE, cast: Cast = USUAL_CAST) -> Clip:
    """All frames of a clip; see :func:`make_script`."""
    script = make_script(seed, split, length, size, cast)
    return render(script, range(length))


def render(script: Script, frames: Sequence[int]) -> Clip:
    """The frames asked for, in that order."""
    pairs = [script.render(frame) for frame in frames]
    return Clip(np.stack([image for image, _ in pairs]), np.stack([labels for _, labels in pairs]), script)


def trackable(labels: Labels, wholes: Sequence[int]) -> list[int]:
    """Objects of one frame, (H, W) labels, that show enough to be asked for: as in a scene, 100 pixels and a third of
    what lies in the picture (``wholes``)."""
    shown = [int(np.count_nonzero(labels == index)) for index in range(len(wholes))]
    return [
        index
        for index, (pixels, whole) in enumerate(zip(shown, wholes, strict=True))
        if pixels >= MIN_VISIBLE_PIXELS and pixels >= MIN_VISIBLE_FRACTION * whole
    ]


def first_prompts(clip: Clip) -> tuple[Prompt, ...]:
    """One click and one box on the clip's first frame for every object that shows there; deterministic."""
    labels = clip.labels[0]
    masks = {index: labels == index for index in trackable(labels, clip.script.whole_areas(0))}
    return tuple(Prompt(index, centre_click(mask), mask_box(mask)) for index, mask in masks.items())
