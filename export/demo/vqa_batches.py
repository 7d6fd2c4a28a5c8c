"""Training batches for the demo's language model: one picture with several questions in one sequence.

The questions of a picture share its tokens and cannot see each other: every one continues the picture as if it were the
only one (positions start anew, the attention mask of :func:`~.smolvlm_model.attention_mask` keeps them apart). What is
learned is therefore exactly what a prompt with one question needs, for the price of one picture.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pixano_edge.export.demo.prompts import prepared
from pixano_edge.export.demo.questions import TYPES, Question, ask
from pixano_edge.export.demo.smolvlm_model import GRID, IMAGE_TOKENS, PATCH
from pixano_edge.export.demo.vlm_words import END, FAKE, GLOBAL, IM_START, IMAGE, build_tokenizer
from pixano_edge.export.demo.vqa_scenes import COLOR_NAMES, SHAPES, SIZE, TalkScene, talk_scene

BLOCK = 8
"""Batches that are made together."""
ASKED = (*TYPES, *TYPES, "caption")
"""What is asked about every picture, in the order of the sequence."""


@dataclass
class VqaBatch:
    """B pictures, each with its questions in a sequence of L tokens.

    ``images`` (B, S, S, 3) uint8 RGB; ``tokens``, ``positions`` (B, L) int64; ``group`` (B, L) int64: 0 the picture and
    what stands before it, then 1, 2, ... the questions, -1 filled up; ``answer`` (B, L) bool: tokens to be learned;
    ``shape``, ``color`` (B, GRID, GRID) int64: what lies under the middle of each patch, the last class for nothing.
    """

    images: NDArray[np.uint8]
    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    group: NDArray[np.int64]
    answer: NDArray[np.bool_]
    shape: NDArray[np.int64]
    color: NDArray[np.int64]


class Writer:
    """Texts to tokens, with the prompts of the chat template; keeps what it has written."""

    def __init__(self) -> None:
        tokenizer = build_tokenizer()
        self._encode = functools.cache(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))
        self.head = self._encode(f"{IM_START}User:{FAKE}{GLOBAL}{IMAGE * IMAGE_TOKENS}{FAKE}")

    def turn(self, question: Question) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What follows the picture, and the answer with its end."""
        return self._encode(f"{question.text}{END}\nAssistant:"), self._encode(f" {question.answer}{END}")


@functools.cache
def _writer() -> Writer:
    return Writer()


def sequence(questions: list[Question]) -> list[tuple[int, int, int, bool]]:
    """(token, position, group, is answer) of every token of one picture with its questions."""
    writer = _writer()
    rows = [(token, at, 0, False) for at, token in enumerate(writer.head)]
    for number, question in enumerate(questions, 1):
        asked, answer = writer.turn(question)
        for at, token in enumerate((*asked, *answer), len(writer.head)):
            rows.append((token, at, number, at >= len(writer.head) + len(asked)))
    return rows


def make_batch(scenes: list[TalkScene], rng: np.random.Generator) -> VqaBatch:
    """The batch of some scenes, with questions drawn from ``rng``."""
    rows = [sequence([q for kind in ASKED if (q := ask(scene, kind, rng)) is not None]) for scene in scenes]
    length = max(len(row) for row in rows)
    table = np.zeros((len(rows), length, 4), np.int64)
    table[..., 2] = -1
    for out, row in zip(table, rows, strict=True):
        out[: len(row)] = row
    middle = slice(PATCH // 2, None, PATCH)
    shape = np.full((len(rows), GRID, GRID), len(SHAPES), np.int64)
    color = np.full((len(rows), GRID, GRID), len(COLOR_NAMES), np.int64)
    for i, scene in enumerate(scenes):
        owner = scene.owner[middle, middle]
        for k, thing in enumerate(scene.things):
            shape[i][owner == k] = SHAPES.index(thing.shape)
            color[i][owner == k] = COLOR_NAMES.index(thing.color)
    images = np.stack([scene.image for scene in scenes])
    assert images.shape[1] == SIZE
    return VqaBatch(images, table[..., 0], table[..., 1], table[..., 2], table[..., 3] > 0, shape, color)


def make_block(block: int, seed: int, batch: int) -> list[VqaBatch]:
    """``BLOCK`` training batches of ``batch`` new scenes each; a pure function."""
    rng = np.random.default_rng([31, seed, block])
    first = (seed * 10**6 + block) * BLOCK * batch
    scenes = [talk_scene(first + k, "train") for k in range(BLOCK * batch)]
    return [make_batch(scenes[k * batch : (k + 1) * batch], rng) for k in range(BLOCK)]


def vqa_batches(first: int, seed: int, batch: int) -> Iterator[VqaBatch]:
    """Batches ``first``, ``first + 1``, ... in order, prepared by one process that runs two blocks ahead."""
    skip = first % BLOCK
    for block in prepared(functools.partial(make_block, seed=seed, batch=batch), first // BLOCK, 2):
        yield from block[skip:]
        skip = 0
