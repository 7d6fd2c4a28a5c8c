"""The words of `pixano-edge demo`: the objects of the bundled pictures found by name, with times and hits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..models.detection.nms import box_iou
from ..models.images import decode_image
from .detect import named_boxes
from .draw import overlay, write_png

if TYPE_CHECKING:
    from ..models.detection.base import Detections, Detector

ABSENT = "green heart"
"""Asked for on every picture and on none of them."""
NMS = 0.5
IOU = 0.5
"""Least overlap of a box with the true one."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class WordsResult:
    """One picture searched by name.

    Attributes:
        picture: Its file.
        words: What was asked for, `ABSENT` last.
        objects: Objects on it.
        found: How many of them have a box of their name.
        wrong: Boxes that fit no object of their name.
        first_seconds: With the words new to the detector.
        again_seconds: With their features kept; the image is encoded anew.
        file: The picture that was written.
    """

    picture: str
    words: list[str]
    objects: int
    found: int
    wrong: int
    first_seconds: float
    again_seconds: float
    file: str


def word_of(name: str) -> str:
    """Colour and shape of ``pink striped crescent``: what the detector was taught to look for."""
    words = name.split()
    return f"{words[0]} {words[-1]}"


def run_words(
    detector: Detector, picture: Path, objects: Sequence[tuple[str, Box]], out: Path, threshold: float
) -> WordsResult:
    """Asks for every object of a picture by name and draws what is found.

    Args:
        detector: The demo's detector.
        picture: Image file.
        objects: Name and true box (x0, y0, x1, y1) of each.
        out: Folder to write to; exists.
        threshold: Least score of a box and its words.

    Raises:
        EdgeError: The picture cannot be read or written, or the detector failed.
    """
    image = decode_image(picture)
    words = [*dict.fromkeys(word_of(name) for name, _ in objects), ABSENT]
    found, first_seconds = _timed(detector, image, words, threshold)
    other = image.copy()
    other[0, 0] ^= 1  # another picture for whoever keeps image features
    _, again_seconds = _timed(detector, other, words, threshold)
    hits = _hits(found, objects)
    path = out / f"{picture.stem}.words.png"
    write_png(path, overlay(image, [], boxes=named_boxes(found)))
    return WordsResult(
        picture.name, words, len(objects), hits, len(found) - hits, first_seconds, again_seconds, path.name
    )


def _timed(
    detector: Detector, image: npt.NDArray[np.uint8], words: Sequence[str], threshold: float
) -> tuple[Detections, float]:
    start = time.perf_counter()
    found = detector.detect(image, words, box_threshold=threshold, text_threshold=threshold, nms=NMS)
    return found, time.perf_counter() - start


def _hits(found: Detections, objects: Sequence[tuple[str, Box]]) -> int:
    """How many objects have a box of their name; each box and each object counts once, the best box first."""
    left = list(range(len(objects)))
    for name, box in zip(found.names(), found.boxes):
        own = [i for i in left if word_of(objects[i][0]) == name]
        overlaps = box_iou(np.array([objects[i][1] for i in own]).reshape(-1, 4), box)
        if overlaps.max(initial=0.0) >= IOU:
            left.remove(own[int(overlaps.argmax())])
    return len(objects) - len(left)
