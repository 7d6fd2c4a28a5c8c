"""Start values of the small SAM 2's memory, from which it learns to track in few steps.

A memory attention with random weights first has to find out where to look. Here it starts as a tracker of its own:

* a place attends to the memories of the same place and its neighbours: rotary codes turn equal query and key offsets
  into a bump over the distance, so those of the fast-turning channel pairs start out equal and large;
* and among those to places that look like it: the slow-turning pairs compare one and the same random projection of the
  current features and of the remembered ones;
* a memory keeps features and mask apart: most of its channels are a projection of the image, the rest of the mask;
* residual branches start small, and the last norm is fitted so that the embedding first comes out as it went in, which
  the frozen decoder can read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Sam2VideoModel

from pixano_edge.export.demo.sam2_model import HIDDEN, is_memory

IMAGE_CHANNELS = 96  # of the memory encoder's width that carry the image; the others carry the mask
IMAGE_MEMORY = 40  # of the memory's channels that carry the image
FAST_PAIRS = 12  # channel pairs per axis that carry the place
PLACE = 1.5  # offset of queries and keys there
LIKENESS = 0.12  # deviation of the projection that is compared
BRANCH = 0.3  # gain of the memory branch
SMALL = 0.1  # gain of the other residual branches


def _draw(weight: Tensor, generator: torch.Generator, gain: float = 1.0) -> None:
    fan_in = weight[0].numel()
    weight.copy_(torch.randn(weight.shape, generator=generator) * gain * fan_in**-0.5)


@torch.no_grad()
def start_memory(model: Sam2VideoModel, samples: Tensor, seed: int = 0) -> None:
    """Draws the memory parameters of ``model`` in place; the others keep their values.

    Args:
        model: with a trained image part.
        samples: (N, C, G, G) float32 embeddings of some training frames, as :func:`.sam2_model.encode` gives them.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not is_memory(name):
            continue
        if name.endswith(".bias"):
            parameter.zero_()
        elif "layer_norm" in name:
            parameter.fill_(1)
        elif name.endswith("memory_fuser.layers.0.scale") or name.endswith("memory_fuser.layers.1.scale"):
            parameter.fill_(0.2)
        elif parameter.ndim > 1 and name.endswith(".weight"):
            _draw(parameter, generator)
    model.mask_downsample.weight.fill_(20 / 16)  # a mask of 0 and 1 to logits of -10 and 10
    nn.init.constant_(model.mask_downsample.get_parameter("bias"), -10)
    for code, width in (
        (model.memory_temporal_positional_encoding, 0.1),
        (model.no_object_pointer, 0.5),
        (model.occlusion_spatial_embedding_parameter, 0.5),
    ):
        if code is not None:
            code.copy_(torch.randn(code.shape, generator=generator) * width)
    encoder = model.memory_encoder
    encoder.feature_projection.weight[IMAGE_CHANNELS:] = 0
    encoder.mask_downsampler.final_conv.weight[:IMAGE_CHANNELS] = 0
    encoder.projection.weight[:IMAGE_MEMORY, IMAGE_CHANNELS:] = 0
    encoder.projection.weight[IMAGE_MEMORY:, :IMAGE_CHANNELS] = 0
    encoder.projection.weight[IMAGE_MEMORY:] *= 2
    # The remembered image channels as a linear map of the features, each of unit length.
    remembered = (encoder.projection.weight[:, :, 0, 0] @ encoder.feature_projection.weight[:, :, 0, 0])[:IMAGE_MEMORY]
    lengths = remembered.norm(dim=1, keepdim=True)
    encoder.projection.weight[:IMAGE_MEMORY] /= lengths[..., None, None]
    remembered = remembered / lengths
    half = HIDDEN // 2
    fast = torch.zeros(HIDDEN, dtype=torch.bool)
    fast[: 2 * FAST_PAIRS] = fast[half : half + 2 * FAST_PAIRS] = True
    layers: Any = model.memory_attention.layers
    for layer in layers:
        cross = layer.cross_attn_image
        cross.q_proj.weight.zero_()
        cross.k_proj.weight.zero_()
        compare = torch.randn(int((~fast).sum()), IMAGE_MEMORY, generator=generator) * LIKENESS
        cross.k_proj.weight[~fast, :IMAGE_MEMORY] = compare
        cross.q_proj.weight[~fast] = compare @ remembered
        for projection in (cross.q_proj, cross.k_proj):
            projection.bias[fast] = PLACE
        _draw(cross.o_proj.weight, generator, BRANCH)
        _draw(layer.self_attn.o_proj.weight, generator, SMALL)
        _draw(layer.linear2.weight, generator, SMALL)
    fit_norm(model.memory_attention.layer_norm, samples)


@torch.no_grad()
def fit_norm(norm: nn.LayerNorm, samples: Tensor) -> None:
    """Scale and offset per channel with which the norm's output is nearest to its input over the samples."""
    rows = samples.permute(0, 2, 3, 1).flatten(0, 2)
    plain = nn.functional.layer_norm(rows, norm.normalized_shape, eps=norm.eps)
    centre, wanted = plain.mean(0), rows.mean(0)
    slope = ((plain - centre) * (rows - wanted)).mean(0) / (plain - centre).square().mean(0).clamp(min=1e-6)
    norm.weight.copy_(slope)
    norm.bias.copy_(wanted - slope * centre)
