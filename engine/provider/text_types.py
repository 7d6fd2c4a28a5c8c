"""Data of text requests beyond the seed interface: more fields, and answers in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .types import TextImageConditionalGenerationInput, TextImageConditionalGenerationOutput


@dataclass
class EdgeTextImageConditionalGenerationInput(TextImageConditionalGenerationInput):
    """`TextImageConditionalGenerationInput` with what Pixano Edge takes beside it.

    ``prompt`` is a text, or messages as OpenAI's interface has them (see `read_conversation`); `images` are ``data:``
    URIs, paths or bytes, and win over those that messages name. ``temperature`` 0 always takes the most probable token.

    Attributes:
        top_p: Only the most probable tokens that reach it together are drawn from.
        seed: Of the random numbers; None takes a new one each time.
        stop: Strings that end the answer.
        system: One more message in front, the model's instructions.
    """

    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] | str | None = None
    system: str | None = None


@dataclass
class TextChunk:
    """A piece of an answer.

    Attributes:
        text: To be shown after what came before; whole characters.
        output: With the last chunk, whose text is empty: the whole answer. None before.
        metadata: With the last chunk: what a result's metadata holds.
    """

    text: str
    output: TextImageConditionalGenerationOutput | None = None
    metadata: dict[str, Any] | None = None
