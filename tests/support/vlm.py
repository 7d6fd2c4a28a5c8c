"""Seeded vision-language checkpoints as `save_pretrained` writes them: real architectures, small or of real size.

Weights are sharpened: with transformers' own initialisation attention is flat and every answer repeats one token, so
that wrong positions, a stale cache or swapped tiles would not show.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

TILE_TOKENS = tuple(f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6))
SMOLVLM_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>",
    "<global-img>", *TILE_TOKENS,
)  # fmt: skip
QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
SMOLVLM_TEMPLATE = """\
<|im_start|>
{%- for turn in messages -%}
  {{ turn.role[0].upper() + turn.role[1:] }}:
  {%- if turn.content is string %} {{ turn.content }}
  {%- else -%}
    {%- for part in turn.content -%}
      {%- if loop.first and part.type != 'image' %} {% endif -%}
      {{ '<image>' if part.type == 'image' else part.text }}
    {%- endfor -%}
  {%- endif -%}
  {{ '<end_of_utterance>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}
"""
QWEN_TEMPLATE = """\
{%- for turn in messages -%}
  {{ '<|im_start|>' + turn.role + '\\n' }}
  {%- if turn.content is string -%}{{ turn.content }}
  {%- else -%}
    {%- for part in turn.content -%}
      {{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}
    {%- endfor -%}
  {%- endif -%}
  {{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
TEXTS = (
    "What is on this image? Describe it. User: Assistant: a red circle and a blue square. How many are there? " * 4,
    "größer café 漢字",
)
MERGED = 300
"""Tokens before the special ones: bytes and some merges."""


@cache
def tokenizer(special: tuple[str, ...] = SMOLVLM_TOKENS) -> Tokenizer:
    """A byte-level BPE tokeniser with digits apart, as SmolLM2 has it."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=MERGED, initial_alphabet=alphabet, show_progress=False)
    )
    found.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return found


def token_id(name: str, special: tuple[str, ...] = SMOLVLM_TOKENS) -> int:
    found = tokenizer(special).token_to_id(name)
    assert found is not None, name
    return int(found)


SMALL_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SMALL_TEXT: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "vocab_size": 352, "tie_word_embeddings": True,
}  # fmt: skip
# SmolVLM-256M: SigLIP-base of 512 pixels and SmolLM2-135M; from memory, for no configuration could be fetched here.
REAL_VISION: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 512, "patch_size": 16,
}  # fmt: skip
REAL_TEXT: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "vocab_size": 49280, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}  # fmt: skip


def smolvlm_config(family: str = "idefics3", real: bool = False, tied: bool = True) -> Any:
    """A configuration of `Idefics3` or `SmolVLM`."""
    kind = {"idefics3": Idefics3Config, "smolvlm": SmolVLMConfig}[family]
    ends = {"bos_token_id": token_id("<|im_start|>"), "eos_token_id": token_id("<end_of_utterance>")}
    text = {**(REAL_TEXT if real else SMALL_TEXT), **ends, "pad_token_id": token_id("<|im_end|>")}
    return kind(
        vision_config=dict(REAL_VISION if real else SMALL_VISION),
        text_config={**text, "tie_word_embeddings": tied},
        scale_factor=4 if real else 2,
        image_token_id=token_id("<image>"),
        tie_word_embeddings=tied,
    )


def smolvlm_model(
    family: str = "idefics3", real: bool = False, seed: int = 0, tied: bool = True, choice: float = 2.5
) -> Any:
    """A seeded, sharpened model, float32, eval mode."""
    kind = {"idefics3": Idefics3ForConditionalGeneration, "smolvlm": SmolVLMForConditionalGeneration}[family]
    torch.manual_seed(seed)
    model = kind(smolvlm_config(family, real, tied)).eval()
    sharpen(model.model.text_model, seed, choice)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, value in model.model.vision_model.named_parameters():
            if value.dim() > 1:
                value *= 2
            elif "bias" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
        # Features as large as the embeddings of words.
        connector = model.model.connector.modality_projection.proj.weight
        connector *= 4
    model.generation_config.eos_token_id = token_id("<end_of_utterance>")
    return model


def sharpen(text: Any, seed: int, choice: float = 2.5) -> None:
    """Embeddings of size 1, attention that chooses, no two norms alike.

    ``choice`` is how much queries and keys are enlarged. Over thirty layers 2.5 turns the rounding of fp16 into other
    answers, PyTorch's own fp16 included; 1.5 does not, but repeats itself.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = text.config.hidden_size
    with torch.no_grad():
        text.embed_tokens.weight.copy_(torch.randn(text.embed_tokens.weight.shape, generator=generator))
        for layer in text.layers:
            attention = layer.self_attn
            for part, gain in ((attention.q_proj, choice), (attention.k_proj, choice), (attention.v_proj, 1.5)):
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator) * gain / hidden**0.5)
                if part.bias is not None:
                    part.bias.copy_(torch.randn(part.bias.shape, generator=generator) * 0.3)
            for part in (attention.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                width = part.weight.shape[1]
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator) * 1.5 / width**0.5)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.copy_(1 + 0.2 * torch.randn(norm.weight.shape, generator=generator))
        text.norm.weight.copy_((1 + 0.2 * torch.randn(text.norm.weight.shape, generator=generator)) / hidden**0.5)


def write_smolvlm(
    folder: Path,
    family: str = "idefics3",
    *,
    real: bool = False,
    seed: int = 0,
    tied: bool = True,
    longest_edge: int | None = None,
    split: bool = True,
    choice: float = 2.5,
    model: Any = None,
) -> Path:
    """A checkpoint folder with model, tokeniser, chat template and processor settings; returns it."""
    model = model if model is not None else smolvlm_model(family, real, seed, tied, choice)
    model.save_pretrained(folder)
    write_tokenizer(folder, SMOLVLM_TOKENS, SMOLVLM_TEMPLATE, "<end_of_utterance>")
    tile = model.config.vision_config.image_size
    kind = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}[family]
    images = kind(
        size={"longest_edge": longest_edge or (4 * tile if real else 3 * tile)},
        max_image_size={"longest_edge": tile},
        do_image_splitting=split,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    images.save_pretrained(folder)
    grid = tile // model.config.vision_config.patch_size
    settings = {
        "processor_class": "Idefics3Processor" if family == "idefics3" else "SmolVLMProcessor",
        "image_seq_len": (grid // model.config.scale_factor) ** 2,
    }
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def qwen_config(tied: bool = True) -> Qwen2_5_VLConfig:
    """A small configuration: windows of 2 by 2 units, one layer that sees the whole image."""

    def ids(name: str) -> int:
        return token_id(name, QWEN_TOKENS)

    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 320, "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        "bos_token_id": ids("<|endoftext|>"), "eos_token_id": ids("<|im_end|>"), "pad_token_id": ids("<|endoftext|>"),
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
        "out_hidden_size": 64, "in_channels": 3,
    }  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=tied,
    )


def qwen_model(seed: int = 0, tied: bool = True) -> Any:
    """A seeded, sharpened Qwen2.5-VL, float32, eval mode."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(qwen_config(tied)).eval()
    sharpen(model.model.language_model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, value in model.model.visual.named_parameters():
            if value.dim() > 1:
                width = value[0].numel()
                value.copy_(torch.randn(value.shape, generator=generator) * 1.3 / width**0.5)
            elif "bias" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
            else:
                value.copy_(1 + 0.2 * torch.randn(value.shape, generator=generator))
    model.generation_config.eos_token_id = [token_id("<|im_end|>", QWEN_TOKENS), token_id("<|endoftext|>", QWEN_TOKENS)]
    return model


def write_qwen(folder: Path, *, seed: int = 0, tied: bool = True, max_pixels: int = 4096, model: Any = None) -> Path:
    """A checkpoint folder with model, tokeniser, chat template and processor settings; returns it."""
    model = model if model is not None else qwen_model(seed, tied)
    model.save_pretrained(folder)
    write_tokenizer(folder, QWEN_TOKENS, QWEN_TEMPLATE, "<|im_end|>")
    vision = model.config.vision_config
    Qwen2VLImageProcessorPil(
        size={"shortest_edge": 256, "longest_edge": max_pixels}, patch_size=vision.patch_size, merge_size=2
    ).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, special: tuple[str, ...], template: str, end: str) -> None:
    """``tokenizer.json`` with its configuration, and the chat template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer(special).to_str()), eos_token=end, pad_token="<|im_end|>"
    )
    fast.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: blocks of colour with noise, so that every tile differs."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (-(-height // 16), -(-width // 16), 3))
    fine = np.kron(coarse, np.ones((16, 16, 1), np.int64))[:height, :width]
    return np.clip(fine + random.integers(-20, 21, fine.shape), 0, 255).astype(np.uint8)


PICTURES = (("wide", picture(50, 97)), ("tall", picture(70, 40, 1)))
"""What the tests' exports are measured on."""


@contextmanager
def without_memory() -> Iterator[None]:
    """Leaves out what an export measures in processes of their own, which takes most of its time."""
    from pixano_edge.export import pipeline
    from pixano_edge.export.vlm import export

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.GraphExport, "measure_memory", lambda self: [])
        patch.setattr(export, "measure_file", lambda *_: None)
        yield
