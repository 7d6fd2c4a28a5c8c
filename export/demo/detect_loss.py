"""What the small OWLv2 learns from: which token answers for which object, and the losses of its answers.

An object is answered by exactly one token, so that no duplicates have to be removed afterwards. It is one of the nine
tokens around the centre of its box: at first the nearest, later the one that already answers best (as in POTO, Wang et
al. 2021, "End-to-End Object Detection with Fully Convolutional Network"), so that an object whose centre lies between
two tokens is not torn between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pixano_edge.export.demo.detect_batches import ASKED, UNSURE
from pixano_edge.export.demo.owlv2_model import GRID, IMAGE_SIZE, PATCH, Predictions
from pixano_edge.export.demo.scenes import SHAPES
from pixano_edge.export.demo.textures import COLORS, PATTERNS

CLASS_WEIGHT, BOX_WEIGHT, GIOU_WEIGHT, OBJECT_WEIGHT, SIDE_WEIGHT = 2.0, 5.0, 2.0, 1.0, 1.0
NEIGHBOUR = 0.2
"""Weight of the box of a token next to the one that answers."""


@dataclass
class Targets:
    """Objects of B images in M slots: ``boxes`` (B, M, 4) float32 cx, cy, w, h in sides of the image; ``state``
    (B, M) int64 as in a batch; ``match`` (B, M, K) bool, which of the K texts is true of the object; ``words`` (B, M,
    3) int64; ``owner`` (B, 4 GRID, 4 GRID) int64, the index of the object that shows there, -1 for none."""

    boxes: Tensor
    state: Tensor
    match: Tensor
    words: Tensor
    owner: Tensor


def centred(boxes: Tensor) -> Tensor:
    """xyxy pixels (..., 4) to cx, cy, w, h in sides of the image."""
    x0, y0, x1, y1 = (boxes / IMAGE_SIZE).unbind(-1)
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1)


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al. 2019) of boxes cx, cy, w, h (..., 4); shapes broadcast."""
    a0, a1 = a[..., :2] - a[..., 2:] / 2, a[..., :2] + a[..., 2:] / 2
    b0, b1 = b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2
    both = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp(min=0).prod(-1)
    union = (a[..., 2] * a[..., 3] + b[..., 2] * b[..., 3] - both).clamp(min=1e-9)
    hull = (torch.maximum(a1, b1) - torch.minimum(a0, b0)).clamp(min=0).prod(-1).clamp(min=1e-9)
    iou = both / union
    return iou, iou - (hull - union) / hull


def distances(boxes: Tensor) -> Tensor:
    """How many cells each token (N of them) lies from the centre of each box (B, M, 4), the larger of both axes;
    (B, M, N)."""
    axis = (torch.arange(GRID) + 0.5) / GRID
    x, y = axis.repeat(GRID), axis.repeat_interleave(GRID)
    away = torch.stack([x - boxes[..., :1], y - boxes[..., 1:2]])
    return away.abs().amax(0) * GRID


@torch.no_grad()
def assign(out: Predictions, targets: Targets, choice: float) -> Tensor:
    """The token (B, M) int64 that answers for each object, -1 where nothing is asked.

    Args:
        out: what the model answers now.
        targets: the objects.
        choice: 0: the token nearest to the centre of the box; 1: the one of the nine nearest with the best answer, the
            geometric mean of score (to the power 0.3) and IoU (0.7); linear between.
    """
    away = distances(targets.boxes)
    count = targets.match.sum(-1).clamp(min=1)
    score = torch.einsum("bnk,bmk->bmn", out.logits.sigmoid(), targets.match.float()) / count[..., None]
    iou, _ = overlaps(targets.boxes[:, :, None], out.boxes[:, None])
    quality = score.clamp(min=1e-6) ** 0.3 * iou.clamp(min=1e-6) ** 0.7
    gain = 2 * choice * quality - (1 - 0.9 * choice) * away - 100.0 * (away > 1.5)
    tokens = torch.full(targets.state.shape, -1)
    for row, state in enumerate(targets.state):
        asked = torch.nonzero(state == ASKED)[:, 0]
        objects, chosen = linear_sum_assignment(gain[row, asked].numpy(), maximize=True)
        tokens[row, asked[torch.from_numpy(objects)]] = torch.from_numpy(chosen)
    return tokens


def focal(logits: Tensor, target: Tensor, weight: Tensor, balance: float = 0.4) -> Tensor:
    """Sum of the sigmoid focal loss (Lin et al. 2017, gamma 2); ``balance`` weighs what is true, the rest what is not.

    All arguments have one shape; ``target`` is 0 or 1.
    """
    p = logits.sigmoid()
    wrong = torch.where(target > 0, 1 - p, p)
    share = torch.where(target > 0, balance, 1 - balance)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (weight * share * wrong.square() * entropy).sum()


def detection_loss(out: Predictions, targets: Targets, tokens: Tensor) -> dict[str, Tensor]:
    """The losses of boxes, classes and objectness, each divided by the number of objects asked for.

    ``tokens`` as :func:`assign` gives them. The eight tokens around the one that answers learn the box as well, not
    the class. Tokens by an unsure object are left out of account, except those that answer for another one.
    """
    asked = tokens >= 0
    count = asked.sum().clamp(min=1)
    images = torch.arange(len(tokens))[:, None].expand_as(tokens)[asked]
    chosen, match = tokens[asked], targets.match[asked].float()
    wanted = torch.zeros_like(out.logits)
    wanted[images, chosen] = match
    found = torch.zeros_like(out.objectness)
    found[images, chosen] = 1
    away = distances(targets.boxes)
    unsure = ((targets.state == UNSURE)[..., None] & (away <= 1.5)).any(1)
    known = (~unsure | (found > 0)).float()
    classes = focal(out.logits, wanted, known[..., None].expand_as(wanted))
    objects = focal(out.objectness, found, known)
    # Boxes: every token near an object takes the nearest one's.
    near, nearest = away.masked_fill(targets.state[..., None] != ASKED, 1e3).min(1)
    nearest[images, chosen] = torch.nonzero(asked)[:, 1]
    weight = torch.where(near <= 1.5, NEIGHBOUR, 0.0)
    weight[images, chosen] = 1.0
    goal = targets.boxes.gather(1, nearest[..., None].expand(-1, -1, 4))
    _, giou = overlaps(out.boxes, goal)
    distance = (out.boxes - goal).abs().sum(-1)
    boxes = BOX_WEIGHT * distance + GIOU_WEIGHT * (1 - giou)
    return {
        "class": CLASS_WEIGHT * classes / count,
        "box": (weight * boxes).sum() / weight.sum().clamp(min=1),
        "object": OBJECT_WEIGHT * objects / count,
    }


class WhatIsHere(nn.Module):
    """A second task in training: one linear layer tells of every token what lies there; dropped afterwards.

    Few tokens answer for objects, and early in training their answers say little about the rest. So every token also
    has to name the shape, colour and pattern of the object at its centre, whether there is one, its box's sides, and
    which of the 16 parts of the token's patch belong to the same object, or background, as the centre.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (len(SHAPES), len(COLORS), len(PATTERNS), 1, 4, 16)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, sum(self.sizes))

    def loss(self, features: Tensor, targets: Targets) -> Tensor:
        """Sum of the losses of the six answers, each the mean over tokens; ``features`` (B, N, C)."""
        *names, here, sides, parts = self.head(self.norm(features)).float().split(self.sizes, -1)
        fine = targets.owner.unflatten(1, (GRID, 4)).unflatten(3, (GRID, 4)).transpose(2, 3).flatten(3).flatten(1, 2)
        owner = fine[..., 10]  # of (B, N, 16): row 2, column 2
        own = owner.clamp(min=0)
        sure = (owner >= 0) & (targets.state.gather(1, own) == ASKED)
        words = targets.words.gather(1, own[..., None].expand(-1, -1, 3))[sure]
        total = F.binary_cross_entropy_with_logits(here[..., 0], (owner >= 0).float())
        total = total + 2 * F.binary_cross_entropy_with_logits(parts, (fine == owner[..., None]).float())
        for kind, logits in enumerate(names):
            total = total + 0.5 * F.cross_entropy(logits[sure], words[:, kind])
        cx, cy, w, h = targets.boxes.gather(1, own[..., None].expand(-1, -1, 4)).unbind(-1)
        axis = (torch.arange(GRID) + 0.5) * PATCH / IMAGE_SIZE
        x, y = axis.repeat(GRID), axis.repeat_interleave(GRID)
        goal = 4 * torch.stack([x - cx + w / 2, y - cy + h / 2, cx + w / 2 - x, cy + h / 2 - y], -1)
        return total + 3 * F.smooth_l1_loss(sides[sure], goal[sure], beta=0.1)
