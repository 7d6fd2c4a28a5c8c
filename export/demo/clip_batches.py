"""Short training clips for the memory of the small SAM 2, rendered ahead by a process."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pixano_edge.export.demo.clips import Cast, Labels, Script, make_script, render, trackable
from pixano_edge.export.demo.scenes import SIZE

LENGTH = 90  # frames of the clips that short ones are cut from
STRIDES = ((0.15, (1,)), (0.4, (1, 2)), (1.01, (1, 2, 3)))
"""Frames between those looked at, by progress of the training: larger steps, harder clips."""
CAST = Cast(hide=0.9)
WINDOWS = 12
"""Most of the time the one of so many cuts is taken where objects are hidden and seen again: else that is rare."""
GONE = 16  # pixels below which an object counts as hidden


@dataclass
class ShortClip:
    """T frames in the order of time.

    ``images`` (T, S, S, 3) uint8 RGB; ``labels`` (T, S, S) int8 object that shows; ``times`` T frame numbers in
    units of the stride, from 0; ``objects`` those that can be asked for on the first and on the last frame.
    """

    images: NDArray[np.uint8]
    labels: Labels
    times: tuple[int, ...]
    objects: tuple[tuple[int, ...], tuple[int, ...]]


def strides_at(progress: float) -> tuple[int, ...]:
    """The strides in use."""
    return next(strides for until, strides in STRIDES if progress < until)


def make_short_clip(index: int, seed: int, frames: int, progress: float, size: int = SIZE) -> ShortClip:
    """The training clip of a step; a pure function.

    Half of them have a gap after the first frame: the prompt then lies far back, as it does late in a long clip.
    """
    rng = np.random.default_rng([17, seed, index])
    clip_seed = seed * 10**7 + index
    while True:
        script = make_script(clip_seed, "train", LENGTH, size, CAST)
        cuts = [_cut(rng, strides_at(progress), frames) for _ in range(WINDOWS)]
        start, stride, times = cuts[0]
        if rng.random() < 0.7:
            start, stride, times = max(cuts, key=lambda cut: _worth(script, cut))
        clip = render(script, [start + stride * t for t in times])
        ends = tuple(
            tuple(trackable(clip.labels[end], script.whole_areas(start + stride * times[end]))) for end in (0, -1)
        )
        if ends[0]:
            return ShortClip(clip.images, clip.labels, tuple(times), (ends[0], ends[1]))
        clip_seed += 10**12


def _cut(rng: np.random.Generator, strides: tuple[int, ...], frames: int) -> tuple[int, int, list[int]]:
    """First frame, stride, and frame numbers in units of the stride from 0; half the time with a gap."""
    stride = int(strides[rng.integers(len(strides))])
    room = (LENGTH - 1) // stride - (frames - 1)
    gap = int(rng.integers(3, room)) if rng.random() < 0.5 and room > 4 else 0
    start = int(rng.integers(0, LENGTH - stride * (frames - 1 + gap)))
    return start, stride, [0] + [t + gap for t in range(1, frames)]


def _worth(script: Script, cut: tuple[int, int, list[int]]) -> int:
    """How much an object that can be asked for on the first frame is hidden later, and seen again: a tracker that only
    goes on from the frame before loses it there."""
    start, stride, times = cut
    first = script.labels(start)
    asked = trackable(first, script.whole_areas(start))
    gone = dict.fromkeys(asked, False)
    worth = 0
    for time in times[1:]:
        labels = script.labels(start + stride * time)
        for index in asked:
            if int(np.count_nonzero(labels == index)) < GONE:
                gone[index] = True
                worth += 1
            elif gone[index]:
                worth += 3
    return worth


def _produce(queue: mp.Queue, first: int, seed: int, frames: int, total: int) -> None:
    cv2.setNumThreads(1)
    index = first
    while True:
        queue.put(make_short_clip(index, seed, frames, index / total))
        index += 1


def short_clips(first: int, seed: int, frames: int, total: int) -> Iterator[ShortClip]:
    """Clips ``first``, ``first + 1``, ... of ``total``, in order, from one process that runs a few ahead."""
    context = mp.get_context("spawn")
    queue: mp.Queue = context.Queue(maxsize=8)
    worker = context.Process(target=_produce, args=(queue, first, seed, frames, total), daemon=True)
    worker.start()
    try:
        while True:
            yield queue.get(timeout=300)
    finally:
        worker.terminate()
        worker.join()
