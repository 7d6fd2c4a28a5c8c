"""Tiny OWLv2 and OWL-ViT checkpoints with seeded weights and a small CLIP tokeniser, in transformers' folder format.

Plain random weights hide mistakes or drown them: the stock start values give objectness logits of 3e4 and one score
for all. The weights here are redrawn so that boxes, scores, text and place all matter and nothing saturates.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
)

PIECES = {
    "owlv2": (Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessorPil),
    "owlvit": (OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessorPil),
}
_WORDS = (
    "a cat dog coffee cup spoon wooden table whisker saucer on ear metal teaspoon nose pair of green eyes foam person "
    "bed lamp window photo the object remote control remotes"
)
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"


def make_tokenizer() -> CLIPTokenizer:
    """Byte pairs as CLIP's: all bytes, some words as one token each, start and end last, "!" for padding."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator([_WORDS], trainer)
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in json.loads(trained.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters.insert(0, letters.pop(letters.index(PAD)))
    tokens = [*letters, *(f"{x}</w>" for x in letters), *("".join(m) for m in merges), START, END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        model_max_length=16,
    )


def tiny_config(family: str, vocabulary: int, image_size: int = 96, patch_size: int = 16, **vision: Any) -> Any:
    """A narrow model with all its parts; `vision` replaces values of the vision tower."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
    seen = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
        **vision,
    }
    return PIECES[family][0](text_config=text, vision_config=seen, projection_dim=32)


@torch.no_grad()
def sharpen(model: Any, seed: int = 0) -> Any:
    """Redraws every weight so that each input matters visibly; returns the model. Deterministic in `seed`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            normal(module.weight, module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                normal(module.bias, 0.1)
        elif isinstance(module, nn.LayerNorm):
            normal(module.weight, 0.1, mean=1.0)
            normal(module.bias, 0.1)
        elif isinstance(module, nn.Embedding):
            normal(module.weight, 0.7)
    base = model.owlv2 if hasattr(model, "owlv2") else model.owlvit
    # Single attention heads that look somewhere: with plain weights every token sees the mean of all.
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.weight.mul_(1.7)
    normal(base.vision_model.embeddings.class_embedding, 0.7)
    head = model.class_head
    for part, mean in ((head.logit_scale, 8.0), (head.logit_shift, -0.3)):
        part.weight.mul_(0.3)
        part.bias.fill_(mean)
    # Boxes of a few patches instead of one.
    model.box_head.dense2.bias.copy_(torch.tensor([0.0, 0.0, 1.2, 1.2]))
    return model.eval()


def make_model(family: str = "owlv2", seed: int = 0, **sizes: Any) -> Any:
    """A sharpened tiny model in eval mode."""
    vocabulary = len(make_tokenizer().get_vocab())
    return sharpen(PIECES[family][1](tiny_config(family, vocabulary, **sizes)), seed)


def save_checkpoint(model: Any, folder: Path) -> Path:
    """Saves model, tokeniser and image processor, and a model card that says Apache-2.0: the weights are random."""
    family = model.config.model_type
    side = model.config.vision_config.image_size
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    PIECES[family][2](size={"height": side, "width": side}).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Seeded random weights\n", encoding="utf-8")
    return folder
