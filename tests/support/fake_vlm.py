"""A vision-language model without graphs: says its prompt back, a word at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from pixano_edge.engine.errors import PromptError
from pixano_edge.engine.models.decoder.base import LENGTH, STOP, Generated, GenerationOptions, Piece, Usage
from pixano_edge.engine.models.text.messages import Conversation
from pixano_edge.engine.runtime.memory import MemoryUse

PROMPT_TOKENS = 10


class FakeVlm:
    """Answers "N images:" and the words of the last text, one for each token, then ends.

    `gate` holds every token back until it is set; `entered` tells that one has begun. `error` is raised at token
    `error_at`. `steps` has the prompt of every token made, `open` the answers under way, `most_open` their most.
    """

    context = 64
    conversations = 2

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.seconds = 0.0
        self.error: Exception | None = None
        self.error_at = 0
        self.asked: list[tuple[Conversation, list[tuple[int, ...]], GenerationOptions]] = []
        self.steps: list[str] = []
        self.threads: set[str] = set()
        self.open = self.most_open = 0
        self.closed = False
        self.shrunk = 0
        self.use = MemoryUse()

    def stream(
        self, conversation: Conversation, images: Sequence[np.ndarray], options: GenerationOptions | None = None
    ) -> Generator[Piece | Generated | None, None, None]:
        options = options or GenerationOptions()
        assert not self.closed, "used after close"
        if PROMPT_TOKENS + options.max_new_tokens > self.context and options.max_new_tokens > 1000:
            raise PromptError("max_new_tokens does not fit.", "Ask for less.")
        text = conversation.texts[-1] if conversation.texts else ""
        self.asked.append((conversation, [image.shape for image in images], options))
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        try:
            for _ in images:
                yield None  # a tile
            words = [f"{len(images)} images:", *text.split()]
            shown: list[str] = []
            for number, word in enumerate(words[: options.max_new_tokens]):
                self.threads.add(threading.current_thread().name)
                self.entered.set()
                assert self.gate.wait(20)
                assert not self.closed, "used after close"
                if self.seconds:
                    time.sleep(self.seconds)
                if self.error is not None and number == self.error_at:
                    raise self.error
                self.steps.append(text)
                shown.append(word if number == 0 else f" {word}")
                yield Piece(shown[-1], number + 1)
            ended = len(words) <= options.max_new_tokens - 1
            usage = Usage(PROMPT_TOKENS, len(shown) + ended)
        finally:
            self.open -= 1
        yield Generated("".join(shown), usage, STOP if ended else LENGTH, len(images))

    def generate(
        self,
        conversation: Conversation,
        images: Sequence[np.ndarray] = (),
        options: GenerationOptions | None = None,
        *,
        check: Callable[[], None] | None = None,
    ) -> Generated:
        with closing(self.stream(conversation, images, options)) as steps:
            for step in steps:
                if isinstance(step, Generated):
                    return step
                if check is not None:
                    check()
        raise AssertionError

    def info(self) -> dict[str, Any]:
        return {
            "bundle": "fake", "architecture": "fake", "device": "cpu", "backend": "onnxruntime", "precision": "fp32",
            "warnings": ["a warning"], "warm_up": None,
        }  # fmt: skip

    def memory(self) -> MemoryUse:
        return self.use

    def shrink(self) -> None:
        self.shrunk += 1

    def close(self) -> None:
        self.closed = True
