"""The models in memory: loading, sharing, unloading and freeing, each on the model's own thread."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

from .catalogue import Source
from .errors import InferenceError, InvalidRequestError
from .families import LoadedModel, Opener
from .settings import LoadOptions
from .worker import QUEUE_DEPTH, Job, ModelWorker, settled


class Slot:
    """One name's place in the table, from the start of its loading until it is freed.

    Attributes:
        name: What requests call the model.
        source: Bundle it is loaded from.
        task: What it was asked to do.
        options: How it is loaded.
        worker: Its thread; the load is the first thing there, freeing is the last.
        ready: Gets the loaded model, or the load's error. Cannot be cancelled by those who wait for it.
        freed: Set once the memory is free.
        model: The loaded model, None until then.
    """

    def __init__(self, name: str, source: Source, task: str, options: LoadOptions, depth: int) -> None:
        self.name = name
        self.source = source
        self.task = task
        self.options = options
        self.worker = ModelWorker(name, depth)
        self.ready: Future[LoadedModel] = settled()
        self.freed: Future[None] = settled()
        self.model: LoadedModel | None = None
        self.load_job = Job()
        self.retired = False

    def same(self, source: Source, task: str, options: LoadOptions) -> bool:
        """Whether this is what a load with these arguments would give."""
        return (self.source, self.task, self.options) == (source, task, options)


class ModelTable:
    """Slots by name. All methods return at once and may be called from any thread.

    Args:
        opener: Opens a bundle; runs on the slot's thread.
        depth: Requests that may wait per model.
    """

    def __init__(self, opener: Opener, depth: int = QUEUE_DEPTH) -> None:
        self._opener = opener
        self._depth = depth
        self._lock = threading.Lock()
        self._slots: dict[str, Slot] = {}
        self._draining: set[Slot] = set()
        self._closed = False

    def get(self, name: str) -> Slot | None:
        """The slot of a name, loading or loaded."""
        with self._lock:
            return self._slots.get(name)

    def slots(self) -> list[Slot]:
        """All slots, loading or loaded, in order of their start."""
        with self._lock:
            return list(self._slots.values())

    def start(self, name: str, source: Source, task: str, options: LoadOptions) -> tuple[Slot, bool]:
        """The slot for these arguments, and whether it was made now; wait for its `ready`.

        Raises:
            InvalidRequestError: The name is taken by a model loaded otherwise.
            InferenceError: The table is closed, or no thread can be started.
        """
        with self._lock:
            if self._closed:
                raise InferenceError("This provider is closed.", "Make a new one.")
            held = self._slots.get(name)
            if held is not None:
                if held.same(source, task, options):
                    return held, False
                raise InvalidRequestError(
                    f"Model '{name}' is loaded already, with other settings or from another bundle.",
                    "Unload it first with delete_model, or load this one under another name.",
                )
            slot = Slot(name, source, task, options, self._depth)
            # Queued before anyone can find the slot: whoever retires it then frees what the load made, in that order.
            try:
                _, loading = slot.worker.submit(lambda job: self._load(slot, job), slot.load_job)
            except RuntimeError as error:  # no more threads
                raise InferenceError(f"Model '{name}' cannot be loaded: {error}.", "Try again later.") from error
            self._slots[name] = slot
        # Not under the lock: of a load that is done already, this runs the callback here.
        loading.add_done_callback(lambda done: self._loaded(slot, done))
        return slot, True

    def retire(self, slot: Slot) -> Future[None]:
        """Takes the model out of the table: a load under way is aborted, accepted requests finish, then it is freed.

        Returns:
            The slot's `freed`.
        """
        with self._lock:
            if self._slots.get(slot.name) is slot:
                del self._slots[slot.name]
            if slot.retired:
                return slot.freed
            slot.retired = True
            self._draining.add(slot)
        slot.load_job.cancel()
        slot.worker.finish(lambda: _free(slot)).add_done_callback(lambda done: self._freed(slot, done))
        return slot.freed

    def close(self) -> list[Future[None]]:
        """Retires every model and takes no new one; the futures of all memory still to be freed."""
        with self._lock:
            self._closed = True
            slots = [*self._slots.values(), *self._draining]
        return [self.retire(slot) for slot in slots]

    def _load(self, slot: Slot, job: Job) -> LoadedModel:
        # Set here, on the thread that will free it: when the load was aborted meanwhile, freeing comes right after.
        slot.model = self._opener(slot.source.path, slot.task, slot.options, job)
        job.check()
        return slot.model

    def _loaded(self, slot: Slot, done: Future[LoadedModel]) -> None:
        error = done.exception()
        if error is None:
            slot.ready.set_result(done.result())
        else:
            self.retire(slot)
            slot.ready.set_exception(error)

    def _freed(self, slot: Slot, done: Future[Any]) -> None:
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
