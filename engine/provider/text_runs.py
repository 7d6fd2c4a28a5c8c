"""One answer in text on its way: from the request to its last token, on the model's own thread.

A run waits for its model and then queues one step after the other in the background of the model's thread: an image
decoded, a tile encoded, a part of the prompt, or a few tokens. Answers on one model take turns, requests to it go
between. Whatever happens, a run ends once (`TextRun.ended`) and frees what it holds (`TextRun.freed`), which after a
cancellation comes within one step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any

from ..errors import EdgeError
from ..models.decoder.base import Generated, Piece
from .errors import InferenceError, ModelNotFoundError
from .families import LoadedModel
from .models import ModelTable, Slot
from .runs import provider_error
from .worker import Job, settled

STEP_SECONDS = 0.02
"""How long a step may go on making tokens where these are fast; one token at least is made."""

CANCELLED = "The answer was cancelled."

Work = Callable[[LoadedModel], Generator[Piece | Generated | None, None, None]]
"""Makes the answer on a loaded model, step by step."""

_GOES_ON, _LAST = object(), object()


class TextRun:
    """One answer. Safe to use from any thread.

    Args:
        table: The models.
        slot: The model, loading or loaded, held for this run (`ModelTable.hold`); let go at the end.
        work: What to do.
        turn: Called when the model is loaded; it calls `begin` when this run may start.

    Attributes:
        ended: Set when the run is over: with the answer, or the error. Cannot be cancelled by those who wait for it.
        freed: Set when, after that, conversation and model were let go.
        model: The loaded model; None until then.
    """

    def __init__(self, table: ModelTable, slot: Slot, work: Work, turn: Callable[[TextRun], None]) -> None:
        self.slot = slot
        self.ended: Future[Generated] = settled()
        self.freed: Future[None] = settled()
        self.model: LoadedModel | None = None
        self._table = table
        self._work: Work | None = work
        self._turn = turn
        self._lock = threading.Lock()
        self._over = self._released = False
        self._texts: list[str] = []
        self._waiting: list[Future[None]] = []
        self._steps: Generator[Piece | Generated | None, None, None] | None = None
        self._answer: Generated | None = None
        self._begun = False

    def start(self) -> None:
        """Begins to wait for the model; to be called once."""
        self.slot.ready.add_done_callback(self._ready)

    def begin(self) -> None:
        """Begins the steps; to be called once, after `turn`."""
        self._begun = True
        self._queue()

    def cancel(self) -> None:
        """Ends the run now; what it is just computing is dropped. Of a run that ended this is no news."""
        self._end(None, InferenceError(CANCELLED))
        if not self._begun and self.slot.ready.done():
            self._turn(self)  # it may stand in a queue that moves only when others end

    @property
    def over(self) -> bool:
        return self._over

    def read(self, start: int) -> list[str]:
        """Pieces from number `start` on."""
        with self._lock:
            return self._texts[start:]

    def changed(self, count: int) -> Future[None]:
        """A future that is set when more than `count` pieces are there, or the run ended."""
        future: Future[None] = settled()
        with self._lock:
            if len(self._texts) <= count and not self._over:
                self._waiting.append(future)
                return future
        future.set_result(None)
        return future

    def finish(self, error: BaseException | None) -> None:
        """Frees everything, once, on the thread that has the last word about this run: the model's, once it stepped."""
        with self._lock:
            if self._released:
                return
            self._released = True
        try:
            if self._steps is not None:
                self._steps.close()
        except EdgeError as problem:
            error = error or problem
        finally:
            self._steps = self._work = None
            self._table.let_go(self.slot)
            self._end(None, error or InferenceError("The answer did not come to its end.", "Ask again."))
            self.freed.set_result(None)

    def _ready(self, loading: Future[LoadedModel]) -> None:
        error = loading.exception()
        if error is not None or self._over:
            self.finish(error)
            return
        self.model = loading.result()
        self._turn(self)

    def _queue(self) -> None:
        try:
            self._table.submit_step(self.slot, self._step, self._stepped)
        except (ModelNotFoundError, RuntimeError) as error:  # RuntimeError: the interpreter shuts down
            self.finish(error)

    def _step(self, model: LoadedModel, _: Job) -> object:
        """On the model's thread: the next tile, part of the prompt, or tokens."""
        until = time.monotonic() + STEP_SECONDS
        if self._steps is None:
            assert self._work is not None
            self._steps = self._work(model)
        while not self._over:
            found = next(self._steps, _LAST)
            if isinstance(found, Generated):
                self._answer = found
                return _LAST
            if found is _LAST:  # without an answer, which `finish` says
                return _LAST
            if isinstance(found, Piece) and found.text:
                self._append(found.text)
            if time.monotonic() >= until:
                return _GOES_ON
        return _LAST

    def _stepped(self, step: Future[object]) -> None:
        """On the model's thread, after each step."""
        error = step.exception()
        if error is None and step.result() is not _LAST:
            self._queue()
            return
        if self._answer is not None and error is None:
            self._done(self._answer)
        self.finish(error)

    def _append(self, text: str) -> None:
        with self._lock:
            if self._over:
                return
            self._texts.append(text)
            waiting, self._waiting = self._waiting, []
        for future in waiting:
            future.set_result(None)

    def _done(self, answer: Generated) -> None:
        # What the run holds first: whoever hears that it ended may need the room.
        assert self._steps is not None
        self._steps.close()
        with self._lock:
            first, self._released = not self._released, True
        if first:
            self._steps = self._work = None
            self._table.let_go(self.slot)
        self._end(answer, None)
        if first:
            self.freed.set_result(None)

    def _end(self, answer: Generated | None, error: BaseException | None) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
            waiting, self._waiting = self._waiting, []
        if answer is not None:
            self.ended.set_result(answer)
        else:
            assert error is not None
            self.ended.set_exception(provider_error(error))
        for future in waiting:
            future.set_result(None)


class Turns:
    """Lets as many runs of a model begin as it has conversations; the others wait in order. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: dict[Slot, set[TextRun]] = {}
        self._queues: dict[Slot, list[TextRun]] = {}

    def ask(self, run: TextRun) -> None:
        """Called when a run's model is loaded: it begins now or later. Called again when it was cancelled: it goes."""
        slot, model = run.slot, run.model
        if model is None or model.vlm is None:
            return
        with self._lock:
            active, queue = self._active.get(slot, set()), self._queues.get(slot, [])
            if run in active:
                return
            if run.over:
                if run in queue:
                    queue.remove(run)
                begins = False
            elif len(active) < model.vlm.conversations:
                self._active.setdefault(slot, set()).add(run)
                begins = True
            else:
                self._queues.setdefault(slot, []).append(run)
                return
        if begins:
            run.begin()
        else:
            run.finish(None)

    def gone(self, run: TextRun) -> None:
        """Called when a run was freed: the next one begins."""
        with self._lock:
            active, queue = self._active.get(run.slot, set()), self._queues.get(run.slot, [])
            if run not in active:
                return
            active.discard(run)
            following = queue.pop(0) if queue else None
            if following is not None:
                active.add(following)
            elif not active:
                self._active.pop(run.slot, None)
                self._queues.pop(run.slot, None)
        if following is not None:
            following.begin()


def generation_config(options: Any) -> dict[str, Any]:
    """What an answer was made with; JSON-ready."""
    sampling = options.sampling
    return {
        "max_new_tokens": int(options.max_new_tokens),
        "do_sample": not sampling.greedy,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "stop": list(options.stops),
    }
