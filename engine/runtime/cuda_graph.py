"""What `CudaDevice` hands out or keeps beside its stream: recorded graphs, staging memory, the current-device block."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import ContractError, DeviceError
from .base import Array, CapturedGraph
from .cuda_calls import CudaApi, CudaError
from .cuda_memory import Context, CudaEvent, Stream, free_later

if TYPE_CHECKING:
    from .cuda import CudaDevice


class Current:
    """``with`` block in which a device is current on the calling thread; other threads wait for it. Nests."""

    __slots__ = ("_context", "_lock", "_name", "_stream")

    def __init__(self, lock: Any, stream: Stream, name: str) -> None:
        self._lock = lock
        self._stream = stream
        self._context = stream.context
        self._name = name

    def __enter__(self) -> None:
        self._lock.acquire()
        entered = False
        try:
            if self._stream.handle is None:
                raise DeviceError(f"Device '{self._name}' is closed.", "Open it again.")
            self._context.__enter__()
            entered = True
        finally:
            if not entered:
                self._lock.release()

    def __exit__(self, *_: object) -> None:
        try:
            self._context.__exit__()
        finally:
            self._lock.release()


class Staging:
    """Page-locked memory beside one device buffer: one for uploads, one for downloads, each made at its first use.

    They are two, so that a later upload does not change a view that `download` returned.
    """

    __slots__ = ("down", "sent", "up")

    def __init__(self) -> None:
        self.up: Array | None = None
        self.down: Array | None = None
        self.sent: CudaEvent | None = None
        """Recorded behind the last copy out of `up`."""


class CudaGraph(CapturedGraph):
    """A recorded graph; frees itself with the last reference too."""

    def __init__(self, device: CudaDevice, context: Context, executable: Any) -> None:
        self._device = device
        self._context = context
        self._executable: Any = executable

    def replay(self) -> None:
        """Queues all recorded work on the device's stream.

        Raises:
            DeviceError: The graph or the device is closed.
        """
        with self._device.current():
            if self._executable is None:
                raise DeviceError("The recorded graph is closed.", "Record it again.")
            self._device.launch_graph(self._executable)

    def close(self) -> None:
        """Frees the graph; a replay that still runs ends first (the driver sees to it)."""
        executable, self._executable = self._executable, None
        if executable is not None:
            free_later(self._context, partial(self._context.api.executable_destroy, executable))

    def __del__(self) -> None:
        self.close()


def end_capture(api: CudaApi, stream: Any, finished: bool) -> Any:
    """Ends a recording, which leaves the stream usable in any case.

    Args:
        api: The library.
        stream: The stream that records.
        finished: Whether the recorded code returned; if not, its own error is on the way and none is raised here.

    Returns:
        The graph, or None when not `finished`.

    Raises:
        DeviceError: The code did what cannot be recorded.
    """
    try:
        graph = api.capture_end(stream)
    except CudaError as error:
        if not finished:
            return None
        raise DeviceError(
            f"The graph could not be recorded: {error.message}",
            "Run the work once before, so that nothing is allocated on the way, or run without graph capture.",
        ) from error
    if not finished:
        api.graph_destroy(graph)
        return None
    return graph


def as_mark(event: object, api: CudaApi) -> CudaEvent:
    """Checks that `event` is a mark of a CUDA device of the same library; ContractError if not."""
    if not isinstance(event, CudaEvent) or type(event.api) is not type(api):
        raise ContractError(f"A {type(event).__name__} is no mark of a CUDA device.", "Pass what Device.record gave.")
    return event
