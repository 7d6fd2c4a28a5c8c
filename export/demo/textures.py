"""Colours, patterns, photographs and noise for the demo scenes (numpy and OpenCV only).

Every function takes a ``numpy.random.Generator`` and returns float32 RGB in [0, 255], so a texture is a pure
function of its generator. Photographs are the ones bundled in the scikit-image wheel (nothing is downloaded).
Photographs and noise families are divided between the ``train`` and ``heldout`` splits: a held-out scene
shows no photograph and no noise family that training has seen.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "heldout"]
Image = NDArray[np.float32]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 40, 40),
    "orange": (235, 135, 30),
    "yellow": (235, 215, 50),
    "green": (50, 155, 60),
    "cyan": (50, 190, 200),
    "blue": (45, 80, 200),
    "purple": (125, 60, 170),
    "pink": (240, 130, 180),
    "brown": (120, 75, 40),
    "black": (30, 30, 32),
    "gray": (130, 130, 132),
    "white": (235, 235, 235),
}
PATTERNS: tuple[str, ...] = ("plain", "striped", "checked", "dotted", "photographic", "noisy")

PHOTOS: dict[str, tuple[str, ...]] = {
    "train": (
        "astronaut.png", "chelsea.png", "motorcycle_left.png", "rocket.jpg", "grass.png", "gravel.png",
        "ihc.png", "page.png", "coins.png",
    ),
    "heldout": (
        "coffee.png", "camera.png", "brick.png", "retina.jpg", "hubble_deep_field.jpg", "cell.png",
        "moon.png", "text.png",
    ),
}  # fmt: skip
NOISES: dict[str, tuple[str, ...]] = {
    "train": ("fractal", "cells", "grain", "wood", "blotches"),
    "heldout": ("marble", "weave", "speckle", "ridges"),
}


@functools.cache
def load_photo(name: str) -> NDArray[np.uint8]:
    """One bundled photograph, (H, W, 3) uint8 RGB, shorter side at most 512; cached, do not write to it."""
    import skimage.data  # a training-time dependency only

    path = Path(skimage.data.__file__).parent / name
    photo = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if photo is None:
        raise FileNotFoundError(f"{name} is not in this scikit-image wheel; install scikit-image 0.26")
    photo = cv2.cvtColor(photo, cv2.COLOR_BGR2RGB)
    scale = 512 / min(photo.shape[:2])
    if scale < 1:
        photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    pixels = np.asarray(photo, np.uint8)
    pixels.setflags(write=False)
    return pixels


def photo_crop(rng: np.random.Generator, split: Split, height: int, width: int) -> Image:
    """A random rotated, scaled crop of a photograph of the split; (height, width, 3) float32."""
    photo = load_photo(PHOTOS[split][rng.integers(len(PHOTOS[split]))])
    h, w = photo.shape[:2]
    scale = float(np.exp(rng.uniform(np.log(0.45), np.log(1.6))))  # source pixels per output pixel
    angle = rng.uniform(0, 2 * np.pi)
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    cx, cy = rng.uniform(0.2, 0.8) * w, rng.uniform(0.2, 0.8) * h
    matrix = np.array(
        [[c, -s, cx - c * width / 2 + s * height / 2], [s, c, cy - s * width / 2 - c * height / 2]],
        np.float64,
    )
    crop = cv2.warpAffine(
        photo,
        matrix,
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    return crop.astype(np.float32)


def _smooth(rng: np.random.Generator, height: int, width: int, cell: float) -> Image:
    """Value noise in [0, 1] whose features are about ``cell`` pixels wide; (height, width) float32."""
    gh, gw = max(2, int(height / cell) + 2), max(2, int(width / cell) + 2)
    coarse = rng.random((gh, gw), dtype=np.float32)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)


def noise_field(rng: np.random.Generator, kind: str, height: int, width: int) -> Image:
    """A scalar noise field of one family, roughly in [0, 1]; (height, width) float32."""
    yy, xx = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    u = xx * np.float32(np.cos(angle)) + yy * np.float32(np.sin(angle))
    v = yy * np.float32(np.cos(angle)) - xx * np.float32(np.sin(angle))
    if kind == "fractal":
        cell = rng.uniform(12, 48)
        return sum(_smooth(rng, height, width, cell / 2**k) / 2 ** (k + 1) for k in range(3)) / np.float32(0.875)
    if kind == "cells":
        n = int(rng.integers(8, 30))
        points = rng.random((n, 2)).astype(np.float32) * (height, width)
        distance = ((yy[..., None] - points[:, 0]) ** 2 + (xx[..., None] - points[:, 1]) ** 2).argmin(-1)
        return rng.random(n, dtype=np.float32)[distance]
    if kind == "grain":
        dots = rng.random((height, width), dtype=np.float32)
        return np.asarray(cv2.GaussianBlur(dots, (0, 0), rng.uniform(0.5, 1.2)), np.float32)
    if kind == "wood":
        warp = 12 * _smooth(rng, height, width, 40)
        return 0.5 + 0.5 * np.sin((u + warp) * np.float32(2 * np.pi / rng.uniform(7, 18)))
    if kind == "blotches":
        return (_smooth(rng, height, width, rng.uniform(8, 24)) > 0.5).astype(np.float32)
    if kind == "marble":
        warp = 5 * _smooth(rng, height, width, 36) + 2 * _smooth(rng, height, width, 14)
        return np.abs(np.sin(u * np.float32(np.pi / rng.uniform(24, 60)) + warp))
    if kind == "weave":
        k = np.float32(np.pi / rng.uniform(4, 8))
        return 0.5 + 0.25 * np.sin(u * k) + 0.25 * np.sin(v * k)
    if kind == "speckle":
        spots = (rng.random((height, width), dtype=np.float32) > 0.97).astype(np.float32)
        return np.clip(6 * cv2.GaussianBlur(spots, (0, 0), rng.uniform(0.8, 1.6)), 0, 1)
    if kind == "ridges":
        return 1 - np.abs(2 * _smooth(rng, height, width, rng.uniform(12, 32)) - 1)
    raise ValueError(f"unknown noise family {kind!r}; known: {NOISES}")


def jittered_color(rng: np.random.Generator, name: str) -> Image:
    """A shade of a named colour: (3,) float32 in [0, 255], still recognisable as that colour."""
    base = np.array(COLORS[name], np.float32)
    return np.clip(base * rng.uniform(0.85, 1.12) + rng.uniform(-10, 10, 3), 0, 255).astype(np.float32)


def _contrast_color(rng: np.random.Generator, color: Image) -> Image:
    """A second tone for a pattern: lighter or darker than ``color`` by a clear step; (3,) float32."""
    target = 255.0 if color.mean() < rng.uniform(90, 170) else 0.0
    return color + (target - color) * np.float32(rng.uniform(0.35, 0.8))


def _pattern_weight(rng: np.random.Generator, pattern: str, height: int, width: int) -> Image:
    """Where the second tone shows, 0 to 1 with soft edges, in the object's frame; (height, width) float32."""
    period = rng.uniform(7, 20)
    xx = (np.arange(width, dtype=np.float32) + rng.uniform(0, period))[None, :]
    yy = (np.arange(height, dtype=np.float32) + rng.uniform(0, period))[:, None]
    sx, sy = np.sin(xx * np.float32(2 * np.pi / period)), np.sin(yy * np.float32(2 * np.pi / period))
    if pattern == "striped":
        field = sx + 0 * yy if rng.random() < 0.5 else sy + 0 * xx
        return np.clip(field * 3 + rng.uniform(-1, 1.5), 0, 1)
    if pattern == "checked":
        return np.clip(sx * sy * 6 + 0.5, 0, 1)
    if pattern == "dotted":
        return np.clip((sx + sy - rng.uniform(0.7, 1.2)) * 4, 0, 1)
    raise ValueError(f"unknown pattern {pattern!r}; known: {PATTERNS}")


def object_texture(
    rng: np.random.Generator,
    split: Split,
    color_name: str,
    pattern: str,
    height: int,
    width: int,
    second: Image | None = None,
) -> Image:
    """The surface of one object in its own frame: (height, width, 3) float32 in [0, 255].

    Photographs and noise are tinted so that the named colour stays the dominant one; ``second`` (3,) is the colour of
    what lies between stripes, checks, dots and grains, by default a lighter or darker tone of the first.
    """
    color = jittered_color(rng, color_name)
    if pattern == "plain":
        surface = np.broadcast_to(color, (height, width, 3)).astype(np.float32)
    elif pattern == "photographic":
        photo = photo_crop(rng, split, height, width)
        gray = photo.mean(-1, keepdims=True)
        gray = (gray - gray.mean()) / (gray.std() + 8)
        tinted = color * (1 + 0.35 * gray) + 18 * gray
        surface = tinted + (photo - tinted) * np.float32(rng.uniform(0, 0.35))
    else:
        if pattern == "noisy":
            kinds = NOISES[split]
            weight = noise_field(rng, kinds[rng.integers(len(kinds))], height, width)
        else:
            weight = _pattern_weight(rng, pattern, height, width)
        second = _contrast_color(rng, color) if second is None else second
        surface = color + weight[..., None] * (second - color)
    # A gentle light gradient of its own: same-coloured neighbours then meet in a visible edge.
    gx, gy = rng.uniform(-0.22, 0.22, 2)
    light = 1 + gx * np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    light = light + gy * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    return np.clip(surface * light[..., None], 0, 255).astype(np.float32)


def background(rng: np.random.Generator, split: Split, height: int, width: int) -> Image:
    """A background, half the time a photograph, else noise, a pattern or a gradient; (height, width, 3) float32."""
    kind = rng.random()
    if kind < 0.5:
        image = photo_crop(rng, split, height, width)
        if rng.random() < 0.4:  # another colour cast, and channels exchanged
            image = image[..., rng.permutation(3)] * rng.uniform(0.7, 1.15, 3).astype(np.float32)
    else:
        names = list(COLORS)
        a = jittered_color(rng, names[rng.integers(len(names))])
        b = jittered_color(rng, names[rng.integers(len(names))])
        if kind < 0.8:
            kinds = NOISES[split]
            weight = noise_field(rng, kinds[rng.integers(len(kinds))], height, width)
            weight = weight * np.float32(rng.uniform(0.3, 1))
        elif kind < 0.9:
            weight = _pattern_weight(rng, PATTERNS[rng.integers(1, 4)], height, width) * np.float32(
                rng.uniform(0.2, 0.8)
            )
        else:
            weight = np.linspace(0, 1, width, dtype=np.float32)[None, :] * np.ones((height, 1), np.float32)
        image = a + weight[..., None] * (b - a)
    return np.clip(image, 0, 255).astype(np.float32)
