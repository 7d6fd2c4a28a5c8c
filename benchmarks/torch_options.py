"""PyTorch at its best: the number of threads that is fastest here, and ``torch.compile`` where it is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pixano_edge.engine.errors import EdgeError

FAILURES = (RuntimeError, OSError, NotImplementedError, EdgeError)
"""What a contender that cannot be had raises: no compiler, an operator without bf16, a graph that is not understood."""


MARGIN = 0.05
"""Share by which fewer threads must be faster."""


@dataclass
class Beside:
    """What a measurement is told beside its inputs, and tells beside its figures.

    Attributes:
        compiled: Have ``torch.compile`` beside plain PyTorch.
        left_out: Contender to the reason why it is missing; filled.
        torch_threads: Of PyTorch, the fastest number; set where PyTorch takes part.
    """

    compiled: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    torch_threads: int | None = None


def candidates(threads: int) -> list[int]:
    """Numbers of threads to try: all that a contender may use, and halves of that down to one."""
    found = []
    while threads:
        found.append(threads)
        threads //= 2
    return found


def use_best_threads(
    call: Callable[[], object],
    threads: int,
    rounds: int = 2,
    set_threads: Callable[[int], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Tries `call` with each number of `candidates`, sets the fastest for this process and returns it; fewer threads
    must be faster by `MARGIN`, so that chance does not take threads away.

    Args:
        call: Work of PyTorch.
        threads: Most that it may use.
        rounds: Timed calls per number; the fastest counts.
        set_threads: ``torch.set_num_threads``.
        clock: Seconds.
    """
    if set_threads is None:
        import torch

        set_threads = torch.set_num_threads
    numbers = candidates(threads)
    best = {number: float("inf") for number in numbers}
    for number in numbers if len(numbers) > 1 else []:
        set_threads(number)
        call()
        for _ in range(rounds):
            begun = clock()
            call()
            best[number] = min(best[number], clock() - begun)
    chosen = numbers[0]
    for number in numbers[1:]:
        if best[number] * (1 + MARGIN) < best[chosen]:
            chosen = number
    set_threads(chosen)
    return chosen


def compile_modules(model: Any, names: Sequence[str]) -> None:
    """Compiles parts of a model in place with ``torch.compile``; the first call of each then takes long.

    Raises:
        EdgeError: The model has no such part.
    """
    for name in names:
        part = getattr(model, name, None)
        if part is None:
            raise EdgeError(f"{type(model).__name__} has no part '{name}'.", "Leave --compile out.")
        part.compile()


def first_line(error: BaseException) -> str:
    """Why something could not be compiled, in one line of at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
