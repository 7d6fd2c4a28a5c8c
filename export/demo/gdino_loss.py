"""What the small Grounding DINO learns from: who answers for which object, and the losses of the answers.

Places of the finest level are supervised as if they were a one-stage detector (exactly one place answers for an
object, see :mod:`.detect_loss`), which is where the queries come from; each decoder layer learns the same objects, one
query for each. A second task tells every part of the network early what it should see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pixano_edge.export.demo.detect_batches import ASKED, UNSURE
from pixano_edge.export.demo.detect_loss import NEIGHBOUR, focal, overlaps
from pixano_edge.export.demo.gdino_model import WIDTH, Predictions
from pixano_edge.export.demo.scenes import SHAPES
from pixano_edge.export.demo.textures import COLORS, PATTERNS

WHICH_WEIGHT, BOX_WEIGHT, GIOU_WEIGHT = 0.5, 5.0, 2.0
PARTS = 4
"""Parts per side of a place in the second task."""
NAMES = (len(SHAPES), len(COLORS), len(PATTERNS))
NAME_WEIGHTS = (1.5, 0.4, 0.4)
"""Of shape, colour and pattern in the second task: shapes are what is learned last."""


@dataclass
class Targets:
    """Objects of B images in M slots: ``boxes`` (B, M, 4) float32 cx, cy, w, h in sides of the image; ``state``
    (B, M) int64 as in a batch; ``words`` (B, M, 3) int64; ``match`` (B, M, T) float32, 1 where the token belongs to a
    phrase that is true of the object; ``real`` (B, T) float32, 0 for padding; ``owner`` (B, PARTS G, PARTS G) int64 for
    G places a side, the index of the object that shows there, -1 for none."""

    boxes: Tensor
    state: Tensor
    words: Tensor
    match: Tensor
    real: Tensor
    owner: Tensor


def distances(boxes: Tensor, grid: int) -> Tensor:
    """How many cells each place of the finest level (``grid`` a side) lies from the centre of each box (B, M, 4), the
    larger of both axes; (B, M, grid grid)."""
    axis = (torch.arange(grid) + 0.5) / grid
    x, y = axis.repeat(grid), axis.repeat_interleave(grid)
    return torch.stack([x - boxes[..., :1], y - boxes[..., 1:2]]).abs().amax(0) * grid


def quality(logits: Tensor, boxes: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """How well each of N answers, (B, N, T) and (B, N, 4), answers for each object, (B, M, N): the geometric mean of
    score (to the power 0.3) and IoU (0.7); and the IoU."""
    count = targets.match.sum(-1).clamp(min=1)
    score = torch.einsum("bnt,bmt->bmn", logits.sigmoid(), targets.match) / count[..., None]
    iou, _ = overlaps(targets.boxes[:, :, None], boxes[:, None])
    return score.clamp(min=1e-6) ** 0.3 * iou.clamp(min=1e-6) ** 0.7, iou


def _solve(gain: Tensor, state: Tensor) -> Tensor:
    chosen = torch.full(state.shape, -1)
    for row, states in enumerate(state):
        asked = torch.nonzero(states == ASKED)[:, 0]
        objects, answers = linear_sum_assignment(gain[row, asked].numpy(), maximize=True)
        chosen[row, asked[torch.from_numpy(objects)]] = torch.from_numpy(answers)
    return chosen


@torch.no_grad()
def assign_places(out: Predictions, targets: Targets, choice: float) -> Tensor:
    """The place (B, M) int64 that answers for each object, -1 where nothing is asked.

    ``choice`` 0: the place nearest to the centre of the box; 1: the one of the nine nearest with the best answer;
    linear between.
    """
    away = distances(targets.boxes, out.grid)
    places = out.grid**2
    good, _ = quality(out.logits[:, :places], out.boxes[:, :places], targets)
    return _solve(2 * choice * good - (1 - 0.9 * choice) * away - 100.0 * (away > 1.5), targets.state)


@torch.no_grad()
def assign_queries(logits: Tensor, boxes: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """The query (B, M) int64 that answers for each object, and which queries (B, Q) lie on an unsure one."""
    good, iou = quality(logits, boxes, targets)
    far = (targets.boxes[:, :, None] - boxes[:, None]).abs().sum(-1)
    chosen = _solve(2 * good + 0.2 * iou - 0.5 * far, targets.state)
    return chosen, ((iou > 0.4) & (targets.state == UNSURE)[..., None]).any(1)


def _picked(chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of image, object and answer of everything that is answered."""
    images, objects = torch.nonzero(chosen >= 0, as_tuple=True)
    return images, objects, chosen[images, objects]


def _class_loss(logits: Tensor, chosen: Tensor, skipped: Tensor, targets: Targets) -> Tensor:
    """Focal loss of all answers (B, N, T), divided by the number of tokens that are true of objects."""
    images, objects, answers = _picked(chosen)
    wanted = torch.zeros_like(logits)
    wanted[images, answers] = targets.match[images, objects]
    weight = (~skipped).float()
    weight[images, answers] = 1.0
    loss = focal(logits, wanted, weight[..., None] * targets.real[:, None])
    return loss / wanted.sum().clamp(min=1) * 3


def _which_loss(logits: Tensor, chosen: Tensor, targets: Targets) -> Tensor:
    """How surely what answers for an object prefers each token that is true of it to all those that are not: cross
    entropy, the mean over tokens and objects. The focal loss says little of which of two low scores is higher."""
    images, objects, answers = _picked(chosen)
    own, true = logits[images, answers], targets.match[images, objects]
    false = (1 - true) * targets.real[images]
    others = own.masked_fill(false == 0, float("-inf")).logsumexp(-1, keepdim=True)
    each = (F.softplus(others - own) * true).sum(-1) / true.sum(-1).clamp(min=1)
    return each.sum() / max(1, len(each))


def _box_loss(boxes: Tensor, goal: Tensor, weight: Tensor) -> Tensor:
    _, giou = overlaps(boxes, goal)
    each = BOX_WEIGHT * (boxes - goal).abs().sum(-1) + GIOU_WEIGHT * (1 - giou)
    return (weight * each).sum() / weight.sum().clamp(min=1)


def nearest_object(targets: Targets, grid: int) -> tuple[Tensor, Tensor]:
    """For each place of the finest level the asked object whose centre is nearest, and how many cells away it is."""
    away = distances(targets.boxes, grid).masked_fill((targets.state != ASKED)[..., None], 1e3)
    near, index = away.min(1)
    return index, near


def detection_loss(
    out: Predictions, targets: Targets, choice: float, query_weight: float = 2.0
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The losses of places and of queries, whose products with the text weigh ``query_weight``; the places and the
    queries (B, M) that answer."""
    places = assign_places(out, targets, choice)
    images, objects, answers = _picked(places)
    away = distances(targets.boxes, out.grid)
    unsure = ((targets.state == UNSURE)[..., None] & (away <= 1.5)).any(1)
    skipped = F.pad(unsure, (0, out.logits.shape[1] - out.grid**2))
    losses = {"place": _class_loss(out.logits, places, skipped, targets)}
    losses["pwhich"] = WHICH_WEIGHT * _which_loss(out.logits, places, targets)
    index, near = nearest_object(targets, out.grid)
    weight = torch.where(near <= 1.5, NEIGHBOUR, 0.0)
    index[images, answers], weight[images, answers] = objects, 1.0
    goal = targets.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    losses["pbox"] = _box_loss(out.boxes[:, : out.grid**2], goal, weight)
    queries, skipped = assign_queries(out.query_logits[-1].detach(), out.query_boxes[-1].detach(), targets)
    images, objects, answers = _picked(queries)
    goal = targets.boxes[images, objects]
    losses["query"] = losses["which"] = losses["qbox"] = goal.new_zeros(())
    for logits, boxes in zip(out.query_logits, out.query_boxes, strict=True):
        share = 1 / len(out.query_logits)
        losses["query"] = losses["query"] + share * query_weight * _class_loss(logits, queries, skipped, targets)
        which = _which_loss(logits, queries, targets)
        losses["which"] = losses["which"] + share * query_weight * WHICH_WEIGHT * which
        ones = torch.ones(len(goal))
        losses["qbox"] = losses["qbox"] + share * _box_loss(boxes[images, answers], goal, ones)
    return losses, places, queries


class WhatIsHere(nn.Module):
    """A second task in training: linear heads tell shape, colour and pattern from every stage; dropped afterwards.

    From the backbone's finest map and from the encoder's states: of what shows at each place; from the encoder's
    states around an object's centre and from the decoder's states of the queries that answer: of that object. The
    backbone also tells which of the parts of a place belong to the same object, or background, as its centre.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.backbone = nn.Linear(channels, sum(NAMES) + 1 + PARTS * PARTS)
        self.here = nn.Linear(WIDTH, sum(NAMES))
        self.centre = nn.Linear(WIDTH, sum(NAMES))
        self.query = nn.Linear(WIDTH, sum(NAMES))

    def loss(self, out: Predictions, targets: Targets, queries: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The losses, and how often (three shares) the shapes were right: from what shows, at centres, of queries."""
        seen = out.maps[0].flatten(2).transpose(1, 2).float()
        memory = out.memory[:, : out.grid**2].float()
        fine = targets.owner.unflatten(1, (out.grid, PARTS)).unflatten(3, (out.grid, PARTS)).transpose(2, 3).flatten(3)
        fine = fine.flatten(1, 2)
        owner = fine[..., PARTS * PARTS // 2 + PARTS // 2]
        own = owner.clamp(min=0)
        sure = (owner >= 0) & (targets.state.gather(1, own) == ASKED)
        words = targets.words.gather(1, own[..., None].expand(-1, -1, 3))[sure]
        names, some, parts = self.backbone(seen).split((sum(NAMES), 1, PARTS * PARTS), -1)
        bare, _ = _name_loss(names[sure], words)
        bare = bare + F.binary_cross_entropy_with_logits(some[..., 0], (owner >= 0).float())
        bare = bare + 2 * F.binary_cross_entropy_with_logits(parts, (fine == owner[..., None]).float())
        here, right_here = _name_loss(self.here(memory[sure]), words)
        index, near = nearest_object(targets, out.grid)
        middle = near <= 1.5
        about = targets.words.gather(1, index[..., None].expand(-1, -1, 3))[middle]
        centre, right_centre = _name_loss(self.centre(memory[middle]), about)
        images, objects, answers = _picked(queries)
        asked = targets.words[images, objects]
        query = torch.stack([_name_loss(self.query(h[images, answers]), asked)[0] for h in out.hidden]).mean()
        with torch.no_grad():
            _, right_query = _name_loss(self.query(out.hidden[-1][images, answers]), asked)
        rights = torch.stack([right_here, right_centre, right_query])
        return {"bare": bare, "here": here, "centre": centre, "names": query}, rights


def _name_loss(logits: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted cross entropies of shape, colour and pattern, and the share of right shapes."""
    total = logits.new_zeros(())
    parts = logits.split(NAMES, -1)
    for kind, (part, weight) in enumerate(zip(parts, NAME_WEIGHTS, strict=True)):
        total = total + weight * F.cross_entropy(part, words[:, kind])
    return total, (parts[0].argmax(-1) == words[:, 0]).float().mean()
