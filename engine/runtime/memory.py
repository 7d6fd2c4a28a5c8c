"""How much memory sessions take: what they report themselves, what can be measured, and how running out looks.

`MemoryUse` is the unit of the provider's books. Figures are bytes on the session's own device, but for `host`;
page-locked host copies of a GPU model are not in them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..errors import DeviceError, DeviceMemoryError
from ..machine import ROOT, read_text
from .base import Session


@dataclass(frozen=True)
class MemoryUse:
    """Bytes by purpose; None where nobody knows, which `total` counts as nothing.

    Adding two of them adds every part but `shared`, of which the larger counts.

    Attributes:
        weights: Weights and what the back end made of them (packed copies).
        activations: Memory for intermediate tensors that one session has for itself.
        shared: Scratch memory that the sessions of one device use in turns.
        bindings: Bound inputs and outputs.
        caches: Kept between requests: image features, memory banks, KV caches.
        host: Kept between requests in RAM by a model on a GPU; what its device holds, and so `total`, is without it.
    """

    weights: int | None = None
    activations: int | None = None
    shared: int | None = None
    bindings: int | None = None
    caches: int | None = None
    host: int | None = None

    @property
    def total(self) -> int:
        """All known parts on the device."""
        return sum(v for k, v in self.parts().items() if k != "host" and v is not None)

    @property
    def at_once(self) -> int:
        """What must be there when the model starts; caches fill later."""
        return self.total - (self.caches or 0)

    def parts(self) -> dict[str, int | None]:
        """The fields by name; JSON-ready."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def corrected(self, found: MemoryUse) -> MemoryUse:
        """These declared figures with those of `found` in their place.

        What grows in use (`bindings`, `caches`, `host`) is never lowered: it was declared for later. A back end that
        found `shared` scratch memory has its activations there.
        """
        grows = ("bindings", "caches", "host")
        values = {
            name: known if new is None else _most(known, new) if name in grows else new
            for (name, known), new in zip(self.parts().items(), found.parts().values())
        }
        if found.shared is not None:
            values["activations"] = found.activations
        return MemoryUse(**values)

    def __add__(self, other: MemoryUse) -> MemoryUse:
        values = {
            name: _most(a, b) if name == "shared" else b if a is None else a if b is None else a + b
            for (name, a), b in zip(self.parts().items(), other.parts().values())
        }
        return MemoryUse(**values)


def _most(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else max(a, b)


@runtime_checkable
class ReportsMemory(Protocol):
    """A session whose back end knows more than its bindings.

    ONNX Runtime gives as `weights` what the bundle says of its graph, else the size of the file; it does not tell what
    it allocates, so a `GrowthMeter` around opening and first runs does. TensorRT gives the engine's weights, and its
    scratch memory as `shared` where sessions take turns with it, else as `activations`.
    """

    def memory(self) -> MemoryUse:
        """The parts known to the back end, without `bindings` and `caches`."""


def session_memory(session: Session) -> MemoryUse:
    """What one open session takes now. Buffers borrowed from others are theirs and do not count."""
    own = session.memory() if isinstance(session, ReportsMemory) else MemoryUse()
    with session.lock:
        bindings = sum(binding.nbytes for binding in session._bindings.values())
    return own + MemoryUse(bindings=bindings)


def model_memory(sessions: Iterable[Session], caches: int = 0) -> MemoryUse:
    """What the sessions of one model and its caches (bytes) take now."""
    return sum((session_memory(session) for session in sessions), MemoryUse(caches=caches))


def graph_bytes(path: Path) -> int:
    """Size of a graph file and of the external weight files beside it (named after it, as exporters do).

    Raises:
        OSError: No such file.
    """
    stem = f"{path.stem}."
    beside = (p for p in path.parent.iterdir() if p.name.startswith(stem) and p.suffix != ".onnx" and p != path)
    return path.stat().st_size + sum(p.stat().st_size for p in beside if p.is_file())


def resident_bytes(root: Path = ROOT) -> int | None:
    """Resident memory of this process without shared file pages; None where ``/proc`` does not tell (not Linux)."""
    numbers = read_text(root / "proc/self/statm").split()
    if len(numbers) < 3 or not all(n.isdigit() for n in numbers[:3]):
        return None
    return (int(numbers[1]) - int(numbers[2])) * os.sysconf("SC_PAGE_SIZE")


class Growth:
    """Result of `GrowthMeter.measure`, complete when its ``with`` ends.

    Attributes:
        nbytes: Bytes more (or less) than before; None when it could not be told or other work ran at the same time.
    """

    def __init__(self) -> None:
        self.nbytes: int | None = None


class GrowthMeter:
    """Measures how much memory a piece of work keeps, as long as no other measured work overlaps it.

    Memory belongs to a process or a device, not to a thread, so what ran side by side cannot be told apart: such a
    measurement is dropped and not guessed. Work of other processes on a shared GPU cannot be seen.

    Args:
        read: Bytes in use now, None where unknown.
    """

    def __init__(self, read: Callable[[], int | None] = resident_bytes) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._active = 0
        self._started = 0

    @contextmanager
    def measure(self) -> Iterator[Growth]:
        """Runs the body of the ``with`` and fills in the `Growth` afterwards, also when the body raises."""
        growth = Growth()
        with self._lock:
            alone = self._active == 0
            self._active += 1
            self._started += 1
            turn = self._started
        before = self._read() if alone else None
        try:
            yield growth
        finally:
            after = None if before is None else self._read()
            with self._lock:
                self._active -= 1
                alone = alone and self._started == turn
            if alone and before is not None and after is not None:
                growth.nbytes = after - before


_SIGNS = (
    "out of memory",
    "out_of_memory",
    "outofmemory",
    "failed to allocate memory",
    "memoryallocation",
    "bad_alloc",
    "bad allocation",
    "insufficient memory",
)
"""How ONNX Runtime, CUDA and TensorRT word it in errors that no back end of ours made a `DeviceMemoryError`."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what caused it, is a lack of memory on the host or a device.

    Only a `MemoryError` or a back end's failure counts: messages about requests may quote anything.
    """
    back_end = False
    for found in _chain(error):
        if isinstance(found, MemoryError | DeviceMemoryError):
            return True
        back_end = back_end or isinstance(found, DeviceError)
        if back_end and any(sign in _text(found) for sign in _SIGNS):
            return True
    return False


def is_host_memory(error: BaseException) -> bool:
    """Whether the memory that ran out is the host's, wherever the model is: Python or numpy found none."""
    return any(isinstance(found, MemoryError) for found in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, and so on."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _text(error: Any) -> str:
    return f"{type(error).__name__} {error}".lower()


def readable(nbytes: int | None) -> str:
    """Bytes for people: ``1.50 GiB``, ``12.0 MiB``; ``unknown`` for None."""
    if nbytes is None:
        return "unknown"
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
