"""What a language model's decoder is given for real questions: prompts and its own greedy answers, as embeddings.

The engine runs the bundle's fp32 variant as for a user: chat template, tokeniser, image processing, vision encoder.
Each turn goes to a file at once, so that any number of them takes the memory of one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.bundle.files import os_errors
from pixano_edge.engine.contracts import decoder as contract
from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.models.decoder.model import DecoderModel, Prompt, _prefill, _result
from pixano_edge.engine.models.decoder.opening import open_vlm
from pixano_edge.engine.models.text.messages import read_conversation

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

TOKENS = 32
"""Of an answer, at most."""


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        text: What is asked.
    """

    image: Pixels
    text: str

    def key(self, bundle_hash: str, tokens: int) -> str:
        """Hexadecimal digest of what the turn depends on."""
        told = repr((bundle_hash, tokens, self.text, self.image.shape)).encode()
        return hashlib.sha256(told + np.ascontiguousarray(self.image).tobytes()).hexdigest()


@dataclass(frozen=True)
class Turn:
    """What enters the decoder for one question and its answer.

    Attributes:
        prompt: (1, N, D) float32 words and features.
        answer: (1, M, D) float32 tokens of the greedy answer; M may be 0.
        tokens: (M,) their ids.
        positions: (3, N + M) int32 rotary positions; None for a decoder that takes none.
    """

    prompt: Floats
    answer: Floats
    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int32] | None = None


class Turns:
    """Turns on disk, in the order of their files' names; may be gone through any number of times.

    Args:
        files: As `record_turns` wrote them.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Turn]:
        for file in self.files:
            with np.load(file, allow_pickle=False) as held:
                positions = held["positions"] if "positions" in held.files else None
                yield Turn(held["prompt"], held["answer"], held["tokens"], positions)


def record_turns(
    bundle: Bundle | Path | str,
    questions: Iterable[Question],
    folder: Path,
    *,
    tokens: int = TOKENS,
    threads: int | None = None,
    on_turn: Callable[[], None] = lambda: None,
) -> Turns:
    """Asks the bundle's fp32 variant on the CPU and writes what its decoder was given.

    Args:
        bundle: An open bundle or its folder.
        questions: One turn each. What is in `folder` of the same bundle, question and `tokens` is not asked again.
        folder: Made when it is not there.
        tokens: Most tokens of an answer.
        threads: Threads of one call.
        on_turn: Called after each.

    Raises:
        EdgeError: The bundle does not open, a question does not fit, or the disk is full.
    """
    with os_errors(f"making '{folder.name}'"):
        folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    with closing(
        open_vlm(opened, device="cpu", backend="onnxruntime", precision="fp32", threads=threads, prove=False)
    ) as model:
        for index, question in enumerate(questions):
            file = folder / f"{index:05d}.npz"
            key = question.key(opened.hash, tokens)
            if _key(file) != key:
                with os_errors(f"writing '{file.name}'"):
                    _save(file, ask(model, question, tokens), key)
            files.append(file)
            on_turn()
    if not files:
        raise EdgeError("There are no questions to collect activations with.", "Give at least one picture.")
    return Turns(files)


def ask(model: DecoderModel, question: Question, tokens: int) -> Turn:
    """One greedy answer of an open model.

    Raises:
        PromptError: The question does not fit.
        DeviceError: The back end failed.
    """
    conversation = read_conversation(question.text, [question.image])
    prompt = model.prepare(conversation, [question.image])
    room = min(tokens, model.context - len(prompt.ids) - 1)
    ends = frozenset(model._decoder.constants.eos_ids)
    features = [(part.slots, _result(part.encode())) for part in prompt.images]
    chosen: list[int] = []
    with model._decoder.conversation(prompt.keys) as lane:
        logits = _result(_prefill(lane, prompt, 0, features))
        while len(chosen) < room and (token := int(logits.argmax())) not in ends:
            chosen.append(token)
            logits = lane.step(token, model._position(prompt, len(chosen) - 1))
    embeds = _embed(model, np.concatenate([prompt.ids, np.array(chosen, np.int32)]))
    for slots, rows in features:
        embeds[0, slots] = rows
    count = len(prompt.ids)
    return Turn(embeds[:, :count], embeds[:, count:], np.array(chosen, np.int64), _positions(prompt, len(chosen)))


def _embed(model: DecoderModel, ids: npt.NDArray[np.int32]) -> Floats:
    """(1, S, D) embeddings of some tokens; a copy."""
    with model._decoder.locked():
        binding = model._decoder.embed.prepare({"S": len(ids)})
        binding.write(contract.INPUT_IDS, ids[None])
        binding.run()
        found: Floats = binding.read(contract.EMBEDS).copy()
    return found


def _positions(prompt: Prompt, answered: int) -> npt.NDArray[np.int32] | None:
    if prompt.positions is None:
        return None
    later = np.broadcast_to(
        np.arange(prompt.next_position, prompt.next_position + answered, dtype=np.int32), (3, answered)
    )
    return np.concatenate([prompt.positions, later], axis=1)


def _key(file: Path) -> str:
    """Of a turn on disk; empty where there is none."""
    if not file.exists():
        return ""
    with np.load(file, allow_pickle=False) as held:
        return str(held["key"])


def _save(file: Path, turn: Turn, key: str) -> None:
    """Writes a turn in one step, so that a file is whole or absent."""
    content: dict[str, Any] = {"prompt": turn.prompt, "answer": turn.answer, "tokens": turn.tokens, "key": key}
    if turn.positions is not None:
        content["positions"] = turn.positions
    partial = file.with_name(f".{file.name}.part")
    try:
        with partial.open("wb") as out:
            np.savez(out, **content)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
