"""Tracking through the small SAM 2's memory, differentiable: what ``train_memory`` unrolls.

The computation is the stock ``Sam2VideoModel``'s, for several objects of several clips at once: memory attention and
memory encoder are the modules that the export checks against it, the decoder is :func:`.sam2_model.decode`, and the
engine's :class:`ObjectBank` chooses what a frame attends to. A test compares all of it with the stock model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Sam2VideoModel

from pixano_edge.engine.contracts.sam2_video import OCCLUDED_LOGIT
from pixano_edge.engine.models.sam2_video.bank import Memory, ObjectBank, Selection
from pixano_edge.export.demo.sam2_model import Decoded, Features, decode
from pixano_edge.export.sam2.video_graphs import MemoryAttention, MemoryEncoder, video_constants

GIVEN_SCALE, GIVEN_BIAS = 20.0, -10.0  # logits of a mask that is given, as upstream


@dataclass
class Answer:
    """One frame for n objects: ``logits`` (n, S/4, S/4) of the mask that was chosen, ``score`` (n,) object score
    logit, ``token`` (n, C) its mask token, ``pointer_score`` (n,) what decides about the pointer, ``full`` (n, S, S)
    logits of masks that were given, and ``all`` candidates, None for given masks."""

    logits: Tensor
    score: Tensor
    token: Tensor
    pointer_score: Tensor
    full: Tensor | None = None
    all: Decoded | None = None
    chosen: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Slot:
    """What a frame leaves behind for n objects: ``maps`` (n, 64, G, G) and ``pointers`` (n, C)."""

    maps: Tensor
    pointers: Tensor


def of_objects(features: Features, owner: Tensor) -> Features:
    """The features of each object's clip: C clips to n objects; ``owner`` (n,) int64 is the clip of each."""
    return replace(features, top=features.top[owner], s0=features.s0[owner], s1=features.s1[owner])


class MemoryPath:
    """The tracking steps of a model, with gradient to its memory parameters.

    Args:
        model: its memory parts may be in training; dropout is never applied. Call :meth:`refresh` after each step of
            an optimizer.
    """

    def __init__(self, model: Sam2VideoModel) -> None:
        self.model = model
        self.video = video_constants(model)
        self._attention = MemoryAttention(model)
        self._encoder = MemoryEncoder(model)
        self._no_memory = model.no_memory_embedding.detach().reshape(1, -1, 1, 1)
        config: Any = model.config.mask_decoder_config
        self._delta = float(config.dynamic_multimask_stability_delta)
        self._stable = float(config.dynamic_multimask_stability_thresh)
        self.refresh()

    def refresh(self) -> None:
        """Takes the embeddings, which the export modules hold as constants, from the model again, with gradient."""
        model = self.model
        self._attention.time_table = model.memory_temporal_positional_encoding.reshape(-1, model.mem_dim)
        self._encoder.no_pointer = model.no_object_pointer.reshape(1, -1)
        if model.occlusion_spatial_embedding_parameter is not None:
            self._encoder.occlusion = model.occlusion_spatial_embedding_parameter.reshape(1, -1, 1, 1)

    def bank(self) -> ObjectBank[Slot]:
        """An empty bank; its memories hold tensors for all n objects."""
        return ObjectBank(self.video)

    def prompted(self, features: Features, points: Tensor, labels: Tensor, earlier: Tensor | None = None) -> Answer:
        """Objects marked by points; ``features`` are of n objects.

        Args:
            features: one image per object.
            points: (n, N, 2) float32 pixels; a box is its two corners.
            labels: (n, N) int64.
            earlier: (n, S/4, S/4) float32 logits of an earlier answer as mask prompt, or None.
        """
        out = decode(
            self.model, features, points[:, None], labels[:, None], None if earlier is None else earlier[:, None]
        )
        count = points.shape[1]
        return self._choose(out, self.video.multimask_min_points <= count <= self.video.multimask_max_points)

    def given(self, features: Features, masks: Tensor) -> Answer:
        """Objects whose masks (n, S, S) float32 of 0 and 1 are known."""
        shrunk = self.model.mask_downsample(masks[:, None])[:, 0]
        plain = replace(features, top=features.top - self._no_memory)
        points, labels = _no_points(len(masks))
        out = self._choose(decode(self.model, plain, points[:, None], labels[:, None], shrunk[:, None]), True)
        full = masks * GIVEN_SCALE + GIVEN_BIAS
        logits = F.interpolate(full[:, None], scale_factor=0.25, mode="bilinear", antialias=True)[:, 0]
        there = (masks.flatten(1) > 0).any(1).float()
        return Answer(logits, there * GIVEN_SCALE + GIVEN_BIAS, out.token, out.score, full)

    def tracked(self, features: Features, selection: Selection[Slot]) -> Answer:
        """Objects on a frame where nothing is said about them.

        Args:
            features: one image per object.
            selection: what the frame attends to.
        """
        embed = self.attend(features, selection)
        points, labels = _no_points(len(embed))
        out = decode(self.model, replace(features, top=embed), points[:, None], labels[:, None])
        return self._choose(out, self.video.multimask_for_tracking and self.video.multimask_min_points == 0)

    def attend(self, features: Features, selection: Selection[Slot]) -> Tensor:
        """The embedding (n, C, G, G) conditioned on the memories."""
        n = features.top.shape[0]
        times = torch.tensor(selection.times, dtype=torch.float32).expand(n, -1)
        return self._attention(
            features.top,
            torch.stack([memory.slot.maps for memory in selection.memories], 1),
            torch.tensor(selection.rows).expand(n, -1),
            torch.stack([memory.slot.pointers for memory in selection.pointers], 1),
            times,
        )

    def remember(self, bank: ObjectBank[Slot], frame: int, features: Features, answer: Answer, prompted: bool) -> None:
        """Puts what a frame leaves behind into the bank; masks of prompted frames are remembered with hard borders."""
        full = answer.logits if answer.full is None else answer.full
        maps, pointers = self._encoder(
            features.top,
            full[:, None],
            answer.score[:, None],
            torch.full((len(full),), float(prompted)),
            answer.token,
            answer.pointer_score[:, None],
        )
        bank.store(Memory(frame, Slot(maps, pointers)), prompted)

    def _choose(self, out: Decoded, multimask: bool) -> Answer:
        """The candidate that the stock model takes, for each of n objects."""
        logits, iou = out.logits[:, 0], out.iou[:, 0]
        best = iou[:, 1:].argmax(1) + 1
        if multimask:
            chosen = token = best
        else:
            token = torch.zeros_like(best)
            inner = (logits[:, 0] > self._delta).sum((1, 2)).float()
            outer = (logits[:, 0] > -self._delta).sum((1, 2)).float()
            stable = torch.where(outer > 0, inner / outer.clamp(min=1), torch.ones_like(inner)) >= self._stable
            chosen = torch.where(stable, token, best)
        rows = torch.arange(len(best))
        score = out.score[:, 0]
        shown = torch.where((score > 0)[:, None, None], logits[rows, chosen], OCCLUDED_LOGIT)
        return Answer(shown, score, out.tokens[rows, 0, token].float(), score, all=out, chosen=chosen)


def _no_points(count: int) -> tuple[Tensor, Tensor]:
    """What the stock model passes where nothing is asked: one padding point."""
    return torch.zeros(count, 1, 2), torch.full((count, 1), -1)


@torch.no_grad()
def track(path: MemoryPath, features: Sequence[Features], owner: Tensor, answer: Answer) -> list[Answer]:
    """Follows n objects from their answer on frame 0 through all frames; fp32, no gradient."""
    bank = path.bank()
    path.remember(bank, 0, of_objects(features[0], owner), answer, True)
    answers = [answer]
    for frame in range(1, len(features)):
        own = of_objects(features[frame], owner)
        step = path.tracked(own, bank.select(frame, False, len(features)))
        path.remember(bank, frame, own, step, False)
        for memory in bank.out_of_reach(frame):
            bank.drop(memory)
        answers.append(step)
    return answers
