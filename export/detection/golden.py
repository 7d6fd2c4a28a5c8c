"""Golden samples of detectors: a picture, classes and PyTorch's answers, so a box without torch can check itself.

Keys of each ``golden/<name>.npz`` (K classes, N detections; all arrays little-endian, no pickles):

================  ============  =========================================================================
key               shape, dtype  meaning
================  ============  =========================================================================
original_size     (2,) int32    height and width of the picture
classes           (K,) <U       asked for
box_threshold     () float64    asked with; no score is near it
text_threshold    () float64    asked with, not above box_threshold
boxes             (N, 4)        float32 x1, y1, x2, y2 in pixels, clipped to the picture
scores            (N,) float32  best first
labels            (N,) int64    index into classes
<tensor>_index    (V,) int64    flat C-order positions in <tensor>
<tensor>_values   (V,) float32  values there
================  ============  =========================================================================

``<tensor>`` is each of the family's traced tensors (`Answer.trace`): V values spread evenly, since whole ones would
weigh megabytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pixano_edge.engine.bundle.manifest import GoldenSample
from pixano_edge.engine.bundle.writer import BundleWriter
from pixano_edge.export.detection.family import Answer, DetectorFamily
from pixano_edge.export.detection.parity import CLASS_LISTS, choose_threshold
from pixano_edge.export.photos import Photo, reduce

SAMPLES = 2
VALUES = 512
MAX_SIDE = 384
FEWEST, MOST = 3, 32
"""Detections of a sample."""


def add_golden(
    writer: BundleWriter, family: DetectorFamily, photos: Sequence[Photo], lists: Sequence[Sequence[str]] | None
) -> list[GoldenSample]:
    """Writes `SAMPLES` golden samples into the bundle, each with the longest list of classes."""
    classes = max(lists or CLASS_LISTS, key=len)
    samples = []
    for index, photo in enumerate(photos[:SAMPLES]):
        small = Photo(photo.name, reduce(photo.pixels, MAX_SIDE), photo.origin)
        name = f"golden-{index}"
        buffer = io.BytesIO()
        # PNG: every decoder gives the same pixels, which JPEG does not promise.
        Image.fromarray(small.pixels).save(buffer, format="PNG", optimize=True)
        writer.add_file(f"golden/{name}.png", buffer.getvalue())
        stored = io.BytesIO()
        (answer,) = family.ask(small, [classes])
        arrays: dict[str, Any] = {**make_sample(answer)}
        np.savez_compressed(stored, **arrays)
        writer.add_file(f"golden/{name}.npz", stored.getvalue())
        samples.append(GoldenSample(name=name, image=f"golden/{name}.png", tensors=f"golden/{name}.npz"))
    return samples


def make_sample(answer: Answer) -> dict[str, npt.NDArray[Any]]:
    """The arrays of one golden sample."""
    threshold = choose_threshold(answer.scores, FEWEST, MOST)
    found = answer.detect(threshold)
    arrays: dict[str, npt.NDArray[Any]] = {
        "original_size": np.array(answer.photo.size, np.int32),
        "classes": np.array(answer.classes),
        "box_threshold": np.array(threshold, np.float64),
        "text_threshold": np.array(min(threshold, 0.5), np.float64),
        "boxes": found.boxes,
        "scores": found.scores,
        "labels": found.labels,
    }
    for name, value in answer.trace.items():
        index = np.linspace(0, value.size - 1, min(VALUES, value.size)).astype(np.int64)
        arrays[f"{name}_index"] = index
        arrays[f"{name}_values"] = value.reshape(-1)[index].astype(np.float32)
    return arrays
