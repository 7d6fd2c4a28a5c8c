"""Tracking of many objects through a clip: the state machine around the three video graphs.

The order of work follows transformers' ``Sam2VideoModel.forward`` and upstream's ``sam2/sam2_video_predictor.py``:
a prompt on a frame where the object was not tracked yet starts from the plain embedding and makes a conditioning
frame; every other frame attends to the object's memory bank. A correction (a prompt on a frame that was tracked
already) attends to the bank too, takes the earlier mask as a mask prompt and becomes a conditioning frame, as
upstream's SAM 2.1 configurations have it; ``corrections="tracked"`` does as transformers: neither.

Objects are independent of each other. The frame is encoded once, and objects with equally many memories share calls.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from ...contracts.sam2 import LABEL_PAD
from ...errors import DeviceError, PromptError
from ...runtime.base import Buffer
from ..sam2.postprocess import LOGIT_CLAMP, write_mask
from ..sam2.preprocess import Scratch
from ..sam2.prompts import Prompt, build_prompts
from ..sam2.results import Embedding
from .bank import Memory, ObjectBank
from .frames import Frames
from .memory import MapFile, Slot, SlotPool
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

    def __init__(self, number: int, bank: ObjectBank[Slot]) -> None:
        self.number = number
        self.bank = bank
        self.tracked_frames: set[int] = set()
        self.answers: dict[int, Step] = {}
        """Answers to prompts, which later passes repeat instead of computing again."""


class VideoTracker:
    """Tracks objects through one clip. Make it with `Sam2VideoModel.track`; close it to free its memories.

    Thread-safe in the sense that calls wait for each other; `propagate` holds the tracker for one frame at a time, so
    that objects may be added and removed during a pass: it goes on with those that are there.

    Args:
        stepper: Runs the graphs.
        frames: The clip; closed with the tracker.
        corrections: What a prompt on a tracked frame does, see the module's text.
        history: Keep far memories on disk, which a correction after propagation needs. Without it they are dropped:
            enough for one pass.
        streaming: The clip's length is not known, so that temporal codes use the longest one.
        max_cond_frames: Most conditioning frames attended to, the closest ones; -1 for all, None for the checkpoint's.

    Raises:
        PromptError: `corrections` or `max_cond_frames` is none of these; `frames` are closed then.
    """

    def __init__(
        self,
        stepper: Stepper,
        frames: Frames,
        *,
        corrections: Corrections = "conditioning",
        history: bool = True,
        streaming: bool = False,
        max_cond_frames: int | None = None,
    ) -> None:
        if corrections not in get_args(Corrections):
            frames.close()
            raise PromptError(f"There is no way '{corrections}' to take corrections.", f"Use {get_args(Corrections)}.")
        video = stepper.video
        if max_cond_frames is not None:
            if max_cond_frames < 1 and max_cond_frames != -1:
                frames.close()
                raise PromptError(
                    f"{max_cond_frames} conditioning frames cannot be attended to.", "Use 1 or more, or -1 for all."
                )
            video = replace(video, max_cond_frames=max_cond_frames)
        self.frames = frames
        self._video = video
        self._stepper = stepper
        self._corrections = corrections
        self._streaming = streaming
        self._objects: dict[int, _Object] = {}
        self._numbers = 0
        self._pool = SlotPool(stepper.new_slot)
        c = stepper.constants
        shape = (video.memory_dim, c.embed_size, c.embed_size)
        self._history = MapFile(shape, c.hidden_dim, c.mask_size) if history else None
        self._host: list[tuple[Buffer, Buffer]] = []
        self._scratch = Scratch()
        self._last: tuple[int, Embedding] | None = None
        self._closed = False
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
        # Here already: nothing is decoded nor encoded for a prompt that is refused.
        (checked,) = build_prompts([prompt], self.frames.size, self._stepper.constants)
        if (checked.point_labels == LABEL_PAD).all():
            raise PromptError(
                f"The prompt of object {object_id} on frame {frame} is empty.", "Give a point, a box or a mask."
            )
        with self._open():
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
        with self._open():
            return self._prompt(object_id, frame, None, mask)

    def remove_object(self, object_id: int) -> None:
        """Forgets an object and frees its memories; raises PromptError if there is none."""
        with self._open():
            if object_id not in self._objects:
                raise PromptError(f"There is no object {object_id}.", f"Known: {self.object_ids}.")
            gone = self._objects.pop(object_id)
            self._pool.give(*(memory.slot for memory in gone.bank.all()))
            self._pool.clear()
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
        with self._open():
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
            with self._open():
                result = self._frame(frame, reverse)
            yield result

    def close(self) -> None:
        """Waits for a frame under way, then frees memories and the clip; later calls raise DeviceError. The model stays
        open."""
        with self._lock:
            self._closed = True
            self._objects.clear()
            self._last = None
            self._host.clear()
            self._pool.clear()
            if self._history is not None:
                self._history.close()
            self.frames.close()

    def __enter__(self) -> VideoTracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """The tracker for one frame; raises DeviceError when it is closed."""
        with self._lock:
            if self._closed:
                raise DeviceError("The tracker is closed.", "Open another one for the clip.")
            yield

    def _prompt(
        self, object_id: int, frame: int, prompt: Prompt | None, mask: npt.NDArray[np.bool_] | None
    ) -> ObjectResult:
        embedding = self._encode(frame, True)
        obj = self._objects.get(object_id)
        new = obj is None
        if obj is None:
            obj = _Object(self._numbers, ObjectBank(self._video))
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
        with self._slots(1) as slots:
            if mask is not None:
                step = self._stepper.given(embedding, mask, slots[0])
            else:
                assert prompt is not None
                step = self._stepper.prompted(embedding, prompt, selection, not correction, slots[0])
        self._store([obj], frame, slots, not correction or self._corrections == "conditioning")
        obj.answers[frame] = step
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
            embedding = self._encode(frame, False)
            selections = []
            for _, obj in waiting:
                self._recall(obj, frame, reverse)
                selections.append(obj.bank.select(frame, reverse, self._length))
            far = [(obj, memory) for _, obj in waiting for memory in obj.bank.out_of_reach(frame)]
            # Queued before the step, whose one wait then serves these copies too.
            leaving = [memory.slot for _, memory in far] if self._history is not None else []
            copies = self._stepper.offload(leaving, self._host)
            with self._slots(len(waiting)) as slots:
                steps = self._stepper.tracked(embedding, selections, slots)
            self._store([obj for _, obj in waiting], frame, slots, False)
            for (object_id, obj), step in zip(waiting, steps):
                obj.tracked_frames.add(frame)
                results[object_id] = step
            for index, (obj, memory) in enumerate(far):
                if self._history is not None:  # what cannot be written stays in the bank: the next frame tries again
                    features, pointer = (buffer.host() for buffer in copies[index])
                    self._history.put((obj.number, memory.frame), features, pointer, memory.slot.logits)
                obj.bank.drop(memory)
                self._pool.give(memory.slot)
        return FrameResult(frame, [self._result(i, results[i]) for i in self._objects])

    @property
    def _length(self) -> int | None:
        return None if self._streaming else len(self.frames)

    def _encode(self, frame: int, cached: bool) -> Embedding:
        """Features of a frame, computed once for calls in a row.

        Args:
            frame: Index of the frame.
            cached: Use the model's cache: annotators prompt the same frame again and again, while a pass comes to a
                frame once and would only drive other images out.
        """
        if self._last is not None and self._last[0] == frame:
            return self._last[1]
        image = self.frames[frame]
        self._last = None  # first, so that its buffers can be used again
        embedding = self._stepper.encode(image, cached=cached)
        self._last = (frame, embedding)
        return embedding

    def _logits_of(self, obj: _Object, frame: int) -> Float32 | None:
        """The logits that an object had on a frame, if they are still known."""
        held = obj.bank.conditioning.get(frame) or obj.bank.tracked.get(frame)
        if held is not None:
            return held.slot.logits
        found = self._history.get((obj.number, frame)) if self._history is not None else None
        return None if found is None else found[2]

    @contextlib.contextmanager
    def _slots(self, count: int) -> Iterator[list[Slot]]:
        """Slots for a step, which go back where it fails."""
        slots = self._pool.take(count)
        try:
            yield slots
        except BaseException:
            self._pool.give(*slots)
            raise

    def _store(self, objects: Sequence[_Object], frame: int, slots: Sequence[Slot], conditioning: bool) -> None:
        """Puts what a frame left behind into the banks."""
        for obj, slot in zip(objects, slots):
            self._pool.give(*(old.slot for old in obj.bank.store(Memory(frame, slot), conditioning)))
            if self._history is not None:
                self._history.drop((obj.number, frame))

    def _recall(self, obj: _Object, frame: int, reverse: bool) -> None:
        """Brings memories that `frame` attends to back from the file."""
        if self._history is None or not len(self._history):
            return
        reach = max(self._video.num_memories, self._video.max_pointers) - 1
        near = range(frame + 1, frame + reach + 1) if reverse else range(frame - reach, frame)
        for other in near:
            if other in obj.bank.tracked or other in obj.bank.conditioning:
                continue
            found = self._history.get((obj.number, other))
            if found is not None:
                with self._slots(1) as slots:
                    self._stepper.load(slots[0], *found)
                obj.bank.tracked[other] = Memory(other, slots[0])
                self._history.drop((obj.number, other))

    def _result(self, object_id: int, step: Step) -> ObjectResult:
        if step.mask is not None:
            return ObjectResult(object_id, step.mask.copy(), step.score, step.iou)
        mask = np.empty(self.frames.size, np.bool_)
        write_mask(step.logits, self._stepper.constants.mask_threshold, mask, self._scratch)
        return ObjectResult(object_id, mask, step.score, step.iou)
