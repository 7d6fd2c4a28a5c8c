"""Native TensorRT back end: one engine per graph, one execution context and at most one CUDA graph per set of shapes.

Order of calls per binding: profile, scratch memory, input shapes and addresses are set when they change, never
otherwise; a run is then one ``execute_async_v3`` on the device's stream, or one graph launch. Contexts are not shared
between bindings, because a captured graph uses its context's internal memory, which a change of shapes would move.

Not run on a GPU yet: tested against stand-ins for TensorRT and the CUDA driver, and the names against the real
TensorRT for RTX.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from ..contracts.base import GraphSpec
from ..errors import ContractError, DeviceError, DeviceMemoryError
from .base import Array, Binding, Buffer, Device, Session, Shape
from .cpu import check_writable
from .memory import MemoryUse
from .tensorrt_api import TensorRt, TrtEngine, load_tensorrt
from .tensorrt_binding import Slot, State, TrtBinding
from .tensorrt_contract import Profile, check_engine, check_profiles, open_dimensions, read_profiles, tightest
from .tensorrt_memory import ALIGNMENT, scratch_pool
from .tensorrt_options import TrtOptions

_log = logging.getLogger(__name__)

CAPTURE_AFTER = 2
"""Plain runs in a row with the same buffers before a binding gets its CUDA graph: the first one initialises, and what
came twice is likely to come again."""
MAX_WARNINGS = 20
"""Different ones kept for `TrtSession.info`."""


class _ProfileOff(DeviceMemoryError):
    """The profile for these shapes did not fit when the session was opened."""


class TrtSession(Session):
    """One TensorRT engine. Open it with `open_session`.

    A binding is captured in a CUDA graph after `CAPTURE_AFTER` runs in a row with the same buffers, where device and
    engine allow; with other buffers it runs without, and is captured again once those stay. For outputs whose size
    depends on data (a dimension that no input has) `prepare` takes the contract's maximum as the size of the buffer;
    `TrtBinding.read` and `TrtBinding.result` have the size of the last run.

    Args:
        engine: Serialised engine; may be freed afterwards.
        spec: Contract of the graph, checked against the engine.
        device: A CUDA device; sessions of one device object share scratch memory, their runs follow one another.
        metadata: What the engine file says about itself, for `info`. Of its entries ``flavour`` (``tensorrt`` or
            ``tensorrt_rtx``) chooses the library, ``version`` must be that library's unless ``flags`` has
            ``version_compatible``.
        options: See `TrtOptions`.
        reason: Why this back end was chosen, for `info`.
        api: A loaded TensorRT instead of the installed one.

    Raises:
        MissingDependencyError: TensorRT is not installed.
        DeviceError: No CUDA device, or TensorRT does not take the engine (with its own message).
        DeviceMemoryError: Weights or scratch memory do not fit, not even for the smallest profile.
        ContractError: The engine is not what the contract says.
    """

    backend = "tensorrt"

    def __init__(
        self,
        engine: bytes | memoryview,
        spec: GraphSpec,
        device: Device,
        *,
        metadata: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        reason: str = "",
        api: TensorRt | None = None,
    ) -> None:
        super().__init__(spec, device)
        self._options = TrtOptions.from_dict(options)
        self._metadata = dict(metadata or {})
        self._reason = reason
        if not device.stream:  # 0 is no stream (CPU) or the default stream, which would stop every other one
            raise DeviceError(f"TensorRT needs a CUDA device with a stream, not '{device.name}'.", "Use --device cuda.")
        self._api = api or load_tensorrt(self._metadata.get("flavour"))
        portable = "version_compatible" in self._metadata.get("flags", ())
        built = self._metadata.get("version", self._api.version)
        if built != self._api.version and not portable:
            raise DeviceError(
                f"The engine of graph '{spec.name}' was built with {self._api.flavour} {built}, installed is "
                f"{self._api.version}.",
                "Build it again on this machine: pixano-edge build",
            )
        self._capacity = open_dimensions(spec)
        self.open_outputs = frozenset(t.name for t in spec.outputs if set(t.dynamic) & set(self._capacity))
        self.replays = 0
        self.warnings: list[str] = []
        self._pool = scratch_pool(device)
        self._alive: weakref.WeakSet[TrtBinding] = weakref.WeakSet()
        self._running: TrtBinding | None = None
        self._refused: DeviceError | None = None
        self._file_bytes = memoryview(engine).nbytes
        self._spare_slot: Slot | None = None
        self._engine: TrtEngine | None = None
        with device.current():
            self._engine = self._api.open(engine, spec.name, host_code=portable)
            try:
                self._set_up(self._engine)
            except BaseException:  # whatever it is, the GPU's memory is given back
                self.close()
                raise

    def _set_up(self, engine: TrtEngine) -> None:
        check_engine(self.spec, engine)
        self._all_profiles = read_profiles(engine)
        self.warnings += check_profiles(self.spec, self._all_profiles)
        self._weights = engine.weight_bytes()
        cache = self._options.read_cache() if self._api.rtx else None
        if not engine.configure(self._options.specialization, cache) and cache is not None:
            self.warnings.append("the stored kernels were made by another GPU, driver or release: compiling again")
        self._allocator = engine.output_allocator(self._allocate, self._notify) if self.open_outputs else None
        self._profiles = self._reserve(self._all_profiles)
        self._spare_slot = Slot(engine, self.device.stream, self.open_outputs, self._allocator)
        self.capturable, why = self._can_capture()
        self._graphs = self.capturable and self._options.graphs is not False
        self.self_recording = self._graphs
        if not self.capturable and self._options.graphs:
            raise DeviceError(f"Graph '{self.spec.name}' cannot be captured: {why}.", "Open it without graphs=True.")

    def _reserve(self, profiles: list[Profile]) -> list[Profile]:
        """Takes scratch memory for all profiles, or for the small ones alone where that is all that fits."""
        usable = list(profiles)
        while True:
            most = max(p.scratch for p in usable)
            try:
                self._pool.reserve(self, most)
                return usable
            except DeviceMemoryError as error:
                smaller = [p for p in usable if p.scratch < most]
                if not smaller:
                    raise
                left = [p.index for p in usable if p.scratch == most]
                self.warnings.append(f"profiles {left} are off, they need {most} bytes of scratch: {error.message}")
                usable = smaller

    def _can_capture(self) -> tuple[bool, str]:
        dynamic = any(t.dynamic for t in self.spec.inputs)
        if not self.device.captures:
            return False, f"{self.device.name} has no graphs"
        if self.open_outputs:
            return False, f"the size of {sorted(self.open_outputs)} depends on data"
        if self._api.rtx and dynamic and self._options.specialization == "lazy":
            return False, "its kernels may be replaced at any time (specialization=lazy)"
        return True, ""

    def prepare(
        self, sizes: Mapping[str, int] | None = None, borrowed: Collection[str] = (), owner: Hashable = None
    ) -> Binding:
        with self.lock:
            self._live()
            given = {**self._capacity, **(sizes or {})}
            try:
                return super().prepare(given, borrowed, owner)
            except DeviceMemoryError as error:
                if not self._bindings or isinstance(error, _ProfileOff):
                    raise
                self._warn(f"kept bindings were dropped to make room: {error.message}")
                self._drop(list(self._bindings.values()))
                self._bindings.clear()
                return super().prepare(given, borrowed, owner)

    def drop(self, owner: Hashable) -> None:
        with self.lock:
            mine = [binding for key, binding in self._bindings.items() if key[0] is owner]
            super().drop(owner)
            self._drop(mine)

    def _make_room(self, nbytes: int) -> None:
        before = list(self._bindings.values())
        super()._make_room(nbytes)
        kept = set(self._bindings.values())
        self._drop([binding for binding in before if binding not in kept])

    def _drop(self, bindings: Sequence[Binding]) -> None:
        """Frees graphs and contexts of bindings that are not kept any more, once their last work is done."""
        if not bindings:
            return
        self.device.synchronize()
        mine = [b for b in bindings if isinstance(b, TrtBinding)]
        for binding in mine:
            binding.close_graph()
        with self.device.current():
            for binding in mine:
                if binding.pinned is None:
                    binding.close_context()

    def _prepare_impl(self, shapes: dict[str, Shape], outputs: dict[str, Shape]) -> Binding:
        profile = tightest(self._profiles, shapes)
        if profile is None:
            off = tightest(self._all_profiles, shapes)
            if off is not None:
                raise _ProfileOff(
                    f"Graph '{self.spec.name}' with {shapes} needs {off.scratch} bytes of scratch memory, which did "
                    f"not fit on {self.device.name} ({self._pool.nbytes} bytes reserved).",
                    "Split the call into smaller ones, or unload other models and open this one again.",
                )
            raise DeviceError(
                f"No profile of the engine of graph '{self.spec.name}' takes {shapes}; it has "
                f"{[p.describe()['shapes'] for p in self._all_profiles]}.",
                "Split the call into smaller ones, or build the engine for these sizes: pixano-edge build",
            )
        binding = TrtBinding(self, shapes, outputs, profile)
        self._alive.add(binding)
        return binding

    def _bind_impl(self, binding: Binding, name: str, buffer: Buffer) -> None:
        assert isinstance(binding, TrtBinding)
        if name not in binding.shapes:
            check_writable(buffer)
        if past := buffer.pointer % ALIGNMENT:
            raise ContractError(
                f"TensorRT binds memory at multiples of {ALIGNMENT} bytes; '{name}' starts {past} bytes later.",
                "Copy it into a buffer of the binding's own.",
            )
        binding.addresses[name] = buffer.pointer

    def _unbind_impl(self, binding: Binding, name: str) -> None:
        """The context keeps the address, which no run uses: `Binding.run` refuses until another one is bound."""
        assert isinstance(binding, TrtBinding)
        del binding.addresses[name]

    def _write_impl(self, buffer: Buffer, source: Array) -> None:
        self.device.upload(buffer, source)

    def _run_impl(self, binding: Binding) -> None:
        assert isinstance(binding, TrtBinding)
        engine = self._live()
        with self.device.current(), self._pool.lock:
            state = (self._pool.generation, *(binding.addresses[t.name] for t in self._tensors))
            outside = self.device.capturing  # a model records several launches in one graph of its own
            if not outside and binding.graph is not None and binding.graph[0] == state:
                binding.graph[1].replay()
                binding.last, binding.steady = state, 0
                self.replays += 1
                return
            if outside:
                if binding.last is None or binding.last[0] != state[0]:
                    raise DeviceError(
                        f"Graph '{self.spec.name}' has not run with this memory yet.", "Run it once, then capture."
                    )
                binding.pinned = self._pool.block
            self._launch(binding, self._slot(binding, engine))
            binding.steady = binding.steady + 1 if binding.last == state else 1
            binding.last = state
        # Outside the locks: capturing takes the device's, and others wait for the pool's while they hold that.
        if self._graphs and not outside and binding.steady >= CAPTURE_AFTER:
            self._capture(binding, state)

    def _slot(self, binding: TrtBinding, engine: TrtEngine) -> Slot:
        """The binding's context: the first binding takes the one made at opening."""
        if binding.slot is None:
            spare, self._spare_slot = self._spare_slot, None
            binding.slot = spare or Slot(engine, self.device.stream, self.open_outputs, self._allocator)
        return binding.slot

    def _launch(self, binding: TrtBinding, slot: Slot) -> None:
        slot.load(binding, self._pool)
        self._running, self._refused = binding, None
        try:
            slot.context.enqueue(slot.stream)
        except DeviceError as error:
            binding.last, binding.steady = None, 0
            if self._refused is not None:
                raise self._refused from error
            raise
        finally:
            self._running = None

    def _capture(self, binding: TrtBinding, state: State) -> None:
        """Records the launch that just ran, so that nothing is initialised or allocated on the way."""
        slot = binding.slot
        assert slot is not None

        def launch() -> None:
            with self.device.current(), self._pool.lock:
                if self._pool.generation != state[0]:
                    raise DeviceError("The scratch memory moved meanwhile.", "Run it again.")
                slot.context.enqueue(slot.stream)

        old, binding.graph = binding.graph, None
        if old is not None:
            self.device.synchronize()  # its last replay may still be queued
            old[1].close()
        try:
            if not slot.context.capturable(slot.stream):
                raise DeviceError("the engine allocates while it runs.", "Build it with REQUIRE_USER_ALLOCATION.")
            binding.graph = (state, self.device.capture(launch))
        except DeviceError as error:
            self._graphs = False
            if self._options.graphs:
                raise
            self._warn(f"runs without CUDA graphs: {error.message}")

    def _allocate(self, name: str, nbytes: int, alignment: int) -> int:
        """Called by TensorRT in a run; must not raise."""
        binding = self._running
        if binding is None:
            return 0
        held = binding.spare.get(name, binding.outputs[name])
        if nbytes > held.nbytes:
            try:
                held = binding.spare[name] = self.device.empty((nbytes,), np.uint8)
            except DeviceError as error:
                self._refused = error
                return 0
        return held.pointer

    def _notify(self, name: str, shape: Shape) -> None:
        if self._running is not None:
            self._running.actual[name] = shape

    def _read_impl(self, buffer: Buffer) -> Array:
        return self.device.download(buffer)

    def memory(self) -> MemoryUse:
        """Weights (the engine's size where TensorRT cannot tell) and the scratch memory that sessions share."""
        weights = self._file_bytes if self._weights is None else self._weights
        return MemoryUse(weights=weights, shared=max(p.scratch for p in self._profiles))

    def info(self) -> dict[str, Any]:
        """Facts of the open session; JSON-ready. ``precision`` is the engine's own: networks are strongly typed."""
        engine = self._live()
        facts = {
            "backend": self.backend,
            "version": self._api.version,
            "provider": self._api.flavour,
            "device": self.device.name,
            "graph": self.spec.name,
            "precision": "as built into the engine",
            "engine": self._metadata,
            "engine_bytes": self._file_bytes,
            "weight_bytes": self._weights,
            "scratch_bytes": max(p.scratch for p in self._profiles),
            "scratch_shared_bytes": self._pool.nbytes,
            "profiles": [p.describe() for p in self._profiles],
            "contexts": sum(b.slot is not None for b in self._alive) + (self._spare_slot is not None),
            "graphs": sum(b.graph is not None for b in self._alive) if self._graphs else "off",
            "warnings": [*self.warnings, *engine.warnings],
        }
        return {**facts, "reason": self._reason} if self._reason else facts

    def close(self) -> None:
        """Waits for the device, then frees graphs, contexts, buffers, the engine and the share of scratch memory.

        Graphs that a model captured of it must not be replayed any more.
        """
        with self.lock:
            engine, self._engine = self._engine, None
            if engine is None:
                return
            try:
                self.device.synchronize()
            except DeviceError as error:  # a failed or closed device must not keep the memory
                _log.warning("closing graph '%s' without waiting: %s", self.spec.name, error)
            for binding in list(self._alive):
                binding.close_graph()
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(DeviceError):  # closed, as logged above
                    stack.enter_context(self.device.current())
                for binding in list(self._alive):
                    binding.close_context()
                if self._spare_slot is not None:
                    self._spare_slot.context.close()
                self._spare_slot = None
                super().close()
                kernels = engine.cache_bytes()
                engine.close()
                self._pool.release(self)
            self._options.write_cache(kernels)

    def _warn(self, text: str) -> None:
        if text not in self.warnings and len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(text)

    def _live(self) -> TrtEngine:
        if self._engine is None:
            raise DeviceError(f"The session of graph '{self.spec.name}' is closed.", "Open it again.")
        return self._engine
