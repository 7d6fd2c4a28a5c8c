"""What vision-language models of every family share: from a prompt to an answer, conversations, facts, closing.

A family's class prepares a prompt (`DecoderModel.prepare`): token ids, keys, and features of its images when they are
asked for. The rest is here.
"""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from ...bundle import Bundle
from ...contracts import decoder as decoders
from ...contracts.decoder import DecoderConstants
from ...errors import DeviceError, ImageError, PromptError
from ...runtime.base import Device, Session
from ...runtime.memory import MemoryUse, model_memory
from ..detection.text_cache import FeatureCache
from ..opening import Asked, OpenedGraphs, open_family, open_graphs
from ..text.messages import Conversation, read_conversation
from ..text.pieces import Detokenizer, StopStrings
from ..text.template import ChatTemplate
from ..text.tokenizer import TextTokenizer, require_text_libraries
from ..verdicts import VerdictStore
from .base import (
    DEFAULT_CONTEXT,
    DEFAULT_CONVERSATIONS,
    LENGTH,
    MAX_IMAGES,
    STOP,
    STOP_STRING,
    Generated,
    GenerationOptions,
    Piece,
    Rgb,
    Usage,
)
from .session import PREFILL_TOKENS, DecoderSession, Floats, Ids, Keys, Lane

M = TypeVar("M", bound="DecoderModel")

IMAGE_BYTES = 64 << 20
"""Default budget of image features: 25 large pictures of SmolVLM 256M (2.5 MB each)."""


@dataclass(frozen=True, eq=False)
class ImagePart:
    """Where the features of one image go.

    Attributes:
        slots: (F,) places of its features in the prompt, ascending.
        encode: Makes the (F, D) float32 features; yields None between its steps. Nothing runs before it is asked.
    """

    slots: npt.NDArray[np.int64]
    encode: Callable[[], Generator[None, None, Floats]]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as the decoder takes it.

    Attributes:
        ids: (N,) int32 token ids.
        keys: (N,) int64 what each slot depends on, see `image_keys`; text tokens are their own keys.
        images: In the order of the prompt.
        positions: (3, N) int32 rotary positions, for a decoder that takes them.
        next_position: Rotary position of the answer's first token.
    """

    ids: Ids
    keys: Keys
    images: tuple[ImagePart, ...] = ()
    positions: npt.NDArray[np.int32] | None = None
    next_position: int = 0


class DecoderModel(abc.ABC):
    """The sessions of a vision-language model and what is kept beside them. See `base.VisionLanguageModel`.

    Args:
        sessions: By graph name; those of token embedding and decoder, and what the family has in front of them.
        constants: Of the decoder.
        tokenizer: Content of its ``tokenizer.json``.
        template: Content of its chat template.
        bundle_hash: `Bundle.hash`.
        variant: Name of the variant that the sessions run.
        context: Most tokens of prompt and answer together; None takes `DEFAULT_CONTEXT`, or what the model has.
        conversations: Answers that may be under way at once.
        image_bytes: Budget of the image features kept; 0 keeps none.
        description: Facts for `info`; its ``warnings`` stay in front.

    Attributes:
        contract: The family's contract: its ``FAMILY`` and ``graphs``.
        constants_type: The family's constants, which ``from_dict`` reads from a manifest.
        tokenizer: Of the model.
        template: Of the model.
        image_cache: Image features by picture.

    Raises:
        PromptError: A context that the model does not have, or no conversation.
        BundleError: Tokeniser or chat template cannot be read.
    """

    contract: ClassVar[Any]
    constants_type: ClassVar[Any]

    def __init__(
        self,
        sessions: Mapping[str, Session],
        constants: DecoderConstants,
        tokenizer: str | bytes,
        template: str | bytes,
        *,
        bundle_hash: str,
        variant: str,
        context: int | None = None,
        conversations: int = DEFAULT_CONVERSATIONS,
        image_bytes: int = IMAGE_BYTES,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        slots = min(DEFAULT_CONTEXT, constants.max_length) if context is None else context
        if not 1 < slots <= constants.max_length:
            raise PromptError(
                f"A context of {slots} tokens is not possible.", f"This model takes 2 to {constants.max_length}."
            )
        if conversations < 1:
            raise PromptError(f"{conversations} conversations are none.", "Allow at least one.")
        self.tokenizer = TextTokenizer(tokenizer)
        self.template = ChatTemplate(template)
        self.image_cache: FeatureCache[Floats] = FeatureCache(image_bytes)
        self._sessions = tuple(sessions.values())
        self._decoder = DecoderSession(
            sessions[decoders.EMBED_TOKENS], sessions[decoders.DECODER], constants, slots, conversations
        )
        self._ends = frozenset(constants.eos_ids)
        self._bundle_hash = bundle_hash
        self._variant = variant
        self._description = dict(description or {})
        self._opened = contextlib.ExitStack()
        self._closed = False
        self._warm_up: dict[str, Any] | None = None
        self._answers = self._tokens = self._reused = self._encoded = 0

    @classmethod
    def open(
        cls: type[M],
        bundle: Bundle | Path | str,
        *,
        device: str = "auto",
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        check: Callable[[], None] | None = None,
        force: bool = False,
        cache_bytes: int = IMAGE_BYTES,
        context: int | None = None,
        conversations: int = DEFAULT_CONVERSATIONS,
        prove: bool = True,
        warm_up: bool | None = None,
        capture: bool = True,
        verdicts: VerdictStore | None = None,
    ) -> M:
        """Opens a bundle; see `Sam2ImagePredictor.open` for what choosing means and for the other arguments.

        Args:
            bundle: An open bundle or its folder.
            device: ``auto``, ``cpu`` or ``cuda:N``.
            backend: Back end.
            precision: Variant.
            threads: Threads of one call.
            check: Called between the steps; what it raises ends the opening.
            force: Use a combination although it failed its check here.
            cache_bytes: Budget of image features; KV caches come on top.
            context: Most tokens of prompt and answer together; None takes 4096, or what the model has.
            conversations: Answers that may be under way at once; each has a KV cache of `context` tokens.
            prove: Ask for proof.
            warm_up: Run the graphs once; None: on a GPU.
            capture: Whether back ends may record launches themselves.
            verdicts: Where verdicts are kept.

        Raises:
            MissingDependencyError: `tokenizers` or `jinja2` is not installed.
            BundleError: Damaged, of another family, or without tokeniser or chat template.
            DeviceError, ContractError: As `Sam2ImagePredictor.open`.
            PromptError: A context that the model does not have.
        """
        require_text_libraries()
        bundle = open_family(bundle, cls.contract.FAMILY)
        constants = cls.constants_type.from_dict(bundle.manifest.constants)
        tokenizer = bundle.file(decoders.TOKENIZER).read_bytes()
        template = bundle.file(decoders.CHAT_TEMPLATE).read_bytes()
        asked = Asked(device, backend, precision, threads, force, prove)
        found = open_graphs(
            bundle, asked, cls.contract.graphs(constants), check=check, capture=capture, verdicts=verdicts
        )
        make = partial(
            cls,
            found.sessions,
            constants,
            tokenizer,
            template,
            bundle_hash=bundle.hash,
            variant=found.precision,
            context=context,
            conversations=conversations,
            image_bytes=cache_bytes,
            description=found.description,
        )
        return take_over(found, make, warm_up, check)

    @abc.abstractmethod
    def prepare(self, conversation: Conversation, images: Sequence[Rgb]) -> Prompt:
        """Tokens of a conversation and its images; runs no graph.

        Raises:
            PromptError: The conversation is malformed for this model.
            BundleError: The chat template fails.
        """

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._decoder.slots

    @property
    def conversations(self) -> int:
        """Answers that may be under way at once; one more waits."""
        return self._decoder.lanes

    @property
    def device(self) -> Device:
        """The device object, for facts about it."""
        return self._decoder.device

    def stream(
        self, conversation: Conversation, images: Sequence[Rgb], options: GenerationOptions | None = None
    ) -> Generator[Piece | Generated | None, None, None]:
        """See `base.VisionLanguageModel.stream`."""
        options = options or GenerationOptions()
        self._check_open()
        check_images(conversation, images)
        prompt = self.prepare(conversation, images)
        self._check_room(prompt, options)
        encoded = 0
        with self._decoder.conversation(prompt.keys) as lane:
            started = time.perf_counter()
            start = lane.common(prompt.keys)
            features: list[tuple[npt.NDArray[np.int64], Floats]] = []
            for part in prompt.images:
                if len(part.slots) and part.slots[-1] >= start:
                    before = self._encoded
                    features.append((part.slots, (yield from part.encode())))
                    encoded += self._encoded > before
            ready = time.perf_counter()
            logits = yield from _prefill(lane, prompt, start, features)
            del features
            first = time.perf_counter()
            self._answers += 1
            self._reused += start
            answer = yield from self._answer(lane, prompt, options, logits)
        yield replace(
            answer,
            usage=replace(answer.usage, reused=start),
            images_encoded=encoded,
            encode_seconds=ready - started,
            prefill_seconds=first - ready,
            decode_seconds=time.perf_counter() - first,
        )

    def generate(
        self,
        conversation: Conversation,
        images: Sequence[Rgb] = (),
        options: GenerationOptions | None = None,
        *,
        check: Callable[[], None] | None = None,
    ) -> Generated:
        """See `base.VisionLanguageModel.generate`."""
        with contextlib.closing(self.stream(conversation, images, options)) as steps:
            for step in steps:
                if isinstance(step, Generated):
                    return step
                if check is not None:
                    check()
        raise AssertionError("a stream ends with its answer")

    def logits(self, conversation: Conversation, images: Sequence[Rgb], answer: Sequence[int]) -> Iterator[Floats]:
        """Logits after the prompt and after each token of a given answer, for comparison with a reference; each a
        (V,) copy. Nothing is taken over from earlier prompts. Raises as `stream`."""
        check_images(conversation, images)
        prompt = self.prepare(conversation, images)
        self._check_room(prompt, GenerationOptions(max_new_tokens=len(answer) + 1))
        with self._decoder.conversation(prompt.keys) as lane:
            features = [(part.slots, _result(part.encode())) for part in prompt.images]
            yield _result(_prefill(lane, prompt, 0, features)).copy()
            for index, token in enumerate(answer):
                yield lane.step(token, self._position(prompt, index)).copy()

    @abc.abstractmethod
    def warm_vision(self) -> None:
        """Encodes a blank image of the smallest size, past the cache."""

    def warm_up(self, check: Callable[[], None] | None = None) -> float:
        """Runs each graph, the decoder for a short prompt, so that what is made once is made.

        Caches and counters are as before. For a model that nobody uses yet.

        Args:
            check: Called between the steps; what it raises ends it.

        Returns:
            Seconds it took, also in `info`.
        """
        started = time.perf_counter()
        before = self._answers, self._tokens, self._reused, self._encoded
        try:
            self.warm_vision()
            if check is not None:
                check()
            self.generate(read_conversation("Hello"), (), GenerationOptions(max_new_tokens=3), check=check)
        finally:
            self._decoder.forget()
            self._answers, self._tokens, self._reused, self._encoded = before
        seconds = time.perf_counter() - started
        self._warm_up = {"seconds": seconds}
        return seconds

    def info(self) -> dict[str, Any]:
        """Bundle, device, back end, precision and why, warnings, caches, counters; JSON-ready."""
        graphs = {session.spec.name: session.info() for session in self._sessions}
        told = (self._description, *graphs.values())
        return {
            **self._description,
            "warnings": list(dict.fromkeys(w for one in told for w in one.get("warnings", ()))),
            "warm_up": self._warm_up,
            "bundle_hash": self._bundle_hash,
            "precision": self._variant,
            "device": self.device.name,
            "backend": self._decoder.decoder.backend,
            **graphs,
            "image_cache": self.image_cache.stats().to_dict(),
            "kv_cache": self._decoder.info(),
            "answers": self._answers,
            "tokens": self._tokens,
            "reused_tokens": self._reused,
            "tiles_encoded": self._encoded,
        }

    def memory(self) -> MemoryUse:
        """Bytes that sessions, their buffers and KV caches take now; image features lie in RAM."""
        cached, conversations = self.image_cache.stats().bytes, self._decoder.nbytes
        if self.device.kind == "cpu":
            return model_memory(self._sessions, cached + conversations)
        return model_memory(self._sessions, conversations) + MemoryUse(host=cached)

    def shrink(self) -> None:
        """Drops image features, and the caches of ended conversations but one."""
        self.image_cache.clear()
        self._decoder.forget()

    def close(self) -> None:
        """Waits for the step under way, then frees what `open` opened; later calls and steps raise DeviceError."""
        if self._closed:
            return
        self._closed = True
        self._decoder.close()
        self.image_cache.clear()
        with contextlib.ExitStack() as held:
            for session in self._sessions:
                held.enter_context(session.lock)
            self._opened.close()

    def __enter__(self: M) -> M:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError("The model is closed.", "Open the bundle again.")

    def _check_room(self, prompt: Prompt, options: GenerationOptions) -> None:
        have, asked, most = len(prompt.ids), options.max_new_tokens, self.context
        if not have:
            raise PromptError("The prompt has no tokens.", "Ask something.")
        if have >= most:
            raise PromptError(
                f"The prompt has {have} tokens, and the context is {most} for prompt and answer together.",
                "Send a shorter prompt, fewer or smaller images, or open the model with a larger context.",
            )
        if have + asked > most:
            raise PromptError(
                f"The prompt has {have} tokens, which leaves {most - have} of the context of {most}; max_new_tokens is "
                f"{asked}.",
                f"Ask for at most {most - have}, or open the model with a larger context.",
            )

    def _answer(
        self, lane: Lane, prompt: Prompt, options: GenerationOptions, logits: Floats
    ) -> Generator[Piece | None, None, Generated]:
        """Samples tokens until one of the ends; (usage without what was reused)."""
        lane.sampler.start(options.sampling)
        detokenizer, stops = Detokenizer(self.tokenizer), StopStrings(options.stops)
        shown: list[str] = []
        made, finish = 0, LENGTH
        while True:
            token = lane.sampler.choose(logits)
            made += 1
            self._tokens += 1
            if token in self._ends and not options.go_on:
                finish = STOP
                break
            text = stops.push(detokenizer.push(token))
            if text:
                shown.append(text)
            yield Piece(text, made)
            if stops.found is not None:
                finish = STOP_STRING
                break
            if made >= options.max_new_tokens:
                break
            logits = lane.step(token, self._position(prompt, made - 1))
        rest = stops.push(detokenizer.finish()) + stops.finish()
        if stops.found is not None:
            finish = STOP_STRING
        if rest:
            shown.append(rest)
            yield Piece(rest, made)
        return Generated("".join(shown), Usage(len(prompt.ids), made), finish)

    @staticmethod
    def _position(prompt: Prompt, index: int) -> int | None:
        return None if prompt.positions is None else prompt.next_position + index


def check_images(conversation: Conversation, images: Sequence[Rgb]) -> None:
    """The images of a conversation, one for each place.

    Raises:
        PromptError: Another number, or more than `MAX_IMAGES`.
        ImageError: Something else than (H, W, 3) uint8.
    """
    if len(images) != len(conversation.images):
        raise PromptError(
            f"{len(images)} images for {len(conversation.images)} places in the conversation.", "Give one for each."
        )
    if len(images) > MAX_IMAGES:
        raise PromptError(f"{len(images)} images are more than {MAX_IMAGES}.", "Ask about them in several prompts.")
    for index, image in enumerate(images):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ImageError(
                f"Image {index} is {image.dtype}{list(image.shape)}, not uint8 [height, width, 3].", "Decode it to RGB."
            )


def _prefill(
    lane: Lane, prompt: Prompt, start: int, features: Sequence[tuple[npt.NDArray[np.int64], Floats]]
) -> Generator[None, None, Floats]:
    """Runs a prompt from slot `start` on, a part at a time; the logits after its last token."""
    total = len(prompt.ids)
    while True:
        end = min(start + PREFILL_TOKENS, total)
        rows, values = [], []
        for slots, found in features:
            inside = slice(*np.searchsorted(slots, (start, end)))
            rows.append(slots[inside] - start)
            values.append(found[inside])
        logits = lane.prefill(
            prompt.ids[start:end],
            prompt.keys[start:end],
            start,
            np.concatenate(rows) if rows else None,
            np.concatenate(values) if values else None,
            None if prompt.positions is None else np.ascontiguousarray(prompt.positions[:, start:end]),
        )
        start = end
        if start == total:
            return logits
        yield None


def _result(steps: Generator[Any, None, Floats]) -> Floats:
    """What a generator returns, run to its end."""

    def run() -> Generator[Any, None, None]:
        found.append((yield from steps))

    found: list[Floats] = []
    for _ in run():
        pass
    return found[0]


def take_over(found: OpenedGraphs, make: Callable[[], M], warm_up: bool | None, check: Callable[[], None] | None) -> M:
    """A model on open graphs, which it closes with itself; they are closed when making it fails.

    Args:
        found: The graphs.
        make: Makes the model on their sessions.
        warm_up: Call `DecoderModel.warm_up`; None: on devices with a stream.
        check: Called before that; what it raises ends the opening.
    """
    with contextlib.ExitStack() as failed:
        failed.callback(found.opened.close)
        model = make()
        model._opened.push(found.opened)
        if warm_up or (warm_up is None and model.device.stream):
            if check is not None:
                check()
            model.warm_up()
        failed.pop_all()
    return model
