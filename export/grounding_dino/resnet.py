"""ResNet backbone of a Grounding DINO, each of its frozen batch norms one factor and one term per channel.

The weights are those of transformers' `ResNetBackbone` (``models/resnet/modeling_resnet.py``; He et al., "Deep Residual
Learning", 2016) with the batch norms that ``GroundingDinoFrozenBatchNorm2d`` keeps as constants, as DETR's backbones
do; any image size works as it is. The factor stays apart from the convolution, so that weights which are fp16 numbers
in the checkpoint are so in the graph and are stored once for all variants; ONNX Runtime and TensorRT fold it into the
convolution when they load the graph.
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
        self.stem = _Convolution(backbone.embedder.embedder)
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
        self.layers = nn.Sequential(*(_Convolution(part) for part in layer.layer))
        self.shortcut = nn.Identity() if isinstance(layer.shortcut, nn.Identity) else _Convolution(layer.shortcut)
        self.activation = layer.activation

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.layers(hidden) + self.shortcut(hidden))


class _Convolution(nn.Module):
    """A convolution of transformers with its norm, and its activation where it has one."""

    scale: Tensor
    shift: Tensor

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.convolution = part.convolution
        norm = part.normalization
        with torch.no_grad():
            scale = norm.weight.double() / (norm.running_var.double() + EPSILON).sqrt()
            shift = norm.bias.double() - norm.running_mean.double() * scale
        self.register_buffer("scale", scale.float()[:, None, None])
        self.register_buffer("shift", shift.float()[:, None, None])
        self.activation = getattr(part, "activation", None) or nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.convolution(hidden) * self.scale + self.shift)
