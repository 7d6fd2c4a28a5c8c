"""What a tracking request asks for, read from any object with the fields of `EdgeVideoMaskGenerationInput`.

Everything that can be told without the clip is checked in `read_request`, the rest in `TrackingRequest.check`, before
any frame is computed: a wrong prompt on the last frame shall not cost the whole clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contracts.sam2 import Sam2Constants
from ..errors import PromptError
from ..models.rle import decode_rle
from ..models.sam2.prompts import Prompt, build_prompts
from .errors import InvalidRequestError


@dataclass(frozen=True, eq=False)
class VideoPrompt:
    """One object marked on one frame, by points and box or by a mask.

    Attributes:
        object_id: The request's number.
        frame: Index of the frame.
        prompt: In pixels of the frame; None for a mask.
        rle: The mask's run lengths; None for points and box.
    """

    object_id: int
    frame: int
    prompt: Prompt | None = None
    rle: Mapping[str, Any] | None = None

    @property
    def where(self) -> str:
        """For messages."""
        return f"The prompt of object {self.object_id} on frame {self.frame}"

    @property
    def mask_size(self) -> tuple[int, int] | None:
        """(height, width) as the run lengths say; None where they do not, which decoding tells."""
        size = self.rle.get("size") if self.rle is not None else None
        if isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) for side in size):
            return size[0], size[1]
        return None

    def mask(self) -> npt.NDArray[np.bool_]:
        """The mask, decoded now: (H, W) bool.

        Raises:
            InvalidRequestError: Malformed run lengths.
        """
        assert self.rle is not None
        try:
            return decode_rle(self.rle)
        except PromptError as error:
            raise InvalidRequestError(f"{self.where}: {error.message}", error.action) from error


@dataclass(frozen=True, eq=False)
class TrackingRequest:
    """Prompts and range of one request.

    Attributes:
        prompts: In the order of the request, at most one for each object and frame.
        propagate: Whether to follow the objects beyond the prompted frames.
        interval: First and last frame, both included; None: from the earliest prompted frame to the clip's end.
    """

    prompts: list[VideoPrompt]
    propagate: bool
    interval: tuple[int, int] | None

    def span(self, count: int) -> tuple[int, int]:
        """First and last frame of a clip of `count` frames, last before first for going backwards."""
        return self.interval or (min(p.frame for p in self.prompts), count - 1)

    def total(self, count: int) -> int:
        """Frames that will be answered in a clip of `count` frames."""
        if not self.propagate:
            return len({p.frame for p in self.prompts})
        first, last = self.span(count)
        return abs(last - first) + 1

    def check(self, count: int, size: tuple[int, int], constants: Sam2Constants) -> None:
        """Compares the request with the clip.

        Args:
            count: Frames of the clip.
            size: (height, width) of its frames.
            constants: Of the model.

        Raises:
            InvalidRequestError: A frame that the clip does not have, coordinates far outside, a box without area, a
                mask of another size.
        """
        for frame in (*(p.frame for p in self.prompts), *(self.interval or ())):
            if frame >= count:
                raise InvalidRequestError(
                    f"Frame {frame} is asked for, the clip has {count}.", f"Use 0 to {count - 1}: frames count from 0."
                )
        for prompt in self.prompts:
            if prompt.prompt is not None:
                try:
                    build_prompts([prompt.prompt], size, constants)
                except PromptError as error:
                    detail = error.message.removeprefix("The prompt").lstrip(": ")
                    raise InvalidRequestError(f"{prompt.where}: {detail}", error.action) from error
            else:
                # What it says of its size comes first: a few bytes can stand for 100 million pixels.
                shape = prompt.mask_size or prompt.mask().shape
                if shape != size:
                    raise InvalidRequestError(
                        f"{prompt.where}: the mask is {list(shape)}, frames are {list(size)} (height, width).",
                        "Send a mask of the frames' size.",
                    )
                prompt.mask()


def read_request(request: Any) -> TrackingRequest:
    """Prompts, `propagate` and `interval` of a request.

    Raises:
        InvalidRequestError: No prompt, a malformed one, two for one object on one frame, too few ids or frame indexes,
            or an interval that is none.
    """
    ids = [_index(v, f"objects_ids[{i}]", False) for i, v in enumerate(_list(request, "objects_ids"))]
    frames = [_index(v, f"frame_indexes[{i}]") for i, v in enumerate(_list(request, "frame_indexes"))]
    keyframes = _list(request, "keyframes")
    prompts = _of_keyframes(keyframes, ids, frames) if keyframes else _of_lists(request, ids, frames)
    if not prompts:
        raise InvalidRequestError(
            "The request marks no object.", "Send keyframes, or points or boxes, with objects_ids and frame_indexes."
        )
    seen: set[tuple[int, int]] = set()
    for prompt in prompts:
        if (prompt.object_id, prompt.frame) in seen:
            raise InvalidRequestError(
                f"Object {prompt.object_id} is marked twice on frame {prompt.frame}.",
                "Combine the points and the box into one prompt, or use another id for another object.",
            )
        seen.add((prompt.object_id, prompt.frame))
    propagate = getattr(request, "propagate", None)
    if not isinstance(propagate, bool | None):
        raise InvalidRequestError(f"propagate must be true, false or null, got {propagate!r:.60}.", "Correct it.")
    return TrackingRequest(prompts, propagate is not False, _interval(getattr(request, "interval", None)))


def _of_lists(request: Any, ids: list[int], frames: list[int]) -> list[VideoPrompt]:
    """Prompts of `points`, `labels` and `boxes`, one entry per object."""
    given = {key: _list(request, key) for key in ("points", "labels", "boxes")}
    counts = {key: len(v) for key, v in given.items() if v}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{n} {key}" for key, n in counts.items())
        raise InvalidRequestError(f"The prompts disagree: {listed}.", "Send one entry per object in each list.")
    count = next(iter(counts.values()), 0)
    _check_count(count, ids, "objects_ids")
    _check_count(count, frames, "frame_indexes")
    prompts = []
    for i in range(count):
        points, labels, box = (given[key][i] if given[key] else None for key in ("points", "labels", "boxes"))
        prompt = Prompt(
            points=_some(points), labels=_some(labels) if _some(points) is not None else None, box=_some(box)
        )
        if prompt.points is None and prompt.box is None:
            raise InvalidRequestError(
                f"Object {ids[i]} has neither point nor box on frame {frames[i]}.", "Give one, or leave the object out."
            )
        prompts.append(VideoPrompt(ids[i], frames[i], prompt))
    return prompts


def _of_keyframes(keyframes: list[Any], ids: list[int], frames: list[int]) -> list[VideoPrompt]:
    _check_count(len(keyframes), ids, "objects_ids")
    return [_keyframe(k, f"keyframes[{i}]", ids[i], frames[i : i + 1]) for i, k in enumerate(keyframes)]


def _keyframe(keyframe: Any, where: str, object_id: int, fallback: list[int]) -> VideoPrompt:
    """One keyframe; `fallback` holds the frame index for one that does not tell its own."""
    if not isinstance(keyframe, Mapping):
        raise InvalidRequestError(
            f"{where} must be an object, got {type(keyframe).__name__}.", "See frame_index, points."
        )
    own = keyframe.get("frame_index")
    if own is None and not fallback:
        raise InvalidRequestError(f"{where} has no frame_index.", "Say which frame it marks, counted from 0.")
    frame = fallback[0] if own is None else _index(own, f"{where}.frame_index")
    points, box, mask = (_some(keyframe.get(key)) for key in ("points", "box", "mask"))
    if mask is not None:
        if points is not None or box is not None:
            raise InvalidRequestError(
                f"{where} has a mask together with points or a box.",
                "Send the mask alone, or points and box without it.",
            )
        if not isinstance(mask, Mapping):
            raise InvalidRequestError(f"{where}.mask must have 'size' and 'counts'.", "Send COCO run lengths.")
        return VideoPrompt(object_id, frame, rle=mask)
    if points is None and box is None:
        raise InvalidRequestError(f"{where} marks nothing.", "Give it points, a box or a mask, or leave it out.")
    coords, labels = _points(points, f"{where}.points")
    return VideoPrompt(object_id, frame, Prompt(points=coords, labels=labels, box=_box(box, f"{where}.box")))


def _points(points: Any, where: str) -> tuple[list[list[float]] | None, list[int] | None]:
    if points is None:
        return None, None
    if isinstance(points, str) or not isinstance(points, Sequence):
        raise InvalidRequestError(f"{where} must be a list, got {type(points).__name__}.", "Send [{x, y, label}].")
    coords, labels = [], []
    for i, point in enumerate(points):
        if not isinstance(point, Mapping):
            raise InvalidRequestError(f"{where}[{i}] must have x and y, got {point!r:.60}.", "Send {x, y, label}.")
        coords.append([_number(point.get(key), f"{where}[{i}].{key}") for key in ("x", "y")])
        label = point.get("label")
        if label is not None and (isinstance(label, bool) or label not in (0, 1)):
            raise InvalidRequestError(
                f"{where}[{i}].label is {label!r:.60}.", "Use 1 for the object, 0 for background."
            )
        labels.append(1 if label is None else int(label))
    return coords, labels


def _box(box: Any, where: str) -> list[float] | None:
    if box is None:
        return None
    if not isinstance(box, Mapping):
        raise InvalidRequestError(f"{where} must have x, y, width and height, got {box!r:.60}.", "Send all four.")
    x, y, width, height = (_number(box.get(key), f"{where}.{key}") for key in ("x", "y", "width", "height"))
    if width <= 0 or height <= 0:
        raise InvalidRequestError(
            f"{where} is {width:g}x{height:g}: it has no area.", "Send a width and height above 0."
        )
    return [x, y, x + width, y + height]


def _interval(interval: Any) -> tuple[int, int] | None:
    if interval is None:
        return None
    if not isinstance(interval, Mapping):
        raise InvalidRequestError(
            f"interval must have start_frame and end_frame, got {interval!r:.60}.", "Send both, or null."
        )
    start, end = (_index(interval.get(key), f"interval.{key}") for key in ("start_frame", "end_frame"))
    direction = interval.get("direction")
    if direction not in (None, "forward", "backward"):
        raise InvalidRequestError(f"interval.direction is {direction!r:.60}.", "Use 'forward' or 'backward'.")
    if direction == "backward" and start < end:
        raise InvalidRequestError(
            f"The interval goes forward, from frame {start} to {end}, and its direction is backward.",
            f"To go backwards send start_frame {end} and end_frame {start}.",
        )
    return start, end


def _list(request: Any, key: str) -> list[Any]:
    value = getattr(request, key, None)
    if value is None:
        return []
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        raise InvalidRequestError(f"{key} must be a list, got {type(value).__name__}.", "Send one entry per object.")
    return list(value)


def _check_count(prompts: int, values: list[int], key: str) -> None:
    # More ids than prompts is what Pixano's own helper sends; the other way round prompts would be lost.
    if len(values) < prompts:
        raise InvalidRequestError(
            f"There are {prompts} prompts and {len(values)} {key}.", f"Send one of {key} for each prompt."
        )


def _some(value: Any) -> Any:
    """None for what is absent or empty."""
    if value is None or (isinstance(value, Sequence | Mapping | np.ndarray) and len(value) == 0):
        return None
    return value


def _index(value: Any, where: str, positive: bool = True) -> int:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole and isinstance(value, float) and value.is_integer():
        whole = True
    if not whole or (positive and value < 0):
        kind = "a whole number, 0 or more" if positive else "a whole number"
        raise InvalidRequestError(f"{where} must be {kind}, got {value!r:.60}.", "Correct it.")
    return int(value)


def _number(value: Any, where: str) -> float:
    if not isinstance(value, int | float | np.number) or isinstance(value, bool) or not np.isfinite(value):
        raise InvalidRequestError(f"{where} must be a number, got {value!r:.60}.", "Give pixels of the frame.")
    return float(value)
