"""Vision-language models: greedy answers about pictures, which must be fp32's word for word.

One other token changes all that follow, so an answer counts as a whole: 1 where it is equal, else 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import decoder as decoders
from pixano_edge.engine.models.decoder.base import GenerationOptions
from pixano_edge.engine.models.decoder.model import DecoderModel
from pixano_edge.engine.models.decoder.opening import _model as model_class
from pixano_edge.engine.models.text.messages import read_conversation
from pixano_edge.engine.models.text.tokenizer import require_text_libraries
from pixano_edge.engine.runtime.base import Session

from ..data import Picture
from ..result import WorstSample
from ..spool import Spool
from .base import Task, TaskOptions
from .sam2 import picture

QUESTIONS = ("What is on this picture?", "Describe the picture in one sentence.")
"""Asked where the user gives none."""
CONTEXT = 2048
"""Most tokens of prompt and answer."""


class TextTask(Task[Picture, DecoderModel, tuple[str, ...], tuple[str, ...]]):
    """See the module. What is asked are the questions, what is answered are the texts."""

    metric = "exact"
    about = "share of greedy answers that are fp32's word for word"
    usual = 0.95

    def __init__(self, bundle: Bundle, options: TaskOptions) -> None:
        super().__init__(bundle, options)
        require_text_libraries()
        self._class = model_class(bundle)
        self.constants = self._class.constants_type.from_dict(bundle.manifest.constants)
        self._limit = GenerationOptions(max_new_tokens=options.max_new_tokens)
        self._longest = 0
        self._recording = False

    @property
    def graphs(self) -> tuple[str, ...]:
        return tuple(self._class.contract.graphs(self.constants))

    def make(self, sessions: Mapping[str, Session], digests: Mapping[str, str]) -> DecoderModel:
        made: DecoderModel = self._class(
            sessions,
            self.constants,
            self.bundle.file(decoders.TOKENIZER).read_bytes(),
            self.bundle.file(decoders.CHAT_TEMPLATE).read_bytes(),
            bundle_hash="".join(digests.values()),
            variant="calibration",
            context=min(self._context(), self.constants.decoder.max_length),
            conversations=1,
        )
        return made

    def close(self, model: DecoderModel) -> None:
        model.close()

    def plan(self, model: DecoderModel, sample: Picture) -> tuple[str, ...] | None:
        return self.options.questions or QUESTIONS

    def answer(self, model: DecoderModel, sample: Picture, plan: tuple[str, ...]) -> tuple[str, ...]:
        image = sample.load()
        found = [model.generate(read_conversation(question, [image]), [image], self._limit) for question in plan]
        self._longest = max(self._longest, *(answer.usage.prompt for answer in found))
        return tuple(answer.text for answer in found)

    def grain(self, sample: Picture) -> float:
        return 1 / len(self.plan_of(sample))

    def collect(self, samples: Sequence[Picture], spool: Spool, on_sample: Callable[[], None] = lambda: None) -> None:
        self._recording = True
        try:
            super().collect(samples, spool, on_sample)
        finally:
            self._recording = False

    def weight(self, graph: str, inputs: Mapping[str, Any]) -> float:
        # By tokens: a prompt has hundreds and an answer many runs of one, which would be all that is kept.
        return float(inputs[decoders.INPUTS_EMBEDS].shape[1]) if graph == decoders.DECODER else 1.0

    def _context(self) -> int:
        """Tokens that the cache has room for. Recorded inputs hold all of it, so there only what was needed."""
        return self._longest + self.options.max_new_tokens + 1 if self._recording and self._longest else CONTEXT

    def compare(self, want: tuple[str, ...], got: tuple[str, ...], plan: tuple[str, ...]) -> float:
        return float(np.mean([a.strip() == b.strip() for a, b in zip(want, got, strict=True)]))

    def draw(
        self, sample: Picture, plan: tuple[str, ...], want: tuple[str, ...], got: tuple[str, ...], value: float
    ) -> WorstSample:
        index = next((i for i, (a, b) in enumerate(zip(want, got)) if a.strip() != b.strip()), 0)
        shown: Any = picture(sample.load(), [], [])
        return WorstSample(sample.name, value, plan[index], shown, None, want[index], got[index])
