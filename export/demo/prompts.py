"""Training batches for the small SAM 2: scenes and prompts on their objects, prepared ahead by a process."""

from __future__ import annotations

import functools
import multiprocessing as mp
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from pixano_edge.export.demo.scenes import USUAL, Crowd, Mask, generate_scene

T = TypeVar("T")

# The first steps see more and smaller objects: many places to ask about in each image, from which the decoder learns
# soonest that the prompt matters. Each line holds for the steps before its number.
CURRICULUM = (
    (1500, Crowd(objects=8, near=0.4, small=0.16, radius=(24.0, 56.0), width=(5.0, 8.0), camouflage=0.5)),
    (3500, Crowd(objects=8, near=0.6, small=0.12, radius=(28.0, 64.0), width=(5.0, 9.0), camouflage=0.7)),
)


def crowd_at(step: int) -> Crowd:
    """The scenes of a training step."""
    return next((crowd for until, crowd in CURRICULUM if step < until), USUAL)


@dataclass
class Batch:
    """B scenes with P clicks and P boxes each.

    ``images`` (B, S, S, 3) uint8 RGB; ``clicks`` (B, P, 2) and ``boxes`` (B, P, 4) float32 pixels;
    ``click_masks`` and ``box_masks`` (B, P, S/2, S/2) uint8, 255 x the coverage of the visible object;
    ``click_present`` (B, P) float32, 0 where the click is on the background, which asks for no object; ``regions``
    (B, S/2, S/2) int64 index of the object that shows in each cell, -1 for none; ``outlines`` (B, 8, 4) float32 boxes
    of the objects by that index.
    """

    images: NDArray[np.uint8]
    clicks: NDArray[np.float32]
    click_masks: NDArray[np.uint8]
    click_present: NDArray[np.float32]
    boxes: NDArray[np.float32]
    box_masks: NDArray[np.uint8]
    regions: NDArray[np.int64]
    outlines: NDArray[np.float32]


def _half(mask: Mask) -> NDArray[np.uint8]:
    side = mask.shape[0] // 2
    return cv2.resize(mask.astype(np.uint8) * np.uint8(255), (side, side), interpolation=cv2.INTER_AREA)


def sample_click(rng: np.random.Generator, mask: Mask) -> tuple[float, float]:
    """A pixel of the mask: two times in three well inside, otherwise anywhere in it."""
    candidates = mask
    if rng.random() < 0.67:
        padded = cv2.copyMakeBorder(mask.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        distance = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
        candidates = distance >= rng.uniform(0.5, 1.0) * distance.max()
    ys, xs = np.nonzero(candidates)
    k = rng.integers(len(xs))
    return float(xs[k]), float(ys[k])


def sample_box(rng: np.random.Generator, box: tuple[int, int, int, int], size: int) -> NDArray[np.float32]:
    """The exact box four times in ten, otherwise with every side moved by up to 8 % of the extent."""
    exact = np.array(box, np.float32)
    if rng.random() < 0.4:
        return exact
    extent = np.array([box[2] - box[0], box[3] - box[1]] * 2, np.float32)
    return np.clip(exact + rng.uniform(-0.08, 0.08, 4) * extent + rng.uniform(-1, 1, 4), 0, size).astype(np.float32)


def make_batch(index: int, seed: int, batch: int, prompts: int, size: int) -> Batch:
    """The training batch of step ``index``; a pure function."""
    rng = np.random.default_rng([7, seed, index])
    half = size // 2
    out = Batch(
        np.zeros((batch, size, size, 3), np.uint8),
        np.zeros((batch, prompts, 2), np.float32),
        np.zeros((batch, prompts, half, half), np.uint8),
        np.ones((batch, prompts), np.float32),
        np.zeros((batch, prompts, 4), np.float32),
        np.zeros((batch, prompts, half, half), np.uint8),
        np.full((batch, half, half), -1, np.int64),
        np.zeros((batch, 8, 4), np.float32),
    )
    for b in range(batch):
        scene_seed = (seed * 10**7 + index) * batch + b
        objects: list[int] = []
        while not objects:
            scene = generate_scene(scene_seed, "train", size, crowd_at(index))
            areas = [int(o.visible.sum()) for o in scene.objects]
            wholes = [int(o.amodal.sum()) for o in scene.objects]
            objects = [i for i, (a, w) in enumerate(zip(areas, wholes, strict=True)) if a >= 50 and a >= 0.2 * w]
            scene_seed += 10**12
        out.images[b] = scene.image
        for i, obj in enumerate(scene.objects):
            out.regions[b][obj.visible[1::2, 1::2]] = i
            out.outlines[b, i] = obj.box
        halves = {i: _half(scene.objects[i].visible) for i in objects}
        order = [*rng.permutation(objects), *rng.choice(objects, 2 * prompts)]
        for p in range(prompts):
            i, j = int(order[p]), int(order[p + prompts])
            if rng.random() < 0.03:
                free = ~np.logical_or.reduce([o.visible for o in scene.objects])
                if free.sum() > 100:
                    out.clicks[b, p] = sample_click(rng, free)
                    out.click_present[b, p] = 0
                    out.boxes[b, p] = sample_box(rng, scene.objects[j].box, size)
                    out.box_masks[b, p] = halves[j]
                    continue
            out.clicks[b, p] = sample_click(rng, scene.objects[i].visible)
            out.click_masks[b, p] = halves[i]
            out.boxes[b, p] = sample_box(rng, scene.objects[j].box, size)
            out.box_masks[b, p] = halves[j]
    return out


def _produce(queue: mp.Queue, make: Callable[[int], object], first: int) -> None:
    cv2.setNumThreads(1)
    index = first
    while True:
        queue.put(make(index))
        index += 1


def prepared(make: Callable[[int], T], first: int, ahead: int = 6) -> Iterator[T]:
    """``make(first)``, ``make(first + 1)``, ... in order, from one process that runs at most ``ahead`` of them ahead.

    ``make`` has to be picklable: a function of a module, or a partial of one.
    """
    context = mp.get_context("spawn")
    queue: mp.Queue = context.Queue(maxsize=ahead)
    worker = context.Process(target=_produce, args=(queue, make, first), daemon=True)
    worker.start()
    try:
        while True:
            yield queue.get(timeout=300)
    finally:
        worker.terminate()
        worker.join()


def batches(first: int, seed: int, batch: int, prompts: int, size: int) -> Iterator[Batch]:
    """Batches ``first``, ``first + 1``, ... in order, prepared by one process that runs a few ahead."""
    return prepared(functools.partial(make_batch, seed=seed, batch=batch, prompts=prompts, size=size), first)
