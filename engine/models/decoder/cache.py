"""The memory of a KV cache: allocated once at its full length, bound, and never moved.

Two kinds, by what the graph can do (see `contracts.decoder`): one buffer per tensor that is the graph's past and its
present at once, or two buffers that take turns where outputs cannot be inputs.
"""

from __future__ import annotations

import abc
import time
from typing import Any

import numpy as np

from ...contracts.decoder import CACHE_POSITION, INPUTS_EMBEDS, LOGITS, POSITION_IDS, SEQLENS_K, DecoderConstants
from ...runtime.base import Binding, Buffer, Device, Session


class KvCache(abc.ABC):
    """Keys and values of one conversation. Used under the decoder session's lock.

    Args:
        session: Of the decoder.
        constants: Of the decoder.
        slots: Tokens that it holds.
        logits: Where the logits go, (1, V) float32, its own.

    Attributes:
        slots: Tokens that it holds.
        nbytes: Of its buffers.
        bind_seconds: Spent in binding so far, apart from the first time for each number of tokens.
        binds: Runs that had to bind anew.
    """

    kind = "abstract"

    def __init__(self, session: Session, constants: DecoderConstants, slots: int, logits: Buffer) -> None:
        self.slots = slots
        self.nbytes = 0
        self.bind_seconds = 0.0
        self.binds = 0
        self._session = session
        self._constants = constants
        self._logits = logits

    @abc.abstractmethod
    def binding(self, filled: int, count: int) -> Binding:
        """The decoder's binding for `count` tokens after `filled` ones: everything is bound and written but
        `INPUTS_EMBEDS` and, where the graph has it, `POSITION_IDS`."""

    def done(self) -> None:  # noqa: B027 (only some kinds have something to note)
        """The run of the last binding succeeded."""

    def info(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"kind": self.kind, "slots": self.slots, "bytes": self.nbytes}


class SharedCache(KvCache):
    """Past and present are one buffer: a step writes one slot and moves nothing.

    A binding for each number of tokens is made once and keeps its buffers; a step only writes `SEQLENS_K`.
    """

    kind = "shared"

    def __init__(self, session: Session, constants: DecoderConstants, slots: int, logits: Buffer) -> None:
        super().__init__(session, constants, slots, logits)
        self._buffers = [
            session.device.empty(constants.cache_shape(slots), session.spec.tensor(past).dtype)
            for past, _ in constants.cache_names
        ]
        self.nbytes = sum(b.nbytes for b in self._buffers)
        self._lengths = np.zeros(1, np.int32)
        self._borrowed = _borrowed(session, constants)
        self._step = self._bound(1)

    def binding(self, filled: int, count: int) -> Binding:
        found = self._step if count == 1 else self._bound(count)
        self._lengths[0] = filled + count - 1
        found.write(SEQLENS_K, self._lengths)
        return found

    def _bound(self, count: int) -> Binding:
        found = self._session.prepare({"S": count, "C": self.slots}, self._borrowed, owner=self)
        for (past, present), buffer in zip(self._constants.cache_names, self._buffers):
            found.bind(past, buffer)
            found.bind(present, buffer)
        found.bind(LOGITS, self._logits)
        return found


class AlternatingCache(KvCache):
    """Two sets of buffers: a run reads the filled slots of one and writes all of them, and the new ones, to the other.

    What that costs is more than the copy, which is the graph's: the shapes change with every token, so every run binds
    anew (`bind_seconds`).
    """

    kind = "alternating"

    def __init__(self, session: Session, constants: DecoderConstants, slots: int, logits: Buffer) -> None:
        super().__init__(session, constants, slots, logits)
        flat = (int(np.prod(constants.cache_shape(slots), dtype=np.int64)),)
        self._sets = [
            [session.device.empty(flat, session.spec.tensor(past).dtype) for past, _ in constants.cache_names]
            for _ in range(2)
        ]
        self.nbytes = sum(b.nbytes for one in self._sets for b in one)
        self._current = 0
        self._held = 0
        self._after = 0
        self._borrowed = _borrowed(session, constants)

    def binding(self, filled: int, count: int) -> Binding:
        # Shorter than what the last run left: the filled slots of each head must move together first.
        if filled < self._held:
            self._shorten(filled)
        started = time.perf_counter()
        constants = self._constants
        sizes = {"S": count, "P": filled, "T": filled + count}
        found = self._session.prepare(sizes, self._borrowed, owner=self)
        source, target = self._sets[self._current], self._sets[1 - self._current]
        for index, (past, present) in enumerate(constants.cache_names):
            found.bind(past, _head_of(source[index], constants.cache_shape(filled)))
            found.bind(present, _head_of(target[index], constants.cache_shape(filled + count)))
        found.bind(LOGITS, self._logits)
        found.write(CACHE_POSITION, np.arange(filled, filled + count, dtype=np.int32))
        self.bind_seconds += time.perf_counter() - started
        self.binds += 1
        self._after = filled + count
        return found

    def done(self) -> None:
        self._current = 1 - self._current
        self._held = self._after

    def info(self) -> dict[str, Any]:
        return {**super().info(), "binds": self.binds, "bind_seconds": self.bind_seconds}

    def _shorten(self, filled: int) -> None:
        """Slots lie head by head, so a shorter cache is another layout; through host memory, once per prompt."""
        device, constants = self._session.device, self._constants
        for buffer in self._sets[self._current]:
            held = _head_of(buffer, constants.cache_shape(self._held))
            kept = np.ascontiguousarray(device.download(held)[:, :, :filled])
            if filled:
                device.upload(_head_of(buffer, constants.cache_shape(filled)), kept)
        device.synchronize()
        self._held = filled


def make_cache(session: Session, constants: DecoderConstants, slots: int, logits: Buffer) -> KvCache:
    """The kind of cache that the decoder's graph takes; raises DeviceMemoryError where there is no room."""
    names = {spec.name for spec in session.spec.inputs}
    kind = SharedCache if SEQLENS_K in names else AlternatingCache
    return kind(session, constants, slots, logits)


def cache_bytes(session: Session, constants: DecoderConstants, slots: int) -> int:
    """What one such cache takes."""
    names = {spec.name: spec for spec in session.spec.inputs}
    one = sum(
        int(np.prod(constants.cache_shape(slots), dtype=np.int64)) * names[past].np_dtype.itemsize
        for past, _ in constants.cache_names
    )
    return one if SEQLENS_K in names else 2 * one


def _borrowed(session: Session, constants: DecoderConstants) -> tuple[str, ...]:
    """Tensors that the binding of a run gets from others."""
    names = [name for pair in constants.cache_names for name in pair]
    return (*names, LOGITS, INPUTS_EMBEDS)


def _head_of(buffer: Buffer, shape: tuple[int, ...]) -> Buffer:
    """The start of a flat buffer as a tensor of this shape."""
    count = int(np.prod(shape, dtype=np.int64))
    array = None if buffer.array is None else buffer.array[:count].reshape(shape)
    device: Device = buffer.device
    return Buffer(device, shape, buffer.dtype, buffer.pointer, array, owned=False, owner=buffer)


def needs_positions(session: Session) -> bool:
    """Whether the decoder takes rotary positions as an input."""
    return any(spec.name == POSITION_IDS for spec in session.spec.inputs)
