"""Answers in text for `EdgeProvider`: as a whole, or in pieces as they come."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..models.decoder.base import DEFAULT_NEW_TOKENS, Generated, GenerationOptions, Piece
from ..models.images import ImageLimits, decode_image
from ..models.text.messages import Conversation, read_conversation
from ..models.text.sampling import Sampling
from .errors import InferenceError, InvalidRequestError, ModelBusyError
from .families import LoadedModel
from .media import MediaPolicy
from .models import ModelTable, Slot
from .text_runs import TextRun, Turns, generation_config
from .text_types import TextChunk
from .types import TextImageConditionalGenerationOutput, UsageInfo
from .worker import Deadline, wait_for

MAX_IMAGES = 64

Hold = Callable[[Any, Deadline], Awaitable[Slot]]
"""Finds the model that answers in text under a name and holds it."""


@dataclass(frozen=True)
class TextRequest:
    """A request, checked as far as that goes without its images and model."""

    conversation: Conversation
    options: GenerationOptions


class TextService:
    """One per provider.

    Args:
        table: The models.
        hold: Finds and holds the model of a request.
        media: Which files requests may name.
        depth: Answers of one model that may be under way or wait; one more is refused.
    """

    def __init__(self, table: ModelTable, hold: Hold, media: MediaPolicy, depth: int) -> None:
        self._table = table
        self._hold = hold
        self._media = media
        self._depth = depth
        self._turns = Turns()
        self._lock = threading.Lock()
        self._runs: set[TextRun] = set()
        self._closed = False

    async def answer(
        self, input_data: Any, deadline: Deadline
    ) -> tuple[TextImageConditionalGenerationOutput, dict[str, Any], LoadedModel]:
        """The whole answer, what is told about it, and the model; see `EdgeProvider`."""
        request = read_request(input_data)
        run = await self._begin(input_data, request, deadline)
        found = await wait_for(run.ended, deadline, f"Text generation with model '{run.slot.name}'", run)
        assert run.model is not None
        return _output(found, request), _told(found), run.model

    async def stream(
        self, input_data: Any, deadline: Deadline, facts: Callable[[Any, LoadedModel], dict[str, Any]]
    ) -> AsyncIterator[TextChunk]:
        """The answer in pieces; leaving the iterator ends the work."""
        request = read_request(input_data)
        run = await self._begin(input_data, request, deadline)
        what = f"Text generation with model '{run.slot.name}'"
        try:
            position = 0
            while True:
                over = run.ended.done()  # asked first: pieces come before the end
                texts = run.read(position)
                position += len(texts)
                if texts:
                    yield TextChunk("".join(texts))
                if over:
                    break
                await wait_for(run.changed(position), deadline, what, run)
            found = await wait_for(run.ended, Deadline(None), what)  # raises why it failed
            assert run.model is not None
            yield TextChunk("", _output(found, request), {**facts(input_data, run.model), **_told(found)})
        finally:
            run.cancel()  # of a run that has ended this is no news

    async def close(self) -> None:
        """Waits for runs to be gone, whose models were retired by the caller; takes no new ones."""
        with self._lock:
            self._closed = True
            runs = list(self._runs)
        for run in runs:
            await wait_for(run.freed, Deadline(None), "Ending an answer")

    async def _begin(self, input_data: Any, request: TextRequest, deadline: Deadline) -> TextRun:
        slot = await self._hold(getattr(input_data, "model", None), deadline)
        started = False
        try:
            run = TextRun(self._table, slot, lambda model: work(model, request, self._media), self._turns.ask)
            with self._lock:
                if self._closed:
                    raise InferenceError("This provider is closed.", "Make a new one.")
                others = sum(other.slot is slot for other in self._runs)
                if others >= self._depth:
                    raise ModelBusyError(
                        f"{others} answers of model '{slot.name}' are under way or wait already.",
                        "Try again in a moment.",
                    )
                self._runs.add(run)
            started = True
        finally:
            if not started:
                self._table.let_go(slot)
        run.freed.add_done_callback(lambda _: self._gone(run))
        run.start()
        return run

    def _gone(self, run: TextRun) -> None:
        with self._lock:
            self._runs.discard(run)
        self._turns.gone(run)


def work(
    model: LoadedModel, request: TextRequest, media: MediaPolicy
) -> Generator[Piece | Generated | None, None, None]:
    """Decodes the images, one in each step, and makes the answer; on the model's own thread.

    Raises:
        InvalidRequestError, ImageError, PromptError: The request is malformed.
    """
    assert model.vlm is not None
    options = model.options
    limits = ImageLimits(max_bytes=options.max_image_bytes, max_pixels=options.max_image_pixels)
    images = []
    for source in request.conversation.images:
        images.append(decode_image(media.read(source, options.max_image_bytes), limits))
        yield None
    with closing(model.vlm.stream(request.conversation, images, request.options)) as steps:
        yield from steps


def read_request(input_data: Any) -> TextRequest:
    """The request's prompt and settings.

    ``max_new_tokens`` None is 512, as Pixano 0.8's own provider sends it; ``temperature`` None is 1.

    Raises:
        InvalidRequestError, PromptError: Malformed.
    """
    conversation = read_conversation(
        getattr(input_data, "prompt", None), getattr(input_data, "images", None), getattr(input_data, "system", None)
    )
    if len(conversation.images) > MAX_IMAGES:
        raise InvalidRequestError(
            f"{len(conversation.images)} images are more than {MAX_IMAGES}.", "Ask about them in several requests."
        )
    count = getattr(input_data, "max_new_tokens", None)
    temperature, top_p = getattr(input_data, "temperature", None), getattr(input_data, "top_p", None)
    stop = getattr(input_data, "stop", None)
    return TextRequest(
        conversation,
        GenerationOptions(
            DEFAULT_NEW_TOKENS if count is None else count,
            Sampling(
                1.0 if temperature is None else _plain(temperature),
                1.0 if top_p is None else _plain(top_p),
                getattr(input_data, "seed", None),
            ),
            (stop,) if isinstance(stop, str) else tuple(stop or ()),
        ),
    )


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, np.number) else value


def _output(found: Generated, request: TextRequest) -> TextImageConditionalGenerationOutput:
    usage = UsageInfo(found.usage.prompt, found.usage.completion, found.usage.total)
    return TextImageConditionalGenerationOutput(found.text, usage, generation_config(request.options))


def _told(found: Generated) -> dict[str, Any]:
    return {
        "finish_reason": found.finish,
        "reused_tokens": found.usage.reused,
        "images_encoded": found.images_encoded,
        "encode_seconds": found.encode_seconds,
        "prefill_seconds": found.prefill_seconds,
        "decode_seconds": found.decode_seconds,
    }
