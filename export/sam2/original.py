"""The original ``.pt`` checkpoints of facebookresearch/sam2, mapped to transformers' names.

A ``.pt`` file is a pickle: it is opened with ``torch.load(weights_only=True)``, which builds tensors and plain
containers and refuses everything else. Names on the left are the modules of upstream's ``sam2/modeling``.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Sam2Model, Sam2VideoConfig, Sam2VideoModel

from pixano_edge.engine.errors import ExportError
from pixano_edge.export.sam2 import sizes

# Upstream tensors of the video memory; checkpoints for images alone lack all of them.
MEMORY = (
    "memory_attention.",
    "memory_encoder.",
    "maskmem_tpos_enc",
    "no_mem_pos_enc",
    "no_obj_ptr",
    "no_obj_embed_spatial",
    "mask_downsample.",
    "obj_ptr_proj.",
    "obj_ptr_tpos_proj.",
)
# Only SAM 2.1 has these two.
_GENERATION_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight")

_TAIL = r"(?P<tail>weight|bias)"
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), target)
    for pattern, target in (
        (r"image_encoder\.trunk\.(?P<name>pos_embed|pos_embed_window)", r"vision_encoder.backbone.\g<name>"),
        (
            rf"image_encoder\.trunk\.patch_embed\.proj\.{_TAIL}",
            r"vision_encoder.backbone.patch_embed.projection.\g<tail>",
        ),
        (
            rf"image_encoder\.trunk\.blocks\.(?P<i>\d+)\.norm(?P<n>[12])\.{_TAIL}",
            r"vision_encoder.backbone.blocks.\g<i>.layer_norm\g<n>.\g<tail>",
        ),
        (
            rf"image_encoder\.trunk\.blocks\.(?P<i>\d+)\.(?P<part>attn\.qkv|attn\.proj|proj)\.{_TAIL}",
            r"vision_encoder.backbone.blocks.\g<i>.\g<part>.\g<tail>",
        ),
        (
            rf"image_encoder\.trunk\.blocks\.(?P<i>\d+)\.mlp\.layers\.(?P<mlp2>[01])\.{_TAIL}",
            r"vision_encoder.backbone.blocks.\g<i>.mlp.{mlp2}.\g<tail>",
        ),
        (rf"image_encoder\.neck\.convs\.(?P<i>\d+)\.conv\.{_TAIL}", r"vision_encoder.neck.convs.\g<i>.\g<tail>"),
        (r"no_mem_embed", "no_memory_embedding"),
        (
            r"sam_prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix",
            "prompt_encoder.shared_embedding.positional_embedding",
        ),
        (
            r"sam_prompt_encoder\.(?P<part>not_a_point_embed|no_mask_embed)\.weight",
            r"prompt_encoder.\g<part>.weight",
        ),
        (
            rf"sam_prompt_encoder\.mask_downscaling\.(?P<mask>[01346])\.{_TAIL}",
            r"prompt_encoder.mask_embed.{mask}.\g<tail>",
        ),
        (
            r"sam_mask_decoder\.(?P<part>iou_token|mask_tokens|obj_score_token)\.weight",
            r"mask_decoder.\g<part>.weight",
        ),
        (rf"sam_mask_decoder\.(?P<part>conv_s0|conv_s1)\.{_TAIL}", r"mask_decoder.\g<part>.\g<tail>"),
        (rf"sam_mask_decoder\.output_upscaling\.(?P<up>[013])\.{_TAIL}", r"mask_decoder.{up}.\g<tail>"),
        (
            rf"sam_mask_decoder\.(?P<part>output_hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head)"
            rf"\.layers\.(?P<mlp3>[012])\.{_TAIL}",
            r"mask_decoder.\g<part>.{mlp3}.\g<tail>",
        ),
        (
            rf"sam_mask_decoder\.transformer\.layers\.(?P<i>\d+)"
            rf"\.(?P<part>self_attn|cross_attn_token_to_image|cross_attn_image_to_token)"
            rf"\.(?P<proj>[qkv]_proj|out_proj)\.{_TAIL}",
            r"mask_decoder.transformer.layers.\g<i>.\g<part>.{proj}.\g<tail>",
        ),
        (
            rf"sam_mask_decoder\.transformer\.layers\.(?P<i>\d+)\.norm(?P<n>[1-4])\.{_TAIL}",
            r"mask_decoder.transformer.layers.\g<i>.layer_norm\g<n>.\g<tail>",
        ),
        (
            rf"sam_mask_decoder\.transformer\.layers\.(?P<i>\d+)\.mlp\.layers\.(?P<mlp2>[01])\.{_TAIL}",
            r"mask_decoder.transformer.layers.\g<i>.mlp.{mlp2}.\g<tail>",
        ),
        (
            rf"sam_mask_decoder\.transformer\.final_attn_token_to_image\.(?P<proj>[qkv]_proj|out_proj)\.{_TAIL}",
            r"mask_decoder.transformer.final_attn_token_to_image.{proj}.\g<tail>",
        ),
        (
            rf"sam_mask_decoder\.transformer\.norm_final_attn\.{_TAIL}",
            r"mask_decoder.transformer.layer_norm_final_attn.\g<tail>",
        ),
        (
            rf"memory_attention\.layers\.(?P<i>\d+)\.(?P<part>self_attn|cross_attn_image)"
            rf"\.(?P<proj>[qkv]_proj|out_proj)\.{_TAIL}",
            r"memory_attention.layers.\g<i>.\g<part>.{proj}.\g<tail>",
        ),
        (
            rf"memory_attention\.layers\.(?P<i>\d+)\.(?P<part>linear[12])\.{_TAIL}",
            r"memory_attention.layers.\g<i>.\g<part>.\g<tail>",
        ),
        (
            rf"memory_attention\.layers\.(?P<i>\d+)\.norm(?P<n>[1-3])\.{_TAIL}",
            r"memory_attention.layers.\g<i>.layer_norm\g<n>.\g<tail>",
        ),
        (rf"memory_attention\.norm\.{_TAIL}", r"memory_attention.layer_norm.\g<tail>"),
        (
            rf"memory_encoder\.mask_downsampler\.encoder\.(?P<down>\d+)\.{_TAIL}",
            r"memory_encoder.mask_downsampler.{down}.\g<tail>",
        ),
        (rf"memory_encoder\.pix_feat_proj\.{_TAIL}", r"memory_encoder.feature_projection.\g<tail>"),
        (rf"memory_encoder\.out_proj\.{_TAIL}", r"memory_encoder.projection.\g<tail>"),
        (
            rf"memory_encoder\.fuser\.layers\.(?P<i>\d+)\.(?P<fuse>dwconv|norm|pwconv1|pwconv2)\.{_TAIL}",
            r"memory_encoder.memory_fuser.layers.\g<i>.{fuse}.\g<tail>",
        ),
        (r"memory_encoder\.fuser\.layers\.(?P<i>\d+)\.gamma", r"memory_encoder.memory_fuser.layers.\g<i>.scale"),
        (rf"mask_downsample\.{_TAIL}", r"mask_downsample.\g<tail>"),
        (rf"obj_ptr_proj\.layers\.(?P<mlp3>[012])\.{_TAIL}", r"object_pointer_proj.{mlp3}.\g<tail>"),
        (rf"obj_ptr_tpos_proj\.{_TAIL}", r"temporal_positional_encoding_projection_layer.\g<tail>"),
        (r"maskmem_tpos_enc", "memory_temporal_positional_encoding"),
        (r"no_mem_pos_enc", "no_memory_positional_encoding"),
        (r"no_obj_ptr", "no_object_pointer"),
        (r"no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
    )
)
# Parts whose index in an nn.Sequential or MLP has a name in transformers.
_NAMED: dict[str, dict[str, str]] = {
    "mlp2": {"0": "proj_in", "1": "proj_out"},
    "mlp3": {"0": "proj_in", "1": "layers.0", "2": "proj_out"},
    "mask": {"0": "conv1", "1": "layer_norm1", "3": "conv2", "4": "layer_norm2", "6": "conv3"},
    "up": {"0": "upscale_conv1", "1": "upscale_layer_norm", "3": "upscale_conv2"},
    # Four times convolution, normalisation and activation, then the last convolution.
    "down": {
        **{str(3 * i): f"layers.{i}.conv" for i in range(4)},
        **{str(3 * i + 1): f"layers.{i}.layer_norm" for i in range(4)},
        "12": "final_conv",
    },
    "fuse": {
        "dwconv": "depthwise_conv",
        "norm": "layer_norm",
        "pwconv1": "pointwise_conv1",
        "pwconv2": "pointwise_conv2",
    },
    "proj": {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"},
}
_POINT = re.compile(r"sam_prompt_encoder\.point_embeddings\.([0-3])\.weight")


def map_name(name: str) -> str:
    """transformers' name of an upstream tensor.

    The four point embeddings are one table in transformers, so they map to ``prompt_encoder.point_embed.weight``.

    Raises:
        ExportError: Upstream's SAM 2 has no such tensor.
    """
    if _POINT.fullmatch(name):
        return "prompt_encoder.point_embed.weight"
    for pattern, target in _RULES:
        match = pattern.fullmatch(name)
        if match:
            groups = match.groupdict()
            for key, names in _NAMED.items():
                if key in groups:
                    if groups[key] not in names:
                        raise _unknown(name)
                    target = target.replace("{" + key + "}", names[groups[key]])
            return match.expand(target)
    raise _unknown(name)


def _unknown(name: str) -> ExportError:
    return ExportError(
        f"The checkpoint holds '{name}', which SAM 2 does not have.",
        "This is a modified model; its extra parts would be lost, so it is not exported.",
    )


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's state dict under transformers' names; no tensor is copied but the point embeddings.

    Raises:
        ExportError: A tensor is unknown, or a point embedding is missing.
    """
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        target = map_name(name)
        if target != "prompt_encoder.point_embed.weight":
            result[target] = value
    points = [state.get(f"sam_prompt_encoder.point_embeddings.{i}.weight") for i in range(4)]
    present = [p for p in points if p is not None]
    if len(present) != 4:
        raise ExportError("The checkpoint lacks point embeddings.", "Get the whole checkpoint.")
    result["prompt_encoder.point_embed.weight"] = torch.cat(present)
    fourier = result.get("prompt_encoder.shared_embedding.positional_embedding")
    if fourier is not None:
        # Upstream keeps one random Fourier matrix for prompts and image grid; transformers stores it twice.
        result["shared_image_embedding.positional_embedding"] = fourier
    return result


@dataclass
class Original:
    """What an original checkpoint holds.

    Attributes:
        model: `Sam2Model`, float32, eval mode.
        video_model: `Sam2VideoModel` on the same tensors; None without memory modules, or when not asked for.
        generation: ``sam2`` or ``sam2.1``.
        has_memory: Whether the file holds memory modules.
    """

    model: Any
    video_model: Any | None
    generation: str
    has_memory: bool


def load(path: Path, config: Sam2VideoConfig | None = None, *, video: bool = True) -> Original:
    """Reads an original checkpoint into transformers' models.

    Args:
        path: ``.pt`` file, ``{"model": state_dict}`` or the state dict itself.
        config: Configuration of a trunk that is none of the four sizes; detected from tensor shapes if None.
        video: Whether to make the `Sam2VideoModel` too, where the file holds memory modules.

    Raises:
        ExportError: Damaged, not a SAM 2 checkpoint, incomplete, or a pickle with anything but tensors in it.
    """
    state = read_state(path)
    made_in = generation(set(state))
    if config is None:
        size = sizes.detect({name: tuple(value.shape) for name, value in state.items()})
        config = size.video_config(made_in)
    converted = {name: value.to(torch.float32) for name, value in convert(state).items()}
    has_memory = any(name.startswith(MEMORY) for name in state)
    with torch.device("meta"):
        model = Sam2Model(sizes.image_config(config))
    expected = set(model.state_dict())
    _fill(model, {name: value for name, value in converted.items() if name in expected}, path.name)
    video_model = None
    if video and has_memory:
        # Not on the meta device: tables that are no part of a checkpoint are computed when it is made.
        video_model = Sam2VideoModel(config)
        _fill(video_model, converted, path.name)
        video_model.eval()
    return Original(model.eval(), video_model, made_in, has_memory)


def _fill(model: Any, weights: dict[str, Tensor], file: str) -> None:
    """Gives a model its weights, without copying them; every one must be there and fit."""
    missing = sorted(set(model.state_dict()) - set(weights))
    if missing:
        raise ExportError(
            f"The checkpoint lacks {len(missing)} tensors of SAM 2, for example {missing[:3]}.",
            "Get the whole checkpoint; a partial one would leave the model without weights.",
        )
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ExportError(
            f"The tensors of '{file}' do not fit SAM 2: {str(error).splitlines()[-1].strip()}",
            "Give an original SAM 2 / 2.1 checkpoint, or export a transformers folder.",
        ) from error


def generation(names: set[str]) -> str:
    """``sam2.1`` where both tensors that only SAM 2.1 has are there, else ``sam2``."""
    return "sam2.1" if names.issuperset(_GENERATION_2_1) else "sam2"


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a ``.pt`` file; nothing but tensors and plain containers is unpickled.

    Raises:
        ExportError: Damaged, or the pickle names something that would run code.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"'{path.name}' is damaged or holds more than tensors: {_reason(error)}",
            "Pixano Edge never runs code from a checkpoint; get the original file, or save its state dict alone.",
        ) from error
    except (
        RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error,
    ) as error:  # fmt: skip
        raise ExportError(
            f"'{path.name}' is not a readable checkpoint: {_reason(error)}", "It is damaged or truncated; get it again."
        ) from error
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ExportError(
            f"'{path.name}' holds no state dict.", "Give an original SAM 2 / 2.1 checkpoint with a 'model' entry."
        )
    return state


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch explains at length how to switch the safety off; only the culprit is of interest.
    culprit = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (culprit or lines or [type(error).__name__])[0][:300]
