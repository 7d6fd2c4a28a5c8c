"""What `CudaDevice` asks of the CUDA driver, whichever library makes the calls. Imports no CUDA.

`BindingsApi` (cuda_api.py) implements it with cuda-bindings, `PycudaApi` (pycuda.py) with pycuda. Addresses and sizes
are plain ints; streams, events, contexts and graphs are opaque.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DeviceError
from .base import DeviceInfo

OUT_OF_MEMORY = ("CUDA_ERROR_OUT_OF_MEMORY",)
"""Codes of `CudaError` that mean too little memory."""
ENDING = ("CUDA_ERROR_DEINITIALIZED", "CUDA_ERROR_CONTEXT_IS_DESTROYED")
"""Codes when the process ends and the driver went first: everything is freed already."""

# After these the context is lost: every later call fails the same way.
_LOST = {
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_ASSERT",
}


class CudaError(DeviceError):
    """A call to the CUDA driver failed; `code` is the name of the status, for example CUDA_ERROR_INVALID_VALUE."""

    def __init__(self, call: str, code: str, text: str = "") -> None:
        self.code = code
        action = "Run 'pixano-edge doctor'."
        if code in _LOST:
            action = "The CUDA context is lost: start the process again, and check the graph with 'pixano-edge verify'."
        elif "CAPTURE" in code:
            action = "Run without graph capture."
        super().__init__(f"{call} failed: {code}{f' ({text})' if text else ''}.", action)


@dataclass(frozen=True)
class CudaFacts:
    """What the driver says about one device without a context.

    Attributes:
        index: The N of ``cuda:N``: CUDA's own order, after CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER.
        name: Product name.
        compute_capability: For example "8.7".
        memory_total: Bytes.
        multiprocessors: Number of SMs.
        integrated: The GPU shares the RAM (Jetson).
        maps_host: Kernels can use page-locked host memory.
        pageable: Kernels can use any host memory.
        registers_host: Host memory can be page-locked after it was allocated.
        uuid: As NVML writes it ("GPU-..."), or None.
        pci: As NVML writes it, lower case ("00000000:65:00.0"), or None.
        cuda: Highest CUDA version that the driver supports, for example "13.2".
    """

    index: int
    name: str
    compute_capability: str
    memory_total: int
    multiprocessors: int
    integrated: bool
    maps_host: bool
    pageable: bool
    registers_host: bool
    uuid: str | None
    pci: str | None
    cuda: str


def device_info(
    facts: CudaFacts, total: int | None, free: int | None, driver: str | None, extra: Mapping[str, str]
) -> DeviceInfo:
    """The facts in the form that `doctor` and server info show; memory in bytes, `driver` is the kernel driver's."""
    named = {"uuid": facts.uuid, "pci": facts.pci, "memory": "shared with the CPU" if facts.integrated else None}
    return DeviceInfo(
        name=facts.name,
        kind="cuda",
        index=facts.index,
        compute_capability=facts.compute_capability,
        driver=driver,
        runtime=f"CUDA {facts.cuda}",
        memory_total=total,
        memory_free=free,
        extra={
            "multiprocessors": str(facts.multiprocessors),
            **{key: value for key, value in named.items() if value},
            **extra,
        },
    )


class CudaApi(abc.ABC):
    """The calls. Those below `push` need a current context; all raise `CudaError`."""

    label: str
    """Library and version, for `DeviceInfo.extra`."""
    captures: bool
    locates: bool = True
    """Whether `locate` can tell."""

    @abc.abstractmethod
    def count(self) -> int:
        """Devices that this process can see."""

    @abc.abstractmethod
    def facts(self, index: int) -> CudaFacts:
        """About one device."""

    @abc.abstractmethod
    def retain(self, index: int) -> Any:
        """The primary context, which ONNX Runtime and TensorRT use as well; one `release` per call."""

    @abc.abstractmethod
    def release(self, index: int, context: Any) -> None: ...

    @abc.abstractmethod
    def push(self, context: Any) -> None: ...

    @abc.abstractmethod
    def pop(self, context: Any) -> None: ...

    @abc.abstractmethod
    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""

    @abc.abstractmethod
    def alloc(self, nbytes: int) -> int: ...

    @abc.abstractmethod
    def free(self, pointer: int) -> None: ...

    @abc.abstractmethod
    def host_alloc(self, nbytes: int) -> tuple[int, int]:
        """Page-locked memory mapped for the device: host address, device address."""

    @abc.abstractmethod
    def host_free(self, host: int) -> None: ...

    @abc.abstractmethod
    def host_register(self, host: int, nbytes: int) -> int:
        """Page-locks and maps memory of somebody else; returns the device address."""

    @abc.abstractmethod
    def host_unregister(self, host: int) -> None: ...

    @abc.abstractmethod
    def locate(self, pointer: int) -> tuple[int, int] | None:
        """Device index and device address of memory that CUDA knows; None for other memory."""

    @abc.abstractmethod
    def copy(self, target: int, source: int, nbytes: int, stream: Any, kind: str) -> None:
        """Queues a copy; `kind` is htod, dtoh, dtod or htoh (page-locked host memory only)."""

    @abc.abstractmethod
    def stream_create(self) -> Any:
        """A stream that does not wait for the default stream."""

    @abc.abstractmethod
    def stream_pointer(self, stream: Any) -> int: ...

    @abc.abstractmethod
    def stream_synchronize(self, stream: Any) -> None: ...

    @abc.abstractmethod
    def stream_destroy(self, stream: Any) -> None: ...

    @abc.abstractmethod
    def stream_wait(self, stream: Any, event: Any) -> None: ...

    @abc.abstractmethod
    def event_create(self, timed: bool) -> Any: ...

    @abc.abstractmethod
    def event_record(self, event: Any, stream: Any) -> None: ...

    @abc.abstractmethod
    def event_record_foreign(self, event: Any, stream: int) -> None:
        """Records on a stream that another library made, given by its handle."""

    @abc.abstractmethod
    def event_synchronize(self, event: Any) -> None: ...

    @abc.abstractmethod
    def event_elapsed(self, start: Any, end: Any) -> float:
        """Milliseconds."""

    @abc.abstractmethod
    def event_destroy(self, event: Any) -> None: ...

    def capture_begin(self, stream: Any) -> None:
        raise NotImplementedError

    def capture_end(self, stream: Any) -> Any:
        """The recorded graph. Capture is over whether this raises or not."""
        raise NotImplementedError

    def graph_instantiate(self, graph: Any) -> Any:
        raise NotImplementedError

    def graph_empty(self, graph: Any) -> bool:
        raise NotImplementedError

    def graph_host_work(self, graph: Any) -> tuple[bool, bool]:
        """Whether a replay would call a function on the host, and whether it would copy out of host memory."""
        raise NotImplementedError

    def graph_launch(self, executable: Any, stream: Any) -> None:
        raise NotImplementedError

    def graph_destroy(self, graph: Any) -> None:
        raise NotImplementedError

    def executable_destroy(self, executable: Any) -> None:
        raise NotImplementedError


def long_pci(text: str) -> str:
    """A PCI address as NVML writes it, in lower case: CUDA's domain has four digits, NVML's eight."""
    domain, _, rest = text.lower().partition(":")
    return f"{domain:0>8}:{rest}"
