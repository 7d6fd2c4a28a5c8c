"""A device and a session without any back end, so that call order and models can be tested anywhere.

`StubDevice` notes every call in order. Deferred, it also behaves like an asynchronous stream: copies and launches
happen at `synchronize`, so code that reads too early reads old data, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contracts.base import GraphSpec
from ..errors import ContractError, DeviceError
from .base import Array, Binding, Buffer, CapturedGraph, DeviceInfo, Session, Shape
from .cpu import CpuDevice, check_copy

Function = Callable[[dict[str, Array]], Mapping[str, Array]]
"""Input arrays by name (views, valid during the call) to output arrays by name."""


class StubEvent(int):
    """A mark on the stream of one `StubDevice`; its value counts the marks of that device."""

    device: StubDevice
    reached_at: int
    """Copies and launches submitted before the mark."""


class StubGraph(CapturedGraph):
    """Launches recorded by `StubDevice.capture`."""

    def __init__(self, device: StubDevice, number: int, work: list[Callable[[], None]]) -> None:
        self._device, self._number = device, number
        self._work: list[Callable[[], None]] | None = work

    def replay(self) -> None:
        if self._work is None:
            raise DeviceError(f"Graph {self._number} is closed.", "Record it again.")
        self._device.calls.append(("replay", self._number))
        for work in self._work:
            self._device.submit(work)

    def close(self) -> None:
        if self._work is not None:
            self._device.calls.append(("close graph", self._number))
        self._work = None


class StubDevice(CpuDevice):
    """Host memory behind a recorded stream.

    Args:
        name: What `name` answers.
        deferred: Queue copies and launches until `synchronize` instead of doing them at once.
        discrete: Buffers of `empty` have no `array`, as on a GPU with memory of its own; `memory` shows it to tests.
        captures: Offer `capture`.

    Attributes:
        calls: Every call as a tuple that starts with its name: ``('empty', shape, dtype)``,
            ``('host_empty', shape, dtype)``, ``('wrap', shape, dtype)``, ``('copy', target pointer, source pointer)``,
            ``('launch', graph)``, ``('record', event)``, ``('wait', event)``, ``('wait_on_host', event)``,
            ``('capture', number, graphs)``, ``('replay', number)``, ``('close graph', number)``,
            ``('synchronize',)``, ``('close',)``.
    """

    kind = "stub"

    def __init__(
        self, name: str = "stub", deferred: bool = False, *, discrete: bool = False, captures: bool = False
    ) -> None:
        super().__init__()
        self.captures = captures
        self.calls: list[tuple[Any, ...]] = []
        self._name = name
        self._deferred = deferred
        self._queue: list[Callable[[], None]] = []
        self._discrete = discrete
        self._events = 0
        self._graphs = 0
        self._submitted = 0
        self._recording: tuple[list[str], list[Callable[[], None]]] | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def stream(self) -> int:
        return 1

    @property
    def ops(self) -> list[str]:
        """Names of the calls, in order."""
        return [call[0] for call in self.calls]

    @property
    def pending(self) -> int:
        """Copies and launches queued and not done yet."""
        return len(self._queue)

    def info(self) -> DeviceInfo:
        return DeviceInfo(self.name, self.kind)

    def empty(self, shape: Shape, dtype: npt.DTypeLike) -> Buffer:
        self._not_while_recording("allocating")
        self.calls.append(("empty", tuple(shape), np.dtype(dtype).name))
        buffer = super().empty(shape, dtype)
        if self._discrete:
            buffer.owner, buffer.array = buffer.array, None
        return buffer

    def memory(self, buffer: Buffer) -> Array:
        """What a buffer holds now, also where the host could not look."""
        if buffer.array is None and isinstance(buffer.owner, Buffer):  # a part of another buffer
            start = buffer.pointer - buffer.owner.pointer
            whole = self.memory(buffer.owner).reshape(-1).view(np.uint8)
            part: Array = whole[start : start + buffer.nbytes].view(buffer.dtype).reshape(buffer.shape)
            return part
        memory: Array = buffer.owner if buffer.array is None else buffer.array  # type: ignore[assignment]
        return memory

    def host_empty(self, shape: Shape, dtype: npt.DTypeLike) -> Buffer:
        self._not_while_recording("allocating")
        self.calls.append(("host_empty", tuple(shape), np.dtype(dtype).name))
        return super().empty(shape, dtype)

    def wrap(self, source: object) -> Buffer:
        if self._discrete:
            raise ContractError("Host memory cannot be borrowed by this device.", "Upload it.")
        buffer = super().wrap(source)
        self.calls.append(("wrap", buffer.shape, buffer.dtype.name))
        return buffer

    def copy(self, target: Buffer, source: Buffer) -> None:
        check_copy(target, source)
        self.calls.append(("copy", target.pointer, source.pointer))
        self.submit(lambda: np.copyto(self.memory(target), self.memory(source), casting="no"))

    def upload(self, target: Buffer, source: Array) -> None:
        """Copies a host array as it is now; recorded as a copy from pointer 0 (staging memory)."""
        self._not_while_recording("copying from pageable memory")
        held = source.copy() if self._deferred else source
        self.calls.append(("copy", target.pointer, 0))
        self.submit(lambda: np.copyto(self.memory(target), held, casting="no"))

    def launch(self, graph: str, work: Callable[[], None]) -> None:
        """Queues one run of a graph."""
        if self._recording is None:
            self.calls.append(("launch", graph))
        else:
            self._recording[0].append(graph)
        self.submit(work)

    def download(self, source: Buffer) -> Array:
        self.synchronize()
        return self.memory(source)

    def record(self, timed: bool = False) -> StubEvent:
        self._not_while_recording("marking")
        self._events += 1
        event = StubEvent(self._events)
        event.device, event.reached_at = self, self._submitted
        self.calls.append(("record", event))
        return event

    def wait(self, event: object) -> None:
        self._not_while_recording("waiting for another stream")
        self.calls.append(("wait", event))
        if isinstance(event, StubEvent) and event.device is not self:
            self.submit(lambda: event.device.finish(event))

    def wait_on_host(self, event: object) -> None:
        self._not_while_recording("waiting")
        self.calls.append(("wait_on_host", event))
        if isinstance(event, StubEvent):
            event.device.finish(event)

    def finish(self, event: StubEvent | None = None) -> None:
        """Does what is queued, up to a mark of this device."""
        while self._queue and (event is None or self._submitted - len(self._queue) < event.reached_at):
            self._queue.pop(0)()

    def synchronize(self) -> None:
        self._not_while_recording("waiting")
        self.calls.append(("synchronize",))
        self.finish()

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        if not self.captures:
            return super().capture(work)
        self._not_while_recording("recording twice")
        self._recording = ([], [])
        try:
            work()
            graphs, steps = self._recording
        finally:
            self._recording = None
        self._graphs += 1
        self.calls.append(("capture", self._graphs, tuple(graphs)))
        return StubGraph(self, self._graphs, steps)

    def close(self) -> None:
        self.calls.append(("close",))
        self._queue.clear()

    def submit(self, work: Callable[[], None]) -> None:
        """Queues work, does it at once, or keeps it for the graph that is being recorded."""
        if self._recording is not None:
            self._recording[1].append(work)
            return
        self._submitted += 1
        if self._deferred:
            self._queue.append(work)
        else:
            work()

    def _not_while_recording(self, what: str) -> None:
        """As CUDA does, whichever thread asks: it would spoil the recording."""
        if self._recording is not None:
            raise DeviceError(f"The stream is being recorded: {what} cannot be part of it.", "Do it before.")


class StubSession(Session):
    """Runs a Python callable as if it were a graph, with the same buffers, checks and order of calls.

    Args:
        spec: The contract; the callable's outputs are checked against it.
        device: A `StubDevice`, whose `calls` then show what the session did.
        function: The graph.
        capturable: Whether models may record its launches.
    """

    backend = "stub"

    def __init__(self, spec: GraphSpec, device: StubDevice, function: Function, *, capturable: bool = False) -> None:
        super().__init__(spec, device)
        self.capturable = capturable
        self._stub = device
        self._function = function
        self._closed = False

    def _prepare_impl(self, shapes: dict[str, Shape], outputs: dict[str, Shape]) -> Binding:
        return Binding(self, shapes, outputs)

    def _bind_impl(self, binding: Binding, name: str, buffer: Buffer) -> None:
        """Nothing to point at: `run` reads the binding."""

    def _write_impl(self, buffer: Buffer, source: Array) -> None:
        self._stub.upload(buffer, source)

    def _run_impl(self, binding: Binding) -> None:
        if self._closed:
            raise DeviceError(f"The session of graph '{self.spec.name}' is closed.", "Open it again.")
        inputs = {name: self._stub.memory(buffer) for name, buffer in binding.inputs.items()}
        outputs = {name: self._stub.memory(buffer) for name, buffer in binding.outputs.items()}
        self._stub.launch(self.spec.name, lambda: self._compute(inputs, outputs))

    def _compute(self, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        results = self._function(inputs)
        if set(results) != set(outputs):
            raise ContractError(
                f"The stub of graph '{self.spec.name}' returned {sorted(results)}, its outputs are {sorted(outputs)}.",
                "Return every output by name.",
            )
        for name, target in outputs.items():
            result = results[name]
            if result.shape != target.shape or result.dtype != target.dtype:
                raise ContractError(
                    f"The stub of graph '{self.spec.name}' returned {result.dtype}{list(result.shape)} for '{name}', "
                    f"bound is {target.dtype}{list(target.shape)}.",
                    "Return exactly what the contract says.",
                )
            np.copyto(target, result, casting="no")

    def _read_impl(self, buffer: Buffer) -> Array:
        return self.device.download(buffer)

    def info(self) -> dict[str, Any]:
        return {"backend": self.backend, "provider": "stub", "device": self.device.name, "graph": self.spec.name}

    def close(self) -> None:
        super().close()
        self._closed = True
