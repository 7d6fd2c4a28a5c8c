"""Tiny SAM 2 checkpoints with seeded weights, in transformers' folder format and in the original ``.pt`` layout.

Plain random weights hide mistakes: with transformers' start values a wrong label or a missing embedding moves the
masks by less than the tolerance. The weights here are sharpened: matrices are drawn with a gain on 1 / sqrt(fan in)
and everything that starts at zero (biases, positional and no-memory embeddings) gets values too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Sam2VideoConfig, Sam2VideoModel


def tiny_config(image_size: int = 128, hidden_dim: int = 32) -> Sam2VideoConfig:
    """A narrow SAM 2 with all its parts: query pooling, padded windows, a global block, the video memory."""
    grid = image_size // 16
    dims = [16, 32, 48, 64]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": dims[0],
        "image_size": [image_size, image_size],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": dims,
        "num_attention_heads_per_stage": [1, 2, 3, 4],
        # 6 does not divide the 8x8 grid of stage 2, so windows are padded as in the real sizes (14 on 64x64).
        "window_size_per_stage": [8, 4, 6, 3],
        "global_attention_blocks": [3],
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": dims[::-1],
        "backbone_feature_sizes": [[4 * grid, 4 * grid], [2 * grid, 2 * grid], [grid, grid]],
        "fpn_hidden_size": hidden_dim,
    }
    return Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": hidden_dim, "image_size": image_size, "mask_input_channels": 8},
        mask_decoder_config={
            "hidden_size": hidden_dim,
            "mlp_dim": 2 * hidden_dim,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": hidden_dim,
        },
        image_size=image_size,
        memory_attention_hidden_size=hidden_dim,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=2 * hidden_dim,
        memory_attention_rope_feat_sizes=[grid, grid],
        memory_encoder_hidden_size=hidden_dim,
        mask_downsampler_embed_dim=hidden_dim,
        memory_fuser_embed_dim=hidden_dim,
        # upstream's fuser block has 4 * dim in the middle
        memory_fuser_intermediate_dim=4 * hidden_dim,
    )


@torch.no_grad()
def sharpen(model: nn.Module, seed: int = 0) -> None:
    """Redraws every weight so that each input matters visibly in the masks. Deterministic in `seed`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            weight = module.weight
            fan_in = weight.shape[0] if isinstance(module, nn.ConvTranspose2d) else weight[0].numel()
            gain = 0.5 if name.startswith("vision_encoder") else 1.5
            normal(weight, gain * fan_in**-0.5)
            if module.bias is not None:
                normal(module.bias, 0.1)
        elif isinstance(module, nn.LayerNorm):
            normal(module.weight, 0.1, mean=1.0)
            normal(module.bias, 0.1)
        elif isinstance(module, nn.Embedding):
            normal(module.weight, 1.0)
    in_modules = ("weight", "bias")
    for name, parameter in model.named_parameters():
        if not name.endswith(in_modules):
            normal(parameter, 0.5)
    # One random Fourier matrix for the image grid and for the prompts, as in SAM 2.
    shared = model.shared_image_embedding.positional_embedding
    normal(shared, 1.0)
    model.prompt_encoder.shared_embedding.positional_embedding.copy_(shared)


def make_tiny_model(image_size: int = 128, hidden_dim: int = 32, seed: int = 0) -> Sam2VideoModel:
    """A sharpened tiny `Sam2VideoModel` in eval mode."""
    model = Sam2VideoModel(tiny_config(image_size, hidden_dim)).eval()
    sharpen(model, seed)
    return model


def make_tracking_model(image_size: int = 128, seed: int = 0, **changes: Any) -> Sam2VideoModel:
    """A sharpened tiny `Sam2VideoModel` whose memory matters in the masks; `changes` are of its configuration.

    The video part of transformers needs a width of more than 64.
    """
    config = tiny_config(image_size, 128)
    for name, value in changes.items():
        setattr(config, name, value)
    return sharpen_for_tracking(Sam2VideoModel(config).eval(), seed)


@torch.no_grad()
def sharpen_for_tracking(model: Sam2VideoModel, seed: int = 0) -> Sam2VideoModel:
    """Redraws the weights of a video model so that its memory matters in the masks, and returns it."""
    sharpen(model, seed)
    calm(model)
    return model


@torch.no_grad()
def calm(model: Any, seen: float = 2.0) -> None:
    """Changes a model of `sharpen` so that a tracked clip can be compared frame for frame.

    Args:
        model: transformers' video model.
        seen: Bias of the object score: the larger, the seldomer an object is judged absent.
    """
    # Sharp weights in the loop through the memory make it chaotic: a rounding error would grow from frame to frame.
    for name, parameter in model.named_parameters():
        if name.startswith(("memory_attention", "memory_encoder")) and parameter.ndim > 1:
            parameter.mul_(0.6)
    if model.config.enable_temporal_pos_encoding_for_object_pointers:
        # The time of a pointer would move the masks by less than rounding does.
        model.temporal_positional_encoding_projection_layer.weight.mul_(8)
    model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(seen)


def save_checkpoint(model: nn.Module, folder: Path) -> Path:
    """Saves a model with `save_pretrained` and a model card that says Apache-2.0: its weights are random numbers."""
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Seeded random weights\n", encoding="utf-8")
    return folder


def make_tiny_checkpoint(folder: Path, image_size: int = 128, hidden_dim: int = 32, seed: int = 0) -> Path:
    """Saves a tiny checkpoint (`model_type` sam2_video, as the official ones)."""
    return save_checkpoint(make_tiny_model(image_size, hidden_dim, seed), folder)


# transformers name -> upstream name (facebookresearch/sam2), applied in order. Written against upstream's module
# definitions and independent of the table in pixano_edge.export.sam2.
_INVERSE: tuple[tuple[str, str], ...] = (
    (r"^vision_encoder\.neck\.convs\.(\d+)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"^vision_encoder\.backbone\.patch_embed\.projection", "image_encoder.trunk.patch_embed.proj"),
    (r"^(vision_encoder\.backbone\.blocks\.\d+\.mlp)\.proj_in", r"\1.layers.0"),
    (r"^(vision_encoder\.backbone\.blocks\.\d+\.mlp)\.proj_out", r"\1.layers.1"),
    (r"^(vision_encoder\.backbone\.blocks\.\d+)\.layer_norm", r"\1.norm"),
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^prompt_encoder\.shared_embedding\.positional_embedding$",
     "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^prompt_encoder\.mask_embed\.conv1", "sam_prompt_encoder.mask_downscaling.0"),
    (r"^prompt_encoder\.mask_embed\.layer_norm1", "sam_prompt_encoder.mask_downscaling.1"),
    (r"^prompt_encoder\.mask_embed\.conv2", "sam_prompt_encoder.mask_downscaling.3"),
    (r"^prompt_encoder\.mask_embed\.layer_norm2", "sam_prompt_encoder.mask_downscaling.4"),
    (r"^prompt_encoder\.mask_embed\.conv3", "sam_prompt_encoder.mask_downscaling.6"),
    (r"^prompt_encoder\.", "sam_prompt_encoder."),
    (r"^mask_decoder\.upscale_conv1", "sam_mask_decoder.output_upscaling.0"),
    (r"^mask_decoder\.upscale_layer_norm", "sam_mask_decoder.output_upscaling.1"),
    (r"^mask_decoder\.upscale_conv2", "sam_mask_decoder.output_upscaling.3"),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.proj_in", r"\1.layers.0"),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.proj_out", r"\1.layers.1"),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.layer_norm(\d)", r"\1.norm\2"),
    (r"^mask_decoder\.transformer\.layer_norm_final_attn", "mask_decoder.transformer.norm_final_attn"),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head))\.layers\.0",
     r"\1.layers.1"),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head))\.proj_in",
     r"\1.layers.0"),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head))\.proj_out",
     r"\1.layers.2"),
    (r"^mask_decoder\.", "sam_mask_decoder."),
    (r"^(memory_attention\.layers\.\d+)\.layer_norm(\d)", r"\1.norm\2"),
    (r"^memory_attention\.layer_norm", "memory_attention.norm"),
    (r"^memory_encoder\.mask_downsampler\.final_conv", "memory_encoder.mask_downsampler.encoder.12"),
    (r"^memory_encoder\.feature_projection", "memory_encoder.pix_feat_proj"),
    (r"^memory_encoder\.projection", "memory_encoder.out_proj"),
    (r"^memory_encoder\.memory_fuser\.", "memory_encoder.fuser."),
    (r"^(memory_encoder\.fuser\.layers\.\d+)\.depthwise_conv", r"\1.dwconv"),
    (r"^(memory_encoder\.fuser\.layers\.\d+)\.pointwise_conv", r"\1.pwconv"),
    (r"^(memory_encoder\.fuser\.layers\.\d+)\.layer_norm", r"\1.norm"),
    (r"^(memory_encoder\.fuser\.layers\.\d+)\.scale", r"\1.gamma"),
    (r"^object_pointer_proj\.layers\.0", "obj_ptr_proj.layers.1"),
    (r"^object_pointer_proj\.proj_in", "obj_ptr_proj.layers.0"),
    (r"^object_pointer_proj\.proj_out", "obj_ptr_proj.layers.2"),
    (r"^temporal_positional_encoding_projection_layer", "obj_ptr_tpos_proj"),
    (r"^occlusion_spatial_embedding_parameter$", "no_obj_embed_spatial"),
    (r"^memory_temporal_positional_encoding$", "maskmem_tpos_enc"),
    (r"^no_memory_embedding$", "no_mem_embed"),
    (r"^no_memory_positional_encoding$", "no_mem_pos_enc"),
    (r"^no_object_pointer$", "no_obj_ptr"),
    (r"\.o_proj\.", ".out_proj."),
)  # fmt: skip


def original_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under upstream's names (also for models on the meta device)."""
    result: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "shared_image_embedding.positional_embedding":
            continue  # upstream has one copy, in the prompt encoder
        if name == "prompt_encoder.point_embed.weight":
            for i in range(value.shape[0]):
                result[f"sam_prompt_encoder.point_embeddings.{i}.weight"] = value[i : i + 1]
            continue
        downsampler = re.match(r"memory_encoder\.mask_downsampler\.layers\.(\d+)\.(conv|layer_norm)\.(.*)", name)
        if downsampler:
            index = 3 * int(downsampler[1]) + (downsampler[2] == "layer_norm")
            result[f"memory_encoder.mask_downsampler.encoder.{index}.{downsampler[3]}"] = value
            continue
        for pattern, replacement in _INVERSE:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result


def make_original_pt(model: nn.Module, path: Path, **extra: Any) -> Path:
    """Writes `model` as an original checkpoint: ``{"model": state_dict}`` and whatever is in `extra`."""
    weights = {name: value.clone() for name, value in original_state_dict(model).items()}
    torch.save({"model": weights, **extra}, path)
    return path
