"""The CUDA driver through NVIDIA's cuda-bindings 12.x or 13.x: the one file that imports ``cuda.bindings``.

Sources: CUDA Driver API reference; cuda-bindings' own docstrings (the same call forms in 12.9 and 13.5).

cuda.core is not called: its allocators keep freed memory in a pool where TensorRT and ONNX Runtime cannot take it, and
its graph builder hides which call broke a capture. Its objects are welcome all the same: `CudaDevice` takes part in
``__cuda_stream__``, and `CudaDevice.wrap` borrows its buffers through DLPack.
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable
from typing import Any

from ..errors import DeviceError, MissingDependencyError
from .cuda_calls import CudaApi, CudaError, CudaFacts, long_pci

ABSENT = "CUDA_ERROR_NOT_FOUND"
"""Code of `CudaError` when the driver has no such function, or there is no driver."""


class BindingsApi(CudaApi):
    """cuda-bindings. Making one initialises the driver (no context, no memory on the device).

    Raises:
        MissingDependencyError: cuda-bindings is not installed.
        DeviceError: No driver, no device, or a driver older than the bindings.
    """

    captures = True

    def __init__(self) -> None:
        try:
            driver: Any = importlib.import_module("cuda.bindings.driver")
            version = str(importlib.import_module("cuda.bindings").__version__)
        except ModuleNotFoundError as error:
            raise MissingDependencyError("cuda.bindings", "cuda", "Running on a CUDA device") from error
        except ImportError as error:
            raise DeviceError(
                f"cuda-bindings is installed but does not load: {error}", "pip install --force-reinstall cuda-bindings"
            ) from error
        self._d = driver
        self.label = f"cuda-bindings {version}"
        try:
            self._call(driver.cuInit, 0)
        except CudaError as error:
            if error.code != ABSENT:
                raise
            raise DeviceError(f"No NVIDIA driver: {error.__cause__}", "Install it, or use --device cpu.") from error
        supported = int(self._call(driver.cuDriverGetVersion))
        self._cuda = f"{supported // 1000}.{supported % 1000 // 10}"
        major = int(version.partition(".")[0])
        if supported // 1000 < major:
            raise DeviceError(
                f"The NVIDIA driver supports CUDA up to {self._cuda}, cuda-bindings {version} needs CUDA {major}.",
                f"pip install 'cuda-bindings<{major}', or update the driver.",
            )

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls the driver and returns what follows the status: nothing, one value, or a tuple."""
        try:
            status, *values = function(*arguments)
        except RuntimeError as error:  # how the bindings say that the library or the function is missing
            raise CudaError(function.__name__, ABSENT, str(error)) from error
        if int(status):
            raise CudaError(function.__name__, getattr(status, "name", str(status)), self._text(status))
        return values[0] if len(values) == 1 else tuple(values)

    def _text(self, status: Any) -> str:
        failed, text = self._d.cuGetErrorString(status)
        return "" if int(failed) or text is None else text.decode("utf-8", "replace")

    def _attribute(self, name: str, device: Any) -> int:
        key = getattr(self._d.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._call(self._d.cuDeviceGetAttribute, key, device))

    def count(self) -> int:
        return int(self._call(self._d.cuDeviceGetCount))

    def facts(self, index: int) -> CudaFacts:
        d = self._d
        device = self._call(d.cuDeviceGet, index)
        pci = _string(self._call(d.cuDeviceGetPCIBusId, 32, device))
        major = self._attribute("COMPUTE_CAPABILITY_MAJOR", device)
        minor = self._attribute("COMPUTE_CAPABILITY_MINOR", device)
        return CudaFacts(
            index=index,
            name=_string(self._call(d.cuDeviceGetName, 256, device)),
            compute_capability=f"{major}.{minor}",
            memory_total=int(self._call(d.cuDeviceTotalMem, device)),
            multiprocessors=self._attribute("MULTIPROCESSOR_COUNT", device),
            integrated=bool(self._attribute("INTEGRATED", device)),
            maps_host=bool(self._attribute("CAN_MAP_HOST_MEMORY", device)),
            pageable=bool(self._attribute("PAGEABLE_MEMORY_ACCESS", device)),
            registers_host=bool(self._attribute("HOST_REGISTER_SUPPORTED", device)),
            uuid=f"GPU-{uuid.UUID(bytes=bytes(self._call(d.cuDeviceGetUuid, device).bytes)[:16])}",
            pci=long_pci(pci),
            cuda=self._cuda,
        )

    def retain(self, index: int) -> Any:
        return self._call(self._d.cuDevicePrimaryCtxRetain, self._call(self._d.cuDeviceGet, index))

    def release(self, index: int, context: Any) -> None:
        self._call(self._d.cuDevicePrimaryCtxRelease, self._call(self._d.cuDeviceGet, index))

    def push(self, context: Any) -> None:
        self._call(self._d.cuCtxPushCurrent, context)

    def pop(self, context: Any) -> None:
        self._call(self._d.cuCtxPopCurrent)

    def memory(self) -> tuple[int, int]:
        free, total = self._call(self._d.cuMemGetInfo)
        return int(free), int(total)

    def alloc(self, nbytes: int) -> int:
        return int(self._call(self._d.cuMemAlloc, nbytes))

    def free(self, pointer: int) -> None:
        self._call(self._d.cuMemFree, pointer)

    def host_alloc(self, nbytes: int) -> tuple[int, int]:
        flags = self._d.CU_MEMHOSTALLOC_PORTABLE | self._d.CU_MEMHOSTALLOC_DEVICEMAP
        host = int(self._call(self._d.cuMemHostAlloc, nbytes, flags))
        try:
            return host, int(self._call(self._d.cuMemHostGetDevicePointer, host, 0))
        except CudaError:
            self._call(self._d.cuMemFreeHost, host)
            raise

    def host_free(self, host: int) -> None:
        self._call(self._d.cuMemFreeHost, host)

    def host_register(self, host: int, nbytes: int) -> int:
        flags = self._d.CU_MEMHOSTREGISTER_PORTABLE | self._d.CU_MEMHOSTREGISTER_DEVICEMAP
        self._call(self._d.cuMemHostRegister, host, nbytes, flags)
        try:
            return int(self._call(self._d.cuMemHostGetDevicePointer, host, 0))
        except CudaError:
            self._call(self._d.cuMemHostUnregister, host)
            raise

    def host_unregister(self, host: int) -> None:
        self._call(self._d.cuMemHostUnregister, host)

    def locate(self, pointer: int) -> tuple[int, int] | None:
        kinds = self._d.CUpointer_attribute
        try:
            index = self._call(self._d.cuPointerGetAttribute, kinds.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, pointer)
            address = self._call(self._d.cuPointerGetAttribute, kinds.CU_POINTER_ATTRIBUTE_DEVICE_POINTER, pointer)
        except CudaError as error:
            if error.code == "CUDA_ERROR_INVALID_VALUE":  # documented: not CUDA's memory
                return None
            raise
        return int(index), int(address)

    def copy(self, target: int, source: int, nbytes: int, stream: Any, kind: str) -> None:
        # The driver sees from the addresses where they are (unified addressing).
        self._call(self._d.cuMemcpyAsync, target, source, nbytes, stream)

    def stream_create(self) -> Any:
        return self._call(self._d.cuStreamCreate, int(self._d.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def stream_pointer(self, stream: Any) -> int:
        return int(stream)

    def stream_synchronize(self, stream: Any) -> None:
        self._call(self._d.cuStreamSynchronize, stream)

    def stream_destroy(self, stream: Any) -> None:
        self._call(self._d.cuStreamDestroy, stream)

    def stream_wait(self, stream: Any, event: Any) -> None:
        self._call(self._d.cuStreamWaitEvent, stream, event, 0)

    def event_create(self, timed: bool) -> Any:
        flags = self._d.CUevent_flags
        return self._call(
            self._d.cuEventCreate, int(flags.CU_EVENT_DEFAULT if timed else flags.CU_EVENT_DISABLE_TIMING)
        )

    def event_record(self, event: Any, stream: Any) -> None:
        self._call(self._d.cuEventRecord, event, stream)

    def event_record_foreign(self, event: Any, stream: int) -> None:
        self._call(self._d.cuEventRecord, event, self._d.CUstream(stream))

    def event_synchronize(self, event: Any) -> None:
        self._call(self._d.cuEventSynchronize, event)

    def event_elapsed(self, start: Any, end: Any) -> float:
        return float(self._call(self._d.cuEventElapsedTime, start, end))

    def event_destroy(self, event: Any) -> None:
        self._call(self._d.cuEventDestroy, event)

    def capture_begin(self, stream: Any) -> None:
        # Thread-local: other threads may go on allocating, this one fails when it does what a graph cannot hold.
        self._call(
            self._d.cuStreamBeginCapture, stream, self._d.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        )

    def capture_end(self, stream: Any) -> Any:
        return self._call(self._d.cuStreamEndCapture, stream)

    def graph_instantiate(self, graph: Any) -> Any:
        return self._call(self._d.cuGraphInstantiate, graph, 0)

    def graph_empty(self, graph: Any) -> bool:
        return int(self._call(self._d.cuGraphGetNodes, graph)[-1]) == 0

    def graph_host_work(self, graph: Any) -> tuple[bool, bool]:
        count = int(self._call(self._d.cuGraphGetNodes, graph)[-1])
        nodes, _ = self._call(self._d.cuGraphGetNodes, graph, count)
        kinds = self._d.CUgraphNodeType
        call, copy = int(kinds.CU_GRAPH_NODE_TYPE_HOST), int(kinds.CU_GRAPH_NODE_TYPE_MEMCPY)
        found = [(int(self._call(self._d.cuGraphNodeGetType, node)), node) for node in nodes]
        return any(kind == call for kind, _ in found), any(
            self._reads_host(node) for kind, node in found if kind == copy
        )

    def _reads_host(self, node: Any) -> bool:
        parameters = self._call(self._d.cuGraphMemcpyNodeGetParams, node)
        return int(parameters.srcMemoryType) == int(self._d.CUmemorytype.CU_MEMORYTYPE_HOST)

    def graph_launch(self, executable: Any, stream: Any) -> None:
        self._call(self._d.cuGraphLaunch, executable, stream)

    def graph_destroy(self, graph: Any) -> None:
        self._call(self._d.cuGraphDestroy, graph)

    def executable_destroy(self, executable: Any) -> None:
        self._call(self._d.cuGraphExecDestroy, executable)


def _string(value: bytes) -> str:
    return value.partition(b"\0")[0].decode("utf-8", "replace")
