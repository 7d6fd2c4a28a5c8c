"""Devices and their memory: what sessions allocate, copy, queue and wait on. Knows neither graphs nor models."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ContractError, DeviceError

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class DeviceInfo:
    """What a device is, for `doctor`, `info` and server info. None where unknown.

    Memory in bytes, utilisation in percent of time, temperature in degrees Celsius, power in watts.
    """

    name: str
    kind: str
    index: int = 0
    compute_capability: str | None = None
    driver: str | None = None
    runtime: str | None = None
    memory_total: int | None = None
    memory_free: int | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    utilisation: int | None = None
    temperature: int | None = None
    power: float | None = None


class Buffer:
    """C-contiguous memory of one tensor on one device.

    Attributes:
        array: numpy view of host memory, or None when the memory is on a device only.
        pointer: Address of the first byte on the device.
        owned: Whether the device allocated it; borrowed memory is kept alive by `owner`.
        handle: Back-end object wrapping the same memory, made once (for example an OrtValue).
        staging: Page-locked host copy that the device made for `Device.upload` and `Device.download`, or None.
    """

    __slots__ = ("array", "device", "dtype", "handle", "nbytes", "owned", "owner", "pointer", "shape", "staging")

    def __init__(
        self,
        device: Device,
        shape: Shape,
        dtype: np.dtype[Any],
        pointer: int,
        array: Array | None = None,
        owned: bool = True,
        owner: object = None,
    ) -> None:
        self.device = device
        self.shape = shape
        self.dtype = dtype
        self.pointer = pointer
        self.array = array
        self.owned = owned
        self.owner = owner
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.handle: Any = None
        self.staging: Any = None

    def host(self) -> Array:
        """The numpy view; raises ContractError for memory that lives on a device only."""
        if self.array is None:
            raise ContractError("This buffer has no host memory.", "Copy it with Device.copy first.")
        return self.array


class CapturedGraph(abc.ABC):
    """Launches recorded once by `Device.capture`; replaying them costs one call. Buffers must stay where they are."""

    @abc.abstractmethod
    def replay(self) -> None:
        """Queues all recorded work on the stream it was captured from."""

    @abc.abstractmethod
    def close(self) -> None:
        """Frees the graph; it cannot be replayed afterwards."""


class Device(abc.ABC):
    """Memory, one stream and copies on one device. One file per implementation.

    A device object is one stream: models that shall run side by side open one each (``open_device`` never shares).
    """

    kind: str = "abstract"
    captures: bool = False
    """Whether `capture` works here."""
    unified: bool = False
    """Whether device memory is host memory too (integrated GPUs): every buffer then has an `array`, copies cost
    nothing, but host access still needs a `synchronize` first."""
    _recording: Any = None
    """True or full while `capture` records; implementations set it."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """``cpu`` or ``cuda:0``; what `--device` takes."""

    @property
    @abc.abstractmethod
    def stream(self) -> int:
        """Handle of the device's stream, 0 where there is none (CPU)."""

    @abc.abstractmethod
    def info(self) -> DeviceInfo:
        """Current facts; cheap enough to call per request."""

    @abc.abstractmethod
    def empty(self, shape: Shape, dtype: npt.DTypeLike) -> Buffer:
        """Allocates uninitialised memory that graphs can read and write (64-byte aligned on CPU)."""

    @abc.abstractmethod
    def host_empty(self, shape: Shape, dtype: npt.DTypeLike) -> Buffer:
        """Allocates host memory that copies to this device can use directly (page-locked on CUDA)."""

    @abc.abstractmethod
    def wrap(self, source: object) -> Buffer:
        """Borrows a C-contiguous buffer on this device without a copy.

        Args:
            source: numpy array, memoryview or other buffer-protocol object, DLPack or
                ``__cuda_array_interface__`` exporter.

        Raises:
            ContractError: Not C-contiguous, on another device, or of an unsupported kind.
        """

    @abc.abstractmethod
    def copy(self, target: Buffer, source: Buffer) -> None:
        """Queues a copy of equal shape and dtype on the stream; done at `synchronize`, at once on CPU."""

    @abc.abstractmethod
    def upload(self, target: Buffer, source: Array) -> None:
        """Queues a copy of a host array of equal shape and dtype into `target`.

        `source` may be changed on return: it is copied to page-locked staging memory first, which is made at the
        first upload into `target`, kept with it and not overwritten while an earlier copy still reads it.

        Raises:
            ContractError: Shape or dtype differ, or `target` is read-only.
        """

    @abc.abstractmethod
    def download(self, source: Buffer) -> Array:
        """Waits for the stream and returns a host view of `source`.

        On CPU and where memory is `unified` this is the memory itself; elsewhere page-locked staging memory, made at
        the first download, kept with the buffer and overwritten by the next one.
        """

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Waits until everything queued on the stream is done."""

    def capture(self, work: Callable[[], None], *, host_copies: bool = True) -> CapturedGraph:
        """Records what `work` queues on the stream, without running it.

        `work` must not allocate, synchronise or copy to pageable memory; run it once before, so that nothing is
        initialised on the way.

        Args:
            work: Queues the work.
            host_copies: Whether `work` may copy out of host memory: a replay reads the same memory again, so whoever
                owns it must keep it. A back end of somebody else's may have freed it by then.

        Raises:
            DeviceError: The device has no graphs (see `captures`), or `work` did what cannot be recorded; the stream
                is usable again.
        """
        raise DeviceError(f"Device '{self.name}' cannot record graphs.", "Run without graph capture.")

    @property
    def capturing(self) -> bool:
        """Whether `capture` is recording: a back end then only launches."""
        return bool(self._recording)

    def current(self) -> AbstractContextManager[Any]:
        """Makes the device current on the calling thread inside ``with``, for back ends that launch by themselves.

        Other threads wait meanwhile. Take session locks before it, locks of one device's shared memory inside.
        """
        return contextlib.nullcontext()

    def record(self, timed: bool = False) -> object:
        """Marks the point reached on the stream, for `wait` on another device object or `elapsed`.

        Args:
            timed: Whether `elapsed` shall be able to use the mark.
        """
        return None

    def elapsed(self, start: object, end: object) -> float:
        """Milliseconds between two timed marks of this device; waits for the later one.

        Raises:
            DeviceError: The device has no clock of its own (CPU), or a mark is not timed.
        """
        raise DeviceError(f"Device '{self.name}' does not time its stream.", "Measure wall time.")

    def wait(self, event: object) -> None:  # noqa: B027 (nothing to wait for on CPU)
        """Lets the stream wait for a point that `record` marked; does not block the caller."""

    def wait_on_host(self, event: object) -> None:
        """Blocks the caller until a point that `record` marked on this device is reached, or longer."""
        self.synchronize()

    def close(self) -> None:  # noqa: B027 (optional hook)
        """Frees the stream; buffers free themselves with their last reference."""
