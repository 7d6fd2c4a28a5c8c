"""Deformable attention as training on a CPU wants it: one sparse matrix of bilinear weights, one matrix product.

transformers' ``MultiScaleDeformableAttention`` samples every level with ``grid_sample`` and multiplies what it read,
(B heads, C, Q, L P), with the attention. The values of all levels are few here (189 places at 192 pixels, 336 at
256), so the weights of the four corners of each sample, times its attention, are added up in a matrix (B heads, Q,
places), which then multiplies the values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.models.grounding_dino import modeling_grounding_dino as upstream


def sample(value: Tensor, sizes: list[tuple[int, int]], locations: Tensor, attention: Tensor) -> Tensor:
    """Deformable attention over maps of several sizes, equal to transformers' own up to rounding.

    Args:
        value: (B, places, heads, C), the maps one after the other.
        sizes: height and width of each map.
        locations: (B, Q, heads, L, P, 2) x, y in sides of a map; what lies outside is zero.
        attention: (B, Q, heads, L, P).

    Returns:
        (B, Q, heads C).
    """
    batch, places, heads, channels = value.shape
    queries = locations.shape[1]
    height, width = (torch.tensor(side, dtype=torch.float32)[:, None] for side in zip(*sizes, strict=True))
    first = (height * width).cumsum(0) - height * width
    locations, attention = locations.float().transpose(1, 2), attention.transpose(1, 2)  # bfloat16 ends at 256 places
    x, y = locations[..., 0] * width - 0.5, locations[..., 1] * height - 0.5
    left, top = x.detach().floor(), y.detach().floor()
    index, weight = [], []
    for row, down in ((top, 1 - (y - top)), (top + 1, y - top)):
        share = down * ((row >= 0) & (row < height)) * attention
        begin = row.clamp(min=0).minimum(height - 1) * width + first
        for column, along in ((left, 1 - (x - left)), (left + 1, x - left)):
            weight.append(along * ((column >= 0) & (column < width)) * share)
            index.append(begin + column.clamp(min=0).minimum(width - 1))
    row_start = torch.arange(batch * heads * queries).view(batch, heads, queries, 1, 1, 1) * places
    matrix = weight[0].new_zeros(batch * heads * queries * places)
    matrix.scatter_add_(0, (torch.stack(index, -1).long() + row_start).flatten(), torch.stack(weight, -1).flatten())
    matrix = matrix.view(batch, heads, queries, places)
    read = matrix @ value.to(matrix.dtype).transpose(1, 2)
    return read.transpose(1, 2).reshape(batch, queries, heads * channels)


def _forward(
    _: Any,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    return sample(value, value_spatial_shapes_list, sampling_locations, attention_weights)


@contextlib.contextmanager
def quick_deformable() -> Iterator[None]:
    """Inside, every Grounding DINO of this process computes its deformable attention by :func:`sample`."""
    kind = upstream.MultiScaleDeformableAttention
    own = kind.forward
    kind.forward = _forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        kind.forward = own  # type: ignore[method-assign]
