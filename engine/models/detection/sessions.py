"""What detectors of every family share: two sessions on one stream, caches of features, opening, facts, closing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ...errors import DeviceError
from ...runtime.base import Device, Session
from ...runtime.memory import MemoryUse, model_memory
from ..chain import Chain
from ..opening import OpenedGraphs
from .text_cache import FeatureCache, TextCache

D = TypeVar("D", bound="SessionDetector")


class SessionDetector:
    """The sessions of a detector and what is kept beside them; the family's class detects with them.

    Args:
        sessions: All on one device object; their locks are taken in this order where several are needed.
        caches: By the name that `info` shows; the one called ``text_cache`` is `text_cache`.
        bundle_hash: `Bundle.hash`.
        variant: Name of the variant that the sessions run.
        description: Facts for `info`; its ``warnings`` stay in front.
        capture: Record launches and replay them where device and sessions can.

    Attributes:
        text_cache: Features of texts.
    """

    def __init__(
        self,
        sessions: tuple[Session, ...],
        caches: Mapping[str, FeatureCache[Any]],
        *,
        bundle_hash: str,
        variant: str,
        description: dict[str, Any] | None = None,
        capture: bool = True,
    ) -> None:
        text_cache = caches["text_cache"]
        assert isinstance(text_cache, TextCache)
        self.text_cache = text_cache
        self._sessions = sessions
        self._caches = caches
        self._device = sessions[0].device
        self._bundle_hash = bundle_hash
        self._variant = variant
        self._description = description or {}
        self._closed = False
        self._opened = contextlib.ExitStack()
        self._chain = Chain(self._device, capture=capture)
        self._warm_up: dict[str, Any] | None = None

    def warm_up(self) -> float:
        """Runs the graphs until their launches are recorded; seconds it took, also in `info`."""
        raise NotImplementedError

    @property
    def device(self) -> Device:
        """The device object, for facts about it."""
        return self._device

    @property
    def runs(self) -> tuple[int, ...]:
        """Launches of each session so far, in the order of the constructor."""
        return tuple(session.runs for session in self._sessions)

    def info(self) -> dict[str, Any]:
        """Bundle, device, back end, precision and why, warnings, warm-up, counters; JSON-ready."""
        graphs = {session.spec.name: session.info() for session in self._sessions}
        told = (self._description, {"warnings": tuple(self._chain.warnings.values())}, *graphs.values())
        return {
            **self._description,
            "warnings": list(dict.fromkeys(w for one in told for w in one.get("warnings", ()))),
            "warm_up": self._warm_up,
            "stream": self._chain.info(),
            "bundle_hash": self._bundle_hash,
            "precision": self._variant,
            "device": self._device.name,
            "backend": self._sessions[0].backend,
            **graphs,
            **{name: cache.stats().to_dict() for name, cache in self._caches.items()},
        }

    def memory(self) -> MemoryUse:
        """Bytes that sessions and their buffers take now; cached features lie in RAM."""
        cached = sum(cache.stats().bytes for cache in self._caches.values())
        if self._device.kind == "cpu":
            return model_memory(self._sessions, cached)
        return model_memory(self._sessions) + MemoryUse(host=cached)

    def shrink(self) -> None:
        """Drops all features kept."""
        for cache in self._caches.values():
            cache.clear()

    def reset(self) -> None:
        """Drops all features kept, and the counters of the caches."""
        for cache in self._caches.values():
            cache.reset()

    def close(self) -> None:
        """Waits for calls under way, then frees what `open` opened; later calls raise DeviceError."""
        with contextlib.ExitStack() as held:
            for session in self._sessions:
                held.enter_context(session.lock)
            if self._closed:
                return
            self._closed = True
            with self._opened:  # frees in this order, and all of it whatever fails
                self._opened.callback(self.shrink)
                self._opened.callback(self._chain.close)
                self._chain.wait()

    def __enter__(self: D) -> D:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError("The detector is closed.", "Open the bundle again.")


def take_over(found: OpenedGraphs, make: Callable[[], D], warm_up: bool | None, check: Callable[[], None] | None) -> D:
    """A detector on open graphs, which it closes with itself; they are closed when making it fails.

    Args:
        found: The graphs.
        make: Makes the detector on their sessions.
        warm_up: Call `SessionDetector.warm_up`; None: on devices with a stream.
        check: Called before that; what it raises ends the opening.
    """
    with contextlib.ExitStack() as failed:
        failed.callback(found.opened.close)
        detector = make()
        detector._opened.push(found.opened)
        if warm_up or (warm_up is None and detector.device.stream):
            if check is not None:
                check()
            detector.warm_up()
        failed.pop_all()
    return detector
