"""Sessions and bindings, and (from `device`) buffers and devices: the part that knows tensors and nothing of models.

`Session` opens one graph once. `Session.prepare` allocates (or borrows) one C-contiguous buffer per input and
output for a set of shapes and binds them; `Binding.run` then only launches. Back ends implement the ``_impl``
methods; checks, locking and bookkeeping live here once.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import numpy as np

from ..contracts.base import GraphSpec, TensorSpec
from ..errors import ContractError
from .device import Array, Buffer, CapturedGraph, Device, DeviceInfo, Shape

__all__ = ["Array", "Binding", "Buffer", "CapturedGraph", "Device", "DeviceInfo", "Session", "Shape"]


class Binding:
    """The buffers of one session for one set of shapes, bound once.

    Outputs are valid until the next `run` that writes them. Not thread-safe on its own: hold
    `session.lock` from the first `write` to the last `release`.

    Attributes:
        shapes: Shape of each input.
        inputs: Bound input buffers by name.
        outputs: Bound output buffers by name.
        nbytes: Size of the buffers that the binding owns; borrowed ones do not count.
    """

    def __init__(self, session: Session, shapes: dict[str, Shape], outputs: dict[str, Shape]) -> None:
        self.session = session
        self.shapes = shapes
        self.inputs: dict[str, Buffer] = {}
        self.outputs: dict[str, Buffer] = {}
        self.nbytes = 0
        self._own: dict[str, Buffer] = {}
        self._specs: dict[str, TensorSpec] = {s.name: s for s in (*session.spec.inputs, *session.spec.outputs)}
        self._expected: dict[str, Shape] = {**shapes, **outputs}
        self._unbound: set[str] = set(self._specs)

    def own(self, name: str) -> None:
        """Gives a tensor memory of the binding's own, unless it has some already."""
        if name not in self._own:
            spec = self._specs[name]
            buffer = self.session.device.empty(self._expected[name], spec.dtype)
            self.bind(name, buffer)
            self._own[name] = buffer
            self.nbytes += buffer.nbytes

    def bind(self, name: str, buffer: Buffer) -> None:
        """Binds a borrowed buffer instead of the own one; no copy. The caller keeps it unchanged until `release`.

        Raises:
            ContractError: Unknown name, or shape, dtype or device differ.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise ContractError(
                f"Graph '{self.session.spec.name}' has no tensor '{name}'.", f"Known: {list(self._specs)}."
            )
        if buffer.shape != self._expected[name] or buffer.dtype != spec.np_dtype:
            raise ContractError(
                f"Tensor '{name}' is bound as {spec.dtype}{list(self._expected[name])}, "
                f"got {buffer.dtype}{list(buffer.shape)}.",
                "Call prepare() with the new shapes or convert the buffer.",
            )
        if buffer.device.name != self.session.device.name:
            raise ContractError(
                f"Tensor '{name}' lives on {buffer.device.name}, the session on {self.session.device.name}.",
                "Copy it with Device.copy first.",
            )
        held = self._held(name)
        if held.get(name) is buffer:
            return
        self.session._bind_impl(self, name, buffer)  # first: a refused buffer must not count as bound
        held[name] = buffer
        self._unbound.discard(name)

    def release(self, *names: str) -> None:
        """Lets go of borrowed buffers, so that an idle binding does not keep them alive.

        A tensor with memory of its own gets that back; another one must be bound again before the next `run`.
        Nothing is allocated or copied.
        """
        for name in names:
            held, own = self._held(name), self._own.get(name)
            if own is not None:
                self.bind(name, own)
            elif name in held:
                self._unbound.add(name)
                del held[name]
                self.session._unbind_impl(self, name)

    def _held(self, name: str) -> dict[str, Buffer]:
        return self.inputs if name in self.shapes else self.outputs

    def write(self, name: str, source: Array) -> None:
        """Copies `source` into the bound input buffer: one copy, never a change of dtype.

        Raises:
            ContractError: Unknown input, or shape or dtype differ.
        """
        buffer = self.inputs.get(name)
        if buffer is None:
            raise ContractError(
                f"Graph '{self.session.spec.name}' has no bound input '{name}'.", f"Bound: {list(self.inputs)}."
            )
        if source.shape != buffer.shape or source.dtype != buffer.dtype:
            raise ContractError(
                f"Input '{name}' is bound as {buffer.dtype}{list(buffer.shape)}, "
                f"got {source.dtype}{list(source.shape)}.",
                "Call prepare() with the new shapes or convert the array.",
            )
        self.session._write_impl(buffer, source)

    def run(self) -> None:
        """Launches the graph on the device's stream. On CPU the outputs are ready on return.

        Raises:
            ContractError: A borrowed tensor is not bound.
            DeviceError: The session is closed, or the back end failed.
        """
        with self.session.lock:
            if self._unbound:
                raise ContractError(
                    f"Tensors of graph '{self.session.spec.name}' have no memory: {sorted(self._unbound)}.",
                    "Bind them, or call prepare() without naming them as borrowed.",
                )
            self.session._run_impl(self)
            self.session.runs += 1

    def read(self, name: str) -> Array:
        """Host view of an output, valid until the next run; waits for the device where it must."""
        buffer = self.outputs.get(name)
        if buffer is None:
            raise ContractError(
                f"Graph '{self.session.spec.name}' has no bound output '{name}'.", f"Bound: {list(self.outputs)}."
            )
        return self.session._read_impl(buffer)


class Session(abc.ABC):
    """One graph on one device, opened once.

    Attributes:
        spec: The contract of the graph; names, dtypes and ranks were checked against the file at opening.
        device: Where it runs.
        lock: Held while a call uses the session's buffers; re-entrant.
        runs: Number of finished launches.
    """

    backend: str = "abstract"
    capturable: bool = False
    """Whether `Device.capture` can record `Binding.run`: a launch that neither allocates nor waits, on the device's
    stream, with nothing shared between the graphs of two bindings that a launch of the other one would change."""
    self_recording: bool = False
    """Whether the session records launches itself and replays them while a binding's buffers stay where they are.
    Models then keep the buffers of its bindings and leave recording to it."""
    max_bindings: int = 8
    """Bindings kept (least recently used go first), so that changing shapes cannot grow memory."""
    max_binding_bytes: int = 128 << 20
    """Most bytes that the kept bindings own together; the newest is kept whatever its size."""

    def __init__(self, spec: GraphSpec, device: Device) -> None:
        self.spec = spec
        self.device = device
        self.lock = threading.RLock()
        self.runs = 0
        self._tensors = (*spec.inputs, *spec.outputs)
        self._bindings: dict[tuple[Hashable, tuple[tuple[str, Shape], ...]], Binding] = {}

    def prepare(
        self, sizes: Mapping[str, int] | None = None, borrowed: Collection[str] = (), owner: Hashable = None
    ) -> Binding:
        """Returns the binding for the given sizes of the dynamic dimensions, made at the first call.

        Args:
            sizes: Size per dynamic dimension, for example ``{"P": 1, "N": 2}``.
            borrowed: Tensors that the caller binds before each run and releases after it; no memory is allocated
                for them.
            owner: Whoever binds buffers that stay: every owner has bindings of its own, so that two of them do not
                bind in turns.

        Raises:
            ContractError: A size is missing or outside the contract's range.
        """
        sizes = dict(sizes or {})
        for dim, value in sizes.items():
            low, _, high = self.spec.ranges.get(dim, (1, 1, value))
            if not low <= value <= high:
                raise ContractError(
                    f"Graph '{self.spec.name}' takes {dim} from {low} to {high}, got {value}.",
                    "Split the call into smaller ones.",
                )
        shapes = {s.name: s.shape(sizes) for s in self.spec.inputs}
        key = (owner, tuple(shapes.items()))
        with self.lock:
            binding = self._bindings.pop(key, None)
            if binding is None:
                binding = self._prepare_impl(shapes, {s.name: s.shape(sizes) for s in self.spec.outputs})
            missing = [s for s in self._tensors if s.name not in borrowed and s.name not in binding._own]
            if missing:
                need = sum(int(np.prod(s.shape(sizes), dtype=np.int64)) * s.np_dtype.itemsize for s in missing)
                self._make_room(binding.nbytes + need)  # first: old and new together could be too much memory
                for spec in missing:
                    binding.own(spec.name)
            self._bindings[key] = binding
            return binding

    def drop(self, owner: Hashable) -> None:
        """Forgets the bindings of an owner who is done, and with them the buffers that it bound."""
        with self.lock:
            for key in [key for key in self._bindings if key[0] is owner]:
                del self._bindings[key]

    def _make_room(self, nbytes: int) -> None:
        """Drops bindings, the least recently used first, until one more of this size fits."""
        while self._bindings and (
            len(self._bindings) >= self.max_bindings
            or sum(b.nbytes for b in self._bindings.values()) + nbytes > self.max_binding_bytes
        ):
            self._bindings.pop(next(iter(self._bindings)))

    @abc.abstractmethod
    def _prepare_impl(self, shapes: dict[str, Shape], outputs: dict[str, Shape]) -> Binding:
        """Makes a binding without any buffer."""

    @abc.abstractmethod
    def _bind_impl(self, binding: Binding, name: str, buffer: Buffer) -> None:
        """Points the back end at `buffer`."""

    def _unbind_impl(self, binding: Binding, name: str) -> None:  # noqa: B027 (nothing held by default)
        """Lets the back end forget the buffer bound to `name`; `Binding.run` refuses until another one is bound."""

    @abc.abstractmethod
    def _write_impl(self, buffer: Buffer, source: Array) -> None:
        """Copies host data into a bound buffer."""

    @abc.abstractmethod
    def _run_impl(self, binding: Binding) -> None:
        """Launches."""

    @abc.abstractmethod
    def _read_impl(self, buffer: Buffer) -> Array:
        """Host view of a bound output."""

    @abc.abstractmethod
    def info(self) -> dict[str, Any]:
        """Back end, provider that really runs, precision, warnings; JSON-ready."""

    def close(self) -> None:
        """Frees graph and buffers; the session cannot be used afterwards."""
        with self.lock:
            self._bindings.clear()
