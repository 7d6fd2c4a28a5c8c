"""SmolVLM checkpoints with seeded random weights, for measuring speed where real ones are not at hand.

Matrices are drawn with a gain on 1 / sqrt(fan in), so that attention chooses and answers do not repeat one token. The
tokeniser is made here: bytes, a few words, and SmolVLM's control tokens.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pixano_edge.engine.errors import EdgeError

from .checkpoints import cache_root

SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "tiny": (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 64, "patch_size": 8},
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 2048},
        2,
    ),
    "256M": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "image_size": 512, "patch_size": 16},
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49_280, "max_position_embeddings": 8192},
        4,
    ),
    "500M": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "image_size": 512, "patch_size": 16},
        {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
         "num_key_value_heads": 5, "vocab_size": 49_280, "max_position_embeddings": 8192},
        4,
    ),
}  # fmt: skip
"""Vision encoder, language model, and patches per side that become one feature. The shapes of SmolVLM2-256M and 500M,
from memory: no configuration could be fetched where this was written."""

TEMPLATE = """<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}\
{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}\
{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}\
{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
CONTROL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>",
    "<global-img>", *(f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)),
)  # fmt: skip
TEXT = "Describe this image in detail. What is on it, and how many are there? User: Assistant: a cup of coffee, a spoon"


def random_smolvlm(size: str, seed: int = 0) -> Path:
    """Folder of such a checkpoint in transformers' format, made once and kept in the cache.

    Args:
        size: A key of `SIZES`.
        seed: Of the weights.

    Raises:
        EdgeError: Unknown size.
    """
    if size not in SIZES:
        raise EdgeError(f"There is no random SmolVLM '{size}'.", f"Sizes: {', '.join(SIZES)}.")
    folder = cache_root() / f"smolvlm-{size}-random{seed}"
    if not (folder / "config.json").is_file():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        partial.mkdir(parents=True, exist_ok=True)
        _save(size, seed, partial)
        note = "---\nlicense: apache-2.0\n---\nSeeded random weights made by pixano-edge bench; they know nothing.\n"
        (partial / "README.md").write_text(note, encoding="utf-8")
        partial.replace(folder)
    return folder


def export_smolvlm(checkpoint: Path, destination: Path) -> Path:
    """Bundle of a checkpoint folder: fp32, and int4 beside it."""
    from pixano_edge.export.smolvlm import export_smolvlm as export

    return export(checkpoint, destination, variants=("fp32", "int4"), tokens=8)


def _save(size: str, seed: int, folder: Path) -> None:
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        PreTrainedTokenizerFast,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessorPil,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    words.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in CONTROL])
    ids = {name: words.token_to_id(name) for name in CONTROL}
    vision, text, scale = SIZES[size]
    text = {
        **text, "model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}, "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": ids["<end_of_utterance>"], "pad_token_id": ids["<|im_end|>"],
    }  # fmt: skip
    config = SmolVLMConfig(
        vision_config=dict(vision), text_config=text, scale_factor=scale, image_token_id=ids["<image>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = SmolVLMForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:
                gain = 1.0 if "embed_tokens" in name else 1.5 / value[0].numel() ** 0.5
                value.copy_(torch.randn(value.shape) * gain)
        # Logits of a few units.
        model.model.text_model.norm.weight.mul_(text["hidden_size"] ** -0.5)
    model.generation_config.eos_token_id = ids["<end_of_utterance>"]
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end_of_utterance>", pad_token="<|im_end|>")
    fast.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    side = vision["image_size"]
    half = [0.5, 0.5, 0.5]
    SmolVLMImageProcessorPil(
        size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side}, image_mean=half, image_std=half
    ).save_pretrained(folder)
    length = (side // vision["patch_size"] // scale) ** 2
    settings = {"processor_class": "SmolVLMProcessor", "image_seq_len": length}
    (folder / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
