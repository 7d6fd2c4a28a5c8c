"""How far a build is, from the nested phases that TensorRT's ``IProgressMonitor`` reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

MIN_SECONDS = 0.1
"""Least time between two events; TensorRT reports thousands of steps."""


class Meter:
    """Turns phases and steps into a fraction.

    A phase counts as one step of its parent, so a fraction never goes back. TensorRT does not know how long a phase
    takes: the fraction says how many steps are done, not how much time is left.

    Args:
        say: Gets ``("progress", {"phase": ..., "fraction": ...})``.
    """

    def __init__(self, say: Callable[[str, Mapping[str, Any]], None]) -> None:
        self._say = say
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # name -> (parent, steps in all, steps done)
        self._shown = 0.0
        self._best = 0.0

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self._phases[phase] = (parent if parent in self._phases else None, max(1, steps), 0)
        self._tell(phase)

    def step(self, phase: str, step: int) -> None:
        if phase in self._phases:
            parent, steps, done = self._phases[phase]
            self._phases[phase] = (parent, steps, min(steps, max(done, step + 1)))
            self._tell(phase)

    def finish(self, phase: str) -> None:
        self._phases.pop(phase, None)

    @property
    def fraction(self) -> float:
        """Done so far, 0 to 1."""
        return self._best

    def _tell(self, phase: str) -> None:
        inner, name = 0.0, phase
        seen: set[str] = set()
        while name in self._phases and name not in seen:
            seen.add(name)
            parent, steps, done = self._phases[name]
            inner = min(1.0, (done + inner) / steps)
            if parent is None:
                break
            name = parent
        self._best = max(self._best, inner)
        now = time.monotonic()
        if now - self._shown >= MIN_SECONDS:
            self._shown = now
            self._say("progress", {"phase": phase, "fraction": round(self._best, 4)})

    def monitor(self, trt: Any) -> Any:
        """An ``IProgressMonitor`` of module `trt` that feeds this meter; keep it alive while the build runs."""
        meter = self

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                meter.start(phase_name, parent_phase, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                meter.step(phase_name, step)
                return True  # False would cancel; the parent kills instead, which also works between steps

            def phase_finish(self, phase_name: str) -> None:
                meter.finish(phase_name)

        return Monitor()
