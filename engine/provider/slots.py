"""One model's place in the table, and what is remembered of one that made room."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import Future
from dataclasses import dataclass

from ..runtime.memory import readable
from .budget import Booking
from .catalogue import Source
from .families import LoadedModel
from .settings import LoadOptions
from .watch import Tally
from .worker import Job, ModelWorker, settled

_CLOCK = itertools.count()


class Slot:
    """One name's place in the table, from the start of its loading until it is freed.

    Attributes:
        name: What requests call the model.
        source: Bundle it is loaded from.
        task: What it was asked to do.
        options: How it was asked to be loaded.
        worker: Its thread; the load is the first thing there, freeing is the last.
        ready: Gets the loaded model, or the load's error. Cannot be cancelled by those who wait for it.
        freed: Set once the memory is free.
        model: The loaded model, None until then.
        booking: Its place in the memory books, None until then.
        placement: Why it is on its device; empty when that was the only choice.
        evicted: Whether it was taken out of the table to make room, not by anyone's wish.
        base: Name of the model that this one was loaded for, to track with the same bundle; None for itself.
        replaced: Whether another slot answers its requests now, which look it up again.
    """

    def __init__(
        self, name: str, source: Source, task: str, options: LoadOptions, depth: int, base: str | None = None
    ) -> None:
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
        self.booking: Booking | None = None
        self.placement = ""
        self.evicted = False
        self.base = base
        self.replaced = False
        self.tally = Tally()
        self.users = 0  # requests between finding the slot and having their answer
        self.loading = 0  # of the users, those who want it loaded and no answer
        self.turn = next(_CLOCK)  # order of use: times can be equal
        self.used_at = time.monotonic()

    def twin(self, source: Source, options: LoadOptions) -> bool:
        """Whether it is of this bundle and these settings, for whatever task."""
        return (self.source, self.options) == (source, options)

    @property
    def awaited(self) -> bool:
        """Whether a request is on its way."""
        return self.users > self.loading

    def touch(self) -> None:
        """Makes it the most recently used one."""
        self.turn = next(_CLOCK)
        self.used_at = time.monotonic()

    @property
    def idle(self) -> bool:
        """Whether it is loaded and nobody runs, waits for or is about to send anything."""
        return self.ready.done() and self.model is not None and self.users == 0 and self.worker.idle


@dataclass(frozen=True)
class Unloaded:
    """A model that had to go to make room, and how to load it again.

    Attributes:
        name, source, task, options, base: As in `Slot`.
        checkpoint, model_class, tracks: As in `LoadedModel`.
        device: Where it was.
        nbytes: What it had reserved.
        idle_s: Seconds since its last use.
        reason: Whom it made room for, with the numbers.
    """

    name: str
    source: Source
    task: str
    options: LoadOptions
    checkpoint: str
    model_class: str
    device: str
    nbytes: int
    idle_s: float
    reason: str
    base: str | None = None
    tracks: bool = False

    def describe(self) -> str:
        """One sentence for the administrator."""
        return (
            f"Model '{self.name}' ({readable(self.nbytes)} on {self.device}, idle for {self.idle_s:.0f} s) was "
            f"unloaded: {self.reason} It comes back at its next request."
        )
