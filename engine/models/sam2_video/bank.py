"""The memory bank of one object: what each frame left behind, and which of it the next frame attends to.

Rules as in transformers' ``Sam2VideoModel`` (``_gather_memory_frame_outputs``, ``_get_object_pointers``,
``_select_closest_cond_frames``), which follow upstream's ``sam2/modeling/sam2_base.py``:

* conditioning frames first, all of them or the closest ones, each with the last row of the temporal table;
* then the frames 6, 5, ... 1 steps back in the direction of tracking, row "steps - 1", where they left a memory;
* pointers of all conditioning frames that are not ahead, then of the frames 1, 2, ... steps back.

The graphs take `MAX_MEMORIES` maps and `MAX_POINTERS` pointers: of more prompted frames than that the closest ones are
attended to, where upstream, without its option, takes all.

Nothing here computes; memories are opaque to it, so it is tested without a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ...contracts.sam2_video import MAX_MEMORIES, MAX_POINTERS, Sam2VideoConstants

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Memory(Generic[T]):
    """What one frame left behind for one object.

    Attributes:
        frame: Its index.
        slot: Memory map, object pointer and mask logits, wherever the tracker keeps them.
    """

    frame: int
    slot: T


@dataclass(frozen=True, eq=False)
class Selection(Generic[T]):
    """What one frame attends to.

    Attributes:
        memories: Memories in upstream's order.
        rows: Row of the temporal table for each.
        pointers: Memories whose pointers enter.
        times: Temporal code of each: steps back over the number of pointers allowed minus 1.
    """

    memories: list[Memory[T]]
    rows: list[int]
    pointers: list[Memory[T]]
    times: list[float]


class ObjectBank(Generic[T]):
    """Memories of one object by frame. Not thread-safe; the tracker serialises.

    Attributes:
        conditioning: Frames with a prompt of their own, in the order in which they came.
        tracked: All other frames.
    """

    def __init__(self, constants: Sam2VideoConstants) -> None:
        self._constants = constants
        most = MAX_MEMORIES - constants.num_memories + 1
        self._limit = most if constants.max_cond_frames == -1 else min(constants.max_cond_frames, most)
        self.conditioning: dict[int, Memory[T]] = {}
        self.tracked: dict[int, Memory[T]] = {}

    def select(self, frame: int, reverse: bool, frames: int | None) -> Selection[T]:
        """What `frame` attends to.

        Args:
            frame: Index of the frame to be tracked.
            reverse: Whether tracking goes backwards in time.
            frames: Frames of the clip; None while it is not known (streaming).

        Raises:
            KeyError: There is no conditioning frame.
        """
        c = self._constants
        if not self.conditioning:
            raise KeyError("no conditioning frame")
        chosen, rest = closest(frame, self.conditioning, self._limit)
        memories = list(chosen.values())
        rows = [c.num_memories - 1] * len(memories)
        step = -1 if reverse else 1
        for back in range(c.num_memories - 1, 0, -1):
            other = frame - step * back
            found = self.tracked.get(other) or rest.get(other)
            if found is not None:
                memories.append(found)
                rows.append(back - 1)
        pointers: list[Memory[T]] = []
        steps: list[int] = []
        behind = {i: m for i, m in self.conditioning.items() if (i - frame) * step <= 0}
        behind, _ = closest(frame, behind, MAX_POINTERS - c.max_pointers)
        for index, memory in behind.items():
            pointers.append(memory)
            steps.append((frame - index) * step)
        allowed = c.max_pointers if frames is None else min(frames, c.max_pointers)
        for back in range(1, allowed):
            other = frame - step * back
            if other < 0 or (frames is not None and other >= frames):
                break
            found = self.tracked.get(other)
            if found is not None:
                pointers.append(found)
                steps.append(back)
        return Selection(memories, rows, pointers, [back / max(allowed - 1, 1) for back in steps])

    def store(self, memory: Memory[T], conditioning: bool) -> list[Memory[T]]:
        """Keeps a memory; returns those it replaces."""
        target, other = (self.conditioning, self.tracked) if conditioning else (self.tracked, self.conditioning)
        old = [target.pop(memory.frame, None)]
        if conditioning:
            old.append(other.pop(memory.frame, None))
        target[memory.frame] = memory
        return [m for m in old if m is not None]

    def out_of_reach(self, frame: int) -> list[Memory[T]]:
        """Tracked memories that neither a pass that has come to `frame` nor one starting at a conditioning frame
        attends to; they stay until `drop`."""
        reach = max(self._constants.num_memories, self._constants.max_pointers) - 1
        near = [frame, *self.conditioning]
        return [m for i, m in self.tracked.items() if all(abs(i - n) > reach for n in near)]

    def drop(self, memory: Memory[T]) -> None:
        """Takes a tracked memory out."""
        del self.tracked[memory.frame]

    def all(self) -> Iterable[Memory[T]]:
        """Every memory held."""
        yield from self.conditioning.values()
        yield from self.tracked.values()


def closest(frame: int, outputs: Mapping[int, Any], limit: int) -> tuple[dict[int, Any], dict[int, Any]]:
    """Upstream's ``select_closest_cond_frames``: the nearest before, the nearest from `frame` on, then by distance.

    Returns:
        The chosen ones and the rest; all are chosen when `limit` is -1 or not exceeded.
    """
    if limit == -1 or len(outputs) <= limit:
        return dict(outputs), {}
    order: list[int] = []
    before = max((t for t in outputs if t < frame), default=None)
    after = min((t for t in outputs if t >= frame), default=None)
    order += [t for t in (before, after) if t is not None]
    remaining = sorted((t for t in outputs if t not in order), key=lambda t: abs(t - frame))
    order += remaining[: max(limit - len(order), 0)]
    return {t: outputs[t] for t in order}, {t: v for t, v in outputs.items() if t not in order}
