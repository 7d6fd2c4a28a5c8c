"""Tracking of many objects through a clip: the state machine around the three video graphs.

The order of work follows transformers' ``Sam2VideoModel.forward`` and upstream's ``sam2/sam2_video_predictor.py``:
a prompt on a frame where the object was not tracked yet starts from the plain embedding and makes a conditioning
frame; every other frame attends to the object's memory bank. A correction (a prompt on a frame that was tracked
already) attends to the bank too, takes the earlier mask as a mask prompt and becomes a conditioning frame, as
upstream's SAM 2.1 configurations have it; ``corrections="tracked"`` does as transformers: neither.

Objects are independent of each other. The frame is encoded once, and objects with equally many memories share calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...errors import DeviceError, PromptError
from ...runtime.base import Buffer
from ..sam2.postprocess import LOGIT_CLAMP, write_mask
from ..sam2.preprocess import Scratch
from ..sam2.prompts import Prompt
from .bank import Memory, ObjectBank
from .frames import Frames
from .memory import MapFile, MapPool
from .steps import Step, Stepper

Float32 = npt.NDArray[np.float32]
Corrections = Literal["conditioning", "tracked"]


@dataclass(frozen=True, eq=False)
class ObjectResult:
    """One object on one frame.

    Attributes:
        object_id: The caller's number.
        mask: (H, W) bool at the size of the frames; the caller's to keep.
        score: Object score logit; not above 0 means that the object is judged absent, and the mask is empty.
        iou: The model's own estimate of the mask's IoU; 1 for a mask that was given.
    """

    object_id: int
    mask: npt.NDArray[np.bool_]
    score: float
    iou: float


@dataclass(frozen=True, eq=False)
class FrameResult:
    """All objects of one frame, in the order in which they were added."""

    frame: int
    objects: list[ObjectResult]


class _Object:
    """State of one object."""

    def __init__(self, number: int, bank: ObjectBank[Buffer]) -> None:
        self.number = number
        self.bank = bank
        self.tracked_frames: set[int] = set()
        self.answers: dict[int, Step] = {}
        """Answers to prompts, which later passes repeat instead of computing again."""


class VideoTracker:
    """Tracks objects through one clip. Make it with `Sam2VideoModel.track`; close it to free its memories.

    Thread-safe in the sense that calls wait for each other; `propagate` holds the tracker for one frame at a time.

    Args:
        stepper: Runs the graphs.
        frames: The clip; closed with the tracker.
        corrections: What a prompt on a tracked frame does, see the module's text.
        history: Keep far memories on disk, which a correction after propagation needs. Without it they are dropped:
            enough for one pass.
        streaming: The clip's length is not known, so that temporal codes use the longest one.
    """

    def __init__(
        self,
        stepper: Stepper,
        frames: Frames,
        *,
        corrections: Corrections = "conditioning",
        history: bool = True,
        streaming: bool = False,
    ) -> None:
        self.frames = frames
        self._stepper = stepper
        self._corrections = corrections
        self._streaming = streaming
        self._objects: dict[int, _Object] = {}
        self._numbers = 0
        self._pool = MapPool(stepper.device, stepper.map_shape)
        constants = stepper.constants
        self._history = MapFile(stepper.map_shape, constants.hidden_dim, constants.mask_size) if history else None
        self._scratch = Scratch()
        self._lock = threading.RLock()

    @property
    def object_ids(self) -> list[int]:
        """The objects, in the order in which they were added."""
        return list(self._objects)

    @property
    def maps(self) -> int:
        """Memory maps that exist on the device."""
        return self._pool.made

    def add_prompt(self, object_id: int, frame: int, prompt: Prompt) -> ObjectResult:
        """Marks an object on a frame and answers for that frame; a prompt on the same frame replaces the earlier one.

        Args:
            object_id: Any number; a new one adds an object.
            frame: Index of the frame.
            prompt: Points, box or both, in pixels of the frame.

        Raises:
            PromptError: No points and no box, or malformed ones.
            FrameError: No such frame, or it does not decode.
        """
        if prompt.box is None and (prompt.points is None or len(np.asarray(prompt.points)) == 0):
            raise PromptError(
                f"The prompt of object {object_id} on frame {frame} is empty.", "Give a point, a box or a mask."
            )
        with self._lock:
            return self._prompt(object_id, frame, prompt, None)

    def add_mask(self, object_id: int, frame: int, mask: npt.NDArray[np.bool_]) -> ObjectResult:
        """Gives an object's mask on a frame; it is the answer there and the start of tracking.

        An empty mask says that the object is not on that frame.

        Args:
            object_id: Any number; a new one adds an object.
            frame: Index of the frame.
            mask: (H, W) bool of the frames' size.

        Raises:
            PromptError: Another shape or dtype.
            FrameError: No such frame, or it does not decode.
        """
        mask = np.asarray(mask)
        if mask.shape != self.frames.size or mask.dtype != np.bool_:
            raise PromptError(
                f"The mask of object {object_id} is {mask.dtype}{list(mask.shape)}, frames are "
                f"{list(self.frames.size)}.",
                "Pass a bool array of the frames' height and width.",
            )
        with self._lock:
            return self._prompt(object_id, frame, None, mask)

    def remove_object(self, object_id: int) -> None:
        """Forgets an object and frees its memories; raises PromptError if there is none."""
        with self._lock:
            if object_id not in self._objects:
                raise PromptError(f"There is no object {object_id}.", f"Known: {self.object_ids}.")
            gone = self._objects.pop(object_id)
            for memory in gone.bank.all():
                self._pool.give(memory.features)
            if self._history is not None:
                self._history.drop_object(gone.number)

    def propagate(
        self,
        start: int | None = None,
        end: int | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[FrameResult]:
        """Tracks all objects from frame to frame and yields the results in the order of processing.

        Args:
            start: First frame; None for the earliest one with a prompt.
            end: Last frame, included; before `start` for tracking backwards. None for the end of the clip.
            cancelled: Asked before each frame; True ends the pass.

        Raises:
            PromptError: No objects, or `start` or `end` lie outside the clip.
            FrameError: A frame does not decode or has another size; frames before it were yielded, and the tracker
                can go on after it.
        """
        with self._lock:
            if not self._objects:
                raise PromptError("There is nothing to track.", "Add a prompt first.")
            count = len(self.frames)
            first = min(min(o.bank.conditioning) for o in self._objects.values()) if start is None else start
            last = count - 1 if end is None else end
            if not (0 <= first < count and 0 <= last < count):
                raise PromptError(
                    f"Frames {first} to {last} are asked for, the clip has {count}.", f"Use 0 to {count - 1}."
                )
        reverse = last < first
        for frame in range(first, last + (-1 if reverse else 1), -1 if reverse else 1):
            if cancelled is not None and cancelled():
                return
            with self._lock:
                result = self._frame(frame, reverse)
            yield result

    def close(self) -> None:
        """Frees memories and the clip; the model stays open."""
        with self._lock:
            self._objects.clear()
            self._pool.clear()
            if self._history is not None:
                self._history.close()
            self.frames.close()

    def __enter__(self) -> VideoTracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prompt(
        self, object_id: int, frame: int, prompt: Prompt | None, mask: npt.NDArray[np.bool_] | None
    ) -> ObjectResult:
        embedding = self._stepper.encode(self.frames[frame])
        obj = self._objects.get(object_id)
        new = obj is None
        if obj is None:
            obj = _Object(self._numbers, ObjectBank(self._stepper.video))
        correction = frame in obj.tracked_frames and bool(obj.bank.conditioning)
        attend = correction and mask is None
        if attend and prompt is not None and self._corrections == "conditioning" and prompt.mask_input is None:
            earlier = self._logits_of(obj, frame)
            if earlier is not None:
                prompt = Prompt(prompt.points, prompt.labels, prompt.box, np.clip(earlier, -LOGIT_CLAMP, LOGIT_CLAMP))
        selection = None
        if attend:
            self._recall(obj, frame, False)
            selection = obj.bank.select(frame, False, self._length)
        if mask is not None:
            step = self._stepper.given(embedding, mask)
        else:
            assert prompt is not None
            step = self._stepper.prompted(embedding, prompt, selection, first=not correction)
        conditioning = not correction or self._corrections == "conditioning"
        self._remember(obj, frame, step, embedding, True, conditioning)
        if new:  # only now: a refused prompt must not leave an empty object behind
            self._objects[object_id] = obj
            self._numbers += 1
        return self._result(object_id, step)

    def _frame(self, frame: int, reverse: bool) -> FrameResult:
        """All objects on one frame."""
        results: dict[int, Step] = {}
        waiting: list[tuple[int, _Object]] = []
        for object_id, obj in self._objects.items():
            if frame in obj.answers:
                results[object_id] = obj.answers[frame]
            else:
                waiting.append((object_id, obj))
        if waiting:
            embedding = self._stepper.encode(self.frames[frame])
            selections = []
            for _, obj in waiting:
                self._recall(obj, frame, reverse)
                selections.append(obj.bank.select(frame, reverse, self._length))
            steps = self._stepper.tracked(embedding, selections)
            self._remember_all([obj for _, obj in waiting], frame, steps, embedding, False)
            for (object_id, obj), step in zip(waiting, steps):
                obj.tracked_frames.add(frame)
                self._forget_far(obj, frame)
                results[object_id] = step
        return FrameResult(frame, [self._result(i, results[i]) for i in self._objects])

    @property
    def _length(self) -> int | None:
        return None if self._streaming else len(self.frames)

    def _logits_of(self, obj: _Object, frame: int) -> Float32 | None:
        """The logits that an object had on a frame, if they are still known."""
        held = obj.bank.conditioning.get(frame) or obj.bank.tracked.get(frame)
        if held is not None:
            return held.logits
        found = self._history.get((obj.number, frame)) if self._history is not None else None
        return None if found is None else found[2]

    def _remember(
        self, obj: _Object, frame: int, step: Step, embedding: Any, prompted: bool, conditioning: bool
    ) -> None:
        self._remember_all([obj], frame, [step], embedding, prompted, conditioning)
        obj.answers[frame] = step

    def _remember_all(
        self,
        objects: Sequence[_Object],
        frame: int,
        steps: Sequence[Step],
        embedding: Any,
        prompted: bool,
        conditioning: bool = False,
    ) -> None:
        """Encodes what the frame leaves behind for each object and puts it into the banks."""
        buffers = [self._pool.take() for _ in objects]
        pointers = self._stepper.remember(embedding, steps, prompted, buffers)
        for obj, buffer, pointer, step in zip(objects, buffers, pointers, steps):
            for old in obj.bank.store(Memory(frame, buffer, pointer, step.logits), conditioning):
                self._pool.give(old.features)
            if self._history is not None:
                self._history.drop((obj.number, frame))

    def _forget_far(self, obj: _Object, frame: int) -> None:
        """Moves memories that the coming frames do not need to the file, or drops them."""
        for memory in obj.bank.out_of_reach(frame):
            if self._history is not None:
                features = self._stepper.device.download(memory.features)
                try:
                    self._history.put((obj.number, memory.frame), features, memory.pointer, memory.logits)
                except DeviceError:
                    obj.bank.tracked[memory.frame] = memory  # nothing is lost: the next frame tries again
                    raise
            self._pool.give(memory.features)

    def _recall(self, obj: _Object, frame: int, reverse: bool) -> None:
        """Brings memories that `frame` attends to back from the file."""
        if self._history is None or not len(self._history):
            return
        reach = max(self._stepper.video.num_memories, self._stepper.video.max_pointers) - 1
        near = range(frame + 1, frame + reach + 1) if reverse else range(frame - reach, frame)
        for other in near:
            if other in obj.bank.tracked or other in obj.bank.conditioning:
                continue
            found = self._history.get((obj.number, other))
            if found is not None:
                buffer = self._pool.take()
                self._stepper.device.upload(buffer, found[0])
                obj.bank.tracked[other] = Memory(other, buffer, found[1], found[2])
                self._history.drop((obj.number, other))

    def _result(self, object_id: int, step: Step) -> ObjectResult:
        if step.mask is not None:
            return ObjectResult(object_id, step.mask.copy(), step.score, step.iou)
        mask = np.empty(self.frames.size, np.bool_)
        write_mask(step.logits, self._stepper.constants.mask_threshold, mask, self._scratch)
        return ObjectResult(object_id, mask, step.score, step.iou)
