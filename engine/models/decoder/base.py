"""What every vision-language model takes and answers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import PromptError
from ...runtime.memory import MemoryUse
from ..text.messages import Conversation
from ..text.pieces import check_stops
from ..text.sampling import Sampling

Rgb = npt.NDArray[np.uint8]

MAX_IMAGES = 64
"""Images of one prompt. Most models' context is full long before."""
DEFAULT_NEW_TOKENS = 512
"""Pixano 0.8's default."""
DEFAULT_CONTEXT = 4096
"""Tokens of prompt and answer together, unless the model has less or another number is asked for."""
DEFAULT_CONVERSATIONS = 2
"""Answers that may be under way at once."""

STOP = "stop"
LENGTH = "length"
STOP_STRING = "stop_string"


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is made.

    Attributes:
        max_new_tokens: Most tokens of the answer, 1 or more; prompt and answer together must fit the context.
        sampling: How tokens are chosen.
        stops: Strings that end the answer and are not part of it.
        go_on: Go on after the model's end token, to `max_new_tokens`: for measurements.

    Raises:
        PromptError: A value is out of range.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    go_on: bool = False

    def __post_init__(self) -> None:
        count = self.max_new_tokens
        if not isinstance(count, int | np.integer) or isinstance(count, bool) or count < 1:
            raise PromptError(f"max_new_tokens must be 1 or more, got {count!r:.60}.", "Send for example 100.")
        object.__setattr__(self, "stops", check_stops(self.stops))


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer.

    Attributes:
        prompt: Of the prompt, image tokens included.
        completion: Made by the model; the token that ended the answer counts, though it has no text.
        reused: Of the prompt, how many were in the cache from an earlier one.
    """

    prompt: int
    completion: int
    reused: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it comes; `text` is whole characters, and may be empty where a token completes none.

    Attributes:
        text: To be shown after what came before.
        tokens: Made so far.
    """

    text: str
    tokens: int


@dataclass(frozen=True)
class Generated:
    """A whole answer.

    Attributes:
        text: Without the prompt and without what ended it.
        usage: Tokens.
        finish: ``stop``: the model ended it; ``length``: `max_new_tokens` were made; ``stop_string``.
        images_encoded: Images that the vision encoder ran for; the others were not needed or known.
        encode_seconds: Images.
        prefill_seconds: The prompt's tokens.
        decode_seconds: The answer's tokens after the first one.
    """

    text: str
    usage: Usage
    finish: str
    images_encoded: int = 0
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        u = self.usage
        counts = {"prompt_tokens": u.prompt, "completion_tokens": u.completion, "total_tokens": u.total}
        rest = {k: v for k, v in self.__dict__.items() if k not in ("text", "usage")}
        return {"text": self.text, "usage": {**counts, "reused_tokens": u.reused}, **rest}


class VisionLanguageModel(Protocol):
    """A model of any family that answers in text. Thread-safe; each conversation under way has a cache of its own."""

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    @property
    def conversations(self) -> int:
        """Answers that may be under way at once; one more waits."""
        ...

    def stream(
        self, conversation: Conversation, images: Sequence[Rgb], options: GenerationOptions | None = None
    ) -> Generator[Piece | Generated | None, None, None]:
        """The answer in pieces, and at last as a whole. None says that a step is done which made no token.

        Nothing runs before the first piece is asked for, and nothing between two: whoever stops asking and closes the
        iterator has stopped the model within one step (a tile of an image, a part of the prompt, a token).

        Args:
            conversation: See `read_conversation`; its images are named there and given as pixels here.
            images: (H, W, 3) uint8 RGB each; not kept.
            options: None takes the defaults.

        Raises:
            PromptError: The conversation or the number of images is malformed, or it does not fit the context.
            ImageError: Not such an array.
            BundleError: The chat template fails.
            DeviceMemoryError: No room on the device; the model still works.
            DeviceError: The model is closed, or the back end failed.
        """
        ...

    def generate(
        self,
        conversation: Conversation,
        images: Sequence[Rgb],
        options: GenerationOptions | None = None,
        *,
        check: Callable[[], None] | None = None,
    ) -> Generated:
        """The whole answer; `check` is called between the steps, and what it raises ends the call."""
        ...

    def info(self) -> dict[str, Any]:
        """Bundle, device, back end, precision and why, warnings, caches, counters; JSON-ready."""
        ...

    def memory(self) -> MemoryUse: ...

    def shrink(self) -> None:
        """Drops what is kept between requests and can be computed again."""
        ...

    def close(self) -> None: ...
