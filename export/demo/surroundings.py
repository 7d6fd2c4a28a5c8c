"""A second task for the small SAM 2 in training: what lies where, asked of every cell of the feature maps.

A prompt's mask says little about the rest of the picture, and from few prompts an encoder learns slowly that two
touching objects of one texture are two. So each feature map that the decoder reads also has to tell, through one
linear layer, where objects are, the box of the object under each cell (as in FCOS, Tian et al. 2019) and whether the
next cell to the right and below belongs to something else. The layers are dropped after training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixano_edge.export.demo.sam2_model import HIDDEN, IMAGE_SIZE, Features


class Surroundings(nn.Module):
    """One 1x1 convolution for each feature map, to 7 channels: object, box sides (left, top, right, bottom), edges."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Conv2d(width, 7, 1) for width in (HIDDEN, HIDDEN // 4, HIDDEN // 8)])

    def loss(self, features: Features, regions: Tensor, boxes: Tensor) -> Tensor:
        """Mean over the maps of the three losses.

        Args:
            features: of B images.
            regions: (B, S/2, S/2) int64, index of the object that shows in each cell, -1 for none.
            boxes: (B, K, 4) float32 xyxy in pixels, around what shows of each object.
        """
        total = torch.zeros(())
        for head, level in zip(self.heads, (features.top, features.s1, features.s0), strict=True):
            out = head(level).float()
            stride = IMAGE_SIZE // level.shape[-1]
            start, step = stride // 4, stride // 2  # the cell's centre, in the half-size map
            owner = regions[:, start::step, start::step]
            total = total + self._level(out, owner, boxes, stride)
        return total / len(self.heads)

    @staticmethod
    def _level(out: Tensor, owner: Tensor, boxes: Tensor, stride: int) -> Tensor:
        present = (owner >= 0).float()
        inside = F.binary_cross_entropy_with_logits(out[:, 0], present)
        own = boxes.gather(1, owner.clamp(min=0).flatten(1)[..., None].expand(-1, -1, 4)).unflatten(1, owner.shape[1:])
        centre = (torch.arange(owner.shape[-1]) + 0.5) * stride
        x, y = centre[None, None, :], centre[None, :, None]
        sides = torch.stack([x - own[..., 0], y - own[..., 1], own[..., 2] - x, own[..., 3] - y], 1) / (IMAGE_SIZE / 4)
        wrong = F.smooth_l1_loss(out[:, 1:5], sides, reduction="none", beta=0.1).mean(1)
        box = (wrong * present).sum() / present.sum().clamp(min=1)
        weight = torch.tensor(3.0)  # borders are few
        right = F.binary_cross_entropy_with_logits(
            out[:, 5, :, :-1], (owner[:, :, 1:] != owner[:, :, :-1]).float(), pos_weight=weight
        )
        below = F.binary_cross_entropy_with_logits(
            out[:, 6, :-1], (owner[:, 1:] != owner[:, :-1]).float(), pos_weight=weight
        )
        return inside + 2 * box + right + below
