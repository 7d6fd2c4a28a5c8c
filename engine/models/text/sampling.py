"""Choosing the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import PromptError

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: Logits are divided by it; 0 takes the largest one always (greedy).
        top_p: Only the most probable tokens whose probabilities together reach it are drawn from; 1 takes all. Tokens
            as probable as the last of them stay.
        seed: Of the random numbers; None takes a new one each time.

    Raises:
        PromptError: A number is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not _number(self.temperature) or not 0 <= self.temperature <= 100:
            raise PromptError(f"temperature must be 0 to 100, got {self.temperature!r:.60}.", "0 is greedy, 1 usual.")
        if not _number(self.top_p) or not 0 < self.top_p <= 1:
            raise PromptError(f"top_p must be above 0 and at most 1, got {self.top_p!r:.60}.", "1 takes all tokens.")
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0):
            raise PromptError(
                f"seed must be a whole number, 0 or more, got {self.seed!r:.60}.", "Leave it out for chance."
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Sampler:
    """Chooses tokens for one generation at a time; its work memory is made once.

    Args:
        vocabulary: Logits of a step.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._probabilities: npt.NDArray[np.float64] | None = None
        self._sorted: npt.NDArray[np.float64] | None = None
        self._sums: npt.NDArray[np.float64] | None = None
        self._mask: npt.NDArray[np.bool_] | None = None
        self._sampling = Sampling()
        self._random: np.random.Generator | None = None

    def start(self, sampling: Sampling) -> None:
        """Begins a generation: the same seed gives the same tokens for the same logits."""
        self._sampling = sampling
        if sampling.greedy:
            return
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))
        if self._probabilities is None:
            self._probabilities = np.empty(self.vocabulary, np.float64)
            self._sorted = np.empty(self.vocabulary, np.float64)
            self._sums = np.empty(self.vocabulary, np.float64)
            self._mask = np.empty(self.vocabulary, np.bool_)

    def choose(self, logits: Logits) -> int:
        """The next token.

        Args:
            logits: (V,) float32, not changed.
        """
        if self._sampling.greedy:
            return int(np.argmax(logits))
        p, sums = self._probabilities, self._sums
        assert p is not None
        assert sums is not None
        assert self._random is not None
        # The largest first: a small temperature must not overflow.
        np.subtract(logits, np.max(logits), out=p)
        np.divide(p, self._sampling.temperature, out=p)
        np.exp(p, out=p)
        if self._sampling.top_p < 1:
            self._keep_top(p)
        np.cumsum(p, out=sums)
        drawn = self._random.random() * sums[-1]
        return min(int(np.searchsorted(sums, drawn, side="right")), self.vocabulary - 1)

    def _keep_top(self, p: npt.NDArray[np.float64]) -> None:
        """Zeroes what lies below the top share."""
        ordered, sums, mask = self._sorted, self._sums, self._mask
        assert ordered is not None
        assert sums is not None
        assert mask is not None
        np.copyto(ordered, p)
        ordered.sort()
        np.cumsum(ordered, out=sums)
        # What all smaller ones leave out: the last token that is needed is the first whose own sum exceeds that.
        last = int(np.searchsorted(sums, (1.0 - self._sampling.top_p) * sums[-1], side="right"))
        np.less(p, ordered[min(last, self.vocabulary - 1)], out=mask)
        np.copyto(p, 0, where=mask)


def _number(value: Any) -> bool:
    kind = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return kind and math.isfinite(value)
