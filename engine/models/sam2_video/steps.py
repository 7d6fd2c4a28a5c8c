"""One step of tracking on the graphs: attend, decode, choose a mask, remember.

Everything of a step is queued on the model's stream (see `Chain`): memories, pointers and mask logits move from graph
to graph on the device. The host waits once per call of the decoder, for the masks among which it chooses; the memory
encoder that follows is only queued, and the next frame comes after it by the order of the stream.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...contracts import sam2, sam2_video
from ...contracts.sam2 import Sam2Constants
from ...contracts.sam2_video import OCCLUDED_LOGIT, Sam2VideoConstants
from ...errors import DeviceMemoryError
from ...runtime.base import Binding, Buffer, Device, Session
from ..sam2.postprocess import choose_masks
from ..sam2.predictor import Sam2ImagePredictor
from ..sam2.preprocess import Scratch
from ..sam2.prompts import Prompt, PromptBatch, build_prompts
from ..sam2.results import Embedding
from .bank import Memory, Selection
from .given import given_mask
from .memory import Slot
from .parts import Parts, part_of

Float32 = npt.NDArray[np.float32]

ATTENTION_BYTES = 4 * sam2_video.MAX_ATTENTION
"""Objects share a call of the memory attention as long as their attention weights together stay below this."""
OBJECTS_AT_ONCE = 16
"""Objects that share a call of the decoder and of the memory encoder: their upscaled features are 8 MB each at 1024
pixels, several times over."""
_HIGH_RES = (sam2.HIGH_RES_0, sam2.HIGH_RES_1)
_EMBED = (sam2.IMAGE_EMBED,)
_ANSWERS = (sam2.MASKS, sam2.IOU_SCORES, sam2.OBJECT_SCORE_LOGITS)


@dataclass(frozen=True, eq=False)
class Step:
    """What one frame gave for one object.

    Attributes:
        logits: (m, m) float32 of the chosen mask, all `OCCLUDED_LOGIT` for an absent object. On a frame without a
            prompt they are those of the slot, valid while that is in use.
        score: Object score logit.
        iou: The model's estimate for the chosen mask.
        mask: (H, W) bool that was given, None for one that the model made.
    """

    logits: Float32
    score: float
    iou: float
    mask: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class _Pick:
    """Which of the decoder's masks and tokens an object gets, and its two object scores."""

    mask: int
    token: int
    score: float
    pointer_score: float
    iou: float


class Stepper:
    """Runs the video graphs for any number of trackers. Thread-safe: one step at a time.

    Args:
        predictor: Encodes frames; its cache keeps those that were prompted.
        sessions: Open sessions by the names of `sam2_video.graphs`, on the predictor's device.
        video: Constants of the checkpoint.

    Attributes:
        lock: Held during a step.
        halved: How often fewer objects had to share a call for want of memory.
    """

    def __init__(self, predictor: Sam2ImagePredictor, sessions: dict[str, Session], video: Sam2VideoConstants) -> None:
        self.predictor = predictor
        self.constants: Sam2Constants = predictor.constants
        self.video = video
        self.lock = threading.RLock()
        self.halved = 0
        self._at_once = OBJECTS_AT_ONCE
        self._chain = predictor.chain
        self._attention = sessions[sam2_video.MEMORY_ATTENTION]
        self._decoder = sessions[sam2_video.TRACK_DECODER]
        self._encoder = sessions[sam2_video.MEMORY_ENCODER]
        self._scratch = Scratch()
        self._blank: weakref.WeakSet[Binding] = weakref.WeakSet()  # bindings whose mask input holds zeros only
        self._parts = Parts()

    @property
    def device(self) -> Device:
        """Where the memory maps are."""
        return self._attention.device

    @property
    def runs(self) -> dict[str, int]:
        """Launches of each graph so far."""
        return {s.spec.name: s.runs for s in (self._attention, self._decoder, self._encoder)}

    def new_slot(self) -> Slot:
        """Uninitialised memory for what one frame leaves behind for one object."""
        side, low = self.constants.embed_size, self.constants.mask_size
        with self._chain.lock:
            return Slot(
                self.device.empty((self.video.memory_dim, side, side), "float32"),
                self.device.empty((self.constants.hidden_dim,), "float32"),
                np.empty((low, low), np.float32),
            )

    def encode(self, image: npt.NDArray[np.uint8], *, cached: bool) -> Embedding:
        """Features of a frame; with `cached` they come from the predictor's cache or go there."""
        return self.predictor.encode(image, cached=cached)

    def warm_up(self) -> None:
        """Runs every graph on blank input, so that no user waits for lazy initialisation."""
        side = self.constants.image_size
        embedding = self.encode(np.zeros((side, side, 3), np.uint8), cached=False)
        slots = [self.new_slot(), self.new_slot()]
        self.prompted(embedding, Prompt(points=[[side / 2, side / 2]]), None, True, slots[0])
        seen = [Memory(0, slots[0])]
        selection = Selection(seen, [self.video.num_memories - 1], seen, [1.0])
        for _ in range(self._chain.warm_runs(self._attention)):
            self.tracked(embedding, [selection], slots[1:])
        self._chain.wait()

    def prompted(
        self, embedding: Embedding, prompt: Prompt, selection: Selection[Slot] | None, first: bool, slot: Slot
    ) -> Step:
        """An object marked by points or a box.

        Args:
            embedding: Of the frame.
            prompt: In pixels of the frame.
            selection: Memories to attend to, None on a frame that starts an object.
            first: Whether this is such a frame.
            slot: Gets what the frame leaves behind, with sharp borders.

        Raises:
            PromptError: See `build_prompts`.
        """
        (batch,) = build_prompts([prompt], embedding.original_size, self.constants)
        points = int((batch.point_labels != sam2.LABEL_PAD).sum())
        multimask = self._multimask(first, points)
        with self._held():
            ((pick, binding),) = [*self._decode(embedding, batch, [selection], [slot], multimask)]
            self._remember(embedding, binding, [pick], [slot], True)
        return Step(slot.logits.copy(), pick.score, pick.iou)

    def tracked(self, embedding: Embedding, selections: Sequence[Selection[Slot]], slots: Sequence[Slot]) -> list[Step]:
        """Objects without a prompt on this frame, each with what it attends to and with a slot for what it leaves.

        Short of memory, fewer objects share a call from then on.

        Raises:
            DeviceMemoryError: No room for one object.
        """
        steps: list[Step] = []
        multimask = self._multimask(False, 0)
        while len(steps) < len(selections):
            start = len(steps)
            part, into = selections[start : start + self._at_once], slots[start : start + self._at_once]
            try:
                with self._held():
                    found = self._decode(embedding, _unprompted(len(part)), part, into, multimask)
                    picks = [pick for pick, _ in found]
                    self._remember(embedding, found[0][1], picks, into, False)
            except DeviceMemoryError:
                if len(part) == 1:
                    raise
                self._at_once = (len(part) + 1) // 2  # for good: the next frame would not fit either
                self.halved += 1
                continue
            steps += [Step(slot.logits, pick.score, pick.iou) for pick, slot in zip(picks, into)]
        return steps

    def given(self, embedding: Embedding, mask: npt.NDArray[np.bool_], slot: Slot) -> Step:
        """An object whose (H, W) bool mask is known; the mask is its answer."""
        known = given_mask(mask, self.constants, self.video)
        (batch,) = build_prompts([Prompt(mask_input=known.shrunk)], mask.shape, self.constants)
        with self._held():
            ((seen, binding),) = self._decode(embedding, batch, [None], [slot], True, skip_no_memory=True)
            pick = _Pick(seen.mask, seen.token, known.score, seen.score, 1.0)
            self._remember(embedding, binding, [pick], [slot], True, known.full)
        np.copyto(slot.logits, known.low)
        return Step(known.low, known.score, 1.0, mask.copy())

    def offload(self, slots: Sequence[Slot], host: list[tuple[Buffer, Buffer]]) -> list[tuple[Buffer, Buffer]]:
        """Queues copies of maps and pointers to host memory, complete after the next step; where the host can read the
        slots themselves, they are returned.

        Args:
            slots: What to copy.
            host: Host memory of the caller's earlier calls, written again in the order of the stream; grows.
        """
        with self._chain.lock:
            while len(host) < len(slots) and slots[0].features.array is None:
                host.append((self._host(slots[0].features), self._host(slots[0].pointer)))
            copies = []
            for index, slot in enumerate(slots):
                if slot.features.array is not None:
                    copies.append((slot.features, slot.pointer))
                    continue
                self.device.copy(host[index][0], slot.features)
                self.device.copy(host[index][1], slot.pointer)
                copies.append(host[index])
        return copies

    def load(self, slot: Slot, features: Float32, pointer: Float32, logits: Float32) -> None:
        """Fills a slot from host memory."""
        with self._chain.lock:
            self.device.upload(slot.features, features)
            self.device.upload(slot.pointer, pointer)
        np.copyto(slot.logits, logits)

    def _host(self, buffer: Buffer) -> Buffer:
        return self.device.host_empty(buffer.shape, buffer.dtype)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """The stepper, its sessions, then the stream: nobody else comes between the launches of one step."""
        with self.lock, self._attention.lock, self._decoder.lock, self._encoder.lock, self._chain.lock:
            yield

    @contextlib.contextmanager
    def _bound(self, binding: Binding, embedding: Embedding, names: Sequence[str]) -> Iterator[None]:
        """Binds features of a frame: those of the cache entry itself, or copies that never move for recordings."""
        embedding.features.await_on(self.device)
        if self._chain.captures(binding.session):
            fixed = self.predictor.fixed_features()
            fixed.bind(binding, names)
            fixed.load(embedding.features)
            yield
            return
        try:
            for name in names:
                binding.bind(name, embedding.features.buffers[name])
            yield
        finally:
            binding.release(*names)

    def _multimask(self, first: bool, points: int) -> bool:
        """Whether three masks are asked for; a box counts as two points."""
        v = self.video
        return (
            v.multimask_in_sam
            and (first or v.multimask_for_tracking)
            and v.multimask_min_points <= points <= v.multimask_max_points
        )

    def _most_objects(self, memories: int, pointers: int) -> int:
        """Objects that share a call of the memory attention: its weights together stay below the contract's bound."""
        area = self.constants.embed_size**2
        keys = memories * area + pointers * (self.constants.hidden_dim // self.video.memory_dim)
        return int(min(self._at_once, max(1, ATTENTION_BYTES // (4 * area * keys))))

    def _attend(self, embedding: Embedding, selections: Sequence[Selection[Slot] | None], decoder: Binding) -> None:
        """Fills the decoder's embeddings: the frame conditioned on each object's memories, or as it is for None.

        Objects with equally many memories and pointers share calls.
        """
        groups: dict[tuple[int, int], list[tuple[int, Selection[Slot]]]] = {}
        for row, selection in enumerate(selections):
            if selection is None:
                plain = part_of(embedding.features.buffers[sam2.IMAGE_EMBED], 0)
                self.device.copy(self._parts.of(decoder, sam2_video.TRACKED_EMBED, row), plain)
            else:
                size = (len(selection.memories), len(selection.pointers))
                groups.setdefault(size, []).append((row, selection))
        for size, members in groups.items():
            most = self._most_objects(*size)
            for start in range(0, len(members), most):
                part = members[start : start + most]
                binding = self._attend_to(embedding, [selection for _, selection in part])
                for index, (row, _) in enumerate(part):
                    target = self._parts.of(decoder, sam2_video.TRACKED_EMBED, row)
                    self.device.copy(target, self._parts.of(binding, sam2_video.TRACKED_EMBED, index))

    def _attend_to(self, embedding: Embedding, selections: Sequence[Selection[Slot]]) -> Binding:
        """Queues the memory attention of objects with equally many memories and pointers."""
        count, memories, pointers = len(selections), len(selections[0].memories), len(selections[0].pointers)
        binding = self._attention.prepare({"B": count, "M": memories, "K": pointers}, _EMBED)
        with self._bound(binding, embedding, _EMBED):
            for row, selection in enumerate(selections):
                for column, memory in enumerate(selection.memories):
                    self.device.copy(self._parts.of(binding, sam2_video.MEMORY, row, column), memory.slot.features)
                for column, memory in enumerate(selection.pointers):
                    self.device.copy(self._parts.of(binding, sam2_video.POINTERS, row, column), memory.slot.pointer)
            self._chain.write(binding, sam2_video.MEMORY_TIME, np.array([s.rows for s in selections], np.int32))
            if pointers:
                times = np.array([s.times for s in selections], np.float32)
                self._chain.write(binding, sam2_video.POINTER_TIME, times)
            self._chain.launch(binding)
        return binding

    def _decode(
        self,
        embedding: Embedding,
        batch: PromptBatch,
        selections: Sequence[Selection[Slot] | None],
        slots: Sequence[Slot],
        multimask: bool,
        skip_no_memory: bool = False,
    ) -> list[tuple[_Pick, Binding]]:
        """Attends and decodes, waits, and chooses each object's mask, whose logits go into its slot.

        Returns:
            The choices, with the binding that holds the decoder's outputs until its next run.
        """
        binding = self._decoder.prepare(batch.sizes, _HIGH_RES)
        self._attend(embedding, selections, binding)
        with self._bound(binding, embedding, _HIGH_RES):
            self._write_prompts(binding, batch, skip_no_memory)
            self._chain.launch(binding)
        found = self._chain.fetch(binding, _ANSWERS)
        masks, scores, seen = (found[name] for name in _ANSWERS)
        picks = []
        for row, slot in enumerate(slots):
            pick = self._choose(masks[row], scores[row], float(seen[row, 0]), multimask)
            if pick.score > 0:
                np.copyto(slot.logits, masks[row, pick.mask])
            else:
                slot.logits.fill(OCCLUDED_LOGIT)
            picks.append((pick, binding))
        return picks

    def _choose(self, masks: Float32, scores: Float32, seen: float, multimask: bool) -> _Pick:
        if multimask:
            index = token = 1 + int(np.argmax(scores[1:]))
        else:  # the pointer is made from the single mask's token even where the stability rule takes another mask
            index, token = choose_masks(masks, scores, False, self.constants, self._scratch)[0], 0
        return _Pick(index, token, seen, seen, float(scores[index]))

    def _write_prompts(self, binding: Binding, batch: PromptBatch, skip_no_memory: bool) -> None:
        chain, count = self._chain, len(batch.indices)
        chain.write(binding, sam2.POINT_COORDS, batch.point_coords)
        chain.write(binding, sam2.POINT_LABELS, batch.point_labels)
        given = np.array([mask is not None for mask in batch.masks], np.float32)
        if given.any() or binding not in self._blank:  # zeros that are there already are not sent again
            self._blank.discard(binding)
            for row, mask in zip(chain.stage(binding, sam2.MASK_INPUT), batch.masks, strict=True):
                row[0] = 0.0 if mask is None else mask
            chain.send(binding, sam2.MASK_INPUT)
            if not given.any():
                self._blank.add(binding)
        chain.write(binding, sam2.HAS_MASK_INPUT, given)
        chain.write(binding, sam2_video.SKIP_NO_MEMORY, np.full(count, float(skip_no_memory), np.float32))

    def _remember(
        self,
        embedding: Embedding,
        decoder: Binding,
        picks: Sequence[_Pick],
        slots: Sequence[Slot],
        prompted: bool,
        full: Float32 | None = None,
    ) -> None:
        """Queues the memory encoder on the chosen masks and the copies of what it gives into the slots.

        Args:
            embedding: Of the frame.
            decoder: Holds the masks and tokens.
            picks: The choices, by row of the decoder's outputs.
            slots: One for each.
            prompted: Whether the masks answer a prompt: they are then remembered with sharp borders.
            full: (S, S) logits of a mask that was given, instead of the decoder's; for one object.
        """
        low = self.constants.mask_size
        height, width = (low, low) if full is None else full.shape
        chain, device = self._chain, self.device
        binding = self._encoder.prepare({"B": len(picks), "H": height, "W": width}, _EMBED)
        with self._bound(binding, embedding, _EMBED):
            if full is not None:
                chain.write(binding, sam2_video.MASK_LOGITS, full[None, None])
            for row, pick in enumerate(picks):
                if full is None:
                    chosen = self._parts.of(decoder, sam2.MASKS, row, pick.mask)
                    device.copy(self._parts.of(binding, sam2_video.MASK_LOGITS, row, 0), chosen)
                token = self._parts.of(decoder, sam2_video.MASK_TOKENS, row, pick.token)
                device.copy(self._parts.of(binding, sam2_video.MASK_TOKEN, row), token)
            chain.write(binding, sam2.OBJECT_SCORE_LOGITS, np.array([[p.score] for p in picks], np.float32))
            chain.write(
                binding, sam2_video.POINTER_SCORE_LOGITS, np.array([[p.pointer_score] for p in picks], np.float32)
            )
            chain.write(binding, sam2_video.BINARIZE, np.full(len(picks), float(prompted), np.float32))
            chain.launch(binding)
            for row, slot in enumerate(slots):
                device.copy(slot.features, self._parts.of(binding, sam2_video.MEMORY_FEATURES, row))
                device.copy(slot.pointer, self._parts.of(binding, sam2_video.OBJECT_POINTER, row))


def _unprompted(count: int) -> PromptBatch:
    """No prompt for each of some objects, as `build_prompts` has it."""
    coords = np.zeros((count, 2, 2), np.float32)
    return PromptBatch(list(range(count)), coords, np.full((count, 2), sam2.LABEL_PAD, np.int32), [None] * count)
