"""How often each model answered, how long it took, and the last latencies, for people who look at the box now."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

KEPT = 512
"""Latest answers per model and capability that percentiles are taken from."""
PERCENTILES = (50, 90, 99)


@dataclass
class _Series:
    count: int = 0
    total: float = 0.0
    errors: int = 0
    last: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))


class Stats:
    """Counters by model and capability; used from the event loop, read from anywhere."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._series: dict[tuple[str, str], _Series] = {}

    def answered(self, model: str, capability: str, seconds: float) -> None:
        """One answer."""
        with self._lock:
            series = self._series.setdefault((model, capability), _Series())
            series.count += 1
            series.total += seconds
            series.last.append(seconds)

    def failed(self, model: str, capability: str) -> None:
        """One request that a model did not answer."""
        with self._lock:
            self._series.setdefault((model, capability), _Series()).errors += 1

    def totals(self, model: str) -> tuple[int, float]:
        """Answers of a model and the seconds that they took together."""
        with self._lock:
            found = [s for (name, _), s in self._series.items() if name == model]
        return sum(s.count for s in found), sum(s.total for s in found)

    def latency(self) -> list[dict[str, Any]]:
        """Per model and capability: answers, errors, and percentiles of the latest answers in milliseconds."""
        with self._lock:
            series = {key: (s.count, s.errors, sorted(s.last)) for key, s in self._series.items()}
        return [
            {
                "model": model,
                "capability": capability,
                "count": count,
                "errors": errors,
                **{f"p{p}Ms": round(last[min(len(last) - 1, len(last) * p // 100)] * 1e3, 3) if last else None
                   for p in PERCENTILES},
            }
            for (model, capability), (count, errors, last) in sorted(series.items())
        ]  # fmt: skip
