"""What every zero-shot detector takes and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import PromptError
from ...runtime.memory import MemoryUse

MAX_CLASSES = 1000
"""Classes of one request."""
MAX_CLASS_LENGTH = 1000
"""Characters of one class name; what a tokeniser takes may be less, see the detector."""

BOX_THRESHOLD = 0.5
TEXT_THRESHOLD = 0.5
"""Defaults of Pixano's interface."""


@dataclass(frozen=True, eq=False)
class Detections:
    """Boxes found on one image, best score first; the arrays belong to the caller.

    Attributes:
        boxes: (N, 4) float32 x1, y1, x2, y2 in pixels of the original image, clipped to it.
        scores: (N,) float32 in 0..1.
        labels: (N,) int64 index into `classes`.
        classes: What was asked for, as it was given.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)

    def names(self) -> list[str]:
        """Class name of each box."""
        return [self.classes[i] for i in self.labels]


class TextCache(Protocol):
    """The part of a detector's text cache that others use."""

    def clear(self) -> None: ...

    def stats(self) -> Any: ...


class Detector(Protocol):
    """A zero-shot detector of any family. Thread-safe: each session takes one call at a time."""

    @property
    def text_cache(self) -> TextCache: ...

    def detect(
        self,
        image: npt.NDArray[np.uint8],
        classes: Sequence[str],
        *,
        box_threshold: float = BOX_THRESHOLD,
        text_threshold: float = TEXT_THRESHOLD,
        nms: float | None = None,
        limit: int | None = None,
        check: Callable[[], None] | None = None,
    ) -> Detections:
        """Boxes of the classes on an image.

        Args:
            image: (H, W, 3) uint8 RGB; not kept.
            classes: 1 to `MAX_CLASSES` names; their text features are computed once per list and then cached.
            box_threshold: Boxes below this score are left out, 0 to 1.
            text_threshold: Grounding DINO: least probability of a class's words; OWLv2 scores a box and its class at
                once and has no use for it. 0 to 1.
            nms: IoU above which the lesser of two boxes of one class goes; None keeps both.
            limit: Most boxes returned.
            check: Called between the runs of the graphs, many of which a long list of classes takes; what it raises
                ends the call.

        Raises:
            PromptError: No classes, too many, an empty or too long one or one that is no text, a number out of range.
            ImageError: Not such an array.
            DeviceMemoryError: No room on the device; the detector still works.
            DeviceError: The detector is closed, or the back end failed.
        """
        ...

    def info(self) -> dict[str, Any]:
        """Bundle, device, back end, precision and why, warnings, warm-up, counters; JSON-ready."""
        ...

    def memory(self) -> MemoryUse: ...

    def shrink(self) -> None:
        """Drops what is kept between requests and can be computed again."""
        ...

    def reset(self) -> None:
        """As `shrink`, and the counters of what is kept start again."""
        ...

    def close(self) -> None: ...


def check_request(
    classes: Sequence[str],
    box_threshold: float = BOX_THRESHOLD,
    text_threshold: float = TEXT_THRESHOLD,
    nms: float | None = None,
    limit: int | None = None,
) -> tuple[str, ...]:
    """The classes as a tuple, as they were given; raises PromptError as `Detector.detect` says."""
    names = () if isinstance(classes, str) else tuple(classes)
    if isinstance(classes, str) or not all(isinstance(name, str) for name in names):
        raise PromptError("Classes must be a list of strings.", "Send for example ['cat', 'remote control'].")
    if not names:
        raise PromptError("There are no classes to detect.", "Name at least one, for example 'person'.")
    if len(names) > MAX_CLASSES:
        raise PromptError(f"{len(names)} classes are more than {MAX_CLASSES}.", "Ask for them in several requests.")
    for index, name in enumerate(names):
        if not name.strip():
            raise PromptError(f"Class {index} is empty.", "Leave it out or name it.")
        if len(name) > MAX_CLASS_LENGTH:
            raise PromptError(
                f"Class {index} has {len(name)} characters, more than {MAX_CLASS_LENGTH}.", "Use a short phrase."
            )
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # no tokeniser takes them, and no file
            raise PromptError(f"Class {index} {name[:40]!a} holds half a character.", "Send its name as valid UTF-8.")
    for what, value in (("box_threshold", box_threshold), ("text_threshold", text_threshold), ("nms", nms)):
        if value is not None and not 0 <= value <= 1:  # NaN is refused, too
            raise PromptError(f"{what} must be 0 to 1, got {value}.", "Choose a number in that range.")
    if limit is not None and limit < 1:
        raise PromptError(f"limit must be 1 or more, got {limit}.", "Leave it out for all boxes.")
    return names
