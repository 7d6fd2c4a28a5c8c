"""The demo language model's tokenizer, chat template and processor files: those of SmolVLM, with a small vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pixano_edge.export.demo.questions import corpus

IM_START, END, PAD = "<|im_start|>", "<end_of_utterance>", "<pad>"
IMAGE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
SPECIAL = (PAD, IM_START, END, IMAGE, FAKE, GLOBAL, *ROWS)
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% if message['content'][0]['type'] != 'image' %}{{ ' ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""What SmolVLM's own template says, in fewer words: no videos."""
SYSTEM_WORDS = ("User", "Assistant", "System", "User:", "Assistant:", "System:")


def build_tokenizer() -> Any:
    """A fast tokenizer (transformers) of byte-level pairs in which every word of the questions is one token; all 256
    bytes are tokens, so any text can be written."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([*corpus(), *SYSTEM_WORDS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=IM_START,
        eos_token=END,
        pad_token=PAD,
        unk_token=None,
        model_max_length=1024,
        extra_special_tokens={
            "image_token": IMAGE,
            "fake_image_token": FAKE,
            "global_image_token": GLOBAL,
            "end_of_utterance_token": END,
        },
        chat_template=TEMPLATE,
    )


def write_processor(folder: Path, tokenizer: Any, side: int, image_tokens: int) -> None:
    """Writes what ``SmolVLMProcessor`` loads: tokenizer, chat template, and the settings of its image processor, by
    which every picture becomes one square of ``side`` pixels and ``image_tokens`` tokens."""
    tokenizer.save_pretrained(folder)
    settings = {
        "image_processor_type": "SmolVLMImageProcessor",
        "processor_class": "SmolVLMProcessor",
        "do_convert_rgb": True,
        "do_image_splitting": False,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": side},
        "resample": 1,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": side},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    kind = {"processor_class": "SmolVLMProcessor", "image_seq_len": image_tokens}
    (folder / "processor_config.json").write_text(json.dumps(kind, indent=2) + "\n")
