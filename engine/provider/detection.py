"""One detection request on one loaded model, start to end, on the model's own thread."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from ..models.detection.base import BOX_THRESHOLD, TEXT_THRESHOLD, check_request
from ..models.images import ImageLimits, decode_image
from .errors import InvalidRequestError
from .families import LoadedModel
from .media import MediaPolicy
from .types import ImageZeroShotDetectionOutput
from .worker import Job

_FULL_STOP = re.compile(r"(?<!\d)\.|\.(?!\d)")  # that of "2.5 mm screw" is none


def detect(model: LoadedModel, request: Any, media: MediaPolicy, job: Job) -> ImageZeroShotDetectionOutput:
    """Decodes the image, looks for the classes, rounds the boxes to whole pixels of the image, best score first.

    Raises:
        InvalidRequestError, ImageError, PromptError: The request is malformed.
        CancelledError: The request was abandoned.
    """
    detector, options = model.detector, model.options
    assert detector is not None
    classes = read_classes(getattr(request, "classes", None))
    box_threshold = _threshold(request, "box_threshold", BOX_THRESHOLD)
    text_threshold = _threshold(request, "text_threshold", TEXT_THRESHOLD)
    classes = check_request(classes, box_threshold, text_threshold)  # before the image, which costs more
    limits = ImageLimits(max_bytes=options.max_image_bytes, max_pixels=options.max_image_pixels)
    with job.stage("decode_image"):
        image = decode_image(media.read(getattr(request, "image", None), options.max_image_bytes), limits)
    job.check()
    with job.stage("detect"):
        found = detector.detect(
            image, classes, box_threshold=box_threshold, text_threshold=text_threshold, check=job.check
        )
    boxes = whole_pixels(found.boxes, (image.shape[0], image.shape[1]))
    return ImageZeroShotDetectionOutput(boxes=boxes.tolist(), scores=found.scores.tolist(), classes=found.names())


def whole_pixels(boxes: npt.NDArray[np.float32], size: tuple[int, int]) -> npt.NDArray[np.int64]:
    """(N, 4) corners in whole pixels of the image, never without area: a box thinner than a pixel gets the one that
    its middle lies in.

    Args:
        boxes: (N, 4) x1, y1, x2, y2 in pixels.
        size: (height, width) of the image.
    """
    height, width = size
    corners: npt.NDArray[np.int64] = np.rint(boxes).astype(np.int64).clip(0, (width, height, width, height))
    for axis, side in enumerate((width, height)):
        flat = corners[:, axis] >= corners[:, axis + 2]
        middle = np.floor(boxes[flat][:, [axis, axis + 2]].mean(axis=1)).astype(np.int64).clip(0, side - 1)
        corners[flat, axis], corners[flat, axis + 2] = middle, middle + 1
    return corners


def read_classes(value: Any) -> tuple[str, ...]:
    """The classes of a request: a list, or one text.

    A text is read like a caption of Grounding DINO, "cat. remote control.": it is split at full stops (not at decimal
    points), or at commas where there is none. A list is taken as it is.

    Raises:
        InvalidRequestError: Neither of them.
    """
    if isinstance(value, str):
        parts = _FULL_STOP.split(value) if _FULL_STOP.search(value) else value.split(",")
        return tuple(part.strip() for part in parts if part.strip())
    if isinstance(value, bytes | bytearray | dict) or not isinstance(value, Collection):
        raise InvalidRequestError(
            f"classes must be a list of names or one text, got {type(value).__name__}.",
            "Send for example ['cat', 'remote control'], or 'cat. remote control.'.",
        )
    return tuple(value)


def _threshold(request: Any, key: str, default: float) -> float:
    """A threshold of a request; whether it is in range is checked with the classes."""
    value = getattr(request, key, None)
    if value is None:
        return default
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise InvalidRequestError(f"{key} must be a number, got {value!r:.60}.", "Choose a number from 0 to 1.")
    return float(value)
