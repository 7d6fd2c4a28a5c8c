"""What models were found to take, for the next time they load: a better figure than any that was declared."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from ..bundle.names import MANIFEST_NAME
from ..runtime.memory import MemoryUse
from .budget import Booking
from .families import IMAGES
from .settings import LoadOptions

MAX_KEPT = 64
"""Models remembered, the latest."""

_Key = tuple[Path, int, LoadOptions, str]


class Found:
    """Weights and work memory by bundle, task, settings and device, as long as the process lives. Thread-safe.

    Bindings and caches are not kept: they depend on the requests that came, and the settings declare them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, tuple[str, MemoryUse]] = OrderedDict()

    def note(self, path: Path, options: LoadOptions, booking: Booking, task: str = IMAGES) -> None:
        """Keeps what a model that leaves was found to use; nothing where its work memory was never measured."""
        used, key = booking.used, _key(path, options, task)
        if key is None or used is None or (used.activations is None and used.shared is None):
            return
        with self._lock:
            self._kept[key] = (booking.device, replace(used, bindings=None, caches=None, host=None))
            self._kept.move_to_end(key)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)

    def recall(
        self, path: Path, options: LoadOptions, devices: Collection[str], task: str = IMAGES
    ) -> MemoryUse | None:
        """What the model was found to use with the same settings, on one of these devices."""
        key = _key(path, options, task)
        with self._lock:
            device, use = self._kept.get(key, ("", None)) if key is not None else ("", None)
        return use if device in devices else None


def _key(path: Path, options: LoadOptions, task: str) -> _Key | None:
    """None for a bundle that is gone; another one in its place has another time."""
    try:
        return path, (path / MANIFEST_NAME if path.is_dir() else path).stat().st_mtime_ns, options, task
    except OSError:
        return None
