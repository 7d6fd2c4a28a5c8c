"""Boxes with their names on a picture, readable on any background and at any size. Pillow and OpenCV only."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

Image = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Rect = tuple[int, int, int, int]

# Bright and far apart in hue and lightness (Okabe-Ito without black and grey, then three more).
COLOURS: tuple[Colour, ...] = (
    (0, 158, 255),
    (255, 159, 0),
    (0, 200, 120),
    (232, 62, 140),
    (250, 230, 60),
    (150, 90, 255),
    (255, 94, 0),
    (86, 220, 233),
    (170, 210, 60),
)
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)

MAX_NAME = 40
"""Longer names end with an ellipsis."""


@dataclass(frozen=True)
class NamedBox:
    """A box to draw.

    Attributes:
        box: x1, y1, x2, y2 in pixels.
        kind: Decides the colour; equal ones look alike.
        name: See `drawable`.
        score: 0 to 1; drawn with two digits.
    """

    box: tuple[float, float, float, float]
    kind: int
    name: str
    score: float

    @property
    def text(self) -> str:
        """What is written at the box."""
        return f"{drawable(self.name, self.kind)} {self.score:.2f}"


def colour_of(kind: int) -> Colour:
    """The colour of a kind; they repeat after `COLOURS`."""
    return COLOURS[kind % len(COLOURS)]


def drawable(name: str, kind: int) -> str:
    """The name in the letters that Pillow's own font has: accents are dropped, and where more would be missing it is
    ``#`` with the number of the kind, counted from 1 as COCO's categories are; shortened to `MAX_NAME`."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    plain = " ".join(plain.split())
    if not plain.isascii() or not plain.isprintable() or not plain:
        return f"#{kind + 1}"
    return plain if len(plain) <= MAX_NAME else f"{plain[: MAX_NAME - 3]}..."


def paint_boxes(image: Image, boxes: Sequence[NamedBox], width: int) -> Image:
    """Draws boxes and then their labels, the first box on top.

    Args:
        image: (H, W, 3) uint8 RGB; lines are drawn into it.
        boxes: Best first.
        width: Of the lines.

    Returns:
        (H, W, 3) uint8 RGB, owned by the caller.
    """
    for one in reversed(boxes):
        x1, y1, x2, y2 = _pixels(one.box, image)
        # Light on dark: one of the lines stands out whatever lies below.
        cv2.rectangle(image, (x1, y1), (x2, y2), _BLACK, 2 * width + 2, cv2.LINE_AA)
        cv2.rectangle(image, (x1, y1), (x2, y2), colour_of(one.kind), 2 * width, cv2.LINE_AA)
    height, across = image.shape[:2]
    font = ImageFont.load_default(max(11, round(max(height, across) / 55)))
    pad = 2 + width
    picture = Pillow.fromarray(image)
    draw = ImageDraw.Draw(picture)
    placed: list[Rect] = []
    taken = np.empty((len(boxes), 4), np.int64)
    for one in boxes:
        left, top, right, bottom = draw.textbbox((0, 0), one.text, font=font)
        size = (round(right - left) + 2 * pad, round(bottom - top) + 2 * pad)
        place = _place(_pixels(one.box, image), size, (across, height), taken[: len(placed)])
        taken[len(placed)] = place
        placed.append(place)
    for (x1, y1, x2, y2), one in reversed(list(zip(placed, boxes))):
        left, top, _, _ = draw.textbbox((0, 0), one.text, font=font)
        colour = colour_of(one.kind)
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colour, outline=_BLACK)
        draw.text((x1 + pad - left, y1 + pad - top), one.text, font=font, fill=_contrast(colour))
    return np.array(picture)


def _pixels(box: tuple[float, float, float, float], image: Image) -> Rect:
    """Corners whose lines lie within the picture."""
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (round(v) for v in box)
    return min(x1, width - 1), min(y1, height - 1), min(x2, width - 1), min(y2, height - 1)


def _contrast(colour: Colour) -> Colour:
    """Black or white, whichever is further from the colour in WCAG's relative luminance."""
    shares = [c / 255 for c in colour]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return _BLACK if (luminance + 0.05) ** 2 > 0.05 * 1.05 else _WHITE


def _place(box: Rect, size: tuple[int, int], picture: tuple[int, int], taken: npt.NDArray[np.int64]) -> Rect:
    """Where a label goes: the first place that is free, else the one that hides the least of other labels, (N, 4)."""
    best: tuple[int, Rect] | None = None
    for left, top in _places(box, size):
        # Labels stay inside the picture, as far as they fit at all.
        x = max(0, min(left, picture[0] - size[0]))
        y = max(0, min(top, picture[1] - size[1]))
        rect = (x, y, x + size[0], y + size[1])
        hidden = _common(rect, taken)
        if best is None or hidden < best[0]:
            best = hidden, rect
        if hidden == 0:
            break
    assert best is not None
    return best[1]


def _places(box: Rect, size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Above the box, in its upper left corner, below it, in the lower left corner, and the same on the right."""
    x1, y1, x2, y2 = box
    width, height = size
    for x in (x1, x2 - width):
        yield from ((x, y1 - height), (x, y1), (x, y2), (x, y2 - height))


def _common(rect: Rect, others: npt.NDArray[np.int64]) -> int:
    """Pixels that a rectangle shares with others, in all. On arrays: thousands of boxes have millions of pairs."""
    sides = np.minimum(others[:, 2:], rect[2:]) - np.maximum(others[:, :2], rect[:2])
    return int(np.prod(np.maximum(sides, 0), axis=1).sum())
