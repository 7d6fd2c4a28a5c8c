"""What detectors keep between requests: a byte budget, least recently used first, one computation per key."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

TEXT_BYTES = 64 << 20
"""Default budget for text: 30 lists of 1000 classes with 512 channels."""


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Value = TypeVar("Value", bound=_Sized)


@dataclass(frozen=True)
class CacheStats:
    """Counters of a `FeatureCache`."""

    entries: int
    bytes: int
    max_bytes: int
    hits: int
    misses: int
    evictions: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dict(self.__dict__)


class _Flight(Generic[Value]):
    """A computation under way; `value` stays None when it failed."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.value: Value | None = None


class FeatureCache(Generic[Value]):
    """Values by key. Thread-safe; whoever holds a value keeps it, whatever the cache drops.

    Args:
        max_bytes: Budget; a value that is larger alone is not kept, so 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Value] = OrderedDict()
        self._flights: dict[Hashable, _Flight[Value]] = {}
        self._bytes = self._hits = self._misses = self._evictions = 0

    def get_or_create(self, key: Hashable, create: Callable[[], Value]) -> Value:
        """The value for `key`; `create` runs once however many threads ask at the same time.

        When it raises, the error goes to its caller and a waiting thread computes instead.
        """
        while True:
            with self._lock:
                if key in self._entries:
                    self._entries.move_to_end(key)
                    self._hits += 1
                    return self._entries[key]
                flight = self._flights.get(key)
                if flight is None:
                    flight = self._flights[key] = _Flight()
                    self._misses += 1
                    break
            flight.done.wait()
            if flight.value is not None:
                with self._lock:
                    self._hits += 1
                return flight.value
        try:
            flight.value = create()
            return flight.value
        finally:
            with self._lock:
                del self._flights[key]
                if flight.value is not None:
                    self._store(key, flight.value)
            flight.done.set()

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def reset(self) -> None:
        """As new: forgets everything, and the counters start again."""
        with self._lock:
            self._entries.clear()
            self._bytes = self._hits = self._misses = self._evictions = 0

    def stats(self) -> CacheStats:
        """Counters, taken at once."""
        with self._lock:
            return CacheStats(
                len(self._entries), self._bytes, self.max_bytes, self._hits, self._misses, self._evictions
            )

    def _store(self, key: Hashable, value: Value) -> None:
        if value.nbytes > self.max_bytes:
            return
        self._entries[key] = value
        self._bytes += value.nbytes
        while self._bytes > self.max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self._bytes -= dropped.nbytes
            self._evictions += 1


class TextCache(FeatureCache[npt.NDArray[np.float32]]):
    """Text features by class list, or whatever else the family keys them by; do not change the arrays."""

    def __init__(self, max_bytes: int = TEXT_BYTES) -> None:
        super().__init__(max_bytes)
