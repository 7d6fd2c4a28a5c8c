"""ResNet backbone of a Grounding DINO, its frozen batch norms folded into the convolutions.

The weights are those of transformers' `ResNetBackbone` (``models/resnet/modeling_resnet.py``; He et al., "Deep Residual
Learning", 2016) with the batch norms that ``GroundingDinoFrozenBatchNorm2d`` keeps as constants, as DETR's backbones
do. Each convolution and norm become one convolution with a bias; any image size works as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

EPSILON = 1e-5
"""Of ``GroundingDinoFrozenBatchNorm2d``, which writes it into its forward pass."""


class ResNetBackbone(nn.Module):
    """Pixels (1, 3, H, W) to the feature maps of the chosen stages, each (1, h, w, C).

    Args:
        backbone: transformers' `ResNetBackbone`.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.stem = _folded(backbone.embedder.embedder)
        self.pool = backbone.embedder.pooler
        self.stages = nn.ModuleList(
            nn.Sequential(*(_Block(layer) for layer in stage.layers)) for stage in backbone.encoder.stages
        )
        self.taken = [f"stage{number + 1}" in backbone.out_features for number in range(len(self.stages))]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps, the finest first."""
        hidden = self.pool(self.stem(pixels))
        features = []
        for stage, taken in zip(self.stages, self.taken):
            hidden = stage(hidden)
            if taken:
                features.append(hidden.permute(0, 2, 3, 1))
        return features


class _Block(nn.Module):
    """A basic or bottleneck block."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(_folded(part) for part in layer.layer))
        self.shortcut = nn.Identity() if isinstance(layer.shortcut, nn.Identity) else _folded(layer.shortcut)
        self.activation = layer.activation

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.layers(hidden) + self.shortcut(hidden))


def _folded(part: Any) -> nn.Sequential:
    """A convolution of transformers with its norm and activation, as a convolution and its activation."""
    plain, norm = part.convolution, part.normalization
    with torch.no_grad():
        scale = norm.weight.double() / (norm.running_var.double() + EPSILON).sqrt()
        folded = nn.Conv2d(
            plain.in_channels, plain.out_channels, plain.kernel_size, plain.stride, plain.padding, groups=plain.groups
        )
        folded.weight.copy_(plain.weight.double() * scale[:, None, None, None])
        folded.bias.copy_(norm.bias.double() - norm.running_mean.double() * scale)
    activation = getattr(part, "activation", None)
    return nn.Sequential(folded, *([] if activation is None else [activation]))
