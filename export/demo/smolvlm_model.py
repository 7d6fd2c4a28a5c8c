"""The small SmolVLM of the demo: its configuration, its start values, and the path that training takes through it.

The architecture is the one of ``transformers`` (SigLIP's vision tower, pixel shuffle, a Llama), only narrower and
shallower: the checkpoint is an ordinary ``smolvlm`` folder for ``SmolVLMForConditionalGeneration``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from pixano_edge.export.demo.owlv2_model import cosine_patches, grid_code
from pixano_edge.export.demo.vqa_scenes import COLOR_NAMES, SHAPES, SIZE

PATCH = 8
GRID = SIZE // PATCH
SHUFFLE = 2
IMAGE_TOKENS = (GRID // SHUFFLE) ** 2
MEAN = STD = 0.5


def tiny_config(tokenizer_ids: dict[str, int], vision: int = 160, text: int = 192) -> SmolVLMConfig:
    """The configuration for a tokenizer.

    Args:
        tokenizer_ids: ``size`` of the vocabulary and the ids of ``bos``, ``eos``, ``pad`` and ``image``.
        vision: width of the vision tower.
        text: width of the language model.
    """
    names = (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "pad"))
    ends: dict[str, Any] = {key: tokenizer_ids[name] for key, name in names}
    return SmolVLMConfig(
        vision_config={
            "hidden_size": vision,
            "intermediate_size": 3 * vision,
            "num_hidden_layers": 5,
            "num_attention_heads": 5,
            "image_size": SIZE,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": tokenizer_ids["size"],
            "hidden_size": text,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            **ends,
        },
        scale_factor=SHUFFLE,
        image_token_id=tokenizer_ids["image"],
        tie_word_embeddings=True,
        **ends,
    )


@torch.no_grad()
def initialise(model: SmolVLMForConditionalGeneration) -> None:
    """Start values suited to a narrow network trained from scratch, drawn from torch's global generator."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            gain = 0.3 if name.endswith(("out_proj", "fc2", "o_proj", "down_proj")) else 1.0
            module.weight.normal_(std=gain * module.in_features**-0.5)
            if module.bias is not None:
                module.bias.zero_()
    for name, module in model.named_modules():
        if name.endswith("self_attn") and ".vision_model." in name:  # each place first looks at what is like it
            module.k_proj.weight.mul_(0.8)
            module.q_proj.weight.copy_(module.k_proj.weight)
    place = model.model.vision_model.embeddings
    width = place.patch_embedding.out_channels
    place.patch_embedding.weight.copy_(torch.from_numpy(cosine_patches(width, PATCH)))
    place.patch_embedding.bias.zero_()
    place.position_embedding.weight.copy_(0.7 * torch.from_numpy(grid_code(width, GRID)))
    words = model.get_input_embeddings().weight
    words.normal_(std=words.shape[1] ** -0.5)


def normalise(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 RGB to (B, 3, H, W) float32 in [-1, 1], as the processor does."""
    return (images.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def attention_mask(group: Tensor) -> Tensor:
    """What each token of (B, L) ``group`` may see, (B, 1, L, L) float32 to be added to scores: earlier tokens of its
    own group and of group 0. Tokens that fill up (-1) see themselves alone."""
    length = group.shape[1]
    rows, columns = group[:, :, None], group[:, None, :]
    early = torch.ones(length, length, dtype=torch.bool).tril()
    seen = early & ((rows == columns) | (columns == 0)) & (columns >= 0)
    seen |= torch.eye(length, dtype=torch.bool)
    return torch.zeros(seen.shape).masked_fill(~seen, -1e4)[:, None]


@dataclass
class Losses:
    """``words``: mean cross entropy of the answers' tokens; ``here``: of the second task, over patches."""

    words: Tensor
    here: Tensor


class WhatIsHere(nn.Module):
    """The second task, dropped after training: every patch names the shape and the colour of what lies under it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, len(SHAPES) + 1 + len(COLOR_NAMES) + 1)

    def loss(self, features: Tensor, shape: Tensor, color: Tensor) -> Tensor:
        """``features`` (B, GRID * GRID, C); ``shape``, ``color`` (B, GRID, GRID) int64, the last class for nothing.

        Patches with something count as much, all together, as those without.
        """
        shapes, colors = self.out(features.float()).split([len(SHAPES) + 1, len(COLOR_NAMES) + 1], -1)
        shape, color = shape.flatten(), color.flatten()
        some = shape < len(SHAPES)
        weight = torch.where(some, 1 / some.sum().clamp(min=1), 1 / (~some).sum().clamp(min=1))
        each = F.cross_entropy(shapes.flatten(0, 1), shape, reduction="none")
        each = each + 0.5 * F.cross_entropy(colors.flatten(0, 1), color, reduction="none")
        return (each * weight).sum() / 2


def forward(
    model: SmolVLMForConditionalGeneration,
    here: WhatIsHere,
    images: Tensor,
    tokens: Tensor,
    positions: Tensor,
    group: Tensor,
    answer: Tensor,
    cells: tuple[Tensor, Tensor],
) -> Losses:
    """The losses of a batch (see ``vqa_batches.VqaBatch``), through the stock model's own parts."""
    core = model.model
    with torch.autocast("cpu", torch.bfloat16):
        features = core.vision_model(pixel_values=normalise(images)).last_hidden_state
        picture = core.connector(features)
        words = model.get_input_embeddings()(tokens)
        at = tokens == model.config.image_token_id
        words = words.masked_scatter(at[..., None], picture.to(words.dtype))
        out = core.text_model(
            inputs_embeds=words, attention_mask=attention_mask(group), position_ids=positions, use_cache=False
        ).last_hidden_state
    rows, columns = answer.nonzero(as_tuple=True)
    logits = model.lm_head(out[rows, columns - 1].float())
    return Losses(F.cross_entropy(logits, tokens[rows, columns]), here.loss(features, *cells))
