"""The words of the demo detector: phrases for the objects of the scenes, their templates, and a small tokenizer.

A phrase names a shape, alone or with its colour or its pattern: "circle", "red circle", "striped circle". The patterns
``photographic`` and ``noisy`` have no word: an object that wears them is found by its shape or colour.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixano_edge.export.demo.scenes import SHAPES, SceneObject
from pixano_edge.export.demo.textures import COLORS

KINDS: tuple[str, ...] = ("shape", "color", "pattern")
NAMED_PATTERNS: tuple[str, ...] = ("plain", "striped", "checked", "dotted")
TEMPLATES: tuple[str, ...] = ("{}", "a {}", "a photo of a {}", "the {}", "one {}", "a picture of a {}")
SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("disc", "disk"),
    "ellipse": ("oval",),
    "ring": ("donut", "doughnut"),
    "cross": ("plus", "plus sign"),
    "crescent": ("moon",),
    "bar": ("stick", "rod"),
    "gray": ("grey",),
    "purple": ("violet",),
    "cyan": ("turquoise",),
    "striped": ("stripy",),
    "checked": ("checkered", "chequered"),
    "dotted": ("spotted",),
    "plain": ("solid",),
}
# Words that name nothing in the scenes: asked for in training, so that they find nothing.
STRANGERS: tuple[str, ...] = (
    "cat", "dog", "car", "person", "tree", "house", "chair", "table", "bird", "boat", "bottle", "flower", "horse",
    "train", "lamp", "phone", "book", "shoe", "hat", "fish", "apple", "bicycle", "window", "door", "cloud", "cup",
)  # fmt: skip

BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "!"
MAX_TOKENS = 16


@dataclass(frozen=True)
class Phrase:
    """What is asked for: a shape, and its colour or its pattern, or neither."""

    shape: str
    color: str | None = None
    pattern: str | None = None

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`."""
        return "color" if self.color else "pattern" if self.pattern else "shape"

    @property
    def text(self) -> str:
        """The phrase in its plain form, such as "red circle"."""
        return " ".join(word for word in (self.color, self.pattern, self.shape) if word)

    def matches(self, obj: SceneObject) -> bool:
        """Whether the phrase is true of an object."""
        return (
            obj.shape == self.shape and self.color in (None, obj.color) and self.pattern in (None, obj.pattern)
        )  # fmt: skip


@functools.cache
def all_phrases() -> tuple[Phrase, ...]:
    """Every phrase: 12 shapes, 144 with a colour, 48 with a pattern."""
    bare = [Phrase(shape) for shape in SHAPES]
    colored = [Phrase(shape, color=color) for color in COLORS for shape in SHAPES]
    patterned = [Phrase(shape, pattern=pattern) for pattern in NAMED_PATTERNS for shape in SHAPES]
    return (*bare, *colored, *patterned)


def phrases_of(obj: SceneObject) -> tuple[Phrase, ...]:
    """The two or three phrases that are true of an object."""
    found = [Phrase(obj.shape), Phrase(obj.shape, color=obj.color)]
    if obj.pattern in NAMED_PATTERNS:
        found.append(Phrase(obj.shape, pattern=obj.pattern))
    return tuple(found)


def spoken(phrase: Phrase, rng: np.random.Generator) -> str:
    """A phrase as somebody may type it: now and then a synonym, in one of :data:`TEMPLATES`."""
    words = []
    for word in phrase.text.split():
        others = SYNONYMS.get(word, ())
        words.append(others[rng.integers(len(others))] if others and rng.random() < 0.2 else word)
    template = TEMPLATES[0] if rng.random() < 0.4 else TEMPLATES[rng.integers(1, len(TEMPLATES))]
    return template.format(" ".join(words))


def stranger(rng: np.random.Generator) -> str:
    """A text that names nothing in any scene: another noun, or letters at random, sometimes with a known colour."""
    if rng.random() < 0.5:
        word = STRANGERS[rng.integers(len(STRANGERS))]
    else:
        word = "".join(chr(97 + letter) for letter in rng.integers(0, 26, rng.integers(3, 8)))
    color = list(COLORS)[rng.integers(len(COLORS))] if rng.random() < 0.4 else None
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(f"{color} {word}" if color else word)


def vocabulary() -> tuple[str, ...]:
    """Every known word, sorted: each becomes one token."""
    texts: list[str] = [*SHAPES, *COLORS, *NAMED_PATTERNS, *TEMPLATES, *STRANGERS, "object", "shape"]
    texts += [text for others in SYNONYMS.values() for text in others]
    words = {word for text in texts for word in text.replace("{}", " ").split()}
    return tuple(sorted({*words, *(f"{shape}s" for shape in SHAPES)}))


def build_tokenizer() -> Any:
    """A ``CLIPTokenizer`` (transformers) of byte pairs in which every known word is one token.

    All 256 bytes are tokens, inside a word and at its end, so any text can be written. As in CLIP, the end of the text
    has the highest id (pooling looks for it) and "!", id 0, fills up.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    trainer_of = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer_of.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    trainer_of.train_from_iterator(vocabulary(), trainer)
    merges = [_pair(merge) for merge in _merges(trainer_of)]
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges), BOS, EOS]
    names = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=names,
        merges=merges,  # type: ignore[arg-type]  # pairs are what tokenizers takes
        unk_token=EOS,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_TOKENS,
    )


def _merges(tokenizer: Any) -> list[Any]:
    import json

    return list(json.loads(tokenizer.to_str())["model"]["merges"])


def _pair(merge: str | Iterable[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level vocabularies, in the order of CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
