"""OWLv2 and Grounding DINO checkpoints with seeded random weights, for measuring speed where real ones are not at hand.

Plain start values of transformers saturate (OWLv2) or answer the same whatever they see (Grounding DINO), so matrices
are drawn with a gain on 1 / sqrt(fan in) and everything that starts at zero gets values: an error shows in the boxes.
Tokenisers are made here, with the size of the real vocabularies; they know a few words and write others as letters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pixano_edge.engine.errors import EdgeError

from .checkpoints import cache_root

OWLV2, GROUNDING_DINO = "owlv2", "grounding-dino"

WORDS = (
    "a an the of on in pair cat dog remote control coffee cup spoon wooden metal table person bed lamp whisker saucer "
    "ear teaspoon nose green eyes foam car chair window door book phone bottle picture"
)

OWL_SIZES: dict[str, tuple[dict[str, int], dict[str, int], int]] = {
    "demo": (
        {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 6, "num_attention_heads": 6},
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
        256,
    ),
    "small": (
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6},
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4},
        480,
    ),
    "base": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
        960,
    ),
}
"""Vision tower, text tower and image size in pixels; ``base`` is google/owlv2-base-patch16, ``demo`` the packaged."""

_SMALL_TEXT = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
DINO_SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], tuple[int, int]]] = {
    "demo": (
        {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 3, 6], "window_size": 7},
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
        {"d_model": 64, "num_queries": 100, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256},
        (256, 426),
    ),
    "small": (
        {"embed_dim": 48, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
        _SMALL_TEXT,
        {"num_queries": 300, "encoder_layers": 3, "decoder_layers": 3},
        (480, 800),
    ),
    "tiny": (
        {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}, {}, {}, (800, 1333),
    ),
    "base": (
        {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12, "image_size": 384},
        {}, {}, (800, 1333),
    ),
}  # fmt: skip
"""Backbone, text encoder, the rest, and shortest and longest edge; ``tiny`` and ``base`` are IDEA-Research's."""


def random_detector(family: str, size: str, image_size: int | None = None, seed: int = 0) -> Path:
    """Folder of such a checkpoint in transformers' format, made once and kept in the cache.

    Args:
        family: ``owlv2`` or ``grounding-dino``.
        size: A key of `OWL_SIZES` or `DINO_SIZES`.
        image_size: Side of the model input, or its shortest edge; None for that of the size.
        seed: Of the weights.

    Raises:
        EdgeError: Unknown family or size, or an image size that does not fit.
    """
    makers: dict[str, tuple[dict[str, Any], Callable[..., None], int]] = {
        OWLV2: (OWL_SIZES, _save_owl, 16),
        GROUNDING_DINO: (DINO_SIZES, _save_dino, 32),
    }
    if family not in makers:
        raise EdgeError(f"There is no random '{family}'.", f"Families: {', '.join(makers)}.")
    sizes, save, step = makers[family]
    if size not in sizes or (image_size is not None and (image_size < 8 * step or image_size % step)):
        raise EdgeError(
            f"There is no random {family} '{size}'{f' at {image_size} pixels' if image_size else ''}.",
            f"Sizes: {', '.join(sizes)}; the image size is a multiple of {step} from {8 * step} on.",
        )
    side = image_size or (OWL_SIZES[size][2] if family == OWLV2 else DINO_SIZES[size][3][0])
    folder = cache_root() / f"{family}-{size}-{side}-random{seed}"
    if not (folder / "config.json").is_file():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        partial.mkdir(parents=True, exist_ok=True)
        save(size, side, seed, partial)
        note = "---\nlicense: apache-2.0\n---\nSeeded random weights made by pixano-edge bench; they know nothing.\n"
        (partial / "README.md").write_text(note, encoding="utf-8")
        partial.rename(folder)
    return folder


def export_detector(checkpoint: Path, destination: Path) -> Path:
    """Bundle of a detector's checkpoint folder, fp32 only.

    Raises:
        EdgeError: No configuration of a detector is there, or the export failed.
    """
    try:
        kind = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError) as error:
        raise EdgeError(
            f"'{checkpoint}' has no readable config.json: {error}.", "Give a transformers folder."
        ) from error
    if kind in ("owlv2", "owlvit"):
        from pixano_edge.export.owlv2 import export_owl

        return export_owl(checkpoint, destination, kind, variants=("fp32",))
    if kind == GROUNDING_DINO:
        from pixano_edge.export.grounding_dino import export_grounding_dino

        return export_grounding_dino(checkpoint, destination, variants=("fp32",))
    raise EdgeError(f"'{checkpoint}' is a '{kind}', which is no detector.", "Give an OWLv2 or Grounding DINO folder.")


def _save_owl(size: str, side: int, seed: int, folder: Path) -> None:
    import torch
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessorPil
    from transformers.utils import logging

    logging.disable_progress_bar()
    vision, text, _ = OWL_SIZES[size]
    count = 49_408
    text_config = {
        **text, "vocab_size": count, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": count - 2,
        "eos_token_id": count - 1,
    }  # fmt: skip
    vision_config = {**vision, "image_size": side, "patch_size": 16}
    config = Owlv2Config(text_config=text_config, vision_config=vision_config, projection_dim=text["hidden_size"])
    model = Owlv2ForObjectDetection(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        _draw(model, generator)
        for name, module in model.named_modules():
            if name.endswith(("q_proj", "k_proj")):
                module.weight.mul_(1.7)  # heads that look somewhere
        for part, mean in ((model.class_head.logit_scale, 8.0), (model.class_head.logit_shift, -0.3)):
            part.weight.mul_(0.3)
            part.bias.fill_(mean)
        model.box_head.dense2.bias.copy_(torch.tensor([0.0, 0.0, 1.2, 1.2]))  # boxes of a few patches
    model.save_pretrained(folder)
    letters, merges = _byte_pairs()
    letters.insert(0, letters.pop(letters.index("!")))  # id 0 is the padding
    start, end = "<|startoftext|>", "<|endoftext|>"
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges)]
    tokens = list(dict.fromkeys(words))
    tokens += [f"<unused{i}>" for i in range(count - 2 - len(tokens))] + [start, end]
    make: Any = CLIPTokenizer  # its annotations know pairs as text only
    make(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        unk_token=end,
        bos_token=start,
        eos_token=end,
        pad_token="!",
        model_max_length=16,
    ).save_pretrained(folder)
    Owlv2ImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)


def _save_dino(size: str, side: int, seed: int, folder: Path) -> None:
    import torch
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
        GroundingDinoProcessor,
        SwinConfig,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    backbone, text, rest, (shortest, longest) = DINO_SIZES[size]
    bert, swin = BertConfig(**text), {**backbone, "out_features": ["stage2", "stage3", "stage4"]}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(**swin),
        text_config=bert,
        disable_custom_kernels=True,
        **rest,
    )
    torch.manual_seed(seed)
    model = GroundingDinoForObjectDetection(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sampling_offsets" in name:
                continue  # their start values are a star around each place
            if parameter.ndim > 1 and "embeddings" not in name and "level_embed" not in name:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
            elif name.endswith(("vision_param", "text_param")):
                parameter.copy_(0.5 + 0.5 * torch.rand(parameter.shape, generator=generator))
            elif parameter.ndim == 1 and name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            if "bbox_embed" in name and name.endswith("layers.2.weight"):
                parameter.mul_(0.5)
        model.model.decoder.layer_norm.weight.mul_(0.25)  # logits of a few units: probabilities of 1 would tie
    model.save_pretrained(folder)
    edges = {"shortest_edge": side, "longest_edge": side * longest // shortest}
    vocabulary = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    letters = [chr(code) for code in (*range(ord("a"), ord("z") + 1), *range(ord("0"), ord("9") + 1))]
    words = [*letters, *(f"##{letter}" for letter in letters), ",", "-"]
    vocabulary |= {token: index for index, token in enumerate(words, 2000)}
    used = set(vocabulary.values())
    vocabulary |= {f"[unused{i}]": i for i in range(int(bert.vocab_size)) if i not in used}
    GroundingDinoProcessor(GroundingDinoImageProcessorPil(size=edges), BertTokenizer(vocab=vocabulary)).save_pretrained(
        folder
    )


def _draw(model: Any, generator: Any) -> None:
    """Redraws linear, convolution, normalisation and embedding weights."""
    import torch
    from torch import nn

    def normal(tensor: Any, std: float, mean: float = 0.0) -> None:
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


def _byte_pairs() -> tuple[list[str], list[tuple[str, str]]]:
    """The printable letter of each byte in byte-level vocabularies, and pairs that make `WORDS` one token each: OWLv2
    takes 16 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator([WORDS], trainer)
    found = [m.split(" ") if isinstance(m, str) else m for m in json.loads(trained.to_str())["model"]["merges"]]
    return sorted(pre_tokenizers.ByteLevel.alphabet()), [(first, second) for first, second in found]
