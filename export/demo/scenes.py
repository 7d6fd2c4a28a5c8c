"""Synthetic scenes of textured shapes with exact masks: training and held-out data of the demo bundles.

A scene is a pure function of ``(seed, split, size)``. Shapes, placements and textures are separate pieces, so
that other tasks (clips of moving shapes, detection by words) can compose the same parts:

* :func:`shape_contours` gives a shape in its unit frame, :class:`Placement` puts it somewhere,
* :func:`rasterise` turns both into coverage, :mod:`.textures` makes the surfaces,
* :func:`paint` composes one surface over an image, with a drop shadow.

Difficulty, on purpose: most objects touch or occlude another one, some share its colour and pattern, most patterned
ones the colour behind them; textures are photographic, noisy or patterned on objects and
background alike, some objects are small or thin, and the picture is degraded by light gradients, cast shadows, blur,
sensor noise and JPEG.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pixano_edge.export.demo.textures import COLORS, PATTERNS, Split, background, object_texture

Mask = NDArray[np.bool_]
SIZE = 256
MIN_VISIBLE_PIXELS = 100
MIN_VISIBLE_FRACTION = 0.33

SHAPES: tuple[str, ...] = (
    "circle", "square", "rectangle", "triangle", "star", "ring", "cross", "ellipse", "bar", "hexagon", "heart",
    "crescent",
)  # fmt: skip


@dataclass(frozen=True)
class Crowd:
    """How a scene is filled; the defaults are the scenes that everything is judged on.

    ``objects`` at most; chance of a placement ``near`` an earlier object and of being dressed ``alike`` then; chance
    of a ``small`` object; range of the usual ``radius`` and of half a bar's ``width`` in pixels of a 256-pixel scene;
    chance of ``camouflage``: the colour behind a patterned object is the object's second colour.
    """

    objects: int = 7
    near: float = 0.75
    alike: float = 0.2
    small: float = 0.08
    radius: tuple[float, float] = (36.0, 74.0)
    width: tuple[float, float] = (6.0, 10.0)
    camouflage: float = 0.8


USUAL = Crowd()
_SPLIT_KEY = {"train": 1, "heldout": 2}


@dataclass(frozen=True)
class Placement:
    """Where a unit shape goes: centre (x, y) in pixels, half extents in pixels, rotation in radians."""

    x: float
    y: float
    half_width: float
    half_height: float
    angle: float = 0.0

    def apply(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Unit-frame points (N, 2) to pixel coordinates (N, 2), y down."""
        scaled = points * (self.half_width, self.half_height)
        c, s = np.cos(self.angle), np.sin(self.angle)
        return scaled @ np.array([[c, s], [-s, c]]) + (self.x, self.y)


@dataclass(frozen=True)
class SceneObject:
    """One object: its words and its masks, all (H, W) bool; ``box`` is xyxy around the visible mask.

    ``box`` follows COCO: (x0, y0) is the first pixel's corner, (x1, y1) one past the last pixel. An object that
    is hidden entirely has the box (0, 0, 0, 0).
    """

    shape: str
    color: str
    pattern: str
    visible: Mask
    amodal: Mask
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """``image`` (H, W, 3) uint8 RGB and its objects from back to front."""

    image: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    seed: int
    split: Split


@dataclass(frozen=True)
class Prompt:
    """What is asked about an object: ``click`` (x, y) pixel indices, ``box`` xyxy, ``index`` of the object."""

    index: int
    click: tuple[int, int]
    box: tuple[int, int, int, int]


def _arc(start: float, stop: float, count: int, radius: float = 1.0) -> NDArray[np.float64]:
    t = np.linspace(start, stop, count)
    return radius * np.stack([np.cos(t), np.sin(t)], 1)


@functools.cache
def shape_contours(shape: str) -> tuple[NDArray[np.float64], ...]:
    """Closed contours of a shape in the unit frame [-1, 1]^2, filled by the even-odd rule; each (N, 2)."""
    tau = 2 * np.pi
    if shape in ("circle", "ellipse"):
        return (_arc(0, tau, 64),)
    if shape in ("square", "rectangle", "bar"):
        return (np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float64),)
    if shape == "triangle":
        return (np.array([[0, -1], [1, 0.9], [-1, 0.9]], np.float64),)
    if shape == "hexagon":
        return (_arc(0, tau, 7)[:-1],)
    if shape == "star":
        tips = _arc(-np.pi / 2, 1.5 * np.pi, 11)[:-1]
        return (tips * np.where(np.arange(10) % 2 == 0, 1.0, 0.45)[:, None],)
    if shape == "ring":
        return (_arc(0, tau, 64), _arc(0, tau, 48, 0.55))
    if shape == "cross":
        a = 0.36
        half = [[-a, -1], [a, -1], [a, -a], [1, -a], [1, a], [a, a]]
        return (np.array(half + [[-x, -y] for x, y in half], np.float64),)
    if shape == "heart":
        t = np.linspace(0, tau, 48)
        x = np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
        return (np.stack([x, y], 1),)
    if shape == "crescent":
        outer = _arc(0.2 * np.pi, 1.8 * np.pi, 48)
        gap, tip = 0.45, outer[-1]
        radius = float(np.hypot(tip[0] - gap, tip[1]))
        start = float(np.arctan2(tip[1], tip[0] - gap))
        inner = _arc(start, start - (tau - 2 * abs(start)) if start < 0 else start, 40, radius) + np.array([gap, 0.0])
        return (np.concatenate([outer, inner]),)
    raise ValueError(f"unknown shape {shape!r}; known: {SHAPES}")


def rasterise(shape: str, place: Placement, height: int, width: int) -> NDArray[np.uint8]:
    """Antialiased coverage of a placed shape, (height, width) uint8, 255 inside."""
    coverage = np.zeros((height, width), np.uint8)
    # Pixel centres lie on integers for OpenCV and on halves for a placement.
    contours = [np.round((place.apply(c) - 0.5) * 16).astype(np.int32) for c in shape_contours(shape)]
    cv2.fillPoly(coverage, contours, 255, lineType=cv2.LINE_AA, shift=4)
    return coverage


def sample_placement(
    rng: np.random.Generator, shape: str, size: int, x: float, y: float, crowd: Crowd = USUAL
) -> Placement:
    """A random extent and rotation for a shape centred at (x, y), in proportion to the side of the scene."""
    unit = size / 256
    radius = rng.uniform(13, 20) if rng.random() < crowd.small else rng.uniform(*crowd.radius)
    half_width = half_height = radius * unit
    if shape == "bar":
        half_width, half_height = rng.uniform(26, 72) * unit, rng.uniform(*crowd.width) * unit
    elif shape == "rectangle":
        half_height = half_width * rng.uniform(0.4, 0.7)
    elif shape == "ellipse":
        half_height = half_width * rng.uniform(0.45, 0.75)
    elif shape in ("ring", "cross", "star", "crescent", "heart", "triangle"):
        half_width = half_height = max(radius, 17) * 1.1 * unit
    return Placement(x, y, half_width, half_height, rng.uniform(0, 2 * np.pi))


def paint(
    image: NDArray[np.float32],
    coverage: NDArray[np.uint8],
    texture: NDArray[np.float32],
    place: Placement,
    shadow: tuple[float, float, float, float] | None = None,
) -> None:
    """Compose a texture over ``image`` (H, W, 3) float32, in place.

    Args:
        image: the picture so far.
        coverage: (H, W) uint8 from :func:`rasterise`.
        texture: (h, w, 3) float32 in the object's frame; its centre goes to the placement's centre and it
            turns with the object.
        place: where the object is.
        shadow: (dx, dy, blur sigma, strength in [0, 1]) of a drop shadow under the object, or None.
    """
    x0, y0, w, h = cv2.boundingRect(coverage)
    if w == 0:
        return
    if shadow is not None:
        dx, dy, sigma, strength = shadow
        pad = int(3 * sigma + max(abs(dx), abs(dy))) + 1
        sx0, sy0 = max(0, x0 - pad), max(0, y0 - pad)
        sx1, sy1 = min(image.shape[1], x0 + w + pad), min(image.shape[0], y0 + h + pad)
        part = coverage[sy0:sy1, sx0:sx1].astype(np.float32) * np.float32(strength / 255)
        moved = cv2.warpAffine(part, np.array([[1, 0, dx], [0, 1, dy]], np.float64), part.shape[::-1])
        image[sy0:sy1, sx0:sx1] *= 1 - cv2.GaussianBlur(moved, (0, 0), sigma)[..., None]
    c, s = np.cos(place.angle), np.sin(place.angle)
    th, tw = texture.shape[:2]
    ox, oy = x0 - place.x, y0 - place.y
    matrix = np.array([[c, s, c * ox + s * oy + tw / 2], [-s, c, -s * ox + c * oy + th / 2]], np.float64)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    surface = cv2.warpAffine(texture, matrix, (w, h), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    roi = image[y0 : y0 + h, x0 : x0 + w]
    roi += (surface - roi) * (coverage[y0 : y0 + h, x0 : x0 + w, None].astype(np.float32) / 255)


def degrade(rng: np.random.Generator, image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Light gradient, soft cast shadows, blur, sensor noise and JPEG, each by chance; returns uint8 RGB."""
    h, w = image.shape[:2]
    if rng.random() < 0.6:
        gx, gy = rng.uniform(-0.3, 0.3, 2)
        light = (
            1
            + gx * np.linspace(-1, 1, w, dtype=np.float32)[None, :]
            + gy * np.linspace(-1, 1, h, dtype=np.float32)[:, None]
        )
        image = image * light[..., None]
    if rng.random() < 0.3:  # the shadow of something outside the picture
        small = np.zeros((64, 64), np.float32)
        points = (rng.random((4, 2)) * 64).astype(np.int32)
        cv2.fillConvexPoly(small, cv2.convexHull(points), 1.0)
        shade = cv2.resize(cv2.GaussianBlur(small, (0, 0), rng.uniform(1, 3)), (w, h))
        image = image * (1 - np.float32(rng.uniform(0.15, 0.45)) * shade)[..., None]
    if rng.random() < 0.35:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.0)), np.float32)
    if rng.random() < 0.6:
        image = image + rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(2, 12))
    out = np.clip(image + 0.5, 0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        ok, data = cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 95))])
        if ok:
            out = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return out


def mask_box(mask: Mask) -> tuple[int, int, int, int]:
    """The box (x0, y0, x1, y1) of a mask, x1 and y1 one past the last pixel; zeros for an empty mask."""
    x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
    return (x, y, x + w, y + h) if w else (0, 0, 0, 0)


def _around(image: NDArray[np.float32], x: float, y: float, size: int) -> NDArray[np.float32]:
    """The mean colour (3,) of what is painted so far about a place."""
    reach = size // 24
    row, column = int(np.clip(y, 0, size - 1)), int(np.clip(x, 0, size - 1))
    part = image[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]
    return np.asarray(part.mean((0, 1)), np.float32)


def generate_scene(seed: int, split: Split, size: int = SIZE, crowd: Crowd = USUAL) -> Scene:
    """The scene of a seed: at least three objects, most of them placed by another, some dressed like it.

    Args:
        seed: any non-negative integer; the two splits draw from independent streams.
        split: ``train`` or ``heldout``; decides photographs and noise families.
        size: side of the square image in pixels.
        crowd: how it is filled; held-out scenes are judged at the default.
    """
    rng = np.random.default_rng([_SPLIT_KEY[split], seed])
    names = list(COLORS)
    image = background(rng, split, size, size)
    labels = np.full((size, size), -1, np.int32)
    light = rng.uniform(0, 2 * np.pi)
    words: list[tuple[str, str, str]] = []
    coverages: list[NDArray[np.uint8]] = []
    placements: list[Placement] = []
    for i in range(int(rng.integers(3, crowd.objects + 1))):
        shape = SHAPES[rng.integers(len(SHAPES))]
        color, pattern = names[rng.integers(len(names))], PATTERNS[rng.integers(len(PATTERNS))]
        hidden = bool(rng.random() < crowd.camouflage)
        x, y = rng.uniform(0.08, 0.92, 2) * size
        if i and rng.random() < crowd.near:  # beside or over an earlier object, often dressed alike
            near = placements[rng.integers(len(placements))]
            away = rng.uniform(0, 2 * np.pi)
            reach = (near.half_width + near.half_height) / 2 * rng.uniform(0.7, 1.8)
            x = float(np.clip(near.x + reach * np.cos(away), 0.05 * size, 0.95 * size))
            y = float(np.clip(near.y + reach * np.sin(away), 0.05 * size, 0.95 * size))
            if rng.random() < crowd.alike:
                _, color, pattern = words[placements.index(near)]
        place = sample_placement(rng, shape, size, x, y, crowd)
        coverage = rasterise(shape, place, size, size)
        side = int(2 * np.hypot(place.half_width, place.half_height)) + 4
        second = _around(image, x, y, size) if hidden else None
        texture = object_texture(rng, split, color, pattern, side, side, second)
        shadow = None
        if rng.random() < 0.65:
            far = rng.uniform(1.5, 6) * size / 256
            shadow = (far * np.cos(light), far * np.sin(light), rng.uniform(1, 4), rng.uniform(0.3, 0.7))
        paint(image, coverage, texture, place, shadow)
        labels[coverage > 127] = i
        words.append((shape, color, pattern))
        coverages.append(coverage)
        placements.append(place)
    objects = []
    for i, ((shape, color, pattern), coverage) in enumerate(zip(words, coverages, strict=True)):
        visible = labels == i
        objects.append(SceneObject(shape, color, pattern, visible, coverage > 127, mask_box(visible)))
    return Scene(degrade(rng, image), tuple(objects), seed, split)


def is_evaluated(obj: SceneObject) -> bool:
    """Whether enough of an object shows: 100 visible pixels, and a third of what of it lies in the picture."""
    pixels = int(np.count_nonzero(obj.visible))
    return pixels >= MIN_VISIBLE_PIXELS and pixels >= MIN_VISIBLE_FRACTION * int(np.count_nonzero(obj.amodal))


def centre_click(mask: Mask) -> tuple[int, int]:
    """The pixel (x, y) of a non-empty mask farthest from its border and from the edge of the image."""
    padded = cv2.copyMakeBorder(mask.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return int(x), int(y)


def held_out_prompts(scene: Scene) -> tuple[Prompt, ...]:
    """One click and one box for every object that is evaluated (see :func:`is_evaluated`); deterministic."""
    return tuple(
        Prompt(i, centre_click(obj.visible), obj.box) for i, obj in enumerate(scene.objects) if is_evaluated(obj)
    )
