"""The mask decoder for a CPU, in three graphs that give the numbers of the one in `graphs`; contract: `contracts.sam2`.

What an image, or a mask prompt, settles by itself is computed once (`ImagePrepare`, `MaskPrepare`), and a click runs
`ClickDecoder` on it. There are some ten tokens and thousands of pixels, so what is multiplied with the pixels is made
small before, which changes the order of the sums and nothing else:

* scores of tokens against pixels are ``q (W x)``: here ``(q W) x``, with one row of ``q W`` per head and token instead
  of a projection of every pixel; likewise values, and the projection behind the attention of pixels to tokens;
* heads lie side by side in one matrix, with zeros where head and head meet (`spread`), so that pixels are never moved;
* a transposed convolution with a stride of its kernel's size is a product; its pixels stay in the order
  (row, column, row within, column within) until the masks, and the image's finer features come in that order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.export.sam2.graphs import MaskDecoder


def spread(x: Tensor, heads: int) -> Tensor:
    """(P, T, C) to (P, C, heads * T): per head the transposed rows, zero outside the head's channels."""
    head = torch.arange(x.shape[-1]) // (x.shape[-1] // heads)
    own = (head.unsqueeze(1) == torch.arange(heads)).float()  # (C, heads)
    return (x.transpose(1, 2).unsqueeze(2) * own.unsqueeze(-1)).flatten(2)


def collect(x: Tensor, heads: int) -> Tensor:
    """(P, heads * T, C) to (P, T, C): of each head's rows the channels that are the head's."""
    head = torch.arange(x.shape[-1]) // (x.shape[-1] // heads)
    own = (torch.arange(heads).unsqueeze(1) == head).float().unsqueeze(1)  # (heads, 1, C)
    return (x.unflatten(1, (heads, -1)) * own).sum(1)


def by_cell(x: Tensor, side: int, levels: int) -> Tensor:
    """(1, C, 2**levels * side, 2**levels * side) to (1, cells, 4 * C): the order of pixels that upscaling makes.

    Channels go last first, which is a plain transposition of a matrix; whole rows of them are moved afterwards.
    """
    rows = x.flatten(2).transpose(1, 2).reshape(side, *(2,) * levels, side, *(2,) * levels, -1)
    order = [i for level in range(levels + 1) for i in (level, levels + 1 + level)]
    return rows.permute(*order, 2 * levels + 2).reshape(1, side**2 * 4 ** (levels - 1), -1)


class ImagePrepare(nn.Module):
    """Features of an image to what clicks on it share; names and shapes as `contract.image_prepare`."""

    position: Tensor
    no_mask: Tensor
    bias_0: Tensor
    bias_1: Tensor

    def __init__(self, decoder: MaskDecoder) -> None:
        super().__init__()
        layer: Any = decoder.transformer.layers[0]
        self.to_image, self.to_tokens = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        self.register_buffer("position", decoder.position.clone())
        self.register_buffer("no_mask", decoder.no_mask.clone())
        self.register_buffer("bias_0", decoder.upscale_conv2.bias.detach().repeat(4))
        self.register_buffer("bias_1", decoder.upscale_conv1.bias.detach().repeat(4))

    def forward(self, image_embed: Tensor, high_res_0: Tensor, high_res_1: Tensor) -> tuple[Tensor, ...]:
        """Returns `pixels`, `pixel_keys`, `pixel_values_0`, `pixel_queries`, `fine_0`, `fine_1`."""
        side = image_embed.shape[-1]
        pixels = (image_embed + self.no_mask).flatten(2).transpose(1, 2)
        placed = pixels + self.position.flatten(2).transpose(1, 2)
        keys = self.to_image.k_proj(placed).transpose(1, 2)
        fine_0 = by_cell(high_res_0, side, 2) + self.bias_0
        fine_1 = by_cell(high_res_1, side, 1) + self.bias_1
        return pixels, keys, self.to_image.v_proj(pixels), self.to_tokens.q_proj(placed), fine_0, fine_1


class MaskPrepare(nn.Module):
    """What one mask prompt changes in it; names and shapes as `contract.mask_prepare`.

    A mask adds a projection of 16 channels to the features, so its part of each tensor is a projection of those.
    """

    no_mask: Tensor

    def __init__(self, decoder: MaskDecoder) -> None:
        super().__init__()
        layer: Any = decoder.transformer.layers[0]
        self.to_image, self.to_tokens = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        self.mask_embed = decoder.mask_embed
        self.register_buffer("no_mask", decoder.no_mask.flatten().clone())

    def forward(
        self, pixels: Tensor, pixel_keys: Tensor, pixel_values_0: Tensor, pixel_queries: Tensor, mask_input: Tensor
    ) -> tuple[Tensor, ...]:
        """Returns the first four inputs with the mask in them."""
        embed = self.mask_embed
        hidden = embed.activation(embed.layer_norm1(embed.conv1(mask_input)))
        hidden = embed.activation(embed.layer_norm2(embed.conv2(hidden)))
        hidden = hidden.flatten(2).transpose(1, 2)  # (1, L, 16)
        last = embed.conv3.weight.flatten(1).T  # (16, C)
        offset = (embed.conv3.bias - self.no_mask).unsqueeze(0)
        keys = hidden @ (last @ self.to_image.k_proj.weight.T) + offset @ self.to_image.k_proj.weight.T
        values = hidden @ (last @ self.to_image.v_proj.weight.T) + offset @ self.to_image.v_proj.weight.T
        queries = hidden @ (last @ self.to_tokens.q_proj.weight.T) + offset @ self.to_tokens.q_proj.weight.T
        return (
            pixels + (hidden @ last + offset),
            pixel_keys + keys.transpose(1, 2),
            pixel_values_0 + values,
            pixel_queries + queries,
        )


class TokenToImage(nn.Module):
    """Tokens attending to pixels that are not projected, or to prepared keys and values."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.stock, self.heads, self.scaling = stock, int(stock.num_attention_heads), float(stock.scaling)

    def rows(self, query: Tensor) -> Tensor:
        """(P, T, C) tokens to (P, heads * T, C/2) scaled queries."""
        return spread(self.stock.q_proj(query) * self.scaling, self.heads).transpose(1, 2)

    def prepared(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`query` (P, T, C), `keys` (1, C/2, L), `values` (1, L, C/2); (P, T, C)."""
        seen = torch.softmax(self.rows(query) @ keys, dim=-1) @ values
        out: Tensor = self.stock.o_proj(collect(seen, self.heads))
        return out

    def forward(self, query: Tensor, pixels: Tensor, placed: Tensor) -> Tensor:
        """`query` (P, T, C), `pixels` (P, L, C), `placed` the same with their positions; (P, T, C)."""
        # The keys' bias shifts all scores of a token alike, which softmax does not see.
        scores = (self.rows(query) @ self.stock.k_proj.weight) @ placed.transpose(1, 2)
        seen = torch.softmax(scores, dim=-1) @ pixels  # (P, heads * T, C)
        out: Tensor = self.stock.o_proj(collect(seen @ self.stock.v_proj.weight.T, self.heads) + self.stock.v_proj.bias)
        return out


class ImageToToken(nn.Module):
    """Pixels attending to tokens; the result is added to the pixels."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.stock, self.heads, self.scaling = stock, int(stock.num_attention_heads), float(stock.scaling)

    def columns(self, key: Tensor) -> Tensor:
        """(P, T, C) tokens to (P, C/2, heads * T) scaled keys."""
        return spread(self.stock.k_proj(key) * self.scaling, self.heads)

    def prepared(self, key: Tensor, value: Tensor, queries: Tensor) -> Tensor:
        """`key` and `value` (P, T, C), `queries` (1, L, C/2); (P, L, C)."""
        return self.attend(queries @ self.columns(key), value)

    def forward(self, key: Tensor, value: Tensor, placed: Tensor) -> Tensor:
        """`key` and `value` (P, T, C), `placed` (P, L, C) pixels with their positions; (P, L, C)."""
        columns, projection = self.columns(key), self.stock.q_proj
        return self.attend(placed @ (projection.weight.T @ columns) + projection.bias.unsqueeze(0) @ columns, value)

    def attend(self, scores: Tensor, value: Tensor) -> Tensor:
        """`scores` (P, L, heads * T), `value` (P, T, C); (P, L, C)."""
        weights = torch.softmax(scores.unflatten(2, (self.heads, -1)), dim=-1).flatten(2)
        values = spread(self.stock.v_proj(value), self.heads).transpose(1, 2) @ self.stock.o_proj.weight.T
        # The weights of each head sum to 1, so each head may carry its share of the bias.
        return weights @ (values + self.stock.o_proj.bias / self.heads)


class ClickDecoder(MaskDecoder):
    """P prompts on what was prepared to four masks each; names and shapes as `contract.click_decoder`."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        layers = self.transformer.layers
        last = self.transformer.final_attn_token_to_image
        self.to_image = nn.ModuleList(
            TokenToImage(stock) for stock in (*(layer.cross_attn_token_to_image for layer in layers), last)
        )
        self.to_tokens = nn.ModuleList(ImageToToken(layer.cross_attn_image_to_token) for layer in layers)

    def forward(  # type: ignore[override]
        self,
        pixels: Tensor,
        pixel_keys: Tensor,
        pixel_values_0: Tensor,
        pixel_queries: Tensor,
        fine_0: Tensor,
        fine_1: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `masks`, `iou_scores`, `object_score_logits`."""
        sparse = self.embed_points(point_coords, point_labels)
        tokens = self.place(point_labels) + nn.functional.pad(sparse, (0, 0, len(self.tokens) - 1, 0))
        position = self.position.flatten(2).transpose(1, 2)
        to_image: Any = self.to_image
        to_tokens: Any = self.to_tokens
        queries, placed = tokens, pixels
        for index, layer in enumerate(self.transformer.layers):
            if index == 0:
                queries = layer.layer_norm1(self_attention(layer.self_attn, queries, queries))
                queries = queries + to_image[0].prepared(queries + tokens, pixel_keys, pixel_values_0)
            else:
                queries = layer.layer_norm1(queries + self_attention(layer.self_attn, queries + tokens, queries))
                queries = queries + to_image[index](queries + tokens, pixels, placed)
            queries = layer.layer_norm2(queries)
            queries = layer.layer_norm3(queries + layer.mlp(queries))
            if index == 0:
                change = to_tokens[0].prepared(queries + tokens, queries, pixel_queries)
            else:
                change = to_tokens[index](queries + tokens, queries, placed)
            pixels = layer.layer_norm4(pixels + change)
            placed = pixels + position
        queries = queries + to_image[-1](queries + tokens, pixels, placed)
        queries = self.transformer.layer_norm_final_attn(queries)
        return self.masks(queries, pixels, fine_0, fine_1), self.iou_head(queries[:, 1]), self.score_head(queries[:, 0])

    def masks(self, queries: Tensor, pixels: Tensor, fine_0: Tensor, fine_1: Tensor) -> Tensor:
        """(P, 4, 4G, 4G) logits."""
        side = self.position.shape[-1]
        norm = self.upscale_layer_norm
        image = pixels @ self.upscale_conv1.weight.permute(0, 2, 3, 1).flatten(1) + fine_1
        image = image.unflatten(2, (4, -1)).flatten(1, 2)  # (P, 4 * L, C/4)
        image = nn.functional.layer_norm(image, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        image = self.activation(image)
        image = self.activation(image @ self.upscale_conv2.weight.permute(0, 2, 3, 1).flatten(1) + fine_0)
        kernels = torch.stack([mlp(queries[:, 2 + i]) for i, mlp in enumerate(self.hypernetworks)], dim=1)
        columns = spread(kernels.repeat(1, 1, 4), 4)  # (P, 4 * C/8, 4 * 4): cell within, then mask
        masks = (image @ columns).reshape(-1, side, side, 2, 2, 2, 2, kernels.shape[1])
        return masks.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(-1, kernels.shape[1], 4 * side, 4 * side)


def parts(model: Any, constants: contract.Sam2Constants) -> dict[str, tuple[nn.Module, GraphSpec]]:
    """The three graphs of a loaded `Sam2Model` with their contracts, by name, in eval mode."""
    decoder = ClickDecoder(model).eval()
    modules = {
        contract.IMAGE_PREPARE: ImagePrepare(decoder).eval(),
        contract.MASK_PREPARE: MaskPrepare(decoder).eval(),
        contract.CLICK_DECODER: decoder,
    }
    specs = contract.click_graphs(constants)
    return {name: (module, specs[name]) for name, module in modules.items()}


def self_attention(stock: Any, placed: Tensor, value: Tensor) -> Tensor:
    """The stock attention on (P, T, C) tokens, of which `placed` are queries and keys."""
    out: Tensor = stock(query=placed.unsqueeze(1), key=placed.unsqueeze(1), value=value.unsqueeze(1))[0]
    return out.squeeze(1)
