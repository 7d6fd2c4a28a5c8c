"""Qwen2.5-VL's vision encoder over windows; names and shapes as `contract.vision_encoder`.

The weights are those of transformers' modules. What differs: transformers permutes patches into windows inside, splits
attention at computed places and permutes features back, with Python lists of lengths, which a graph cannot; here all
windows are full, absent patches are masked as keys, and permuting is the caller's. The patch embedding, a convolution
whose stride is its kernel, is a product. RMS norms and rotary embedding stay in fp32 in fp16 graphs, as upstream.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from pixano_edge.engine.contracts import qwen2_5_vl as contract
from pixano_edge.engine.contracts.qwen2_5_vl import QwenVlConstants, window_units
from pixano_edge.export.differences import Arrays
from pixano_edge.export.tensorrt_graph import NORMALISATION

BLOCKED = -1e4
"""Added to the scores of absent keys: exp of it is 0 in float32 as in float16, which holds it."""


class VisionEncoder(nn.Module):
    """See the module.

    Args:
        model: transformers' `Qwen2_5_VLForConditionalGeneration`.
        constants: Of the contract.
    """

    patch_weight: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, model: Any, constants: QwenVlConstants) -> None:
        super().__init__()
        vision = model.model.visual
        self.blocks, self.merger = vision.blocks, vision.merger
        self.whole = frozenset(int(i) for i in vision.fullatt_block_indexes)
        self.heads = int(vision.config.num_heads)
        self.units = constants.units_per_window
        rotary = vision.rotary_pos_emb
        with torch.no_grad():
            weight = vision.patch_embed.proj.weight
            self.register_buffer("patch_weight", weight.reshape(weight.shape[0], -1).T.contiguous())
            angles = torch.arange(contract.MAX_GRID, dtype=torch.float32)[:, None] * rotary.inv_freq.float()[None]
            self.register_buffer("cos", angles.cos() * rotary.attention_scaling)
            self.register_buffer("sin", angles.sin() * rotary.attention_scaling)

    def forward(self, pixel_values: Tensor, patch_positions: Tensor, valid: Tensor) -> Tensor:
        """Returns `features`."""
        hidden = pixel_values @ self.patch_weight
        # Half a head's channels turn with the row, half with the column.
        flat = patch_positions.flatten(1)
        cos, sin = (
            nn.functional.embedding(flat, table).unflatten(1, (-1, 2)).flatten(2) for table in (self.cos, self.sin)
        )
        absent = (1 - valid) * BLOCKED
        for index, block in enumerate(self.blocks):
            hidden = hidden + self._attend(block.attn, block.norm1(hidden), cos, sin, absent, index in self.whole)
            hidden = hidden + block.mlp(block.norm2(hidden))
        normed = self.merger.ln_q(hidden)
        return self.merger.mlp(normed.unflatten(1, (self.units, -1)).flatten(2))

    def _attend(self, attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, absent: Tensor, whole: bool) -> Tensor:
        """Attention of one layer, within windows or over all of them."""
        qkv = attention.qkv(hidden).unflatten(2, (3, self.heads, -1))
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        query, key = (_rotate(x, cos[:, :, None], sin[:, :, None]) for x in (query, key))
        query = query * attention.scaling
        if whole:  # one batch of W * patches
            query, key, value = (x.flatten(0, 1)[None] for x in (query, key, value))
            absent = absent.flatten()[None]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(2, 3) + absent[:, None, None]
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        if whole:
            mixed = mixed[0].unflatten(0, (-1, hidden.shape[1]))
        return attention.proj(mixed)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs of channels that lie half a head apart."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def arrange(
    patches: npt.NDArray[np.float32], grid: tuple[int, int], constants: QwenVlConstants
) -> tuple[Arrays, npt.NDArray[np.int64]]:
    """Inputs of the vision encoder from what the original image processor gives.

    Args:
        patches: (rows * columns, patch_channels) in its order: unit by unit, row by row.
        grid: Rows and columns of patches.
        constants: Of the contract.

    Returns:
        The inputs, and (F,) places of the image's features in the graph's, flattened over windows and units.
    """
    c, merge = constants, constants.merge_size
    rows, columns = grid[0] // merge, grid[1] // merge
    units = window_units(rows, columns, c.window_units)
    present = units >= 0
    per_unit = merge * merge
    filled = np.zeros((*units.shape, per_unit, c.patch_channels), np.float32)
    filled[present] = patches.reshape(rows * columns, per_unit, -1)[units[present]]
    row, column = np.divmod(np.arange(rows * columns), columns)
    inner_row, inner_column = np.divmod(np.arange(per_unit), merge)
    places = np.stack(
        [row[:, None] * merge + inner_row[None], column[:, None] * merge + inner_column[None]], axis=-1
    )  # fmt: skip
    positions = np.zeros((*units.shape, per_unit, 2), np.int32)
    positions[present] = places[units[present]]
    feeds: Arrays = {
        contract.PIXEL_VALUES: filled.reshape(len(units), -1, c.patch_channels),
        contract.PATCH_POSITIONS: positions.reshape(len(units), -1, 2),
        contract.VALID: np.repeat(present, per_unit, axis=1).astype(np.float32),
    }
    where = np.empty(rows * columns, np.int64)
    where[units[present]] = np.flatnonzero(present)
    return feeds, where


def random_feeds(windows: int, seed: int, constants: QwenVlConstants) -> Arrays:
    """Inputs of so many windows in one row, the last of them half filled; deterministic in `seed`."""
    c = constants
    columns = max(1, windows * c.window_units - c.window_units // 2)
    random = np.random.default_rng(seed)
    patches = random.uniform(-2, 2, (c.window_units * columns * c.merge_size**2, c.patch_channels)).astype(np.float32)
    return arrange(patches, (c.window_units * c.merge_size, columns * c.merge_size), c)[0]


def kept_in_fp32(model: onnx.ModelProto) -> dict[str, str]:
    """Nodes of RMS norms, by the square that each begins with: they stay in fp32 in fp16 graphs."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    kept: dict[str, str] = {}
    for start in model.graph.node:
        if start.op_type != "Pow":
            continue
        chain = [start]
        while chain:
            node = chain.pop()
            if node.name in kept:
                continue
            kept[node.name] = NORMALISATION
            # Up to the product of the hidden state with the inverse root.
            if node.op_type != "Mul":
                chain += readers.get(node.output[0], [])
    return kept
