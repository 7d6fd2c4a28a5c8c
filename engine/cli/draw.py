"""Pictures of results: masks over the image, prompt marks, named boxes, mask files. OpenCV and Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from .draw_text import COLOURS, NamedBox, colour_of, paint_boxes
from .output import replacing

if TYPE_CHECKING:
    from ..models.sam2.prompts import Prompt

Image = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
MaskIndex = npt.NDArray[np.uint8 | np.uint16]
"""Object numbers per pixel, see `mask_index`."""

_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)
_POSITIVE, _NEGATIVE = (30, 200, 60), (230, 40, 40)


def line_width(height: int, width: int) -> int:
    """Width of a line that is seen, but hides little, on a picture of this size."""
    return max(1, round(max(height, width) / 500))


def _paint_fill(image: Image, index: MaskIndex, colours: Sequence[tuple[int, int, int]]) -> None:
    """Tints every pixel once, however many masks cover it, so that the picture stays visible below."""
    table = np.array([_BLACK, *colours], np.float32)
    inside = index > 0
    tint = table[index[inside]]
    image[inside] = (image[inside].astype(np.float32) * 0.6 + tint * 0.4).astype(np.uint8)


def _paint_contour(image: Image, mask: Mask, colour: tuple[int, int, int], width: int) -> None:
    contours = _contours(mask)
    # Light on dark: one of the two lines stands out whatever lies below.
    cv2.drawContours(image, contours, -1, _BLACK, 2 * width + 2, cv2.LINE_AA)
    cv2.drawContours(image, contours, -1, _WHITE, width + 1, cv2.LINE_AA)
    cv2.drawContours(image, contours, -1, colour, width, cv2.LINE_AA)


def _contours(mask: Mask) -> Sequence[Any]:
    found = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    contours: Sequence[Any] = found[0]
    return contours


def _paint_point(image: Image, x: float, y: float, positive: bool, width: int) -> None:
    centre = (round(x), round(y))
    radius = 3 + 2 * width
    cv2.circle(image, centre, radius + 2 + width, _BLACK, -1, cv2.LINE_AA)
    cv2.circle(image, centre, radius + 1 + width // 2, _WHITE, -1, cv2.LINE_AA)
    cv2.circle(image, centre, radius, _POSITIVE if positive else _NEGATIVE, -1, cv2.LINE_AA)
    arm = max(1, radius - 2)
    cv2.line(image, (centre[0] - arm, centre[1]), (centre[0] + arm, centre[1]), _WHITE, width, cv2.LINE_AA)
    if positive:
        cv2.line(image, (centre[0], centre[1] - arm), (centre[0], centre[1] + arm), _WHITE, width, cv2.LINE_AA)


def _paint_box(image: Image, box: npt.NDArray[np.floating[Any]], width: int) -> None:
    x0, y0, x1, y1 = (round(float(v)) for v in box)
    cv2.rectangle(image, (x0, y0), (x1, y1), _BLACK, 2 * width + 1, cv2.LINE_AA)
    cv2.rectangle(image, (x0, y0), (x1, y1), _WHITE, width, cv2.LINE_AA)


def overlay(
    image: Image,
    masks: Sequence[Mask],
    prompts: Sequence[Prompt] = (),
    boxes: Sequence[NamedBox] = (),
    kinds: Sequence[int] | None = None,
    index: MaskIndex | None = None,
    areas: Sequence[int] | None = None,
) -> Image:
    """A copy of `image` with translucent masks, their contours, the marks of the prompts and named boxes.

    Args:
        image: (H, W, 3) uint8 RGB; not changed.
        masks: (H, W) bool each; the smallest lies on top.
        prompts: What was asked; green plus = foreground point, red minus = background point, white line = box.
        boxes: Drawn last, the first on top; one of kind k has the colour of the k-th mask.
        kinds: Gives each mask the colour of such a kind; None takes the masks' own numbers.
        index: What `mask_index` gave for these masks, where it is there already.
        areas: Pixels of each mask, where they are known: masks are looked at once less.

    Returns:
        (H, W, 3) uint8 RGB, owned by the caller.
    """
    picture: Image = np.ascontiguousarray(image).copy()
    height, width = image.shape[:2]
    thick = line_width(height, width)
    colours = [colour_of(k) for k in (range(len(masks)) if kinds is None else kinds)]
    _paint_fill(picture, mask_index(masks, (height, width), areas) if index is None else index, colours)
    for number in _large_to_small(masks, areas):
        _paint_contour(picture, np.ascontiguousarray(masks[number]), colours[number], thick)
    for prompt in prompts:
        if prompt.box is not None:
            _paint_box(picture, np.asarray(prompt.box, np.float64), thick)
        if prompt.points is not None:
            points = np.asarray(prompt.points, np.float64).reshape(-1, 2)
            labels = np.ones(len(points)) if prompt.labels is None else np.asarray(prompt.labels, np.float64)
            for (x, y), label in zip(points.tolist(), labels.tolist()):
                _paint_point(picture, x, y, label == 1, thick)
    return paint_boxes(picture, boxes, thick) if boxes else picture


def _large_to_small(masks: Sequence[Mask], areas: Sequence[int] | None) -> list[int]:
    counts = np.array([np.count_nonzero(mask) for mask in masks] if areas is None else areas, np.int64)
    order: list[int] = np.argsort(-counts, kind="stable").tolist()
    return order


def mask_index(masks: Sequence[Mask], size: tuple[int, int], areas: Sequence[int] | None = None) -> MaskIndex:
    """Object numbers 1..K per pixel, 0 for the background; where masks overlap the smaller one wins.

    Args:
        masks: (H, W) bool each.
        size: (height, width) of the image.
        areas: Pixels of each mask, where they are known.

    Returns:
        (H, W) uint8 for up to 255 masks, uint16 above.
    """
    index = np.zeros(size, np.uint8 if len(masks) <= 255 else np.uint16)
    for number in _large_to_small(masks, areas):
        index[masks[number]] = number + 1
    return index


def write_png(path: Path, array: npt.NDArray[Any], palette: bool = False) -> None:
    """Writes an image, a mask or an index image.

    Args:
        path: File to write; replaced in one step, so a broken write leaves the old file.
        array: (H, W, 3) uint8 RGB, (H, W) bool (stored as 0 and 255), or (H, W) uint8 or uint16 numbers.
        palette: Give uint8 numbers the colours of the overlay, so that the file can be looked at.
    """
    from PIL import Image as Pillow

    picture = Pillow.fromarray(array.astype(np.uint8) * 255 if array.dtype == np.bool_ else array)
    if palette and array.dtype == np.uint8:
        picture = Pillow.fromarray(array).convert("L")
        picture.putpalette([*_BLACK, *(v for i in range(255) for v in COLOURS[i % len(COLOURS)])])
    with replacing(path) as partial:
        picture.save(partial, format="PNG")


def write_masks(
    folder: Path,
    stem: str,
    masks: Sequence[Mask],
    size: tuple[int, int],
    separate: bool = False,
    index: MaskIndex | None = None,
) -> list[Path]:
    """Writes the mask files of one image.

    One mask becomes ``STEM.mask.png`` with 0 and 255. Several become one ``STEM.mask.png`` of object numbers
    (palette; 16 bit without palette above 255), or with `separate` ``STEM.mask-1.png``... with 0 and 255 each.

    Args:
        folder: Where to write.
        stem: Start of the file names.
        masks: (H, W) bool each.
        size: (height, width) of the image.
        separate: One file per mask; for masks that may overlap fully.
        index: What `mask_index` gave for these masks, where it is there already.

    Returns:
        The files written.
    """
    if separate and len(masks) > 1:
        paths = [folder / f"{stem}.mask-{number}.png" for number in range(1, len(masks) + 1)]
        for path, mask in zip(paths, masks):
            write_png(path, mask)
        return paths
    path = folder / f"{stem}.mask.png"
    if len(masks) == 1:
        write_png(path, masks[0] if index is None else index > 0)
    else:
        write_png(path, mask_index(masks, size) if index is None else index, palette=True)
    return [path]
