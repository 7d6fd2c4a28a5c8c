"""Detection of named shapes without learning: regions near a named colour, told apart by their contours (OpenCV).

The picture is smoothed, the pixels near each named colour (CIE Lab) give regions, and each region's outline is compared
with drawn examples of the twelve shapes by a few plain measures. Patterns are told by the two tones inside. The
settings are the best of `sweep_detect_baselines` on training scenes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pixano_edge.export.demo.scenes import SHAPES, rasterise, sample_placement
from pixano_edge.export.demo.textures import COLORS
from pixano_edge.export.demo.words import Phrase, all_phrases

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Settings:
    """``blur``: side of the median filter; ``tolerance``: largest distance in Lab; ``opening``: side of the opening
    that cuts thin bridges, 0 for none; ``smallest``: least area in pixels."""

    blur: int = 15
    tolerance: float = 60.0
    opening: int = 0
    smallest: int = 400


SWEPT = Settings()
EXAMPLES = 60
"""Drawn examples of each shape."""


@dataclass(frozen=True)
class Region:
    """A connected region near one colour: ``box`` xyxy, closeness to the ``color`` and likeness to each shape in 0..1,
    and likeness to each named pattern."""

    box: tuple[int, int, int, int]
    color: str
    closeness: float
    shapes: dict[str, float]
    patterns: dict[str, float]


@functools.cache
def _palette() -> NDArray[np.float32]:
    colors = np.array([*COLORS.values()], np.uint8)[None]
    return _lab(colors)[0]


def _lab(image: Image) -> NDArray[np.float32]:
    """(H, W, 3) CIE Lab with L in 0..100."""
    return np.asarray(cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), np.float32)


def _distances(lab: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far each pixel (H, W, 3) is from each named colour; (H, W, 12)."""
    palette = _palette()
    squares = (lab * lab).sum(-1, keepdims=True) - 2 * lab @ palette.T + (palette * palette).sum(1)
    return np.sqrt(np.maximum(squares, 0))


def measures(region: Image) -> NDArray[np.float64]:
    """Plain measures of a region's shape (10,) from its mask (H, W) uint8, which does not depend on size or turn."""
    contours, _ = cv2.findContours(region, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = max(contours, key=cv2.contourArea)
    area, pixels = max(cv2.contourArea(outline), 1.0), float(np.count_nonzero(region))
    around = max(cv2.arcLength(outline, True), 1.0)
    hull = cv2.convexHull(outline)
    hull_area = max(cv2.contourArea(hull), 1.0)
    (_, _), (w, h), _ = cv2.minAreaRect(outline)
    _, radius = cv2.minEnclosingCircle(outline)
    corners = len(cv2.approxPolyDP(outline, 0.03 * around, True))
    hu = cv2.HuMoments(cv2.moments(region, binaryImage=True))[:4, 0]
    return np.array(
        [
            4 * np.pi * area / around**2,
            area / hull_area,
            area / max(w * h, 1.0),
            min(w, h) / max(w, h, 1.0),
            area / (np.pi * max(radius, 1.0) ** 2),
            min(corners, 12) / 4,
            1 - min(1.0, pixels / area),
            *(-np.sign(hu[:3]) * np.log10(np.abs(hu[:3]) + 1e-9) / 2),
        ]
    )


@functools.cache
def _examples() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means (12, 10) and deviations (12, 10) of the measures of drawn shapes, some of them cut off or overlapped."""
    rng = np.random.default_rng(0)
    means, deviations = [], []
    for shape in SHAPES:
        rows = []
        for k in range(EXAMPLES):
            mask = rasterise(shape, sample_placement(rng, shape, 256, 128.0, 128.0), 256, 256)
            mask = np.asarray(mask > 127, np.uint8)
            if k % 3 == 0:  # as another object would hide it
                cut = int(np.quantile(np.nonzero(mask)[1], rng.uniform(0.02, 0.2)))
                mask[:, :cut] = 0
            rows.append(measures(mask))
        values = np.array(rows)
        means.append(values.mean(0))
        deviations.append(values.std(0) + 0.04)
    return np.array(means), np.array(deviations)


def shape_likeness(region: Image) -> dict[str, float]:
    """How much a region (mask, uint8) looks like each shape: normal densities of the measures, scaled to sum 1."""
    means, deviations = _examples()
    away = ((measures(region) - means) / deviations) ** 2
    density = -0.5 * np.minimum(away, 16).sum(1) - np.log(deviations).sum(1)
    weight = np.exp(density - density.max())
    return dict(zip(SHAPES, (weight / weight.sum()).tolist(), strict=True))


def pattern_likeness(gray: NDArray[np.float32], region: Image) -> dict[str, float]:
    """How much the brightness (H, W) inside a region looks plain, striped, checked or dotted, in 0..1.

    Plain: little contrast. Stripes: gradients along one direction. Checks and dots: along several; dots are the ones
    whose second tone covers less than a third.
    """
    inside = cv2.erode(region, np.ones((5, 5), np.uint8))
    if np.count_nonzero(inside) < 30:
        inside = region
    values = gray[inside > 0]
    contrast = float(np.percentile(values, 90) - np.percentile(values, 10)) / 255
    gx, gy = (cv2.Sobel(gray, cv2.CV_32F, *axis)[inside > 0] for axis in ((1, 0), (0, 1)))
    xx, yy, xy = float((gx * gx).sum()), float((gy * gy).sum()), float((gx * gy).sum())
    one_way = float(np.hypot(xx - yy, 2 * xy)) / max(xx + yy, 1e-6)
    middle = (np.percentile(values, 95) + np.percentile(values, 5)) / 2
    bright = float((values > middle).mean())
    fewer = min(bright, 1 - bright)
    busy = min(1.0, contrast / 0.25)
    return {
        "plain": 1 - busy,
        "striped": busy * one_way,
        "checked": busy * (1 - one_way) * min(1.0, fewer / 0.4),
        "dotted": busy * (1 - one_way) * (1 - min(1.0, fewer / 0.4)),
    }


def regions(image: Image, settings: Settings = SWEPT) -> list[Region]:
    """All regions of an image (H, W, 3) uint8 RGB near one of the twelve named colours."""
    smooth = np.asarray(cv2.medianBlur(image, settings.blur), np.uint8) if settings.blur else image
    lab = _lab(smooth)
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    distance = _distances(lab)
    nearest = distance.argmin(-1)
    found = []
    for k, color in enumerate(COLORS):
        near = (distance[..., k] < settings.tolerance) & (nearest == k)
        mask = near.astype(np.uint8)
        if settings.opening:
            mask = np.asarray(cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((settings.opening,) * 2, np.uint8)))
        count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
        for index in range(1, count):
            x, y, w, h, area = (int(v) for v in stats[index])
            if area < settings.smallest or area > 0.5 * mask.size:
                continue
            part = np.pad((labels[y : y + h, x : x + w] == index).astype(np.uint8), 1)
            tone = np.pad(gray[y : y + h, x : x + w], 1, mode="edge")
            inside = distance[y : y + h, x : x + w, k][part[1:-1, 1:-1] > 0]
            closeness = float(np.clip(1 - inside.mean() / settings.tolerance, 0.01, 1))
            whole = _filled(part)
            found.append(
                Region((x, y, x + w, y + h), color, closeness, shape_likeness(part), pattern_likeness(tone, whole))
            )
    return found


def _filled(part: Image) -> Image:
    contours, _ = cv2.findContours(part, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    out = np.zeros_like(part)
    cv2.drawContours(out, contours, -1, 1, cv2.FILLED)
    return out


@functools.cache
def _known() -> dict[str, Phrase]:
    return {phrase.text: phrase for phrase in all_phrases()}


class ContourDetector:
    """A detector (see `detect_eval.Detect`) from colours and contours; knows only the phrases of :mod:`.words`."""

    def __init__(self, settings: Settings = SWEPT) -> None:
        self.settings = settings
        self._last: tuple[Image, list[Region]] | None = None  # the image asked about last, by identity

    def _regions(self, image: Image) -> list[Region]:
        if self._last is None or self._last[0] is not image:
            self._last = image, regions(image, self.settings)
        return self._last[1]

    def __call__(
        self, image: Image, classes: Sequence[str], threshold: float
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Boxes (N, 4) xyxy pixels, scores (N,) best first, labels (N,): one answer per region, its best class."""
        phrases = [_known()[text] for text in classes]
        boxes, scores, labels = [], [], []
        for region in self._regions(image):
            likeness = [self._score(region, phrase) for phrase in phrases]
            best = int(np.argmax(likeness))
            if likeness[best] > threshold:
                boxes.append(region.box)
                scores.append(likeness[best])
                labels.append(best)
        order = np.argsort(-np.array(scores), kind="stable")
        return (
            np.array(boxes, np.float32).reshape(-1, 4)[order],
            np.array(scores, np.float32)[order],
            np.array(labels, np.int64)[order],
        )

    @staticmethod
    def _score(region: Region, phrase: Phrase) -> float:
        score = region.shapes[phrase.shape] * region.closeness
        if phrase.color:
            return score if region.color == phrase.color else 0.0
        return score * region.patterns[phrase.pattern] if phrase.pattern else score
