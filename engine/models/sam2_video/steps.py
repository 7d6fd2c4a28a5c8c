"""One step of tracking on the graphs: attend, decode, choose a mask, remember."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...contracts import sam2, sam2_video
from ...contracts.sam2 import Sam2Constants
from ...contracts.sam2_video import OCCLUDED_LOGIT, Sam2VideoConstants
from ...runtime.base import Binding, Buffer, Device, Session, Shape
from ..sam2.postprocess import choose_masks
from ..sam2.predictor import Sam2ImagePredictor
from ..sam2.preprocess import Scratch, antialias_taps
from ..sam2.prompts import Prompt, PromptBatch, build_prompts
from ..sam2.results import Embedding
from .bank import Selection

Float32 = npt.NDArray[np.float32]

ATTENTION_BYTES = 1 << 30
"""Objects share a call of the memory attention as long as their attention weights together stay below this."""
_HIGH_RES = (sam2.HIGH_RES_0, sam2.HIGH_RES_1)
_GIVEN_SCALE, _GIVEN_BIAS = np.float32(20), np.float32(-10)  # logits of a mask that is given, as upstream


@dataclass(frozen=True, eq=False)
class Step:
    """What one frame gave for one object.

    Attributes:
        logits: (m, m) float32 of the chosen mask; all `OCCLUDED_LOGIT` for an absent object.
        score: Object score logit.
        iou: The model's estimate for the chosen mask.
        token: (C,) float32, the decoder's token of the mask, from which the pointer is made.
        pointer_score: Object score logit that decides about the pointer.
        mask: (H, W) bool that was given, None for one that the model made.
        full: (S, S) float32 logits of a mask that was given.
    """

    logits: Float32
    score: float
    iou: float
    token: Float32
    pointer_score: float
    mask: npt.NDArray[np.bool_] | None = None
    full: Float32 | None = None


class Stepper:
    """Runs the video graphs for any number of trackers; sessions lock themselves.

    Args:
        predictor: Encodes frames; its cache keeps those that several trackers use.
        sessions: Open sessions by the names of `sam2_video.graphs`, on the predictor's device.
        video: Constants of the checkpoint.
    """

    def __init__(self, predictor: Sam2ImagePredictor, sessions: dict[str, Session], video: Sam2VideoConstants) -> None:
        self.predictor = predictor
        self.constants: Sam2Constants = predictor.constants
        self.video = video
        self._attention = sessions[sam2_video.MEMORY_ATTENTION]
        self._decoder = sessions[sam2_video.TRACK_DECODER]
        self._encoder = sessions[sam2_video.MEMORY_ENCODER]
        self._scratch = Scratch()

    @property
    def device(self) -> Device:
        """Where the memory maps are."""
        return self._attention.device

    @property
    def map_shape(self) -> Shape:
        """Shape of one memory map."""
        side = self.constants.embed_size
        return (self.video.memory_dim, side, side)

    @property
    def runs(self) -> dict[str, int]:
        """Launches of each graph so far."""
        return {s.spec.name: s.runs for s in (self._attention, self._decoder, self._encoder)}

    def encode(self, image: npt.NDArray[np.uint8]) -> Embedding:
        """Features of a frame, from the predictor's cache where it has them."""
        return self.predictor.encode(image)

    def prompted(self, embedding: Embedding, prompt: Prompt, selection: Selection[Buffer] | None, first: bool) -> Step:
        """An object marked by points or a box.

        Args:
            embedding: Of the frame.
            prompt: In pixels of the frame.
            selection: Memories to attend to, None on a frame that starts an object.
            first: Whether this is such a frame.

        Raises:
            PromptError: See `build_prompts`.
        """
        (batch,) = build_prompts([prompt], embedding.original_size, self.constants)
        points = int((batch.point_labels != sam2.LABEL_PAD).sum())
        multimask = self._multimask(first, points)
        if selection is None:
            with self._decoder.lock:
                return self._decode(embedding, embedding.features.buffers[sam2.IMAGE_EMBED], batch, multimask)[0]
        with self._attention.lock:
            return self._decode(embedding, self._attend(embedding, [selection]), batch, multimask)[0]

    def tracked(self, embedding: Embedding, selections: Sequence[Selection[Buffer]]) -> list[Step]:
        """Objects without a prompt on this frame, each with what it attends to."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, selection in enumerate(selections):
            groups.setdefault((len(selection.memories), len(selection.pointers)), []).append(index)
        steps: dict[int, Step] = {}
        multimask = self._multimask(False, 0)
        for (memories, pointers), members in groups.items():
            most = self._most_objects(memories, pointers)
            for start in range(0, len(members), most):
                part = members[start : start + most]
                (batch,) = build_prompts([Prompt()] * len(part), embedding.original_size, self.constants)
                with self._attention.lock:
                    embed = self._attend(embedding, [selections[i] for i in part])
                    steps.update(zip(part, self._decode(embedding, embed, batch, multimask)))
        return [steps[i] for i in range(len(selections))]

    def given(self, embedding: Embedding, mask: npt.NDArray[np.bool_]) -> Step:
        """An object whose (H, W) bool mask is known; upstream's ``_use_mask_as_output``."""
        side, low = self.constants.image_size, self.constants.mask_size
        square = (_resized(mask.astype(np.float32), side) >= 0.5).astype(np.float32)
        full = square * _GIVEN_SCALE + _GIVEN_BIAS
        kernel = np.array(self.video.mask_kernel[:16], np.float32).reshape(4, 4)
        shrunk = np.einsum("iajb,ab->ij", square.reshape(low, 4, low, 4), kernel) + np.float32(
            self.video.mask_kernel[16]
        )
        (batch,) = build_prompts([Prompt(mask_input=shrunk.astype(np.float32))], mask.shape, self.constants)
        with self._decoder.lock:
            seen = self._decode(
                embedding, embedding.features.buffers[sam2.IMAGE_EMBED], batch, True, skip_no_memory=True
            )[0]
        score = float(_GIVEN_SCALE * bool(square.any()) + _GIVEN_BIAS)
        return Step(_resized(full, low), score, 1.0, seen.token, seen.score, mask.copy(), full)

    def remember(
        self, embedding: Embedding, steps: Sequence[Step], prompted: bool, targets: Sequence[Buffer]
    ) -> list[Float32]:
        """Encodes memories into the caller's buffers of `map_shape`; returns the object pointers, (C,) each.

        Args:
            embedding: Of the frame.
            steps: One for each object; masks that were given come alone.
            prompted: Whether the masks answer a prompt: they are then remembered with sharp borders.
            targets: Where the maps go.
        """
        pointers: list[Float32] = []
        for start in range(0, len(steps), sam2_video.MAX_OBJECTS):
            part = steps[start : start + sam2_video.MAX_OBJECTS]
            logits = [s.logits if s.full is None else s.full for s in part]
            sizes = {"B": len(part), "H": logits[0].shape[0], "W": logits[0].shape[1]}
            with self._encoder.lock:
                binding = self._encoder.prepare(sizes, (sam2.IMAGE_EMBED,))
                binding.bind(sam2.IMAGE_EMBED, embedding.features.buffers[sam2.IMAGE_EMBED])
                try:
                    binding.write(sam2_video.MASK_LOGITS, np.stack(logits)[:, None])
                    binding.write(sam2.OBJECT_SCORE_LOGITS, np.array([[s.score] for s in part], np.float32))
                    binding.write(sam2_video.BINARIZE, np.full(len(part), float(prompted), np.float32))
                    binding.write(sam2_video.MASK_TOKEN, np.stack([s.token for s in part]))
                    binding.write(
                        sam2_video.POINTER_SCORE_LOGITS, np.array([[s.pointer_score] for s in part], np.float32)
                    )
                    binding.run()
                    maps = binding.outputs[sam2_video.MEMORY_FEATURES]
                    for index in range(len(part)):
                        self.device.copy(targets[start + index], part_of(maps, index))
                    pointers += [row.copy() for row in binding.read(sam2_video.OBJECT_POINTER)]
                finally:
                    binding.release(sam2.IMAGE_EMBED)
        return pointers

    def _multimask(self, first: bool, points: int) -> bool:
        """Whether three masks are asked for; a box counts as two points."""
        v = self.video
        return (
            v.multimask_in_sam
            and (first or v.multimask_for_tracking)
            and v.multimask_min_points <= points <= v.multimask_max_points
        )

    def _most_objects(self, memories: int, pointers: int) -> int:
        area = self.constants.embed_size**2
        keys = memories * area + pointers * (self.constants.hidden_dim // self.video.memory_dim)
        return int(min(sam2_video.MAX_OBJECTS, max(1, ATTENTION_BYTES // (4 * area * keys))))

    def _attend(self, embedding: Embedding, selections: Sequence[Selection[Buffer]]) -> Buffer:
        """The frame conditioned on each object's memories: (B, C, G, G), the session's own, valid until its next run.

        The caller holds the session's lock.
        """
        count, memories = len(selections), len(selections[0].memories)
        pointers = len(selections[0].pointers)
        binding = self._attention.prepare({"B": count, "M": memories, "K": pointers}, (sam2.IMAGE_EMBED,))
        binding.bind(sam2.IMAGE_EMBED, embedding.features.buffers[sam2.IMAGE_EMBED])
        try:
            bank = binding.inputs[sam2_video.MEMORY]
            for row, selection in enumerate(selections):
                for column, memory in enumerate(selection.memories):
                    self.device.copy(part_of(bank, row, column), memory.features)
            width = self.constants.hidden_dim
            binding.write(sam2_video.MEMORY_TIME, np.array([s.rows for s in selections], np.int32))
            stacked = np.array([[m.pointer for m in s.pointers] for s in selections], np.float32)
            binding.write(sam2_video.POINTERS, stacked.reshape(count, pointers, width))
            times = np.array([s.times for s in selections], np.float32)
            binding.write(sam2_video.POINTER_TIME, times.reshape(count, pointers))
            binding.run()
            return binding.outputs[sam2_video.TRACKED_EMBED]
        finally:
            binding.release(sam2.IMAGE_EMBED)

    def _decode(
        self, embedding: Embedding, embed: Buffer, batch: PromptBatch, multimask: bool, skip_no_memory: bool = False
    ) -> list[Step]:
        """Masks of P objects and which one each is given."""
        features = embedding.features.buffers
        with self._decoder.lock:
            binding = self._decoder.prepare(batch.sizes, (sam2_video.TRACKED_EMBED, *_HIGH_RES))
            try:
                binding.bind(sam2_video.TRACKED_EMBED, embed)
                for name in _HIGH_RES:
                    binding.bind(name, features[name])
                self._write_prompts(binding, batch, skip_no_memory)
                binding.run()
                masks, scores = binding.read(sam2.MASKS), binding.read(sam2.IOU_SCORES)
                seen, tokens = binding.read(sam2.OBJECT_SCORE_LOGITS), binding.read(sam2_video.MASK_TOKENS)
                return [
                    self._choose(masks[row], scores[row], float(seen[row, 0]), tokens[row], multimask)
                    for row in range(len(batch.indices))
                ]
            finally:
                binding.release(sam2_video.TRACKED_EMBED, *_HIGH_RES)

    def _write_prompts(self, binding: Binding, batch: PromptBatch, skip_no_memory: bool) -> None:
        count, side = len(batch.indices), self.constants.mask_size
        binding.write(sam2.POINT_COORDS, batch.point_coords)
        binding.write(sam2.POINT_LABELS, batch.point_labels)
        masks = self._scratch.take("masks", (count, 1, side, side))
        for row, mask in enumerate(batch.masks):
            masks[row, 0] = 0.0 if mask is None else mask
        binding.write(sam2.MASK_INPUT, masks)
        binding.write(sam2.HAS_MASK_INPUT, np.array([m is not None for m in batch.masks], np.float32))
        binding.write(sam2_video.SKIP_NO_MEMORY, np.full(count, float(skip_no_memory), np.float32))

    def _choose(self, masks: Float32, scores: Float32, seen: float, tokens: Float32, multimask: bool) -> Step:
        if multimask:
            index = token = 1 + int(np.argmax(scores[1:]))
        else:  # the pointer is made from the single mask's token even where the stability rule takes another mask
            index, token = choose_masks(masks, scores, False, self.constants, self._scratch)[0], 0
        logits = np.array(masks[index]) if seen > 0 else np.full(masks[index].shape, OCCLUDED_LOGIT, np.float32)
        return Step(logits, seen, float(scores[index]), np.array(tokens[token]), seen)


def part_of(buffer: Buffer, *index: int) -> Buffer:
    """A contiguous part of a buffer, the first dimensions fixed; borrowed, keeps the whole alive."""
    shape = buffer.shape[len(index) :]
    size = int(np.prod(shape, dtype=np.int64)) * buffer.dtype.itemsize
    offset = int(np.ravel_multi_index(index, buffer.shape[: len(index)])) * size
    array: Any = None if buffer.array is None else buffer.array[index]
    return Buffer(buffer.device, shape, buffer.dtype, buffer.pointer + offset, array, owned=False, owner=buffer)


def _resized(image: Float32, side: int) -> Float32:
    """(H, W) to (side, side), antialiased bilinear as torch's ``interpolate(antialias=True)``."""
    rows, columns = (_weights(size, side) for size in image.shape)
    return np.ascontiguousarray(rows @ (image @ columns.T))


def _weights(size: int, side: int) -> Float32:
    weights = np.zeros((side, size), np.float32)
    for row, (start, taps) in enumerate(antialias_taps(size, side)):
        weights[row, start : start + len(taps)] = taps
    return weights
