"""The two graphs of Grounding DINO as modules that export with text length, height and width open.

Both use the parameters of transformers' `GroundingDinoForObjectDetection`, with forward passes of their own: the stock
ones bake the size of the image they were traced with into windows, masks, reference points and level shapes, build the
text masks with operators that ONNX lacks, and pad the logits by writing into a slice. What is left out because this
project runs one unpadded image at a time: pixel masks, valid ratios, padded tokens, auxiliary outputs.

Architecture: Liu et al., "Grounding DINO: Marrying DINO with Grounded Pre-Training for Open-Set Object Detection"
(2023); transformers' ``models/grounding_dino/modeling_grounding_dino.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pixano_edge.engine.contracts import grounding_dino as contract
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.export.grounding_dino.attention import BLOCKED, Attention, DeformableAttention, Fusion, Levels
from pixano_edge.export.grounding_dino.resnet import ResNetBackbone
from pixano_edge.export.grounding_dino.swin import SwinBackbone

_BACKBONES: dict[str, type[SwinBackbone] | type[ResNetBackbone]] = {"swin": SwinBackbone, "resnet": ResNetBackbone}
FAR = 1e4
"""Stands for the infinite logit of a proposal outside the picture: its sigmoid is 1 as well, and fp16 holds it."""


class TextEncoder(nn.Module):
    """BERT and the projection to the detector's width; names and shapes as `contract.text_encoder`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        bert = model.model.text_backbone
        self.embeddings = bert.embeddings
        self.layers = nn.ModuleList(_BertLayer(layer) for layer in bert.encoder.layer)
        self.projection = model.model.text_projection

    def forward(self, input_ids: Tensor, position_ids: Tensor, text_self_attention_mask: Tensor) -> Tensor:
        """Returns `text_features`; every token is of segment 0, as the processor makes them."""
        e = self.embeddings
        segment = e.token_type_embeddings.weight[0]
        hidden = e.LayerNorm(e.word_embeddings(input_ids) + segment + e.position_embeddings(position_ids))
        mask = _additive(text_self_attention_mask)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.projection(hidden)


class _BertLayer(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention = layer.attention.self
        self.heads = int(attention.num_attention_heads)
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        self.attention_output = layer.attention.output
        self.intermediate, self.output = layer.intermediate, layer.output

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            part(hidden).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = self.attention_output(found.transpose(1, 2).flatten(2), hidden)
        return self.output(self.intermediate(hidden), hidden)


class Detector(nn.Module):
    """Pixels and text features to scores per token and boxes; names and shapes as `contract.detector`."""

    level_embed: Tensor
    queries: Tensor
    wavelengths: Tensor
    text_wavelengths: Tensor
    query_wavelengths: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        base = model.model
        config = model.config
        backbone = base.backbone.conv_encoder.model
        self.backbone = _BACKBONES[backbone.config.model_type](backbone)
        self.input_proj = base.input_proj_vision
        self.encoder = nn.ModuleList(_EncoderLayer(layer) for layer in base.encoder.layers)
        self.enc_output, self.enc_output_norm = base.enc_output, base.enc_output_norm
        self.enc_bbox = base.encoder_output_bbox_embed
        self.decoder = nn.ModuleList(_DecoderLayer(layer) for layer in base.decoder.layers)
        self.decoder_norm = base.decoder.layer_norm
        self.reference_head = base.decoder.reference_points_head
        self.refine = base.decoder.bbox_embed
        self.bbox_embed = model.bbox_embed
        self.count = int(config.num_queries)
        width = int(config.d_model)
        with torch.no_grad():
            self.register_buffer("level_embed", base.level_embed.detach().clone())
            self.register_buffer("queries", base.query_position_embeddings.weight.detach().clone()[None])
            self.register_buffer("wavelengths", _wavelengths(width // 2, config.positional_embedding_temperature))
            self.register_buffer("text_wavelengths", _wavelengths(width, 10000))
            self.register_buffer("query_wavelengths", _wavelengths(width // 2, 10000))

    def forward(
        self, pixel_values: Tensor, text_features: Tensor, position_ids: Tensor, text_self_attention_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `logits` (1, Q, T), `boxes` (1, Q, 4) and `selection_scores` (1, Q)."""
        maps = self.feature_maps(pixel_values)
        levels = Levels(maps)
        image = torch.cat([m.flatten(1, 2) for m in maps], dim=1)
        image_position = torch.cat([self.image_position(levels, i) for i in range(len(maps))])[None]
        text_position = _waves(position_ids.to(torch.float32) * (2 * math.pi), self.text_wavelengths)
        mask = _additive(text_self_attention_mask)
        text = text_features
        for layer in self.encoder:
            image, text = layer(image, text, image_position, text_position, mask, levels)
        reference, scores = self.propose(image, text, levels)
        hidden = self.queries
        for index, layer in enumerate(self.decoder):
            hidden = layer(hidden, self.query_position(reference), reference, image, text, levels)
            # The last layer's box is taken from the normalised state below.
            if index + 1 < len(self.decoder):
                reference = (self.refine[index](hidden)[0] + _logit(reference)).sigmoid()
        final = self.decoder_norm(hidden)
        boxes = (self.bbox_embed[len(self.decoder) - 1](final) + _logit(reference)[None]).sigmoid()
        return final @ text.transpose(1, 2), boxes, scores[None]

    def feature_maps(self, pixels: Tensor) -> list[Tensor]:
        """(1, 3, H, W) to the maps (1, h, w, D) of all levels, the finest first."""
        features = [f.permute(0, 3, 1, 2) for f in self.backbone(pixels)]
        maps = [project(feature) for project, feature in zip(self.input_proj, features)]
        source = features[-1]
        for project in self.input_proj[len(features) :]:
            source = project(source)
            maps.append(source)
        return [m.permute(0, 2, 3, 1) for m in maps]

    def image_position(self, levels: Levels, level: int) -> Tensor:
        """(h * w, D) sine embedding of one level's places, its level's embedding added."""
        down, across = (
            _waves(numbers / (numbers[-1:] + 1e-6) * (2 * math.pi), self.wavelengths)
            for numbers in (levels.rows[level], levels.columns[level])
        )
        down, across = down[:, None] + 0.0 * across[None], across[None] + 0.0 * down[:, None]
        return torch.cat([down, across], dim=-1).flatten(0, 1) + self.level_embed[level]

    def query_position(self, reference: Tensor) -> Tensor:
        """(Q, 4) boxes to (1, Q, D): waves of y, x, width, height in this order, and a small network."""
        swapped = torch.cat([reference[:, 1:2], reference[:, 0:1], reference[:, 2:]], dim=1)
        return self.reference_head(_waves(swapped * (2 * math.pi), self.query_wavelengths).flatten(1))[None]

    def propose(self, image: Tensor, text: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        """The places that answer best to any token, as boxes (Q, 4) cx, cy, w, h in 0..1, the best first, and their
        scores (Q,)."""
        sizes = torch.cat([0.0 * part + 0.05 * 2.0**level for level, part in enumerate(levels.split(levels.centres))])
        anchors = torch.cat([levels.centres, sizes], dim=1)
        # As a float minimum: TensorRT reduces no booleans.
        inside = ((anchors > 0.01) & (anchors < 0.99)).to(torch.float32).amin(-1, keepdim=True) > 0.5
        states = self.enc_output_norm(self.enc_output(torch.where(inside, image[0], 0.0)))
        scores = (states @ text[0].transpose(0, 1)).amax(-1)
        scores, best = torch.topk(scores, self.count)
        anchors = torch.where(inside, torch.log(anchors / (1 - anchors)), FAR)
        boxes = (self.enc_bbox(states.index_select(0, best)) + anchors.index_select(0, best)).sigmoid()
        return boxes, scores


class _EncoderLayer(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.fusion = Fusion(layer.fusion_layer)
        text, image = layer.text_enhancer_layer, layer.deformable_layer
        self.text_attention = Attention(text.self_attn)
        self.text_before, self.text_after = text.layer_norm_before, text.layer_norm_after
        self.text_mlp = nn.Sequential(text.fc1, text.activation, text.fc2)
        self.image_attention = DeformableAttention(image.self_attn)
        self.image_before, self.image_after = image.self_attn_layer_norm, image.final_layer_norm
        self.image_mlp = nn.Sequential(image.fc1, image.activation_fn, image.fc2)

    def forward(
        self, image: Tensor, text: Tensor, image_position: Tensor, text_position: Tensor, mask: Tensor, levels: Levels
    ) -> tuple[Tensor, Tensor]:
        image, text = self.fusion(image, text)
        query = text + text_position
        text = self.text_before(text + self.text_attention(query, query, text, mask))
        text = self.text_after(text + self.text_mlp(text))
        found = self.image_attention(image + image_position, image, levels.centres, None, levels)
        image = self.image_before(image + found)
        return self.image_after(image + self.image_mlp(image)), text


class _DecoderLayer(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.self_attention = Attention(layer.self_attn)
        self.text_attention = Attention(layer.encoder_attn_text)
        self.image_attention = DeformableAttention(layer.encoder_attn)
        self.self_norm, self.text_norm = layer.self_attn_layer_norm, layer.encoder_attn_text_layer_norm
        self.image_norm, self.final_norm = layer.encoder_attn_layer_norm, layer.final_layer_norm
        self.mlp = nn.Sequential(layer.fc1, layer.activation_fn, layer.fc2)

    def forward(
        self, hidden: Tensor, position: Tensor, reference: Tensor, image: Tensor, text: Tensor, levels: Levels
    ) -> Tensor:
        query = hidden + position
        hidden = self.self_norm(hidden + self.self_attention(query, query, hidden))
        hidden = self.text_norm(hidden + self.text_attention(hidden + position, text, text))
        found = self.image_attention(hidden + position, image, reference[:, :2], reference[:, 2:], levels)
        hidden = self.image_norm(hidden + found)
        return self.final_norm(hidden + self.mlp(hidden))


def _additive(mask: Tensor) -> Tensor:
    """(1, T, T) with 1 where a token may look to (1, 1, T, T) to add to scores."""
    return ((1.0 - mask) * BLOCKED)[:, None]


def _wavelengths(count: int, temperature: float) -> Tensor:
    index = torch.arange(count, dtype=torch.float32)
    return temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / count)


def _waves(angles: Tensor, wavelengths: Tensor) -> Tensor:
    """(...) to (..., F): sine at even and cosine at odd places, as upstream's stack and flatten gives them."""
    waves = angles[..., None] / wavelengths
    return torch.stack([waves[..., 0::2].sin(), waves[..., 1::2].cos()], dim=-1).flatten(-2)


def _logit(x: Tensor) -> Tensor:
    x = x.clamp(1e-5, 1 - 1e-5)
    return torch.log(x / (1 - x))


def example_inputs(graph: str, constants: contract.GroundingDinoConstants) -> tuple[Tensor, ...]:
    """Tensors to trace `graph` with: sizes that no two steps have in common, so that none is taken for a fixed one."""
    side = constants.shortest_edge
    return random_inputs(
        contract.graphs(constants)[graph], {"T": 9, "H": side, "W": min(side + 37, constants.longest_edge)}
    )


def random_inputs(spec: GraphSpec, sizes: dict[str, int], seed: int = 0) -> tuple[Tensor, ...]:
    """Seeded inputs that mean something: token ids that exist, every token seeing itself."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for tensor in spec.inputs:
        shape = tensor.shape(sizes)
        if tensor.dtype == "float32":
            value = torch.randn(shape, generator=generator)
            if tensor.name == contract.TEXT_SELF_ATTENTION_MASK:
                value = (value > 0).float().maximum(torch.eye(shape[-1]))
        else:
            value = torch.randint(0, 3, shape, generator=generator, dtype=torch.int32)
        tensors.append(value)
    return tuple(tensors)


def modules(model: Any) -> dict[str, nn.Module]:
    """The graphs of a loaded `GroundingDinoForObjectDetection`, by contract name, in eval mode."""
    return {
        contract.TEXT_ENCODER: TextEncoder(model).eval(),
        contract.DETECTOR: Detector(model).eval(),
    }
