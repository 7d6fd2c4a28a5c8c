"""The small SAM 2 of the demo: its configuration, its start values, and the differentiable prompt path.

The architecture is the one of ``transformers`` (Hiera, feature pyramid, prompt encoder, two-way mask decoder,
memory attention, memory encoder), only narrower: the checkpoint is an ordinary ``sam2_video`` folder which both
``Sam2Model`` and ``Sam2VideoModel`` load. The spatial relations of SAM 2 hold: embedding = side / 16, mask
logits = side / 4, high-resolution features at side / 4 and side / 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Sam2VideoConfig, Sam2VideoModel

IMAGE_SIZE = 256
HIDDEN = 128
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
LOGIT_LIMIT = 32.0  # SAM 2 clamps the logits that come back as a mask prompt


def tiny_config(dims: tuple[int, int, int, int] = (48, 96, 128, 160), size: int = IMAGE_SIZE) -> Sam2VideoConfig:
    """The configuration of the demo's SAM 2 for square images of ``size`` pixels, a multiple of 128."""
    grid = size // 16
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": dims[0],
        "image_size": [size, size],
        "patch_kernel_size": [7, 7],
        "patch_stride": [4, 4],
        "patch_padding": [3, 3],
        "query_stride": [2, 2],
        "window_positional_embedding_background_size": [8, 8],
        "blocks_per_stage": [2, 2, 5, 1],
        "embed_dim_per_stage": list(dims),
        "num_attention_heads_per_stage": [1, 2, 4, dims[3] // 32],
        "window_size_per_stage": [8, 8, 16, 8],
        "global_attention_blocks": [6, 8],
        "mlp_ratio": 3.0,
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": list(dims[::-1]),
        "backbone_feature_sizes": [[4 * grid, 4 * grid], [2 * grid, 2 * grid], [grid, grid]],
        "fpn_hidden_size": HIDDEN,
        "fpn_top_down_levels": [0, 1, 2, 3],
    }
    prompt = {
        "hidden_size": HIDDEN,
        "image_size": size,
        "patch_size": 16,
        "mask_input_channels": 16,
        "scale": 2,
    }
    decoder = {
        "hidden_size": HIDDEN,
        "mlp_dim": 2 * HIDDEN,
        "num_attention_heads": 4,
        "iou_head_hidden_dim": HIDDEN,
    }
    return Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config=prompt,
        mask_decoder_config=decoder,
        image_size=size,
        memory_attention_hidden_size=HIDDEN,
        memory_attention_num_layers=2,
        memory_attention_feed_forward_hidden_size=2 * HIDDEN,
        memory_attention_rope_feat_sizes=[grid, grid],
        memory_encoder_hidden_size=HIDDEN,
        memory_encoder_output_channels=64,  # the memory attention of transformers has this width built in
        mask_downsampler_embed_dim=HIDDEN,
        memory_fuser_embed_dim=HIDDEN,
        memory_fuser_intermediate_dim=2 * HIDDEN,
    )


def is_memory(name: str) -> bool:
    """Whether a parameter belongs to the video memory, which image training leaves as it started."""
    heads = (
        "memory_",
        "mask_downsample",
        "object_pointer_proj",
        "temporal_",
        "no_memory_positional",
        "no_object",
    )
    return name.startswith((*heads, "occlusion_"))


@torch.no_grad()
def initialise(model: Sam2VideoModel) -> None:
    """Start values suited to a narrow network trained from scratch, drawn from torch's global generator.

    transformers draws every matrix with a deviation of 0.02, meant for widths of several hundred; here it is
    1 / sqrt(fan in), with the last matrix of each residual branch smaller. Embeddings are wider
    than the default too, as in SAM.
    """
    residual_ends = ("attn.proj", "mlp.proj_out", "o_proj")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            weight = module.weight
            fan_in = weight[0].numel() if not isinstance(module, nn.ConvTranspose2d) else weight.shape[0]
            gain = 0.3 if name.endswith(residual_ends) and name.startswith("vision_encoder") else 1.0
            if ".neck." in name:  # features of about the size of the positional code, or they would drown it
                gain = 0.25
            weight.normal_(std=gain * fan_in**-0.5)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(std=0.02 if "no_mask" in name else 0.5)
    # Queries and keys in the decoder start out alike: a prompt then attends to its own place in the image, and
    # that place to the prompt, from the first step on; and in the first self-attention, which has no residual
    # path, each token keeps what it is instead of becoming the mean of all.
    for name, module in model.mask_decoder.transformer.named_modules():
        if name.endswith(("token_to_image", "image_to_token", "self_attn")):
            module.k_proj.weight.mul_(1.5)
            module.q_proj.weight.copy_(module.k_proj.weight)
    # In the encoder too: each place first looks at those in its window that look like it.
    for name, module in model.vision_encoder.named_modules():
        if name.endswith("attn.qkv"):
            width = module.weight.shape[0] // 3
            module.weight[width : 2 * width].copy_(module.weight[:width])
    backbone = model.vision_encoder.backbone
    backbone.pos_embed.normal_(std=0.2)
    backbone.pos_embed_window.normal_(std=0.2)
    model.memory_temporal_positional_encoding.normal_(std=0.02)
    model.no_object_pointer.normal_(std=0.02)
    # One positional code for the image grid and for the prompts, as in SAM 2.
    model.prompt_encoder.shared_embedding.positional_embedding.copy_(model.shared_image_embedding.positional_embedding)


@dataclass
class Features:
    """What the decoder needs of a batch: ``top`` (B, C, S/16, S/16), ``s0`` (B, C/8, S/4, S/4), ``s1``
    (B, C/4, S/8, S/8), ``position`` (1, C, S/16, S/16)."""

    top: Tensor
    s0: Tensor
    s1: Tensor
    position: Tensor


@dataclass
class Decoded:
    """All four candidates of P prompts: ``logits`` (B, P, 4, S/4, S/4), ``iou`` (B, P, 4), ``score`` (B, P), and the
    mask tokens (B, P, 4, C) that object pointers are made from."""

    logits: Tensor
    iou: Tensor
    score: Tensor
    tokens: Tensor


def normalise(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 RGB to (B, 3, H, W) float32 with the ImageNet mean and deviation."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def encode(model: Sam2VideoModel, pixels: Tensor) -> Features:
    """Run the image encoder as ``Sam2Model`` does for a still image (the no-memory embedding is added).

    ``pixels`` (B, 3, S, S) may be smaller than the model's own size, by a power of two, in training: the positional
    code is then that of fewer, larger cells.
    """
    levels = model.vision_encoder(pixels).fpn_hidden_states
    model.prompt_encoder.image_embedding_size = tuple(levels[2].shape[-2:])
    with torch.autocast("cpu", enabled=False):
        position = model.get_image_wide_positional_embeddings()
    return Features(
        top=levels[2] + model.no_memory_embedding.reshape(1, -1, 1, 1),
        s0=model.mask_decoder.conv_s0(levels[0]),
        s1=model.mask_decoder.conv_s1(levels[1]),
        position=position,
    )


def decode(
    model: Sam2VideoModel,
    features: Features,
    points: Tensor,
    labels: Tensor,
    mask_input: Tensor | None = None,
) -> Decoded:
    """Decode P prompts per image, keeping all four masks and one optional mask prompt for each.

    Args:
        model: the model; its own prompt encoder and decoder modules are used.
        features: of B images.
        points: (B, P, N, 2) float32 pixel coordinates; a box is its two corners labelled 2 and 3.
        labels: (B, P, N) int64; the padding point (label -1) is appended here, as the stock forward does.
        mask_input: (B, P, S/4, S/4) float32 logits of an earlier round, or None.
    """
    encoder, decoder = model.prompt_encoder, model.mask_decoder
    batch, count = points.shape[:2]
    with torch.autocast("cpu", enabled=False):  # coordinates need more than the 8 bits of bfloat16
        sparse = encoder._embed_points(points, labels, pad=True)
    if mask_input is None:
        dense = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    else:
        dense = encoder.mask_embed(mask_input.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).flatten(0, 1)[:, None])
    fixed = torch.cat([decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([fixed.expand(batch, count, -1, -1), sparse], dim=2)
    image = features.top.repeat_interleave(count, 0) + dense
    queries, keys = decoder.transformer(
        point_embeddings=tokens,
        image_embeddings=image,
        image_positional_embeddings=features.position.expand(batch * count, -1, -1, -1),
        attention_similarity=None,
    )
    # The decoder runs per prompt with a leading batch of images: (B * P, 1, tokens, C) or (B, P, tokens, C).
    queries = queries.reshape(batch, count, tokens.shape[2], -1)
    keys = keys.reshape(batch * count, -1, keys.shape[-1]).transpose(1, 2).unflatten(2, image.shape[-2:])
    up = decoder.upscale_conv1(keys) + features.s1.repeat_interleave(count, 0)
    up = decoder.activation(decoder.upscale_layer_norm(up))
    up = decoder.activation(decoder.upscale_conv2(up) + features.s0.repeat_interleave(count, 0))
    kernels = [mlp(queries[:, :, 2 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    weights = torch.stack(kernels, dim=2)
    logits = (weights @ up.reshape(batch, count, up.shape[1], -1)).unflatten(-1, up.shape[-2:])
    return Decoded(
        logits=logits.float(),
        iou=decoder.iou_prediction_head(queries[:, :, 1]).float(),
        score=decoder.pred_obj_score_head(queries[:, :, 0]).squeeze(-1).float(),
        tokens=queries[:, :, 2 : 2 + len(kernels)],
    )
