"""A small byte-level tokeniser with SmolVLM's control tokens, and its chat template."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from pixano_edge.engine.models.text.tokenizer import TextTokenizer

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    *(f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)),
)
TEXTS = ["What is on this image? Describe it. User: Assistant: a red circle and a blue square " * 4, "größer café 漢字"]

TEMPLATE = """<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}\
{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}\
{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}\
{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
"""As in the released checkpoints."""


@cache
def tokenizer_json() -> str:
    """Content of a ``tokenizer.json``."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    found.train_from_iterator(TEXTS, trainer)
    found.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    return found.to_str()


@cache
def tokenizer() -> TextTokenizer:
    return TextTokenizer(tokenizer_json())
