"""Running a decoder: prompts in parts, single tokens, conversations that keep their cache for the next prompt.

A conversation remembers the key of every slot of its cache (`PromptKeys`): the token, or for an image token the image
and which of its features. A prompt that starts with the same keys takes over those slots, so a second question about an
image costs its own tokens alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ...contracts.decoder import EMBEDS, INPUT_IDS, INPUTS_EMBEDS, LOGITS, POSITION_IDS, DecoderConstants
from ...errors import DeviceError
from ...runtime.base import Session
from ..text.sampling import Sampler
from .cache import cache_bytes, make_cache, needs_positions

PREFILL_TOKENS = 256
"""Tokens of a prompt that one run takes: long enough for matrix products, short enough to let others run between."""

Keys = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


def image_keys(digest: bytes, count: int) -> Keys:
    """(count,) negative int64 keys of an image's features in order: equal for the same image alone.

    Args:
        digest: Of the pixels and of every setting that the features depend on.
        count: Features.
    """
    start = int.from_bytes(hashlib.blake2b(digest, digest_size=8).digest(), "little")
    mixed = np.uint64(start) + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    found: Keys = -1 - (mixed >> np.uint64(1)).astype(np.int64)
    return found


class Lane:
    """One conversation: its cache, what is in it, and a sampler. Made by `DecoderSession`, used by one call at a time.

    Attributes:
        length: Slots filled.
        turn: When it was last let go.
    """

    def __init__(self, session: DecoderSession, number: int) -> None:
        self.length = 0
        self.turn = 0
        self.number = number
        self.sampler = Sampler(session.constants.vocab_size)
        logits = session.device.empty((1, session.constants.vocab_size), "float32")
        self.cache = make_cache(session.decoder, session.constants, session.slots, logits)
        self._session = session
        self._keys: Keys = np.zeros(session.slots, np.int64)
        self._positions = np.zeros((3, 1), np.int32)

    def common(self, keys: Keys) -> int:
        """Slots that a prompt with these keys can take over: one at least is left to compute, for its logits."""
        count = min(self.length, len(keys) - 1)
        different = np.flatnonzero(self._keys[:count] != keys[:count])
        return int(different[0]) if len(different) else count

    def prefill(
        self,
        ids: Ids,
        keys: Keys,
        start: int,
        rows: npt.NDArray[np.int64] | None = None,
        features: Floats | None = None,
        positions: npt.NDArray[np.int32] | None = None,
    ) -> Floats:
        """Runs a part of a prompt; the slots from `start` on are forgotten first, also when the run fails.

        Args:
            ids: (S,) int32 token ids, at least one.
            keys: (S,) what the slots are remembered by.
            start: Slot of the first one, at most `length`.
            rows: Which of the S are image tokens.
            features: (len(rows), D) what stands in their places.
            positions: (3, S) rotary positions, for a decoder that takes them.

        Returns:
            (V,) logits after the last token; a view that this conversation's next run overwrites.

        Raises:
            DeviceError, DeviceMemoryError: The session is closed, or the back end failed.
        """
        session, count = self._session, len(ids)
        assert start <= self.length
        self.length = start
        with session.locked():
            embed = session.embed.prepare({"S": count})
            embed.write(INPUT_IDS, ids[None])
            embed.run()
            embeds = embed.outputs[EMBEDS]
            if rows is not None and len(rows):
                assert features is not None
                host = embed.read(EMBEDS)
                if session.device.kind != "cpu":
                    host = host.copy()
                host[0, rows] = features
                if session.device.kind != "cpu":
                    session.device.upload(embeds, host)
            binding = self.cache.binding(start, count)
            binding.bind(INPUTS_EMBEDS, embeds)
            try:
                if positions is not None:
                    binding.write(POSITION_IDS, positions)
                binding.run()
            finally:
                if count > 1:
                    binding.release(INPUTS_EMBEDS)
            self.cache.done()
            self._keys[start : start + count] = keys
            self.length = start + count
            return session.read_logits(binding)

    def step(self, token: int, position: int | None = None) -> Floats:
        """Runs one token of the answer.

        Args:
            token: Its id.
            position: Its rotary position, for a decoder that takes them.

        Returns, Raises: As `prefill`.
        """
        session, start = self._session, self.length
        with session.locked():
            session.token[0, 0] = token
            session.embed_one.write(INPUT_IDS, session.token)
            session.embed_one.run()
            binding = self.cache.binding(start, 1)
            binding.bind(INPUTS_EMBEDS, session.embed_one.outputs[EMBEDS])
            if position is not None:
                self._positions[:] = position
                binding.write(POSITION_IDS, self._positions)
            binding.run()
            self.cache.done()
            self._keys[start] = token
            self.length = start + 1
            return session.read_logits(binding)


class DecoderSession:
    """A decoder and its token embedding, with caches for several conversations. Thread-safe.

    Args:
        embed: Session of the token embedding.
        decoder: Session of the decoder, on the same device object.
        constants: Of the decoder.
        slots: Tokens of prompt and answer together.
        lanes: Conversations at once. The first cache is allocated now, the others when they are needed.

    Attributes:
        slots: Tokens of prompt and answer together.
        lanes: Conversations at once.
        positions: Whether the decoder takes rotary positions.
    """

    def __init__(
        self, embed: Session, decoder: Session, constants: DecoderConstants, slots: int, lanes: int = 1
    ) -> None:
        self.embed = embed
        self.decoder = decoder
        self.constants = constants
        self.device = decoder.device
        self.slots = slots
        self.lanes = lanes
        self.positions = needs_positions(decoder)
        self.token = np.zeros((1, 1), np.int32)
        self.embed_one = embed.prepare({"S": 1}, owner=self)
        self._changed = threading.Condition()
        self._all: list[Lane] = [Lane(self, 0)]
        self._free: list[Lane] = list(self._all)
        self._turn = 0
        self._closed = False

    def locked(self) -> contextlib.ExitStack:
        """Both sessions for one run; raises DeviceError when closed."""
        with contextlib.ExitStack() as held:
            held.enter_context(self.decoder.lock)
            held.enter_context(self.embed.lock)
            if self._closed:
                raise DeviceError("The model is closed.", "Open the bundle again.")
            return held.pop_all()

    def read_logits(self, binding: Any) -> Floats:
        found: Floats = binding.read(LOGITS)[0]
        return found

    @contextlib.contextmanager
    def conversation(self, keys: Keys) -> Iterator[Lane]:
        """A conversation for a prompt, the free one that shares its longest start; waits where none is free.

        Raises:
            DeviceError: The model is closed.
            DeviceMemoryError: No room for another cache.
        """
        lane = self._take(keys)
        try:
            yield lane
        finally:
            with self._changed:
                self._turn += 1
                lane.turn = self._turn
                if not self._closed:  # else its cache goes now
                    self._free.append(lane)
                self._changed.notify()

    def forget(self) -> None:
        """Empties the caches that no conversation uses; frees all of these but one."""
        with self._changed:
            for lane in self._free:
                lane.length = 0
            extra = self._free[1:]
            self._free = self._free[:1]
            self._all = [lane for lane in self._all if lane not in extra]
        for lane in extra:  # not under the condition: a run that ends takes it with the session's lock held
            self.decoder.drop(lane.cache)

    def close(self) -> None:
        """Frees the caches; answers under way fail at their next step."""
        with self.locked() if not self._closed else contextlib.nullcontext(), self._changed:
            self._closed = True
            self._free.clear()
            self._all.clear()
            self._changed.notify_all()

    @property
    def nbytes(self) -> int:
        """Of the caches allocated now."""
        return sum(lane.cache.nbytes for lane in self._all)

    @property
    def most_bytes(self) -> int:
        """Of all caches that there may be."""
        return self.lanes * cache_bytes(self.decoder, self.constants, self.slots)

    @property
    def free(self) -> int:
        """Conversations that could start now."""
        with self._changed:
            return len(self._free) + self.lanes - len(self._all)

    def info(self) -> dict[str, Any]:
        """JSON-ready."""
        with self._changed:
            caches = [{**lane.cache.info(), "filled": lane.length} for lane in self._all]
        return {"context": self.slots, "conversations": self.lanes, "caches": caches}

    def _take(self, keys: Keys) -> Lane:
        with self._changed:
            while True:
                if self._closed:
                    raise DeviceError("The model is closed.", "Open the bundle again.")
                common = {lane: lane.common(keys) for lane in self._free}
                best = max(self._free, key=lambda lane: (common[lane], -lane.turn), default=None)
                room = len(self._all) < self.lanes
                # A cache most of which would be lost may help its own conversation again: it is left while there is
                # room for another one.
                if best is not None and (2 * common[best] >= best.length or not room):
                    if 2 * common[best] < best.length:
                        best = min(self._free, key=lambda lane: lane.turn)
                    self._free.remove(best)
                    return best
                if room:
                    lane = Lane(self, len(self._all))
                    self._all.append(lane)
                    return lane
                self._changed.wait()
