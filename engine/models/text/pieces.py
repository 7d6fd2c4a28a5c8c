"""From tokens to pieces of text that may be shown: no half characters, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import PromptError
from .messages import read_text
from .tokenizer import TextTokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
WINDOW = 24
"""Tokens that are decoded together. A character has at most 4 tokens (of one byte each), the rest is context."""
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000


class Detokenizer:
    """Decodes tokens one by one; the pieces together are the text of all tokens decoded at once.

    Args:
        tokenizer: Of the model.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0

    def start(self) -> None:
        """Begins another text."""
        self._window.clear()
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that one more token completes: maybe none."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        end = len(text)
        while end and len(text) - end < 3 and text[end - 1] == UNKNOWN:  # bytes of a character that may be completed
            end -= 1
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        if len(self._window) >= WINDOW and end == len(text):
            self._restart()
        return piece

    def finish(self) -> str:
        """What is left: bytes that no later token completes, as U+FFFD."""
        piece = self._tokenizer.decode(self._window)[self._shown :]
        self.start()
        return piece

    def _restart(self) -> None:
        """Keeps the last token alone as context, where that is whole by itself."""
        text = self._tokenizer.decode(self._window[-1:])
        if text and UNKNOWN not in text:
            del self._window[:-1]
            self._shown = len(text)


class StopStrings:
    """Ends a text at the first of several strings, which may come in pieces.

    Args:
        stops: Strings; none stops nothing.

    Attributes:
        found: The string that ended the text; None before.

    Raises:
        PromptError: Too many, too long, empty, or no text.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops = check_stops(stops)
        self.found: str | None = None
        self._held = ""

    def push(self, piece: str) -> str:
        """The part of the text so far that can be shown: it holds no stop string and cannot become one."""
        if self.found is not None:
            return ""
        if not self.stops:
            return piece
        text = self._held + piece
        places = [(at, -len(stop), stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if places:
            at, _, self.found = min(places)
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """The strings as a tuple; raises PromptError as `StopStrings` says."""
    given = (stops,) if isinstance(stops, str) else tuple(stops)
    if len(given) > MAX_STOPS:
        raise PromptError(f"{len(given)} stop strings are more than {MAX_STOPS}.", "Send fewer.")
    for index, stop in enumerate(given):
        text = read_text(stop, f"Stop string {index}")
        if not text or len(text) > MAX_STOP_LENGTH:
            raise PromptError(f"Stop string {index} has {len(text)} characters.", f"Send 1 to {MAX_STOP_LENGTH}.")
    return given


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` starts with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
