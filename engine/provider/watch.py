"""Measures what loads and requests really take, corrects the books, and words a lack of memory with its numbers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..errors import EdgeError
from ..runtime.memory import Growth, GrowthMeter, MemoryUse, is_host_memory, is_out_of_memory, resident_bytes
from .budget import Booking, DeviceMemory, MemoryBudget
from .errors import OutOfMemoryError
from .families import LoadedModel

METERED_REQUESTS = 32
"""First requests of a model whose memory is measured; by then arenas and buffers have their size."""

MAX_WEIGHT_GROWTH = 4
"""Most that the memory taken by loading counts, as a multiple of the graph files: fp16 weights widened to fp32 and
packed once more. What is beyond are libraries loaded on the way, which every model shares."""


class Tally:
    """What the requests of one model were seen to keep.

    Attributes:
        requests: How many were measured.
        level: Bytes that they keep together, bindings and caches left out; they give memory back, too.
        peak: Highest `level`.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.level = 0
        self.peak = 0

    def start(self, nbytes: int) -> None:
        """Sets what is known from before the first request."""
        self.level = self.peak = nbytes

    def note(self, nbytes: int) -> int:
        """Adds one request; returns the peak."""
        self.level += nbytes
        self.peak = max(self.peak, self.level)
        return self.peak


class MemoryWatch:
    """One per provider. Used on the models' own threads.

    Args:
        budget: The books.
    """

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        self._lock = threading.Lock()
        self._meters: dict[str, GrowthMeter] = {}

    @contextmanager
    def load(self, booking: Booking) -> Iterator[Growth]:
        """Around opening a model.

        Raises:
            OutOfMemoryError: Instead of a back end's error that says that memory is out.
        """
        try:
            with self._meter(booking.place).measure() as growth:
                yield growth
        except (EdgeError, MemoryError) as error:
            if self._ran_out(error):
                raise self._told(error, booking, f"Model '{booking.model}' did not load") from error
            raise

    def loaded(self, booking: Booking, model: LoadedModel, tally: Tally, growth: Growth) -> None:
        """Corrects the books after a load: by what the model reports, and by how much memory is gone.

        A model that ran already (`LoadedModel.warm`) has its activations, so all growth is its own; on a GPU the first
        one's growth has the CUDA context in it. One that did not run shows them with its first requests.
        """
        found = model.use() if model.use is not None else MemoryUse()
        files = found.weights if found.weights is not None else booking.need.weights
        measured = found.activations is None and found.shared is None and growth.nbytes is not None
        if model.warm:
            if measured:
                rest = (growth.nbytes or 0) - (files or 0) - (found.bindings or 0) - (found.caches or 0)
                found = replace(found, activations=max(0, rest))
            tally.start((booking.need if found.activations is None else found).activations or 0)
        elif files and growth.nbytes is not None:
            found = replace(found, weights=min(max(growth.nbytes, files), MAX_WEIGHT_GROWTH * files))
        place = None
        if model.device != booking.device:
            place = self.budget.probe().get(model.device) or DeviceMemory(model.device)
        self.budget.loaded(booking, found, place)

    @contextmanager
    def request(self, booking: Booking, model: LoadedModel, tally: Tally) -> Iterator[None]:
        """Around one request. Out of memory drops the model's caches, so that the next, smaller one has a chance.

        Raises:
            OutOfMemoryError: Instead of an error that says that memory is out.
        """
        try:
            if tally.requests < METERED_REQUESTS:
                with self._meter(booking.place).measure() as growth:
                    yield
                self._note(booking, model, tally, growth)
            else:
                yield
                self._note(booking, model, tally, Growth())
        except (EdgeError, MemoryError) as error:
            if not self._ran_out(error):
                raise
            told = self._told(error, booking, f"Model '{booking.model}' could not answer")  # as it was then
            if model.shrink is not None:
                model.shrink()
            self._note(booking, model, tally, Growth())
            raise told from error

    def _note(self, booking: Booking, model: LoadedModel, tally: Tally, growth: Growth) -> None:
        """Corrects the books by what the model has now and by what the request kept beyond bindings and caches."""
        if model.use is None:
            return
        before, found = booking.used or MemoryUse(), model.use()
        if booking.used is not None:
            found = replace(found, weights=None)  # measured at loading, which saw more than the files
        if growth.nbytes is not None and found.activations is None and found.shared is None:
            tally.requests += 1
            known = sum((found.parts()[k] or 0) - (before.parts()[k] or 0) for k in ("bindings", "caches"))
            found = replace(found, activations=tally.note(growth.nbytes - known))
        self.budget.correct(booking, found)

    def _meter(self, place: DeviceMemory) -> GrowthMeter:
        with self._lock:
            meter = self._meters.get(place.name)
            if meter is None:
                # The memory of an integrated GPU is RAM, but not part of the process's resident set.
                read = resident_bytes if place.name == "cpu" else lambda: self._taken(place.name)
                meter = self._meters[place.name] = GrowthMeter(read)
            return meter

    def _taken(self, device: str) -> int | None:
        """Bytes in use on a device, by whomever."""
        found = self.budget.probe().get(device)
        if found is None or found.total is None or found.free is None:
            return None
        return found.total - found.free

    @staticmethod
    def _ran_out(error: BaseException) -> bool:
        return not isinstance(error, OutOfMemoryError) and is_out_of_memory(error)

    def _told(self, error: BaseException, booking: Booking, what: str) -> OutOfMemoryError:
        """The error with the numbers."""
        name = "cpu" if is_host_memory(error) else booking.device
        device = self.budget.probe().get(name, booking.place)
        cause = getattr(error, "message", None) or str(error) or type(error).__name__
        return OutOfMemoryError(
            f"{what}: {device.name} has no memory left. {cause} On {device.name}: {self.budget.explain(device)}",
            "Use a smaller image or fewer prompts, or unload another model with delete_model. Other requests go on.",
        )
