"""One model's work on one stream: page-locked staging, launches or recorded graphs, and as few waits as possible.

Models queue uploads, launches and copies without waiting and take the outputs of a call with one wait at its end
(`Chain.fetch`). Where device and session allow it, launches are recorded per binding and replayed: a binding has
fixed shapes, so a new shape gets a recording of its own, and a buffer that moved gets a new one.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ..errors import DeviceError
from ..runtime.base import Array, Binding, Buffer, CapturedGraph, Device, Session

CAPTURE_AFTER = 2
"""Plain runs of a binding before its launch is recorded: what was asked twice is likely to come again, and the first
run initialises what cannot be initialised while recording."""


class _Lane:
    """What a chain keeps for one binding."""

    def __init__(self) -> None:
        self.staging: dict[str, Buffer] = {}
        self.busy: dict[str, tuple[object, int] | None] = {}
        """Per input the mark that must be reached before the host may fill its memory again, with `Chain.waits` when
        it was made; None until the run that reads the memory is queued."""
        self.graph: CapturedGraph | None = None
        self.addresses: tuple[int, ...] = ()
        self.plain_runs = 0
        self.refused = False

    def close(self) -> None:
        graph, self.graph = self.graph, None
        if graph is not None:
            graph.close()


class Chain:
    """Queues the work of one model. Thread-safe where the device has a stream.

    Args:
        device: The model's own device object; nobody else queues work on it.
        capture: Record and replay launches where device and session can.

    Attributes:
        lock: Held around everything that touches the stream or allocates, since a recording by one thread takes in,
            or fails by, what another one does. Hold it over calls that belong together. Taken after a session's lock,
            never before. On a CPU, where calls are done on return, it does nothing: a click need not wait for
            another user's encoder.
        waits: Waits of the host for the stream so far, without those for staging memory.
        warnings: What did not work as meant, by graph.
    """

    def __init__(self, device: Device, *, capture: bool = True) -> None:
        self.device = device
        self.lock: AbstractContextManager[Any] = threading.RLock() if device.stream else contextlib.nullcontext()
        self.waits = 0
        self.warnings: dict[str, str] = {}
        self._wanted = capture
        self._captured = self._replays = self._runs = 0
        self._lanes: weakref.WeakKeyDictionary[Binding, _Lane] = weakref.WeakKeyDictionary()

    def captures(self, session: Session) -> bool:
        """Whether launches of `session` are recorded, here or by itself. Its bindings should then keep their buffers:
        a recording holds addresses."""
        return self._wanted and (session.self_recording or (self.device.captures and session.capturable))

    def warm_runs(self, session: Session) -> int:
        """Runs of a new binding until its launch is a replay; 1 where nothing is recorded."""
        return CAPTURE_AFTER + 1 if self.captures(session) else 1

    def stage(self, binding: Binding, name: str) -> Array:
        """Host memory for an input, free to be written: fill it, then call `send` and `launch`.

        It is the bound buffer itself where the host can write that, else page-locked memory kept with the binding.
        Blocks while an earlier call still reads it. Use it under the session's lock.
        """
        buffer, lane = binding.inputs[name], self._lane(binding)
        mark = lane.busy.pop(name, None)
        if mark is not None and mark[0] is not None and mark[1] == self.waits:  # no wait of ours came after it
            with self.lock:
                self.device.wait_on_host(mark[0])
        if buffer.array is not None:
            lane.busy[name] = None  # `launch` marks it: the run reads this memory
            return buffer.array
        with self.lock:
            return self._host(lane, name, buffer).host()

    def send(self, binding: Binding, name: str) -> None:
        """Queues the upload of what `stage` gave; nothing to do where that was the bound buffer."""
        buffer, lane = binding.inputs[name], self._lane(binding)
        if buffer.array is None:
            with self.lock:
                self.device.copy(buffer, lane.staging[name])
                lane.busy[name] = (self.device.record(), self.waits)

    def write(self, binding: Binding, name: str, source: Array) -> None:
        """Fills an input from host memory, which may be changed on return.

        Raises:
            ContractError: Unknown input, or shape or dtype differ.
        """
        buffer = binding.inputs.get(name)
        fits = buffer is not None and (source.shape, source.dtype) == (buffer.shape, buffer.dtype)
        if not fits or buffer is None or buffer.array is None or not self.device.stream:
            binding.write(name, source)
        else:
            # Where the host can write the bound memory, `Device.upload` would wait for the whole stream.
            np.copyto(self.stage(binding, name), source, casting="no")

    def launch(self, binding: Binding) -> None:
        """Queues one run, as a replay where there is a recording.

        Raises:
            DeviceError: The back end failed.
        """
        lane = self._lane(binding)
        with self.lock:
            if binding.session.self_recording or not self.captures(binding.session):
                binding.run()
                self._runs += 1
            else:
                self._launch_recorded(binding, lane)
            if None in lane.busy.values():
                mark = (self.device.record(), self.waits)
                lane.busy = {name: held or mark for name, held in lane.busy.items()}

    def fetch(self, binding: Binding, names: Collection[str]) -> dict[str, Array]:
        """Outputs on the host after one wait, valid until the binding's next `fetch` or run.

        They are the bound buffers themselves where the host can read those, else page-locked memory kept with the
        binding.
        """
        lane = self._lane(binding)
        buffers = {name: binding.outputs[name] for name in names}
        with self.lock:
            for name, buffer in buffers.items():
                if buffer.array is None:
                    self.device.copy(self._host(lane, name, buffer), buffer)
            self.device.synchronize()
            self.waits += 1
        return {n: b.array if b.array is not None else lane.staging[n].host() for n, b in buffers.items()}

    def wait(self) -> None:
        """Waits until everything queued is done."""
        with self.lock:
            self.device.synchronize()
            self.waits += 1

    def info(self) -> dict[str, Any]:
        """Counters of this chain, without what sessions record themselves (`Session.info` has that); JSON-ready."""
        reason = "on" if self._wanted and self.device.captures else "switched off" if not self._wanted else ""
        return {
            "capture": reason or f"the device '{self.device.name}' cannot record graphs",
            "recorded": self._captured,
            "replays": self._replays,
            "runs": self._runs,
            "waits": self.waits,
        }

    def close(self) -> None:
        """Frees recordings and staging memory; wait for the stream first."""
        with self.lock:
            for lane in list(self._lanes.values()):
                lane.close()
                lane.staging.clear()
            self._lanes.clear()

    def _lane(self, binding: Binding) -> _Lane:
        lane = self._lanes.get(binding)
        if lane is None:
            lane = self._lanes[binding] = _Lane()
            # A session drops bindings that were not used for long: their recordings go with them.
            weakref.finalize(binding, lane.close).atexit = False
        return lane

    def _host(self, lane: _Lane, name: str, buffer: Buffer) -> Buffer:
        host = lane.staging.get(name)
        if host is None:
            host = lane.staging[name] = self.device.host_empty(buffer.shape, buffer.dtype)
        return host

    def _launch_recorded(self, binding: Binding, lane: _Lane) -> None:
        addresses = tuple(b.pointer for b in (*binding.inputs.values(), *binding.outputs.values()))
        if addresses != lane.addresses:
            lane.close()
            lane.addresses, lane.plain_runs = addresses, 0
        if lane.graph is not None:
            lane.graph.replay()
            binding.session.runs += 1
            self._replays += 1
        elif lane.refused or lane.plain_runs < CAPTURE_AFTER or not self._record(binding, lane):
            binding.run()
            lane.plain_runs += 1
            self._runs += 1

    def _record(self, binding: Binding, lane: _Lane) -> bool:
        """Records one run and replays it; False, with a warning, where that does not work."""
        try:
            lane.graph = self.device.capture(binding.run, host_copies=False)  # counts the run that the replay does
        except DeviceError as error:
            lane.refused = True
            self.warnings[binding.session.spec.name] = (
                f"Graph '{binding.session.spec.name}' runs without recording its launches: {error.message}"
            )
            return False
        self._captured += 1
        lane.graph.replay()
        self._replays += 1
        return True
