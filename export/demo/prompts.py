"""Training batches for the small SAM 2: scenes and prompts on their objects, prepared ahead by a process."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pixano_edge.export.demo.sam2_model import IMAGE_SIZE
from pixano_edge.export.demo.scenes import USUAL, Crowd, Mask, generate_scene

# The first steps see more and smaller objects: many places to ask about in each image, from which the decoder learns
# soonest that the prompt matters. Each line holds below its part of the small steps.
CURRICULUM = (
    (0.15, Crowd(objects=8, near=0.4, small=0.16, radius=(24.0, 56.0), width=(5.0, 8.0), camouflage=0.5)),
    (0.35, Crowd(objects=8, near=0.6, small=0.12, radius=(28.0, 64.0), width=(5.0, 9.0), camouflage=0.7)),
)


def crowd_at(part: float) -> Crowd:
    """The scenes of a training step; ``part`` of the steps with small pictures are done."""
    return next((crowd for until, crowd in CURRICULUM if part < until), USUAL)


@dataclass
class Batch:
    """B scenes of S x S pixels with C clicks and P boxes each; places are in pixels of a picture of ``IMAGE_SIZE``.

    ``images`` (B, S, S, 3) uint8 RGB; ``clicks`` (B, C, 2) and ``boxes`` (B, P, 4) float32;
    ``click_masks`` (B, C, S/2, S/2) and ``box_masks`` (B, P, S/2, S/2) uint8, 255 x the coverage of the visible object;
    ``click_present`` (B, C) float32, 0 where the click is on the background, which asks for no object; ``regions``
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
    """The exact box seven times in ten, otherwise with every side moved by up to 6 % of the extent."""
    exact = np.array(box, np.float32)
    if rng.random() < 0.7:
        return exact
    extent = np.array([box[2] - box[0], box[3] - box[1]] * 2, np.float32)
    return np.clip(exact + rng.uniform(-0.06, 0.06, 4) * extent + rng.uniform(-1, 1, 4), 0, size).astype(np.float32)


@dataclass(frozen=True)
class Plan:
    """What the batches of a run are made of.

    ``seed`` of the run; the first ``small_steps`` steps show ``small_batch`` pictures of half the side, which cost a
    quarter, all later ones ``batch`` of the full side; ``clicks`` and ``boxes`` for each picture.
    """

    seed: int
    batch: int
    small_steps: int
    small_batch: int
    clicks: int
    boxes: int

    def shape(self, step: int) -> tuple[int, int]:
        """Number and side of the pictures of a step."""
        return (self.small_batch, IMAGE_SIZE // 2) if step < self.small_steps else (self.batch, IMAGE_SIZE)


def make_batch(index: int, plan: Plan) -> Batch:
    """The training batch of step ``index``; a pure function."""
    rng = np.random.default_rng([7, plan.seed, index])
    batch, size = plan.shape(index)
    half, unit = size // 2, IMAGE_SIZE / size
    clicks, boxes = plan.clicks, plan.boxes
    out = Batch(
        np.zeros((batch, size, size, 3), np.uint8),
        np.zeros((batch, clicks, 2), np.float32),
        np.zeros((batch, clicks, half, half), np.uint8),
        np.ones((batch, clicks), np.float32),
        np.zeros((batch, boxes, 4), np.float32),
        np.zeros((batch, boxes, half, half), np.uint8),
        np.full((batch, half, half), -1, np.int64),
        np.zeros((batch, 8, 4), np.float32),
    )
    for b in range(batch):
        scene_seed = (plan.seed * 10**7 + index) * 64 + b
        objects: list[int] = []
        while not objects:
            scene = generate_scene(scene_seed, "train", size, crowd_at(index / max(plan.small_steps, 1)))
            areas = [int(o.visible.sum()) for o in scene.objects]
            wholes = [int(o.amodal.sum()) for o in scene.objects]
            least = 50 / unit**2
            objects = [i for i, (a, w) in enumerate(zip(areas, wholes, strict=True)) if a >= least and a >= 0.2 * w]
            scene_seed += 10**12
        out.images[b] = scene.image
        for i, obj in enumerate(scene.objects):
            out.regions[b][obj.visible[1::2, 1::2]] = i
            out.outlines[b, i] = obj.box
        halves = {i: _half(scene.objects[i].visible) for i in objects}
        order = [*rng.permutation(objects), *rng.choice(objects, clicks)]
        for p in range(clicks):
            i = int(order[p])
            free = None
            if rng.random() < 0.03:
                free = ~np.logical_or.reduce([o.visible for o in scene.objects])
            if free is not None and free.sum() > 100:
                out.clicks[b, p] = sample_click(rng, free)
                out.click_present[b, p] = 0
            else:
                out.clicks[b, p] = sample_click(rng, scene.objects[i].visible)
                out.click_masks[b, p] = halves[i]
        order = [*rng.permutation(objects), *rng.choice(objects, boxes)]
        for p in range(boxes):
            i = int(order[p])
            out.boxes[b, p] = sample_box(rng, scene.objects[i].box, size)
            out.box_masks[b, p] = halves[i]
    out.clicks[:] = (out.clicks + 0.5) * unit - 0.5  # a click is a pixel's centre, a box the corners of pixels
    out.boxes *= unit
    out.outlines *= unit
    return out


def _produce(queue: mp.Queue, first: int, plan: Plan) -> None:
    cv2.setNumThreads(1)
    index = first
    while True:
        queue.put(make_batch(index, plan))
        index += 1


def batches(first: int, plan: Plan) -> Iterator[Batch]:
    """Batches ``first``, ``first + 1``, ... in order, prepared by one process that runs a few ahead."""
    context = mp.get_context("spawn")
    queue: mp.Queue = context.Queue(maxsize=6)
    worker = context.Process(target=_produce, args=(queue, first, plan), daemon=True)
    worker.start()
    try:
        while True:
            yield queue.get(timeout=120)
    finally:
        worker.terminate()
        worker.join()
