"""Grounding DINO's attention in plain operators: deformable sampling with GridSample, fusion of image and text.

Sources: Zhu et al., "Deformable DETR" (2021); Liu et al., "Grounding DINO" (2023); weights and formulas as in
transformers' ``models/grounding_dino/modeling_grounding_dino.py``. Batch 1 without padded pixels or tokens throughout,
so that no padding mask is left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BLOCKED = -30000.0
"""Added to a score that must not count: its exponential is exactly 0, and it is a number in fp16 too."""


class Levels:
    """Shapes of the feature maps as an exporter keeps them open: as tensors where numbers are computed from them.

    Args:
        maps: The feature maps (1, h, w, C), the finest first.

    Attributes:
        shapes: Height and width per level.
        counts: Per level a float tensor (2,) of width and height.
        centres: (S, 2) x and y of every place's centre, in 0..1 of its map, levels one after another.
        rows: Per level the numbers 1..h as floats; `columns` likewise 1..w.
    """

    def __init__(self, maps: list[Tensor]) -> None:
        self.shapes = [(m.shape[1], m.shape[2]) for m in maps]
        device = maps[0].device
        self.rows = [_numbers(height, device) for height, _ in self.shapes]
        self.columns = [_numbers(width, device) for _, width in self.shapes]
        self.counts = [torch.cat([x[-1:], y[-1:]]) for x, y in zip(self.columns, self.rows)]
        self.centres = torch.cat(
            [
                torch.stack(_mesh((x - 0.5) / x[-1:], (y - 0.5) / y[-1:]), dim=-1).flatten(0, 1)
                for x, y in zip(self.columns, self.rows)
            ]
        )

    def split(self, flat: Tensor) -> list[Tensor]:
        """(S, ...) to one (h * w, ...) per level."""
        parts, start = [], 0
        for height, width in self.shapes:
            # Slices: TensorRT's Split wants constant sizes.
            parts.append(flat.narrow(0, start, height * width))
            start = start + height * width
        return parts


def _numbers(count: Any, device: torch.device) -> Tensor:
    # Integers first: a float range of an open size becomes float64 in some exporters.
    return torch.arange(1, count + 1, device=device).to(torch.float32)


def _mesh(x: Tensor, y: Tensor) -> list[Tensor]:
    """x and y over the whole map, each (h, w)."""
    return [x[None, :] + 0.0 * y[:, None], y[:, None] + 0.0 * x[None, :]]


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention; upstream ``MultiScaleDeformableAttention.forward`` level by level.

    Args:
        layer: transformers' `GroundingDinoMultiscaleDeformableAttention`.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.levels, self.heads, self.points = int(layer.n_levels), int(layer.n_heads), int(layer.n_points)
        self.sampling_offsets, self.attention_weights = layer.sampling_offsets, layer.attention_weights
        self.value_proj, self.output_proj = layer.value_proj, layer.output_proj

    def forward(self, queries: Tensor, memory: Tensor, centres: Tensor, sizes: Tensor | None, levels: Levels) -> Tensor:
        """Samples the feature maps around a place per query.

        Args:
            queries: (1, N, D), position embedding included.
            memory: (1, S, D) feature maps, levels one after another.
            centres: (N, 2) x and y in 0..1.
            sizes: (N, 2) width and height that offsets are measured in; None: they are measured in places of each map.
            levels: Shapes of the maps.

        Returns:
            (1, N, D).
        """
        heads, points = self.heads, self.points
        # (heads, N, levels, points, 2) and (heads, N, levels, points)
        offsets = self.sampling_offsets(queries[0]).unflatten(1, (heads, self.levels, points, 2)).transpose(0, 1)
        weights = self.attention_weights(queries[0]).unflatten(1, (heads, self.levels * points)).softmax(-1)
        weights = weights.unflatten(2, (self.levels, points)).transpose(0, 1)
        values = levels.split(self.value_proj(memory)[0].unflatten(1, (heads, -1)))
        total: Tensor | None = None
        for level, (height, width) in enumerate(levels.shapes):
            image = values[level].permute(1, 2, 0).unflatten(2, (height, width))  # (heads, D / heads, h, w)
            shift = offsets[:, :, level]
            shift = shift / levels.counts[level] if sizes is None else shift * (sizes * (0.5 / points))[None, :, None]
            places = 2.0 * (centres[None, :, None] + shift) - 1.0
            sampled = nn.functional.grid_sample(image, places, "bilinear", "zeros", align_corners=False)
            # Summed per level: all levels side by side would be four times the memory.
            part = (sampled * weights[:, :, level][:, None]).sum(-1)
            total = part if total is None else total + part
        assert total is not None
        return self.output_proj(total.flatten(0, 1).transpose(0, 1)[None])


class Attention(nn.Module):
    """Multi-head attention; `layer` is transformers' `GroundingDinoMultiheadAttention`."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.heads = int(layer.num_attention_heads)
        self.query, self.key, self.value, self.out = layer.query, layer.key, layer.value, layer.out_proj

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """(1, N, D) queries on (1, M, D) keys and values; `mask` is added to the scores."""
        query, key, value = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part, x in ((self.query, queries), (self.key, keys), (self.value, values))
        )
        found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(found.transpose(1, 2).flatten(2))


class Fusion(nn.Module):
    """Image to text and text to image attention; `layer` is transformers' `GroundingDinoFusionLayer`.

    Upstream subtracts maxima and clamps at +-50000 before the softmax, which changes nothing short of such scores.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention = layer.attn
        self.heads, self.scale = int(attention.num_heads), float(attention.scale)
        self.norm_image, self.norm_text = layer.layer_norm_vision, layer.layer_norm_text
        self.image_query, self.text_key = attention.vision_proj, attention.text_proj
        self.image_value, self.text_value = attention.values_vision_proj, attention.values_text_proj
        self.image_out, self.text_out = attention.out_vision_proj, attention.out_text_proj
        self.image_gain, self.text_gain = layer.vision_param, layer.text_param

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(1, S, D) and (1, T, D) to the same, each with what it found in the other."""
        image, text = self.norm_image(image), self.norm_text(text)
        query = self._heads(self.image_query(image) * self.scale)
        key = self._heads(self.text_key(text))
        scores = query @ key.transpose(2, 3)
        to_image = scores.softmax(-1) @ self._heads(self.text_value(text))
        to_text = scores.transpose(2, 3).softmax(-1) @ self._heads(self.image_value(image))
        image = image + self.image_gain * self.image_out(to_image.transpose(1, 2).flatten(2))
        text = text + self.text_gain * self.text_out(to_text.transpose(1, 2).flatten(2))
        return image, text

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
