"""Image features kept between clicks: a byte budget, least recently used first, one computation per image.

Features are device buffers that the encoder wrote and the decoder binds, so nothing is copied on the way through.
`Features` owns its buffers through Python's reference count: the cache holds one reference, every `Embedding` in use
another, and with the last one the buffers return to a small pool for the next image. Buffers in use are therefore
never written again, whatever the cache evicts.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...contracts.base import TensorSpec
from ...runtime.base import Binding, Buffer, Device

DEFAULT_BYTES = 256 << 20
"""15 images of a SAM 2 at 1024 pixels (16.8 MB each)."""

_PoolKey = tuple[str, tuple[tuple[str, str, tuple[int, ...]], ...]]


class EmbeddingKey(NamedTuple):
    """What features depend on."""

    bundle_hash: str
    variant: str
    backend: str
    """Back end and device, for example ``onnxruntime@cpu``."""
    digest: bytes
    """See `pixel_digest`."""


def pixel_digest(image: npt.NDArray[np.uint8]) -> bytes:
    """BLAKE2b of the decoded pixels and their shape, so that equal pictures in different files are one entry."""
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=32)
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


class Features:
    """The encoder's outputs for one image on one device. Made by `BufferPool.take`.

    Attributes:
        buffers: By tensor name of the contract.
        nbytes: Size of all buffers, in bytes of the device's memory.
        device: Device object whose stream writes them; None for memory without a stream.
        ready: Mark on that stream after which they are complete; another stream waits for it.
    """

    __slots__ = ("__weakref__", "buffers", "device", "nbytes", "ready")

    def __init__(self, buffers: dict[str, Buffer], device: Device | None = None) -> None:
        self.buffers = buffers
        self.nbytes = sum(b.nbytes for b in buffers.values())
        self.device = device
        self.ready: object = None

    def mark(self) -> None:
        """Says that everything which fills the buffers is queued."""
        if self.device is not None:
            self.ready = self.device.record()

    def await_on(self, device: Device) -> None:
        """Lets the stream of `device` wait until the features are complete; on their own stream they are."""
        if self.device is not None and self.device is not device:
            device.wait(self.ready)


@contextmanager
def bound(binding: Binding, features: Features) -> Iterator[Binding]:
    """Binds features for one run. Afterwards the binding lets go of them, so that only the cache's budget keeps them.

    Use it under the session's lock.
    """
    try:
        for name, buffer in features.buffers.items():
            binding.bind(name, buffer)
        yield binding
    finally:
        binding.release(*features.buffers)


def _home(device: Device) -> str:
    """Who may write recycled buffers: on a device with streams only the stream that wrote them before, since only
    its order keeps the old use and the new one apart."""
    return f"{device.name}#{id(device)}" if device.stream else device.name


class BufferPool:
    """Buffers of features that nobody uses any more, kept for the next image.

    Args:
        spare: Sets of buffers kept per device and shape; more are freed.
    """

    def __init__(self, spare: int = 2) -> None:
        self._spare = spare
        self._free: dict[_PoolKey, deque[dict[str, Buffer]]] = {}
        self.allocated = 0
        """Sets allocated so far; stands still in the steady state."""

    def take(self, device: Device, specs: Iterable[TensorSpec]) -> Features:
        """Features with uninitialised buffers, recycled where possible."""
        specs = tuple(specs)
        key = (_home(device), tuple((s.name, s.dtype, s.shape()) for s in specs))
        free = self._free.setdefault(key, deque(maxlen=self._spare))
        try:
            buffers = free.pop()
        except IndexError:
            buffers = {s.name: device.empty(s.shape(), s.np_dtype) for s in specs}
            self.allocated += 1
        features = Features(buffers, device if device.stream else None)
        # The callback may run inside any allocation of any thread, so it takes no lock: deque.append is atomic.
        weakref.finalize(features, free.append, buffers).atexit = False
        return features

    def clear(self) -> None:
        """Frees what is unused now."""
        for free in list(self._free.values()):
            free.clear()

    def forget(self, device: Device) -> None:
        """Frees what is unused now on one device, which is about to be closed."""
        for key in [key for key in list(self._free) if key[0] == _home(device)]:
            self._free.pop(key).clear()


class FixedFeatures:
    """One set of feature buffers that never move, for recorded graphs, which hold addresses.

    The encoder's graph writes them and the decoder's graphs read them. Recording once per set of cached features
    instead would take a recording, with TensorRT also an execution context, for every set and every prompt shape.
    Copying takes one pass over the features per image and none for further clicks on the same image: 17 MB for a SAM
    2 at 1024 pixels, 0.2 ms where memory moves 200 GB/s. Use it under the lock of the stream.

    Args:
        device: Where the buffers are.
        specs: The encoder's outputs.

    Raises:
        DeviceMemoryError: No room for one more set.
    """

    def __init__(self, device: Device, specs: Iterable[TensorSpec]) -> None:
        self.buffers = {s.name: device.empty(s.shape(), s.np_dtype) for s in specs}
        self.nbytes = sum(b.nbytes for b in self.buffers.values())
        self._device = device
        self._held: weakref.ref[Features] | None = None

    def bind(self, binding: Binding, names: Collection[str] | None = None) -> None:
        """Binds the buffers for good, or only some of them."""
        for name, buffer in self.buffers.items():
            if names is None or name in names:
                binding.bind(name, buffer)

    def invalidate(self) -> None:
        """Says that a graph is about to overwrite the buffers."""
        self._held = None

    def store(self, features: Features) -> None:
        """Queues copies of what the encoder wrote here into the buffers of a cache entry."""
        for name, buffer in self.buffers.items():
            self._device.copy(features.buffers[name], buffer)
        self._held = weakref.ref(features)

    def load(self, features: Features) -> None:
        """Queues copies of a cache entry into the buffers, unless they hold it already."""
        if self._held is not None and self._held() is features:
            return
        self._held = None
        for name, buffer in self.buffers.items():
            self._device.copy(buffer, features.buffers[name])
        self._held = weakref.ref(features)


@dataclass(frozen=True)
class CacheStats:
    """Counters of an `EmbeddingCache`."""

    entries: int
    bytes: int
    max_bytes: int
    hits: int
    misses: int
    evictions: int


class _Flight:
    """A computation under way; `features` stays None when it failed, `reserved` is what the budget holds for them."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.features: Features | None = None
        self.reserved = 0


class EmbeddingCache:
    """Features by `EmbeddingKey`, shared by predictors and threads.

    Features that a client sent are never put here. Entries that are evicted while in use live on, outside the
    budget, until their last user lets go.

    Args:
        max_bytes: Budget for the entries; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self.pool = BufferPool()
        self._lock = threading.Lock()
        self._entries: OrderedDict[EmbeddingKey, Features] = OrderedDict()
        self._flights: dict[EmbeddingKey, _Flight] = {}
        self._bytes = 0
        self._reserved = self._lent = 0
        self._hits = self._misses = self._evictions = 0

    def find(self, key: EmbeddingKey) -> Features | None:
        """The features for `key` if they are there, which counts as a hit."""
        with self._lock:
            features = self._entries.get(key)
            if features is not None:
                self._entries.move_to_end(key)
                self._hits += 1
            return features

    def get_or_create(self, key: EmbeddingKey, nbytes: int, create: Callable[[], Features]) -> Features:
        """The features for `key`; `create` runs once however many threads ask at the same time.

        Args:
            key: What the features depend on.
            nbytes: Size that `create` will return; room is made before it runs, so that its buffers can be those of
                an evicted entry.
            create: Computes the features. When it raises, the error goes to its caller and a waiting thread
                computes instead.
        """
        while True:
            with self._lock:
                features = self._entries.get(key)
                if features is not None:
                    self._entries.move_to_end(key)
                    self._hits += 1
                    return features
                flight = self._flights.get(key)
                if flight is None:
                    flight = self._flights[key] = _Flight()
                    self._misses += 1
                    flight.reserved, evicted = self._reserve(nbytes)
                    break
            flight.done.wait()
            if flight.features is not None:
                with self._lock:
                    self._hits += 1
                return flight.features
        evicted.clear()
        try:
            flight.features = create()
            return flight.features
        finally:
            with self._lock:
                self._land(key, flight)
            flight.done.set()

    def drop_bundle(self, bundle_hash: str) -> int:
        """Forgets every entry of one bundle and frees unused buffers; returns the number of entries."""
        with self._lock:
            keys = [key for key in self._entries if key.bundle_hash == bundle_hash]
            dropped = [self._remove(key) for key in keys]
        dropped.clear()
        self.pool.clear()
        return len(keys)

    def clear(self) -> None:
        """Forgets everything and frees unused buffers."""
        with self._lock:
            dropped = [self._remove(key) for key in list(self._entries)]
        dropped.clear()
        self.pool.clear()

    def forget(self, device: Device) -> None:
        """Forgets what was written by the stream of `device`, before that is closed; memory without a stream stays."""
        with self._lock:
            keys = [key for key, features in self._entries.items() if features.device is device]
            dropped = [self._remove(key) for key in keys]
        dropped.clear()
        if device.stream:
            self.pool.forget(device)

    def stats(self) -> CacheStats:
        """Counters, taken at once."""
        with self._lock:
            return CacheStats(
                len(self._entries), self._bytes, self.max_bytes, self._hits, self._misses, self._evictions
            )

    def lend(self, nbytes: int) -> bool:
        """Sets a part of the budget aside for what is kept beside the features, until `take_back`; entries go for it.

        At most half of the budget is lent, so that features have the rest: False where it would be more.
        """
        with self._lock:
            if self._lent + nbytes > self.max_bytes // 2:
                return False
            self._lent += nbytes
            evicted = self._evict(0)
        evicted.clear()
        return True

    def take_back(self, nbytes: int) -> None:
        """Gives features back what was lent."""
        with self._lock:
            self._lent -= nbytes

    def _reserve(self, nbytes: int) -> tuple[int, list[Features]]:
        """Makes room for an entry under way: what is reserved for it, which is nothing where it is too large, and the
        evicted features, which the caller releases outside the lock."""
        if nbytes > self.max_bytes - self._lent:
            return 0, []
        evicted = self._evict(nbytes)
        self._reserved += nbytes
        return nbytes, evicted

    def _evict(self, nbytes: int) -> list[Features]:
        """The entries that go, the least recently used first, until so many bytes more are within the budget."""
        evicted: list[Features] = []
        while self._entries and self._taken + nbytes > self.max_bytes:
            evicted.append(self._remove(next(iter(self._entries))))
            self._evictions += 1
        return evicted

    @property
    def _taken(self) -> int:
        return self._bytes + self._reserved + self._lent

    def _land(self, key: EmbeddingKey, flight: _Flight) -> None:
        """Ends a computation: the reservation becomes an entry, or nothing."""
        del self._flights[key]
        self._reserved -= flight.reserved
        features = flight.features
        if features is not None and flight.reserved and self._taken + features.nbytes <= self.max_bytes:
            self._entries[key] = features
            self._bytes += features.nbytes

    def _remove(self, key: EmbeddingKey) -> Features:
        features = self._entries.pop(key)
        self._bytes -= features.nbytes
        return features
