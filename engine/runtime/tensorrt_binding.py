"""Buffers, execution context and CUDA graph of one TensorRT session for one set of shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ContractError
from .base import Array, Binding, Buffer, CapturedGraph, Shape
from .tensorrt_api import TrtEngine
from .tensorrt_contract import Profile
from .tensorrt_memory import ScratchPool

if TYPE_CHECKING:
    from .tensorrt import TrtSession

State = tuple[int, ...]
"""Generation of the scratch memory, then the address of every tensor: what a captured graph has inside."""


class Slot:
    """An execution context and what it was told last, so that only what changed is told again.

    Args:
        engine: The engine.
        stream: Where it runs.
        allocator: For the outputs in `open_outputs`.
    """

    def __init__(self, engine: TrtEngine, stream: int, open_outputs: frozenset[str], allocator: Any) -> None:
        self.context = engine.context()
        self.stream = stream
        self._profile: int | None = None
        self._generation: int | None = None
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._checked: dict[str, Shape] | None = None
        for name in sorted(open_outputs):
            self.context.set_output_allocator(name, allocator)

    def load(self, binding: TrtBinding, pool: ScratchPool) -> None:
        """Tells the context what the binding needs. Hold the pool's lock until its work is queued.

        Raises:
            ContractError: The engine's outputs have other shapes than the binding's.
            DeviceError: TensorRT refused.
        """
        context = self.context
        if self._profile != binding.profile.index:
            context.select_profile(binding.profile.index, self.stream)
            self._profile = binding.profile.index
            self._shapes.clear()  # a new profile forgets them
        if self._generation != pool.generation:
            context.set_scratch(pool.pointer, pool.nbytes)
            self._generation = pool.generation
        for name, shape in binding.shapes.items():
            if self._shapes.get(name) != shape:
                context.set_shape(name, shape)
                self._shapes[name] = shape
        if self._checked != binding.shapes:
            binding.check_outputs({name: context.shape(name) for name in binding.outputs})
            self._checked = binding.shapes
        for name, pointer in binding.addresses.items():
            if self._addresses.get(name) != pointer:
                context.set_address(name, pointer)
                self._addresses[name] = pointer


class TrtBinding(Binding):
    """A binding with its own execution context.

    Attributes:
        profile: Optimisation profile that it runs under.
        addresses: Bound address by tensor.
        actual: Shape of each output whose size depends on data, as of the last run.
        spare: Memory for such outputs where the bound buffer was too small.
        slot: Its context, from the first run on.
        graph: Its CUDA graph and the state that was captured.
        last: State of the last run.
        steady: Plain runs in a row with that state.
        pinned: Scratch memory and context that a graph captured from outside uses; they stay until the binding or
            the session goes.
    """

    def __init__(
        self, session: TrtSession, shapes: dict[str, Shape], outputs: dict[str, Shape], profile: Profile
    ) -> None:
        super().__init__(session, shapes, outputs)
        self.profile = profile
        self.addresses: dict[str, int] = {}
        self.actual: dict[str, Shape] = {}
        self.spare: dict[str, Buffer] = {}
        self.slot: Slot | None = None
        self.graph: tuple[State, CapturedGraph] | None = None
        self.last: State | None = None
        self.steady = 0
        self.pinned: Buffer | None = None
        self._open = session.open_outputs

    def check_outputs(self, shapes: dict[str, Shape]) -> None:
        """Compares the shapes that the engine computed from the inputs' with the contract's; -1 depends on data."""
        wrong = [
            f"'{name}' is {list(shape)} instead of {list(self._expected[name])}"
            for name, shape in shapes.items()
            if shape != self._expected[name] and name not in self._open
        ]
        if wrong:
            raise ContractError(
                f"The engine of graph '{self.session.spec.name}' gives other shapes than its contract: "
                f"{'; '.join(wrong)}.",
                "Build the engine again from this bundle: pixano-edge build",
            )

    def result(self, name: str) -> Buffer:
        """Device buffer of an output in the shape of the last run, valid until the next; no copy.

        It differs from ``outputs[name]`` for outputs whose size depends on data only.

        Raises:
            ContractError: No such output, or it has not run yet.
        """
        bound = self.outputs.get(name)
        if bound is None:
            raise ContractError(f"Graph '{self.session.spec.name}' has no bound output '{name}'.", "Bind it first.")
        if name not in self._open:
            return bound
        shape = self.actual.get(name)
        if shape is None:
            raise ContractError(f"Output '{name}' has no size before the first run.", "Call run() first.")
        held = self.spare.get(name, bound)
        array = None if held.array is None else _cut(held.array, shape, bound.dtype)
        return Buffer(bound.device, shape, bound.dtype, held.pointer, array, owned=False, owner=held)

    def read(self, name: str) -> Array:
        """Host view of an output in the shape of the last run, valid until the next; waits for the device."""
        if name not in self._open or name not in self.outputs:
            return super().read(name)
        result = self.result(name)
        # The whole buffer comes over, so that its page-locked copy is made once, whatever the sizes.
        return _cut(self.session._read_impl(self.spare.get(name, self.outputs[name])), result.shape, result.dtype)

    def close_graph(self) -> None:
        """Frees the CUDA graph; the device must have done its work."""
        graph, self.graph = self.graph, None
        self.last, self.steady = None, 0
        if graph is not None:
            graph[1].close()

    def close_context(self) -> None:
        """Frees the context; close the graph first."""
        slot, self.slot = self.slot, None
        self.pinned = self.last = None
        if slot is not None:
            slot.context.close()


def _cut(array: Array, shape: Shape, dtype: np.dtype[Any]) -> Array:
    """The first bytes of a C-contiguous array as another shape."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return array.reshape(-1).view(np.uint8)[:nbytes].view(dtype).reshape(shape)
