"""The models in memory: loading, sharing, unloading and freeing, each on the model's own thread.

A load first gets its place in the memory books (`MemoryBudget`). Where there is no room, idle models are unloaded, the
least recently used first; they are remembered, and come back at their next request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CancelledError, EdgeError
from ..runtime.memory import MemoryUse, readable
from .budget import ADVICE, Booking, MemoryBudget
from .catalogue import Source
from .errors import InferenceError, InvalidRequestError, OutOfMemoryError
from .families import LoadedModel, Opener, does
from .found import Found
from .needs import Declared, declared
from .placement import Plan, candidates, make_room, plan
from .settings import LoadOptions
from .slots import Slot, Unloaded
from .states import Observer
from .watch import MemoryWatch
from .worker import QUEUE_DEPTH, Job

T = TypeVar("T")

__all__ = ["ModelTable", "Slot", "Unloaded"]

Needs = Callable[[Path, LoadOptions, str], Declared]
"""What the bundle at a path will take with these settings, loaded for a task."""


class ModelTable:
    """Slots by name. All methods return at once and may be called from any thread.

    Args:
        opener: Opens a bundle; runs on the slot's thread.
        depth: Requests that may wait per model.
        budget: The memory books; RAM with the default limit if not given.
        gpus: Names of the GPUs that device ``auto`` may take now.
        needs: Reads what a bundle declares, `needs.declared` if not given; runs on the slot's thread.
    """

    def __init__(
        self,
        opener: Opener,
        depth: int = QUEUE_DEPTH,
        budget: MemoryBudget | None = None,
        gpus: Callable[[], Iterable[str]] = tuple,
        needs: Needs | None = None,
    ) -> None:
        self._opener = opener
        self._depth = depth
        self.budget = budget if budget is not None else MemoryBudget()
        self._watch = MemoryWatch(self.budget)
        self._gpus = gpus
        self._needs = needs or declared
        self._found = Found()
        self.observer: Observer | None = None
        self._lock = threading.Lock()
        self._slots: dict[str, Slot] = {}
        self._draining: set[Slot] = set()
        self._unloaded: dict[str, Unloaded] = {}
        self._closed = False

    def get(self, name: str) -> Slot | None:
        """The slot of a name, loading or loaded."""
        with self._lock:
            return self._slots.get(name)

    def slots(self) -> list[Slot]:
        """All slots, loading or loaded, in order of their start."""
        with self._lock:
            return list(self._slots.values())

    def unloaded(self) -> list[Unloaded]:
        """Models that made room for others and were not asked for since."""
        with self._lock:
            return list(self._unloaded.values())

    def start(
        self, name: str, source: Source, task: str, options: LoadOptions, base: str | None = None
    ) -> tuple[Slot, bool]:
        """The slot for these arguments, and whether it was made now; wait for its `ready`.

        A slot of the same bundle and settings that does less under the same name, or under the name `base`, is
        retired, in the first case now, in the second once this one is loaded.

        Raises:
            InvalidRequestError: The name is taken by a model loaded otherwise.
            InferenceError: The table is closed, or no thread can be started.
        """
        with self._lock:
            if self._closed:
                raise InferenceError("This provider is closed.", "Make a new one.")
            held = self._slots.get(name)
            if held is not None:
                less = held.twin(source, options) and not does(held.task, task)
                if held.twin(source, options) and not less:
                    return held, False
                if not (less and does(task, held.task)):
                    raise InvalidRequestError(
                        f"Model '{name}' is loaded already, with other settings or from another bundle.",
                        "Unload it first with delete_model, or load this one under another name.",
                    )
            slot = Slot(name, source, task, options, self._depth, base)
            # Queued before anyone can find the slot: whoever retires it then frees what the load made, in that order.
            try:
                _, loading = slot.worker.submit(lambda job: self._load(slot, job), slot.load_job)
            except RuntimeError as error:  # no more threads
                raise InferenceError(f"Model '{name}' cannot be loaded: {error}.", "Try again later.") from error
            if held is not None:
                self._replace(held)
            self._slots[name] = slot
        if held is not None:
            self._finish(held)
        # Not under the lock: of a load that is done already, this runs the callback here.
        loading.add_done_callback(lambda done: self._loaded(slot, done))
        return slot, True

    def hold(self, slot: Slot, *, loading: bool = False) -> bool:
        """Keeps a slot from being unloaded to make room, until `let_go`. False when that has happened already.

        Args:
            slot: The slot.
            loading: It is to be loaded, and no request comes after that; `let_go` must be told the same.
        """
        with self._lock:
            if slot.evicted:
                return False
            slot.users += 1
            slot.loading += loading
            slot.touch()
            return True

    def let_go(self, slot: Slot, *, loading: bool = False) -> None:
        """Ends one `hold`."""
        with self._lock:
            slot.users -= 1
            slot.loading -= loading
            slot.touch()

    def submit(self, slot: Slot, work: Callable[[LoadedModel, Job], T]) -> tuple[Job, Future[T]]:
        """Queues one request on a loaded model, see `ModelWorker.submit`; what it takes goes into the books.

        Raises:
            ModelNotFoundError: The model was unloaded.
            ModelBusyError: The queue is full.
        """
        queued = time.perf_counter()

        def begun(job: Job) -> T:
            job.stages["queue"] = time.perf_counter() - queued
            return self._request(slot, work, job)

        return slot.worker.submit(begun)

    def submit_step(self, slot: Slot, work: Callable[[LoadedModel, Job], T], then: Callable[[Future[T]], None]) -> None:
        """Queues one step of long work in the background, see `ModelWorker.submit`; what it takes goes into the books.

        Args:
            slot: A loaded model, held by the caller.
            work: The step.
            then: Gets its future on the model's thread, right after it.

        Raises:
            ModelNotFoundError: The model was unloaded.
        """
        slot.worker.submit(lambda job: self._request(slot, work, job), background=True, then=then)

    def retire(self, slot: Slot) -> Future[None]:
        """Takes the model out of the table: a load under way is aborted, accepted requests finish, then it is freed.

        Returns:
            The slot's `freed`.
        """
        with self._lock:
            first = self._take_out(slot)
        if first:
            self._finish(slot)
        return slot.freed

    def remove(self, name: str) -> list[Future[None]]:
        """Retires a model by name, and what was loaded to track for it, and forgets them, if they were unloaded to make
        room; the futures to wait for."""
        with self._lock:
            for gone in [u for u in self._unloaded.values() if name in (u.name, u.base)]:
                del self._unloaded[gone.name]
            slots = [s for s in (*self._draining, *self._slots.values()) if name in (s.name, s.base)]
        return [self.retire(slot) for slot in slots]

    def close(self) -> list[Future[None]]:
        """Retires every model and takes no new one; the futures of all memory still to be freed."""
        with self._lock:
            self._closed = True
            self._unloaded.clear()
            slots = [*self._slots.values(), *self._draining]
        return [self.retire(slot) for slot in slots]

    def _load(self, slot: Slot, job: Job) -> LoadedModel:
        options = self._admit(slot, job)
        assert slot.booking is not None
        try:
            with self._watch.load(slot.booking) as growth, job.stage("load"):
                # Set here, on the thread that will free it: when the load was aborted meanwhile, freeing comes right
                # after, and with it the release of the booking.
                slot.model = self._opener(slot.source.path, slot.task, options, job)
            job.check()
            self._watch.loaded(slot.booking, slot.model, slot.tally, growth)
            if not self._make_room(slot.booking, f"'{slot.name}' takes more than it declared"):
                raise OutOfMemoryError(
                    f"Model '{slot.name}' takes {readable(slot.booking.need.total)}, more than it declared and than "
                    f"there is room for. On {slot.booking.device}: {self.budget.explain(slot.booking.place)}",
                    ADVICE,
                )
            self._warm_up(slot, slot.model, job)
            return slot.model
        finally:
            if slot.model is None:
                self.budget.release(slot.booking)
            else:
                self._tell(slot, job)

    def _warm_up(self, slot: Slot, model: LoadedModel, job: Job) -> None:
        """Runs a model once. A request that waits for it does the same and goes first; that a model cannot answer is
        told, for it might answer what is really asked.

        Raises:
            CancelledError: The load was given up.
        """

        def check() -> None:
            job.check()
            if slot.awaited:
                raise CancelledError("A request came.", "It is the warm-up.")

        assert slot.booking is not None
        if model.warm_up is None or not slot.options.warm_up or slot.awaited:
            return
        begun = time.perf_counter()
        try:
            with self._watch.request(slot.booking, model, slot.tally), job.stage("warm_up"):
                model.warm_up(check)
        except CancelledError:
            job.check()
            return
        except EdgeError as error:
            model.warnings = (*model.warnings, f"its first run after loading failed: {error.message}")
            return
        model.warmed_in = time.perf_counter() - begun
        self._make_room(slot.booking, f"the first run made '{slot.name}' grow")

    def _admit(self, slot: Slot, job: Job) -> LoadOptions:
        """Gives a load its place in the books, unloading idle models where it must, and waits until they are gone.

        Returns:
            The slot's options with the device that was chosen.
        """
        choices = candidates(slot.options.device, self.budget.probe(), self._gpus())
        names = [device.name for device in choices]
        # With nothing to choose, what a CPU needs is known better than what "auto" may need.
        options = replace(slot.options, device="cpu") if names == ["cpu"] else slot.options
        told = self._needs(slot.source.path, options, slot.task)
        if before := self._found.recall(slot.source.path, slot.options, names, slot.task):
            told = told.corrected(before)
        need = told.use
        gone: list[Slot] = []
        try:
            with self._lock:
                if slot.retired:
                    job.cancel()
                job.check()  # a load that was given up meanwhile must unload nothing
                found = plan(slot.name, slot.options.device, need, choices, self.budget, self._idle())
                numbers = self.budget.explain(found.device, need) if found.victims else ""
                gone = self._evict(found, f"'{slot.name}' had no room on {found.device.name}; {numbers}")
                slot.booking = self.budget.reserve(slot.name, found.device, need, told.sources)
                slot.placement = found.reason
        finally:
            for victim in gone:
                self._finish(victim)
        arrived = False
        try:
            self.budget.wait(slot.booking, job.check)
            arrived = True
        finally:
            if not arrived:
                self.budget.release(slot.booking)
        # Without a choice, auto stays auto: the loader then tells why it is what it is, and may take the CPU instead.
        return replace(slot.options, device=found.device.name) if len(choices) > 1 else slot.options

    def _idle(self) -> list[Booking]:
        """Bookings of models that may be unloaded, least recently used first. Under the lock."""
        slots = sorted((s for s in self._slots.values() if s.idle), key=lambda s: s.turn)
        return [s.booking for s in slots if s.booking is not None]

    def _evict(self, found: Plan, reason: str) -> list[Slot]:
        """Takes the victims out of the table and notes why; `_finish` them outside the lock, under which this runs."""
        gone = []
        for slot in [s for s in self._slots.values() if s.booking in found.victims]:
            assert slot.booking is not None
            assert slot.model is not None
            slot.evicted = True
            self._unloaded[slot.name] = Unloaded(
                slot.name, slot.source, slot.task, slot.options, slot.model.checkpoint, slot.model.model_class,
                slot.booking.device, slot.booking.need.total, time.monotonic() - slot.used_at, reason,
                slot.base, slot.model.tracks,
            )  # fmt: skip
            self._take_out(slot)
            gone.append(slot)
        return gone

    def _make_room(self, booking: Booking, reason: str) -> bool:
        """Unloads idle models when corrected figures passed the budget; whether the pool is within it now."""
        with self._lock:
            over = self.budget.over(booking)
            if over is None:
                return True
            victims = make_room(MemoryUse(), replace(over, reported=None), booking.pool, self._idle())
            gone = [] if victims is None else self._evict(Plan(booking.place, "", victims), f"{reason}.")
        for victim in gone:
            self._finish(victim)
        return victims is not None

    def _request(self, slot: Slot, work: Callable[[LoadedModel, Job], T], job: Job) -> T:
        model, booking = slot.model, slot.booking
        assert model is not None
        assert booking is not None
        try:
            with self._watch.request(booking, model, slot.tally):
                result = work(model, job)
        finally:
            self._tell(slot, job)
        slot.touch()
        self._make_room(booking, f"requests made '{slot.name}' grow")
        return result

    def _tell(self, slot: Slot, job: Job) -> None:
        if self.observer is not None:
            for stage, seconds in job.stages.items():
                self.observer(slot.base or slot.name, stage, seconds)

    def _loaded(self, slot: Slot, done: Future[LoadedModel]) -> None:
        error = done.exception()
        if error is None:
            with self._lock:
                self._unloaded.pop(slot.name, None)
                held = None if slot.retired else self._slots.get(slot.base or "")
                gone = self._unloaded.get(slot.base or "")
                if gone is not None and slot.twin(gone.source, gone.options):
                    del self._unloaded[gone.name]  # this one answers for it
                if held is not None and held.twin(slot.source, slot.options):
                    self._replace(held)
                else:
                    held = None
            slot.touch()
            slot.ready.set_result(done.result())
            if held is not None:
                self._finish(held)
        else:
            self.retire(slot)
            slot.ready.set_exception(error)

    def _replace(self, slot: Slot) -> None:
        """Under the lock: another slot takes over; `_finish` this one outside the lock."""
        slot.replaced = True
        self._take_out(slot)

    def _take_out(self, slot: Slot) -> bool:
        """Under the lock: the table forgets the slot; whether that had not happened yet."""
        if self._slots.get(slot.name) is slot:
            del self._slots[slot.name]
        if slot.retired:
            return False
        slot.retired = True
        self._draining.add(slot)
        if slot.booking is not None:
            self._found.note(slot.source.path, slot.options, slot.booking, slot.task)
            self.budget.leave(slot.booking)
        return True

    def _finish(self, slot: Slot) -> None:
        """Lets a slot that was taken out end."""
        slot.load_job.cancel()
        slot.worker.finish(lambda: _free(slot)).add_done_callback(lambda done: self._freed(slot, done))

    def _freed(self, slot: Slot, done: Future[Any]) -> None:
        if slot.booking is not None:
            self.budget.release(slot.booking)
        with self._lock:
            self._draining.discard(slot)
        error = done.exception()
        if error is None:
            slot.freed.set_result(None)
        else:
            slot.freed.set_exception(error)


def _free(slot: Slot) -> None:
    model, slot.model = slot.model, None
    if model is not None:
        model.close()
