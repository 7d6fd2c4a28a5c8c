"""The three graphs of SAM 2 video tracking as modules that export cleanly; contract: `contracts.sam2_video`.

Assembled from the submodules of transformers' `Sam2VideoModel`. What differs from the stock forward:

* rotary position codes are two constant tables, applied to the memories of each frame by broadcasting over the frames,
  so the number of memories is dynamic and nothing is repeated; pointer tokens are never rotated;
* the first self-attention of the memory attention sees the image alone, so it runs once for all objects;
* memories are (B, M, C, G, G) maps with a row number of the temporal table each, instead of lists of tokens.

Source: upstream ``sam2/modeling/memory_attention.py``, ``sam2/modeling/sam/transformer.py`` (RoPEAttention),
``sam2/modeling/sam2_base.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.contracts.sam2_video import Sam2VideoConstants
from pixano_edge.export.sam2.graphs import MaskDecoder, random_inputs


def video_constants(model: Any) -> Sam2VideoConstants:
    """The constants of a loaded `Sam2VideoModel`."""
    config = model.config
    kernel = [*model.mask_downsample.weight.detach().flatten().tolist(), float(model.mask_downsample.bias.detach())]
    return Sam2VideoConstants(
        memory_dim=int(config.memory_encoder_output_channels),
        num_memories=int(config.num_maskmem),
        max_pointers=int(config.max_object_pointers_in_encoder),
        max_cond_frames=int(config.max_cond_frame_num),
        multimask_min_points=int(config.multimask_min_pt_num),
        multimask_max_points=int(config.multimask_max_pt_num),
        multimask_in_sam=bool(config.multimask_output_in_sam),
        multimask_for_tracking=bool(config.multimask_output_for_tracking),
        mask_kernel=tuple(float(v) for v in kernel),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position code on neighbouring pairs of channels, (..., L, D) with tables (L, D)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-second, first], dim=-1).flatten(-2) * sin


class RotaryAttention(nn.Module):
    """One attention of the memory attention; `spatial` tokens are rotated, `extra` tokens are not."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = stock.q_proj, stock.k_proj, stock.v_proj, stock.o_proj
        self.heads = int(stock.num_attention_heads)
        self.scaling = float(stock.scaling)

    def split(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, heads, L, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        cos: Tensor,
        sin: Tensor,
        extra: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`query` (B, L, C), `keys` and `values` (B, M, L, C'), `extra` keys and values (B, T, C'); (B, L, C)."""
        q = rotate(self.split(self.q_proj(query)), cos, sin)
        k = self.k_proj(keys).unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4)  # (B, heads, M, L, D)
        k = rotate(k, cos, sin).flatten(2, 3)
        v = self.split(self.v_proj(values).flatten(1, 2))
        if extra is not None:
            k = torch.cat([k, self.split(self.k_proj(extra[0]))], dim=2)
            v = torch.cat([v, self.split(self.v_proj(extra[1]))], dim=2)
        weights = torch.softmax((q * self.scaling) @ k.transpose(-1, -2), dim=-1)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))


class MemoryAttention(nn.Module):
    """One frame's embedding conditioned on the memories of B objects."""

    position: Tensor
    memory_position: Tensor
    time_table: Tensor
    no_memory: Tensor
    cos: Tensor
    sin: Tensor
    frequencies: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        stock = model.memory_attention
        self.layers = nn.ModuleList(stock.layers)
        self.self_attention = nn.ModuleList(RotaryAttention(layer.self_attn) for layer in stock.layers)
        self.cross_attention = nn.ModuleList(RotaryAttention(layer.cross_attn_image) for layer in stock.layers)
        self.norm = stock.layer_norm
        self.pointer_time = model.temporal_positional_encoding_projection_layer
        self.encode_time = bool(model.config.enable_temporal_pos_encoding_for_object_pointers)
        self.memory_dim = int(model.mem_dim)
        height, width = model.backbone_feature_sizes[-1]
        hidden = int(model.hidden_dim)
        with torch.no_grad():
            neck = model.vision_encoder.neck.position_encoding
            shape = torch.Size((1, hidden, height, width))
            memory_shape = torch.Size((1, self.memory_dim, height, width))
            cos, sin = stock.rotary_emb(torch.zeros(1), stock.position_ids)
            half = hidden // 2
            exponent = 2 * torch.div(torch.arange(half), 2, rounding_mode="floor") / half
            buffers = {
                "position": neck(shape, torch.device("cpu"), torch.float32).flatten(2).transpose(1, 2),
                "memory_position": model.memory_encoder.position_encoding(
                    memory_shape, torch.device("cpu"), torch.float32
                )
                .flatten(2)
                .transpose(1, 2)
                .unsqueeze(1),
                "time_table": model.memory_temporal_positional_encoding.reshape(-1, self.memory_dim),
                "no_memory": model.no_memory_embedding.reshape(1, -1, 1, 1),
                "cos": cos.reshape(-1, cos.shape[-1]),
                "sin": sin.reshape(-1, sin.shape[-1]),
                "frequencies": 10000.0**exponent,
            }
            for name, value in buffers.items():
                self.register_buffer(name, value.detach().clone())

    def pointer_tokens(self, pointers: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, C) pointers to (B, K * C / memory_dim, memory_dim) keys and values."""
        parts = pointers.shape[-1] // self.memory_dim
        values = pointers.unflatten(-1, (parts, self.memory_dim)).flatten(1, 2)
        if not self.encode_time:
            return values, values
        angle = time.unsqueeze(-1) / self.frequencies
        code = self.pointer_time(torch.cat([angle.sin(), angle.cos()], dim=-1))  # (B, K, memory_dim)
        code = code.unsqueeze(2).expand(-1, -1, parts, -1).flatten(1, 2)
        return values + code, values

    def forward(
        self, image_embed: Tensor, memory: Tensor, memory_time: Tensor, pointers: Tensor, pointer_time: Tensor
    ) -> Tensor:
        """Returns `tracked_embed`."""
        image = (image_embed - self.no_memory).flatten(2).transpose(1, 2) + 0.1 * self.position  # (1, L, C)
        values = memory.flatten(3).transpose(2, 3)  # (B, M, L, memory_dim)
        time = nn.functional.embedding(memory_time, self.time_table).unsqueeze(2)
        keys = values + (self.memory_position + time)
        extra = self.pointer_tokens(pointers, pointer_time)
        hidden = image
        layers: Any = self.layers
        for index, layer in enumerate(layers):
            own = layer.layer_norm1(hidden)
            hidden = hidden + self.self_attention[index](own, own.unsqueeze(1), own.unsqueeze(1), self.cos, self.sin)
            if index == 0:  # up to here all objects of a frame are equal
                hidden = hidden.expand(memory.shape[0], -1, -1)
            query = layer.layer_norm2(hidden)
            hidden = hidden + self.cross_attention[index](query, keys, values, self.cos, self.sin, extra)
            hidden = hidden + layer.linear2(layer.activation(layer.linear1(layer.layer_norm3(hidden))))
        side = image_embed.shape[-1]
        return self.norm(hidden).transpose(1, 2).unflatten(2, (side, side))


class TrackDecoder(MaskDecoder):
    """The mask decoder with an embedding per object, and its mask tokens as a fourth output."""

    no_memory: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.register_buffer("no_memory", model.no_memory_embedding.detach().reshape(1, -1, 1, 1).clone())

    def forward(  # type: ignore[override]
        self,
        tracked_embed: Tensor,
        high_res_0: Tensor,
        high_res_1: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        skip_no_memory: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns `masks`, `iou_scores`, `object_score_logits`, `mask_tokens`."""
        embed = tracked_embed - skip_no_memory.reshape(-1, 1, 1, 1) * self.no_memory
        return self.decode(embed, high_res_0, high_res_1, point_coords, point_labels, mask_input, has_mask_input)


class MemoryEncoder(nn.Module):
    """What the objects of a frame leave behind: memory maps and pointers."""

    no_memory: Tensor
    no_pointer: Tensor
    occlusion: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.stock = model.memory_encoder
        self.pointer = model.object_pointer_proj
        self.size = int(model.image_size)
        self.scale = float(model.config.sigmoid_scale_for_mem_enc)
        self.bias = float(model.config.sigmoid_bias_for_mem_enc)
        occlusion = model.occlusion_spatial_embedding_parameter
        with torch.no_grad():
            width = int(model.mem_dim)
            buffers = {
                "no_memory": model.no_memory_embedding.reshape(1, -1, 1, 1),
                "no_pointer": model.no_object_pointer.reshape(1, -1),
                "occlusion": torch.zeros(1, width, 1, 1) if occlusion is None else occlusion.reshape(1, -1, 1, 1),
            }
            for name, value in buffers.items():
                self.register_buffer(name, value.detach().clone())

    def forward(
        self,
        image_embed: Tensor,
        mask_logits: Tensor,
        object_score_logits: Tensor,
        binarize: Tensor,
        mask_token: Tensor,
        pointer_score_logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Returns `memory_features`, `object_pointer`."""
        seen = (object_score_logits > 0).float()
        shown = seen.reshape(-1, 1, 1, 1)
        logits = torch.where(shown > 0.5, mask_logits, sam2_video.OCCLUDED_LOGIT)
        logits = nn.functional.interpolate(logits, size=(self.size, self.size), mode="bilinear", align_corners=False)
        hard = binarize.reshape(-1, 1, 1, 1) > 0.5
        mask = torch.where(hard, (logits > 0).float(), logits.sigmoid()) * self.scale + self.bias
        features = self.stock.feature_projection(image_embed - self.no_memory) + self.stock.mask_downsampler(mask)
        features = self.stock.projection(self.stock.memory_fuser(features))
        features = features + (1 - shown) * self.occlusion
        there = (pointer_score_logits > 0).float() * seen
        pointer = there * self.pointer(mask_token) + (1 - there) * self.no_pointer
        return features.to(torch.bfloat16).float(), pointer


def example_inputs(graph: str, constants: sam2.Sam2Constants, video: Sam2VideoConstants) -> tuple[Tensor, ...]:
    """Tensors to trace `graph` with."""
    side = constants.mask_size
    sizes = {"P": 2, "N": 3, "B": 2, "M": 3, "K": 5, "H": side, "W": side}
    return random_inputs(sam2_video.graphs(constants, video)[graph], sizes)


def modules(model: Any) -> dict[str, nn.Module]:
    """The graphs of a loaded `Sam2VideoModel`, by contract name, in eval mode."""
    return {
        sam2_video.MEMORY_ATTENTION: MemoryAttention(model).eval(),
        sam2_video.TRACK_DECODER: TrackDecoder(model).eval(),
        sam2_video.MEMORY_ENCODER: MemoryEncoder(model).eval(),
    }
