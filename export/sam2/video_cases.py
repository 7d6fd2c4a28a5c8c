"""What PyTorch's own modules answer for single calls of the video graphs, on features and memories of a real clip.

Nothing here uses the export wrappers: inputs are put together and outputs computed by the methods of transformers'
`Sam2VideoModel`, one object at a time; the graphs get the same inputs stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.contracts.sam2_video import Sam2VideoConstants
from pixano_edge.export.differences import Arrays
from pixano_edge.export.sam2.reference import LOGIT_LIMIT, single_mask_as_is

Stored = dict[str, Any]
"""One entry of a session's ``output_dict_per_obj``: memory map, its position code, pointer, mask."""


@dataclass(frozen=True, eq=False)
class GraphCase:
    """One call.

    Attributes:
        graph: Name in the contract.
        feeds: Its inputs.
        want: PyTorch's outputs; `MEMORY_FEATURES` before their rounding to bfloat16.
    """

    graph: str
    feeds: Arrays
    want: Arrays


class Modules:
    """The stock model, called piece by piece.

    Args:
        model: `Sam2VideoModel` in eval mode, fp32.
        constants: Of the checkpoint.
        video: Of the checkpoint.

    Attributes:
        side: Side of the model's input.
    """

    def __init__(self, model: Any, constants: Sam2Constants, video: Sam2VideoConstants) -> None:
        self._model = model
        self._constants = constants
        self._video = video
        self.side = constants.image_size

    def maps(self, kept: Stored) -> tuple[Tensor, Tensor, Tensor]:
        """`top` without the no-memory embedding and the two high-resolution maps of cached features, batch 1."""
        sizes = self._model.backbone_feature_sizes
        high_0, high_1, top = (
            f.permute(1, 2, 0).reshape(1, -1, *size) for f, size in zip(kept["vision_feats"], sizes, strict=True)
        )
        return top, high_0, high_1

    @torch.no_grad()
    def image(self, kept: Stored) -> Arrays:
        """Cached features as the image encoder's graph gives them."""
        top, high_0, high_1 = self.maps(kept)
        embed = top + self._model.no_memory_embedding.reshape(1, -1, 1, 1)
        return {
            sam2.IMAGE_EMBED: embed.numpy(),
            sam2.HIGH_RES_0: high_0.contiguous().numpy(),
            sam2.HIGH_RES_1: high_1.contiguous().numpy(),
        }

    @torch.no_grad()
    def attention(
        self,
        kept: Stored,
        memories: Sequence[Sequence[Stored]],
        rows: npt.NDArray[np.int32],
        pointers: Sequence[Sequence[Stored]],
        steps: npt.NDArray[np.int32],
    ) -> GraphCase:
        """The memory attention of B objects with M memories and K pointers each.

        Args:
            kept: Features of the frame.
            memories: (B, M) entries whose maps are attended to.
            rows: (B, M) rows of the temporal table.
            pointers: (B, K) entries whose pointers enter.
            steps: (B, K) frames that they lie back.
        """
        model, allowed = self._model, self._video.max_pointers
        count, grid = len(memories), self._constants.embed_size
        want = []
        for held, row, marks, back in zip(memories, rows, pointers, steps, strict=True):
            # transformers counts from 1, and 0 is a conditioning frame: the table's last row.
            offsets = [(int(r) + 1) % self._video.num_memories for r in row]
            tokens, codes = model._build_memory_attention_inputs(list(zip(offsets, held)), torch.device("cpu"))
            extra = 0
            if len(marks):
                pointer, code = model._process_object_pointers(
                    [int(b) for b in back],
                    [m["object_pointer"].reshape(1, -1) for m in marks],
                    allowed,
                    1,
                    self._constants.hidden_dim,
                    torch.device("cpu"),
                )
                tokens, codes, extra = [*tokens, pointer], [*codes, code], pointer.shape[0]
            answer = model.memory_attention(
                current_vision_features=kept["vision_feats"][-1],
                current_vision_position_embeddings=kept["vision_pos_embeds"][-1],
                memory=torch.cat([t.float() for t in tokens]),
                memory_posision_embeddings=torch.cat(codes),
                num_object_pointer_tokens=extra,
            )
            want.append(answer.squeeze(1).transpose(1, 2).reshape(-1, grid, grid).numpy())
        feeds = {
            sam2.IMAGE_EMBED: self.image(kept)[sam2.IMAGE_EMBED],
            sam2_video.MEMORY: np.stack([np.stack([memory_map(m, grid) for m in held]) for held in memories]),
            sam2_video.MEMORY_TIME: rows.astype(np.int32),
            sam2_video.POINTERS: np.array(
                [[m["object_pointer"].reshape(-1).numpy() for m in marks] for marks in pointers], np.float32
            ).reshape(count, -1, self._constants.hidden_dim),
            sam2_video.POINTER_TIME: (steps / (allowed - 1)).astype(np.float32).reshape(count, -1),
        }
        return GraphCase(sam2_video.MEMORY_ATTENTION, feeds, {sam2_video.TRACKED_EMBED: np.stack(want)})

    @torch.no_grad()
    def decoder(
        self,
        kept: Stored,
        embeds: npt.NDArray[np.float32],
        points: npt.NDArray[np.float32],
        labels: npt.NDArray[np.int32],
        masks: Sequence[npt.NDArray[np.float32] | None],
        plain: bool = False,
    ) -> GraphCase:
        """The mask decoder for P objects.

        Args:
            kept: Features of the frame.
            embeds: (P, C, G, G), with memory; where `plain`, the image encoder's.
            points: (P, N, 2) in model pixels; N of 0 for objects without a prompt.
            labels: (P, N).
            masks: A mask prompt for each object, or None.
            plain: Whether the no-memory embedding is taken off.
        """
        model, side = self._model, self._constants.mask_size
        _, high_0, high_1 = self.maps(kept)
        count, none = len(embeds), points.shape[1] == 0
        position = model.get_image_wide_positional_embeddings()
        # Without points the stock forward makes one padding point, and its prompt encoder appends another.
        coords = np.zeros((count, 1, 2), np.float32) if none else points
        codes = np.full((count, 1), sam2.LABEL_PAD, np.int32) if none else labels
        outputs: dict[str, list[Tensor]] = {n: [] for n in DECODER_OUTPUTS}
        for index in range(count):
            embed = torch.from_numpy(embeds[index : index + 1])
            if plain:
                embed = embed - model.no_memory_embedding.reshape(1, -1, 1, 1)
            mask = masks[index]
            sparse, dense = model.prompt_encoder(
                input_points=torch.from_numpy(coords[index])[None, None],
                input_labels=torch.from_numpy(codes[index])[None, None],
                input_boxes=None,
                input_masks=None if mask is None else torch.from_numpy(mask)[None, None],
            )
            fixed = {
                "image_embeddings": embed,
                "image_positional_embeddings": position,
                "sparse_prompt_embeddings": sparse,
                "dense_prompt_embeddings": dense,
                "high_resolution_features": [high_0, high_1],
            }
            multi = model.mask_decoder(multimask_output=True, **fixed)
            with single_mask_as_is(model):
                single = model.mask_decoder(multimask_output=False, **fixed)
            outputs[sam2.MASKS].append(torch.cat([single[0], multi[0]], dim=2)[0])
            outputs[sam2.IOU_SCORES].append(torch.cat([single[1], multi[1]], dim=2)[0])
            outputs[sam2_video.MASK_TOKENS].append(torch.cat([single[2], multi[2]], dim=2)[0])
            outputs[sam2.OBJECT_SCORE_LOGITS].append(multi[3][0])
        padded = np.zeros((count, 1, 2), np.float32)
        feeds = {
            sam2_video.TRACKED_EMBED: embeds,
            sam2.HIGH_RES_0: high_0.contiguous().numpy(),
            sam2.HIGH_RES_1: high_1.contiguous().numpy(),
            sam2.POINT_COORDS: np.concatenate([coords, padded], axis=1).astype(np.float32),
            sam2.POINT_LABELS: np.concatenate([codes, np.full((count, 1), sam2.LABEL_PAD)], axis=1).astype(np.int32),
            sam2.MASK_INPUT: np.stack([np.zeros((side, side), np.float32) if m is None else m for m in masks])[:, None],
            sam2.HAS_MASK_INPUT: np.array([m is not None for m in masks], np.float32),
            sam2_video.SKIP_NO_MEMORY: np.full(count, float(plain), np.float32),
        }
        want = {name: torch.cat(values).numpy() for name, values in outputs.items()}
        return GraphCase(sam2_video.TRACK_DECODER, feeds, want)

    @torch.no_grad()
    def memory(
        self, kept: Stored, embeds: npt.NDArray[np.float32], binarize: Sequence[bool], present: Sequence[bool]
    ) -> tuple[GraphCase, list[Stored]]:
        """The memory encoder for the masks that the stock decoder itself chooses on `embeds` (B, C, G, G).

        Args:
            kept: Features of the frame.
            embeds: With memory.
            binarize: Whether each object's mask is remembered with sharp borders.
            present: Whether each object is there: the decoder's object score is moved to that side.

        Returns:
            The call, and for each object an entry as a session would store it.
        """
        _, high_0, high_1 = self.maps(kept)
        shown, stored = [], []
        for index, (sharp, there) in enumerate(zip(binarize, present, strict=True)):
            embed = torch.from_numpy(embeds[index : index + 1])
            with self._object_score(there), self._pointer_input() as tokens:
                answer = self._model._single_frame_forward(image_embeddings=[high_0, high_1, embed])
            exact, entry = self._remember(kept, answer, sharp)
            score = answer.object_score_logits.reshape(1)
            shown.append(_Shown(answer.pred_masks[0], score, score, tokens[-1], exact, answer.object_pointer))
            stored.append(entry)
        return self._memory_case(kept, shown, binarize), stored

    @torch.no_grad()
    def given(self, kept: Stored, masks: Sequence[npt.NDArray[np.bool_]]) -> GraphCase:
        """The memory encoder for (S, S) masks that were given, as `_use_mask_as_output` remembers them."""
        top, high_0, high_1 = self.maps(kept)
        shown = []
        for mask in masks:
            scores: list[Tensor] = []
            handle = self._model.mask_decoder.register_forward_hook(
                lambda _, __, output, seen=scores: seen.append(output[3])
            )
            try:
                with self._pointer_input() as tokens:
                    answer = self._model._use_mask_as_output(
                        top, [high_0, high_1], torch.from_numpy(mask)[None, None].float()
                    )
            finally:
                handle.remove()
            exact, _ = self._remember(kept, answer, True)
            shown.append(
                _Shown(
                    answer.high_res_masks[0],
                    answer.object_score_logits.reshape(1),
                    scores[-1].reshape(1),
                    tokens[-1],
                    exact,
                    answer.object_pointer,
                )
            )
        return self._memory_case(kept, shown, [True] * len(shown))

    def _remember(self, kept: Stored, answer: Any, sharp: bool) -> tuple[Tensor, Stored]:
        """The memory map before its rounding, (1, C, G, G), and an entry with the rounded one."""
        seen: list[Tensor] = []
        handle = self._model.memory_encoder.register_forward_hook(lambda _, __, output: seen.append(output[0]))
        try:
            side = self._constants.image_size
            rounded, position = self._model._encode_new_memory(
                current_vision_feats=kept["vision_feats"][-1],
                pred_masks_high_res=answer.high_res_masks.reshape(1, 1, side, side),
                object_score_logits=answer.object_score_logits.reshape(1, 1),
                is_mask_from_pts=sharp,
            )
        finally:
            handle.remove()
        # The occlusion code is added to the encoder's output in place, so this is what is rounded.
        exact = seen[-1]
        if not torch.equal(exact.to(torch.bfloat16).flatten(2).permute(2, 0, 1), rounded):
            raise AssertionError("this release of transformers encodes memories in another way")
        return exact, {
            "maskmem_features": rounded,
            "maskmem_pos_enc": position,
            "object_pointer": answer.object_pointer.reshape(1, -1),
        }

    def _memory_case(self, kept: Stored, shown: Sequence[_Shown], binarize: Sequence[bool]) -> GraphCase:
        side = shown[0].logits.shape[-1]
        feeds = {
            sam2.IMAGE_EMBED: self.image(kept)[sam2.IMAGE_EMBED],
            sam2_video.MASK_LOGITS: torch.cat([s.logits.reshape(1, 1, side, side) for s in shown]).numpy(),
            sam2.OBJECT_SCORE_LOGITS: torch.stack([s.score for s in shown]).numpy(),
            sam2_video.BINARIZE: np.array(binarize, np.float32),
            sam2_video.MASK_TOKEN: torch.cat([s.token.reshape(1, -1) for s in shown]).numpy(),
            sam2_video.POINTER_SCORE_LOGITS: torch.stack([s.pointer_score for s in shown]).numpy(),
        }
        want = {
            sam2_video.MEMORY_FEATURES: torch.cat([s.memory for s in shown]).numpy(),
            sam2_video.OBJECT_POINTER: torch.cat([s.pointer.reshape(1, -1) for s in shown]).numpy(),
        }
        return GraphCase(sam2_video.MEMORY_ENCODER, feeds, want)

    @contextmanager
    def _object_score(self, present: bool) -> Iterator[None]:
        """Makes the decoder judge the object present or absent, whatever it thinks of this picture."""
        handle = self._model.mask_decoder.pred_obj_score_head.register_forward_hook(
            lambda _, __, output: output.abs().clamp(min=0.5) * (1 if present else -1)
        )
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _pointer_input(self) -> Iterator[list[Tensor]]:
        """Collects the mask tokens that pointers are made of."""
        seen: list[Tensor] = []
        handle = self._model.object_pointer_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            yield seen
        finally:
            handle.remove()


DECODER_OUTPUTS = (sam2.MASKS, sam2.IOU_SCORES, sam2.OBJECT_SCORE_LOGITS, sam2_video.MASK_TOKENS)


@dataclass(frozen=True, eq=False)
class _Shown:
    """One object in front of the memory encoder: logits, two scores and token go in, memory and pointer come out."""

    logits: Tensor
    score: Tensor
    pointer_score: Tensor
    token: Tensor
    memory: Tensor
    pointer: Tensor


def memory_map(entry: Stored, grid: int) -> npt.NDArray[np.float32]:
    """(C, G, G) float32 memory map of a stored entry."""
    tokens: Tensor = entry["maskmem_features"].float()
    return tokens[:, 0].T.reshape(-1, grid, grid).contiguous().numpy()


def make_cases(
    modules: Modules,
    frames: Sequence[Stored],
    objects: Sequence[Sequence[Stored]],
    video: Sam2VideoConstants,
    seed: int,
) -> list[GraphCase]:
    """Calls of all three graphs that use every input, at several sizes of every dynamic dimension.

    Args:
        modules: Of the model.
        frames: Features of frames, at least two.
        objects: What the frames left behind for each object of a clip.
        video: Constants of tracking.
        seed: Of the choice of memories and prompts.
    """
    rng = np.random.default_rng(seed)
    pool = [entry for entries in objects for entry in entries]
    side = modules.side

    def draw(*shape: int) -> list[list[Stored]]:
        return [[pool[i] for i in row] for row in rng.integers(0, len(pool), shape)]

    cases = []
    most, marks = video.num_memories, video.max_pointers
    for index, (count, memories, pointers) in enumerate(
        [(1, 1, 0), (1, 1, 1), (1, most, marks), (2, 3, 5), (3, 2, 2), (1, most + 2, marks + 3)]
    ):
        # The last row is that of conditioning frames; the first memory has it.
        rows = rng.integers(0, most - 1, (count, memories), np.int32)
        rows[:, 0] = most - 1
        steps = rng.integers(1, marks, (count, pointers), np.int32)
        kept = frames[index % len(frames)]
        cases.append(modules.attention(kept, draw(count, memories), rows, draw(count, pointers), steps))
    kept = frames[3 % len(frames)]  # those of the case with two objects
    two = cases[3].want[sam2_video.TRACKED_EMBED]
    three = np.concatenate([two, two[:1] * np.float32(0.5)])
    own = modules.image(kept)[sam2.IMAGE_EMBED]
    none, labels = np.zeros((2, 0, 2), np.float32), np.zeros((2, 0), np.int32)
    mask = np.clip(pool[0]["pred_masks"].reshape(side // 4, side // 4).numpy(), -LOGIT_LIMIT, LOGIT_LIMIT)

    def points(count: int, each: int) -> npt.NDArray[np.float32]:
        return rng.uniform(0.05 * side, 0.95 * side, (count, each, 2)).astype(np.float32)

    cases += [
        modules.decoder(kept, two, none, labels, [None, None]),
        modules.decoder(kept, two[:1], none[:1], labels[:1], [None]),
        modules.decoder(kept, three, points(3, 2), np.array([[1, 0], [2, 3], [1, 1]], np.int32), [mask, None, -mask]),
        modules.decoder(kept, own, none[:1], labels[:1], [mask], plain=True),
        modules.decoder(kept, own, points(1, 1), np.array([[1]], np.int32), [None]),
    ]
    y, x = np.mgrid[0:side, 0:side]
    disc = (x - 0.4 * side) ** 2 + (y - 0.6 * side) ** 2 < (0.2 * side) ** 2
    cases += [
        modules.memory(kept, two[:1], [False], [True])[0],
        modules.memory(kept, three, [False, True, False], [True, True, False])[0],
        modules.given(kept, [disc]),
        modules.given(kept, [np.zeros_like(disc), disc]),
    ]
    return cases
