"""One tracking request on one loaded model, as a generator of steps for the model's own thread.

Each step is one prompt or one frame, so that other work of the model comes between, and a cancelled request stops
within a frame. Closing the generator frees the tracker's memories.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ContractError, EdgeError, ImageError, PromptError
from ..models.sam2_video.frames import FrameError, Frames
from .convert import rle_of
from .errors import InferenceError, InvalidRequestError
from .families import LoadedModel
from .video_prompts import TrackingRequest, VideoPrompt
from .video_types import TrackedFrame, TrackedObject


def track(model: LoadedModel, request: TrackingRequest, frames: Frames) -> Iterator[TrackedFrame | None]:
    """Yields frames in the order of processing, and None after a step that answers no frame by itself.

    Args:
        model: Loaded for tracking.
        request: Checked against the clip already.
        frames: The clip; the caller's, not closed here.

    Raises:
        FrameError: A frame does not decode or has another size; the message names it.
        InvalidRequestError: A prompt is malformed.
        InferenceError: The back end failed; the message names the frame.
    """
    assert model.video is not None
    # One pass needs no memories of frames that are far behind.
    tracker = model.video.track(_Borrowed(frames), history=False)
    model.trackers.add(tracker)
    try:
        answers: dict[int, list[TrackedObject]] = {}
        for prompt in request.prompts:
            with _named(prompt.frame):
                found = _add(tracker, prompt)
                answers.setdefault(prompt.frame, []).append(_object(found))
            yield None
        if not request.propagate:
            yield from (TrackedFrame(frame, answers[frame]) for frame in sorted(answers))
            return
        first, last = request.span(len(frames))
        position, step = first, 1 if last >= first else -1
        passes = tracker.propagate(first, last)
        while True:
            with _named(position):
                result = next(passes, None)
            if result is None:
                return
            yield TrackedFrame(result.frame, [_object(found) for found in result.objects])
            position = result.frame + step
    finally:
        model.trackers.discard(tracker)
        tracker.close()


def _add(tracker: Any, prompt: VideoPrompt) -> Any:
    if prompt.prompt is None:
        return tracker.add_mask(prompt.object_id, prompt.frame, prompt.mask())
    return tracker.add_prompt(prompt.object_id, prompt.frame, prompt.prompt)


@contextmanager
def _named(frame: int) -> Iterator[None]:
    """Puts the frame's number into errors that do not tell it."""
    try:
        yield
    except FrameError:
        raise
    except EdgeError as error:
        kind: type[InferenceError] = InferenceError
        if isinstance(error, InferenceError):
            kind = type(error)
        elif isinstance(error, PromptError | ImageError | ContractError):
            kind = InvalidRequestError
        raise kind(f"Frame {frame}: {error.message}", error.action) from error


class _Borrowed(Frames):
    """A clip that its user may close without closing it."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self.size = frames.size

    def __len__(self) -> int:
        return len(self._frames)

    def _read(self, index: int) -> npt.NDArray[np.uint8]:
        return self._frames[index]


def _object(found: Any) -> TrackedObject:
    return TrackedObject(
        track_id=found.object_id,
        mask=rle_of(found.mask),
        score=_probability(found.score),
        box=_bounds(found.mask),
    )


def _probability(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, logit))))


def _bounds(mask: npt.NDArray[np.bool_]) -> list[float] | None:
    """Smallest xyxy box around the foreground, in pixel borders; None without foreground."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]
