"""The two graphs of SAM 2 image segmentation as modules that export cleanly.

Both are assembled from the submodules of transformers' `Sam2Model`, so the weights and the numerically delicate parts
(Hiera blocks, two-way transformer) are the stock ones. What differs is what an exporter or TensorRT trips over:

* the positional embedding of the trunk is resized once, here, instead of by a bicubic `Resize` in the graph;
* point coordinates are scaled with one division instead of in-place column assignments, which become scatters;
* labels select from one table of five rows, and a mask prompt is chosen per prompt with `Where`: no `If`, no scatter;
* the decoder keeps prompts in the batch dimension (P, 1, ...), so one image serves any number of prompts.

Architecture: Ravi et al., "SAM 2: Segment Anything in Images and Videos" (2024), upstream
``sam2/modeling/sam/prompt_encoder.py`` and ``sam2/modeling/sam/mask_decoder.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.engine.contracts.base import GraphSpec


class ImageEncoder(nn.Module):
    """Normalised pixels to the features the decoder reads; names and shapes as `contract.image_encoder`."""

    position: Tensor
    no_memory: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        vision = model.vision_encoder
        backbone = vision.backbone
        self.patch_embed = backbone.patch_embed
        self.blocks = backbone.blocks
        self.stage_ends = tuple(int(i) for i in backbone.stage_ends)
        self.neck = vision.neck
        self.levels = int(vision.num_feature_levels)
        self.conv_s0 = model.mask_decoder.conv_s0
        self.conv_s1 = model.mask_decoder.conv_s1
        stride = backbone.config.patch_stride[0]
        side = int(model.config.prompt_encoder_config.image_size) // int(stride)
        with torch.no_grad():
            position = backbone._get_pos_embed((side, side)).clone()
            no_memory = model.no_memory_embedding.reshape(1, -1, 1, 1).clone()
        self.register_buffer("position", position)
        self.register_buffer("no_memory", no_memory)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `image_embed` (with the no-memory embedding), `high_res_0`, `high_res_1`."""
        hidden = self.patch_embed(pixel_values) + self.position
        stages = []
        for index, block in enumerate(self.blocks):
            hidden = block(hidden)
            if index in self.stage_ends:
                stages.append(hidden)
        levels = self.neck(tuple(stages))[0][-self.levels :][::-1]
        return levels[-1] + self.no_memory, self.conv_s0(levels[0]), self.conv_s1(levels[1])


class MaskDecoder(nn.Module):
    """P prompts on one image to four masks each; names and shapes as `contract.mask_decoder`."""

    fourier: Tensor
    label_table: Tensor
    no_mask: Tensor
    position: Tensor
    tokens: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        prompt = model.prompt_encoder
        decoder = model.mask_decoder
        self.image_size = int(prompt.input_image_size)
        self.mask_embed = prompt.mask_embed
        self.transformer = decoder.transformer
        self.upscale_conv1 = decoder.upscale_conv1
        self.upscale_layer_norm = decoder.upscale_layer_norm
        self.upscale_conv2 = decoder.upscale_conv2
        self.activation = decoder.activation
        self.hypernetworks = decoder.output_hypernetworks_mlps
        self.iou_head = decoder.iou_prediction_head
        self.score_head = decoder.pred_obj_score_head
        with torch.no_grad():
            buffers = {
                "fourier": prompt.shared_embedding.positional_embedding,
                # Row label + 1: the padding point first, then background, foreground and the two box corners.
                "label_table": torch.cat([prompt.not_a_point_embed.weight, prompt.point_embed.weight]),
                "no_mask": prompt.no_mask_embed.weight.reshape(1, -1, 1, 1),
                "position": model.get_image_wide_positional_embeddings(),
                # The last row stands for the points of a prompt, which are added to it.
                "tokens": torch.cat(
                    [
                        decoder.obj_score_token.weight,
                        decoder.iou_token.weight,
                        decoder.mask_tokens.weight,
                        torch.zeros_like(decoder.iou_token.weight),
                    ]
                ),
            }
            for name, value in buffers.items():
                self.register_buffer(name, value.detach().clone())

    def embed_points(self, coords: Tensor, labels: Tensor) -> Tensor:
        """(P, N, 2) model pixels and (P, N) int32 labels to (P, N, C) tokens."""
        # Upstream shifts to pixel centres before normalising.
        unit = (coords + 0.5) / self.image_size
        angles = (2 * unit - 1) @ self.fourier * (2 * math.pi)
        position = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
        is_padding = (labels < 0).unsqueeze(-1)
        # A padding point has no place: only its learned embedding counts.
        return torch.where(is_padding, 0.0, position) + nn.functional.embedding(labels + 1, self.label_table)

    def place(self, labels: Tensor) -> Tensor:
        """(P, N) labels to (P, 6 + N, C): the decoder's own six tokens and zeros where the points' will be.

        A lookup instead of Expand and Concat: the sizes that those need at run time would be computed on the CPU, and
        ONNX Runtime's CUDA kernel for parts of unequal size reads them from host memory, so that its launch cannot be
        recorded.
        """
        own = len(self.tokens) - 1
        # In float32, which TensorRT 10.3 can sum.
        count = nn.functional.pad(labels.float() * 0 + 1, (own, 0), value=1.0).cumsum(1)
        return nn.functional.embedding((count.clamp(max=own + 1) - 1).int(), self.tokens)

    def forward(
        self,
        image_embed: Tensor,
        high_res_0: Tensor,
        high_res_1: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `masks`, `iou_scores`, `object_score_logits`."""
        return self.decode(image_embed, high_res_0, high_res_1, point_coords, point_labels, mask_input, has_mask_input)[
            :3
        ]

    def decode(
        self,
        image_embed: Tensor,
        high_res_0: Tensor,
        high_res_1: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The outputs and, last, the (P, 4, C) tokens of the four masks; tracking makes object pointers of them."""
        sparse = self.embed_points(point_coords, point_labels)
        use_mask = (has_mask_input > 0.5).reshape(-1, 1, 1, 1)
        dense = torch.where(use_mask, self.mask_embed(mask_input), self.no_mask)
        tokens = self.place(point_labels) + nn.functional.pad(sparse, (0, 0, len(self.tokens) - 1, 0))
        queries, keys = self.transformer(
            point_embeddings=tokens.unsqueeze(1),
            image_embeddings=image_embed + dense,
            image_positional_embeddings=self.position,
            attention_similarity=None,
        )
        queries = queries.squeeze(1)
        side = self.position.shape[-1]
        image = keys.squeeze(1).transpose(1, 2).unflatten(2, (side, side))
        image = self.upscale_layer_norm(self.upscale_conv1(image) + high_res_1)
        image = self.activation(self.upscale_conv2(self.activation(image)) + high_res_0)
        kernels = torch.stack([mlp(queries[:, 2 + i]) for i, mlp in enumerate(self.hypernetworks)], dim=1)
        masks = (kernels @ image.flatten(2)).unflatten(2, image.shape[-2:])
        return masks, self.iou_head(queries[:, 1]), self.score_head(queries[:, 0]), queries[:, 2:6]


def example_inputs(graph: str, constants: contract.Sam2Constants) -> tuple[Tensor, ...]:
    """Tensors to trace `graph` with."""
    return random_inputs(contract.graphs(constants)[graph], {"P": 2, "N": 3})


def random_inputs(spec: GraphSpec, sizes: dict[str, int]) -> tuple[Tensor, ...]:
    """Seeded inputs in [0, 1), to trace a graph with; dynamic sizes of 0 and 1 would be specialised by an exporter."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for tensor in spec.inputs:
        value = torch.rand(tensor.shape(sizes), generator=generator)
        tensors.append(value.to(torch.int32) if tensor.dtype == "int32" else value)
    return tuple(tensors)


def modules(model: Any) -> dict[str, nn.Module]:
    """The graphs of a loaded `Sam2Model`, by contract name, in eval mode."""
    return {
        contract.IMAGE_ENCODER: ImageEncoder(model).eval(),
        contract.MASK_DECODER: MaskDecoder(model).eval(),
    }
