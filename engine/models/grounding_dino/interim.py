"""Stands in for `detection.nms` and `detection.text_cache` until they are there; to be removed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CacheStats:
    entries: int
    bytes: int
    max_bytes: int


class TextCache:
    """Features by key, the least recently used dropped first."""

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, Floats] = OrderedDict()
        self._lock = threading.Lock()

    def get_or_create(self, key: Hashable, create: Callable[[], Floats]) -> Floats:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        value = create()
        with self._lock:
            self._entries[key] = value
            while sum(v.nbytes for v in self._entries.values()) > self.max_bytes and len(self._entries) > 1:
                self._entries.popitem(last=False)
        return value

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def stats(self) -> CacheStats:
        with self._lock:
            return CacheStats(len(self._entries), sum(v.nbytes for v in self._entries.values()), self.max_bytes)


def nms(boxes: Floats, scores: Floats, labels: npt.NDArray[np.int64], limit: float) -> npt.NDArray[np.int64]:
    """Indices kept, best first; only boxes of one class suppress each other."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = np.argsort(-scores, kind="stable")
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        inner = np.minimum(boxes[left, 2:], boxes[best, 2:]) - np.maximum(boxes[left, :2], boxes[best, :2])
        shared = np.prod(np.clip(inner, 0, None), axis=1)
        union = areas[left] + areas[best] - shared
        left = left[~((shared > limit * union) & (labels[left] == labels[best]))]
    return np.array(kept, np.int64)
