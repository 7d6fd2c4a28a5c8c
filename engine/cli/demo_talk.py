"""The questions of `pixano-edge demo`: answers about the bundled pictures beside the right ones."""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.decoder.base import Generated, GenerationOptions
from ..models.images import decode_image
from ..models.text.messages import read_conversation

if TYPE_CHECKING:
    from ..models.decoder.model import DecoderModel

_OPTIONS = GenerationOptions(max_new_tokens=80)


@dataclass(frozen=True)
class TalkResult:
    """One answer, greedy.

    Attributes:
        picture: Its file.
        question: What was asked.
        answer: What the model said.
        right: What it should say, word for word.
        first_seconds: Until the first token, with the picture's encoding where it was new.
        seconds: Until the whole answer.
        tokens: Of the answer.
        reused: Tokens of the prompt that were known from the question before.
    """

    picture: str
    question: str
    answer: str
    right: str
    first_seconds: float
    seconds: float
    tokens: int
    reused: int

    @property
    def exact(self) -> bool:
        return self.answer == self.right


def read_questions(folder: Path) -> list[tuple[Path, list[tuple[str, str]]]]:
    """Pictures of a folder written by ``pixano_edge.export.demo.talk_pictures``, with (question, right answer) each."""
    content: dict[str, Any] = json.loads((folder / "talk.json").read_text(encoding="utf-8"))
    return [
        (folder / picture["file"], [(q["question"], q["answer"]) for q in picture["questions"]])
        for picture in content["pictures"]
    ]


def run_questions(model: DecoderModel, picture: Path, questions: list[tuple[str, str]]) -> list[TalkResult]:
    """Asks everything about one picture.

    Raises:
        EdgeError: The picture cannot be read, or the model failed.
    """
    image = decode_image(picture)
    results = []
    for question, right in questions:
        start, first = time.perf_counter(), None
        with closing(model.stream(read_conversation(question, [picture.name]), [image], _OPTIONS)) as steps:
            for step in steps:
                if step is not None and first is None:
                    first = time.perf_counter() - start
        assert isinstance(step, Generated)  # a stream ends with its answer
        assert first is not None
        seconds, usage = time.perf_counter() - start, step.usage
        said = step.text.strip()
        results.append(TalkResult(picture.name, question, said, right, first, seconds, usage.completion, usage.reused))
    return results
