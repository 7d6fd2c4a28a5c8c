"""Swin Transformer backbone whose image size stays open in an exported graph.

The weights are those of transformers' `SwinBackbone` (``models/swin/modeling_swin.py``); Liu et al., "Swin
Transformer" (2021). The stock modules decide in Python how much to pad and whether to cut, which an exporter turns
into constants of the one size it saw. Here every such step is the same operation at any size:

* padding by a constant number of rows and columns, of which a strided convolution or slice takes what it needs;
* cyclic shift and padding to whole windows in one lookup of rows and columns, and their reverse in another one;
* the mask of shifted windows from comparing indices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MASKED = -100.0
"""Added to the scores of pairs from different regions, as in upstream's ``get_attn_mask``."""


class SwinBackbone(nn.Module):
    """Pixels (1, 3, H, W) to the feature maps of the chosen stages, each (1, h, w, C) after its norm.

    Args:
        backbone: transformers' `SwinBackbone`.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        embeddings = backbone.swin.embeddings
        self.patch = int(embeddings.patch_embeddings.patch_size[0])
        self.projection = embeddings.patch_embeddings.projection
        self.norm = embeddings.norm
        self.stages = nn.ModuleList(_Stage(stage) for stage in backbone.swin.encoder.layers)
        # `stage_names` starts with the stem, which comes before the first stage.
        names = list(backbone.stage_names)[1:]
        self.norms = nn.ModuleDict({name: backbone.hidden_states_norms[name] for name in backbone.out_features})
        self.taken = [name if name in backbone.out_features else None for name in names]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps, the finest first."""
        # Rows and columns that make up no whole patch are not read: this pads to whole patches, no more.
        extra = self.patch - 1
        hidden = self.projection(nn.functional.pad(pixels, (0, extra, 0, extra)))
        hidden = self.norm(hidden.permute(0, 2, 3, 1))
        features = []
        for stage, name in zip(self.stages, self.taken):
            hidden, finer = stage(hidden)
            if name is not None:
                features.append(self.norms[name](finer))
        return features


class _Stage(nn.Module):
    def __init__(self, stage: Any) -> None:
        super().__init__()
        blocks = [_Block(block) for block in stage.blocks]
        self.blocks = nn.ModuleList(blocks)
        self.shapes = [(block.window, block.shift) for block in blocks]
        self.downsample = _PatchMerging(stage.downsample) if stage.downsample is not None else None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(1, h, w, C) to what the next stage reads, and to this stage's own result."""
        grids = {shape: _Windows(hidden, *shape) for shape in self.shapes}
        for block, shape in zip(self.blocks, self.shapes):
            hidden = block(hidden, grids[shape])
        return (hidden if self.downsample is None else self.downsample(hidden)), hidden


class _Windows:
    """Where the rows and columns of one map lie in its shifted windows, computed once for the blocks of a stage."""

    def __init__(self, hidden: Tensor, window: int, shift: int) -> None:
        _, height, width, _ = hidden.shape
        self.window = window
        self.down, self.across = (height + window - 1) // window, (width + window - 1) // window
        self.rows, self.rows_back, row_region = _axis(height, self.down, window, shift, hidden.device)
        self.columns, self.columns_back, column_region = _axis(width, self.across, window, shift, hidden.device)
        self.mask: Tensor | None = None
        if shift:
            same_row = row_region[:, :, None] == row_region[:, None, :]  # (down, window, window)
            same_column = column_region[:, :, None] == column_region[:, None, :]
            same = same_row[:, None, :, None, :, None] & same_column[None, :, None, :, None, :]
            mask = torch.where(same, 0.0, MASKED)
            self.mask = mask.reshape(self.down * self.across, 1, window * window, window * window)

    def split(self, hidden: Tensor) -> Tensor:
        """(1, h, w, C) to (windows, window * window, C); places outside the map are zero."""
        channels = hidden.shape[-1]
        padded = nn.functional.pad(hidden, (0, 0, 0, 1, 0, 1))
        grid = padded.index_select(1, self.rows).index_select(2, self.columns)
        grid = grid.reshape(self.down, self.window, self.across, self.window, channels)
        return grid.transpose(1, 2).reshape(self.down * self.across, self.window * self.window, channels)

    def join(self, windows: Tensor) -> Tensor:
        """The reverse of `split`, without the padding."""
        channels = windows.shape[-1]
        grid = windows.reshape(self.down, self.across, self.window, self.window, channels).transpose(1, 2)
        grid = grid.reshape(1, self.down * self.window, self.across * self.window, channels)
        return grid.index_select(1, self.rows_back).index_select(2, self.columns_back)


def _axis(size: Any, count: Any, window: int, shift: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One axis of a map: places to read for its windows (`size` is the padding), places to read back, and regions.

    The region (count, window) is 0, 1 or 2: places of one window whose regions differ were not neighbours before the
    shift.
    """
    whole = count * window
    place = torch.arange(whole, device=device)
    source = place + shift
    source = torch.where(source >= whole, source - whole, source)
    back = torch.arange(size, device=device) - shift
    back = torch.where(back < 0, back + whole, back)
    region = (place >= whole - window).to(torch.int32) + (place >= whole - shift).to(torch.int32)
    return torch.where(source > size, size, source), back, region.reshape(count, window)


class _Block(nn.Module):
    bias: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention = block.attention
        self.window, self.shift = int(block.window_size), int(block.shift_size)
        self.heads = int(attention.num_attention_heads)
        self.scale = float(attention.scaling)
        self.before, self.after = block.layernorm_before, block.layernorm_after
        self.query, self.key, self.value = attention.q_proj, attention.k_proj, attention.v_proj
        self.out = attention.o_proj
        self.mlp = block.mlp
        with torch.no_grad():
            self.register_buffer("bias", attention.relative_position_bias().clone())

    def forward(self, hidden: Tensor, windows: _Windows) -> Tensor:
        hidden = hidden + windows.join(self.attend(windows.split(self.before(hidden)), windows.mask))
        return hidden + self.mlp(self.after(hidden))

    def attend(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Attention inside each window: (windows, window * window, C) to the same."""
        query, key, value = (
            part(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        scores = (query * self.scale) @ key.transpose(2, 3) + self.bias
        if mask is not None:
            scores = scores + mask
        return self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


class _PatchMerging(nn.Module):
    def __init__(self, merging: Any) -> None:
        super().__init__()
        self.norm, self.reduction = merging.norm, merging.reduction

    def forward(self, hidden: Tensor) -> Tensor:
        """(1, h, w, C) to (1, ceil(h / 2), ceil(w / 2), 2 C)."""
        padded = nn.functional.pad(hidden, (0, 0, 0, 1, 0, 1))
        # Even places never need the padding, odd ones need it where the size is odd.
        parts = []
        for column in range(2):
            for row in range(2):
                part = padded[:, 1::2] if row else padded[:, :-1:2]
                parts.append(part[:, :, 1::2] if column else part[:, :, :-1:2])
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))
