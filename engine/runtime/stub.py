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
from .base import Array, Binding, Buffer, DeviceInfo, Session, Shape
from .cpu import CpuDevice, check_copy

Function = Callable[[dict[str, Array]], Mapping[str, Array]]
"""Input arrays by name (views, valid during the call) to output arrays by name."""


class StubDevice(CpuDevice):
    """Host memory behind a recorded stream.

    Args:
        name: What `name` answers.
        deferred: Queue copies and launches until `synchronize` instead of doing them at once.

    Attributes:
        calls: Every call as a tuple that starts with its name: ``('empty', shape, dtype)``,
            ``('host_empty', shape, dtype)``, ``('wrap', shape, dtype)``, ``('copy', target pointer, source pointer)``,
            ``('launch', graph)``, ``('record', event)``, ``('wait', event)``, ``('synchronize',)``, ``('close',)``.
    """

    kind = "stub"

    def __init__(self, name: str = "stub", deferred: bool = False) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self._name = name
        self._deferred = deferred
        self._queue: list[Callable[[], None]] = []
        self._events = 0

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
        self.calls.append(("empty", tuple(shape), np.dtype(dtype).name))
        return super().empty(shape, dtype)

    def host_empty(self, shape: Shape, dtype: npt.DTypeLike) -> Buffer:
        self.calls.append(("host_empty", tuple(shape), np.dtype(dtype).name))
        return super().empty(shape, dtype)

    def wrap(self, source: object) -> Buffer:
        buffer = super().wrap(source)
        self.calls.append(("wrap", buffer.shape, buffer.dtype.name))
        return buffer

    def copy(self, target: Buffer, source: Buffer) -> None:
        check_copy(target, source)
        self.calls.append(("copy", target.pointer, source.pointer))
        self._submit(lambda: np.copyto(target.host(), source.host(), casting="no"))

    def upload(self, target: Buffer, source: Array) -> None:
        """Copies a host array as it is now; recorded as a copy from pointer 0 (staging memory)."""
        held = source.copy() if self._deferred else source
        self.calls.append(("copy", target.pointer, 0))
        self._submit(lambda: np.copyto(target.host(), held, casting="no"))

    def launch(self, graph: str, work: Callable[[], None]) -> None:
        """Queues one run of a graph."""
        self.calls.append(("launch", graph))
        self._submit(work)

    def record(self) -> int:
        self._events += 1
        self.calls.append(("record", self._events))
        return self._events

    def wait(self, event: object) -> None:
        self.calls.append(("wait", event))

    def synchronize(self) -> None:
        self.calls.append(("synchronize",))
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    def close(self) -> None:
        self.calls.append(("close",))
        self._queue.clear()

    def _submit(self, work: Callable[[], None]) -> None:
        if self._deferred:
            self._queue.append(work)
        else:
            work()


class StubSession(Session):
    """Runs a Python callable as if it were a graph, with the same buffers, checks and order of calls.

    Args:
        spec: The contract; the callable's outputs are checked against it.
        device: A `StubDevice`, whose `calls` then show what the session did.
        function: The graph.
    """

    backend = "stub"

    def __init__(self, spec: GraphSpec, device: StubDevice, function: Function) -> None:
        super().__init__(spec, device)
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
        inputs = {name: buffer.host() for name, buffer in binding.inputs.items()}
        outputs = {name: buffer.host() for name, buffer in binding.outputs.items()}
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
        self.device.synchronize()
        return buffer.host()

    def info(self) -> dict[str, Any]:
        return {"backend": self.backend, "provider": "stub", "device": self.device.name, "graph": self.spec.name}

    def close(self) -> None:
        super().close()
        self._closed = True
