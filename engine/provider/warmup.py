"""What a model runs once after its load, so that the first request finds memory, threads and libraries in place.

A photo of zeros goes the way of a request's photo, past every cache. What a family keeps between requests, and its
counters, are as before; only launches are counted.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..models.images import decode_image
from ..models.rle import encode_rle
from ..models.sam2.prompts import Prompt

if TYPE_CHECKING:
    from ..models.decoder.model import DecoderModel
    from ..models.detection.base import Detector
    from ..models.sam2.predictor import Sam2ImagePredictor
    from ..models.sam2_video.model import Sam2VideoModel

Check = Callable[[], None]
"""Called between the steps; what it raises ends the warm-up."""

WIDTH, HEIGHT = 1024, 768
"""Of the photo: what annotators send is seldom smaller, and work memory for more pixels comes when they do."""


def warm_masks(predictor: Sam2ImagePredictor, check: Check) -> None:
    """Encodes a photo, asks for a click and a box, and packs the masks."""
    embedding = predictor.encode(_photo(), cached=False)
    middle = [[WIDTH / 2, HEIGHT / 2]]
    for prompt in (Prompt(points=middle, labels=[1]), Prompt(box=[0, 0, WIDTH / 2, HEIGHT / 2])):
        check()
        for mask in predictor.predict(embedding, [prompt]).masks[0]:
            encode_rle(mask)


def warm_tracking(video: Sam2VideoModel, check: Check) -> None:
    """As `warm_masks`, and tracks one object over two frames."""
    warm_masks(video.predictor, check)
    check()
    video.warm_up()


def warm_detector(detector: Detector, check: Check) -> None:
    """Looks for one class."""
    try:
        detector.detect(_photo(), ["object"], check=check)
    finally:
        detector.reset()


def warm_text(vlm: DecoderModel, check: Check) -> None:
    """Encodes one image, reads a prompt and answers with a few tokens."""
    _photo()  # for the libraries
    vlm.warm_up(check)


def _photo() -> npt.NDArray[np.uint8]:
    """(`HEIGHT`, `WIDTH`, 3), from a JPEG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(file, "JPEG")
    return decode_image(file.getvalue())
