"""Which model a name and a task mean: bundles of the store, models in memory, and those that made room.

Pixano takes a model's task from the list of models and refuses every other task for that name. So a bundle that
tracks goes by two names, each listed with one task: ``x`` for images and ``x-video`` for videos (``x`` and ``x-image``
for one that was loaded as ``x`` to track). They are one model: for images alone it loads two graphs; the first
request to track loads all five, and from then on those answer images, too. Callers that do not look at the list may use
either name for both tasks. A name that the store or the administrator gave to something else stays theirs.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, replace

from ..contracts import sam2
from ..errors import BundleError, ContractError, EdgeError
from .catalogue import Catalogue, Entry, FilesState, Source, files_state, refreshed, tracks_at, unknown_model
from .errors import InferenceError, TaskNotSupportedError
from .families import FAMILIES, IMAGES, VIDEOS, LoadedModel, check_task, does, tasks
from .models import ModelTable, Slot, Unloaded
from .settings import LoadOptions
from .states import DEPLOY_FAILED, DEPLOYING, NOT_STARTED, RUNNING
from .types import ModelInfo

PROVIDER = "edge"

_CLASSES = FAMILIES[sam2.FAMILY]
"""Of the family whose models have two names."""


def other_name(name: str, task: str) -> str:
    """The second name of a model that tracks and is listed as `name` for `task`."""
    return f"{name}-video" if task == IMAGES else f"{name}-image"


@dataclass(frozen=True)
class Card:
    """One name that requests may use.

    Attributes:
        name: The name.
        task: What it is listed for.
        source: The bundle.
        options: How it is loaded.
        tracks: Whether the bundle has what tracking needs.
        checkpoint: Where the weights came from; None while a model is loading from elsewhere than the store.
        model_class: The class that does the task; None likewise.
        stored: Whether it is what the store offers, loaded as a first request would.
        of: The model whose second name this is; None for its own name.
    """

    name: str
    task: str
    source: Source
    options: LoadOptions
    tracks: bool
    checkpoint: str | None
    model_class: str | None
    stored: bool = False
    of: str | None = None


class Directory:
    """One per provider. Reads manifests, so everything but `loaded` belongs on a thread for files.

    Args:
        catalogue: The store.
        table: The models in memory.
        options: How bundles of the store are loaded.
        autoload: Whether bundles of the store are offered.
    """

    def __init__(self, catalogue: Catalogue, table: ModelTable, options: LoadOptions, autoload: bool) -> None:
        self._catalogue = catalogue
        self._table = table
        self._options = options
        self._autoload = autoload
        # Names that were deleted: their bundles stay in the store but no request loads them again. Only
        # instantiate_model does, and what it loaded is found in the table.
        self._withdrawn: set[str] = set()
        # Bundles that failed to load by themselves, and the state of their files then: hashing gigabytes again for
        # every request would only fail again.
        self._broken: dict[str, tuple[FilesState, EdgeError]] = {}

    def offered(self) -> tuple[list[ModelInfo], dict[str, str]]:
        """Models that requests may name, by name, and the store's faults."""
        entries, faults = self._catalogue.scan()
        cards = self._cards(entries)
        return [
            ModelInfo(c.name, c.task, c.checkpoint, c.model_class, PROVIDER, self._status(c))
            for _, c in sorted(cards.items())
        ], faults

    def loaded(self, name: str, task: str) -> Slot | None:
        """The slot in memory that answers, without looking at files; None where that does not tell."""
        slot = self._table.get(name)
        if slot is not None:
            return slot if does(slot.task, task) else None
        return next((s for s in self._table.slots() if s.base == name and does(s.task, task)), None)

    def find(self, name: str, task: str) -> Slot:
        """The slot that answers; loading starts here where nothing is in memory.

        Raises:
            ModelNotFoundError: No such model, or it was deleted.
            TaskNotSupportedError: The model does not do the task.
            InferenceError: The bundle is damaged, now or at the last try with the same files.
        """
        entries, faults = self._catalogue.scan()
        held = self.loaded(name, task)  # it may have come meanwhile
        if held is not None:
            return held
        cards = self._cards(entries)
        card = cards.get(name)
        if card is None:
            raise self._unknown(name, task, cards, entries, faults)
        own = cards[card.of] if card.of is not None else card
        if does(own.task, task):
            return self.loaded(own.name, task) or self._start(own.name, own, own.task, None)
        if not own.tracks or task != VIDEOS:
            again = (own.task, task) == (IMAGES, VIDEOS)
            raise TaskNotSupportedError(
                f"Model '{name}' does {own.task}, not {task}.",
                "Name another model."
                + (" Where its checkpoint can track, export it again: that adds tracking." if again else ""),
            )
        second = other_name(own.name, own.task)
        if cards[second].of != own.name:
            raise TaskNotSupportedError(
                f"Model '{name}' does {own.task} only here: the name '{second}' of its tracking is another model's.",
                f"Load its bundle under a name of its own: instantiate_model with task '{task}'.",
            )
        return self._start(second, own, VIDEOS, own.name)

    def takes_over(self, name: str, source: Source, task: str, options: LoadOptions) -> Slot | None:
        """A slot that tracks for `name`, of the same bundle and settings, and does `task` as well."""
        slots = self._table.slots()
        return next((s for s in slots if s.base == name and does(s.task, task) and s.twin(source, options)), None)

    def withdraw_loaded(self, name: str) -> list[str]:
        """Stops offering a model that is in memory, without looking at files; its names, or none if it is not there."""
        slot = self._table.get(name) if isinstance(name, str) else None
        if slot is None and all(s.base != name for s in self._table.slots()):
            return []
        names = [name] if slot is None or slot.base is None else [name, slot.base]
        self._withdrawn.update(names)
        return names

    def withdraw(self, name: str) -> list[str]:
        """Stops offering a model under both of its names, which are returned.

        Raises:
            ModelNotFoundError: No such model.
        """
        cards = self._cards(self._catalogue.scan()[0])
        if name not in cards:
            raise unknown_model(name, cards)
        of = cards[name].of
        names = [name] if of is None else [name, of]
        self._withdrawn.update(names)
        return names

    def _status(self, card: Card) -> str:
        name = card.of or card.name
        slot = self.loaded(name, card.task)
        if slot is not None:
            return RUNNING if slot.model is not None and slot.ready.done() else DEPLOYING
        return DEPLOY_FAILED if name in self._broken else NOT_STARTED

    def _start(self, name: str, card: Card, task: str, base: str | None) -> Slot:
        state = files_state(card.source.path) if card.stored else ()
        failed = self._broken.get(name)
        if card.stored and failed is not None and failed[0] == state:
            raise InferenceError(failed[1].message, f"{failed[1].action} It is tried again when its files change.")
        source = card.source if card.stored else refreshed(card.source)
        slot, started = self._table.start(name, source, task, card.options, base)
        if started and card.stored:
            slot.ready.add_done_callback(lambda done: self._note_failure(name, state, done))
        return slot

    def _note_failure(self, name: str, state: FilesState, done: Future[LoadedModel]) -> None:
        error = done.exception()
        # What the system refused (rights, open files) may work the next time.
        if isinstance(error, BundleError | ContractError) and not isinstance(error.__cause__, OSError):
            self._broken[name] = (state, error)
        elif error is None:
            self._broken.pop(name, None)

    def _unknown(
        self, name: str, task: str, cards: dict[str, Card], entries: dict[str, Entry], faults: dict[str, str]
    ) -> EdgeError:
        if name not in self._withdrawn and self._autoload:
            if name in faults:
                return InferenceError(faults[name], "Check it with 'pixano-edge bundle inspect'.")
            if name in entries:
                check_task(entries[name].family, task, name, entries[name].tracks)
        return unknown_model(name, cards)

    def _cards(self, entries: dict[str, Entry]) -> dict[str, Card]:
        """Every name, with the second names of models that track."""
        cards: dict[str, Card] = {}
        for entry in entries.values():
            can = tasks(entry.family, entry.tracks)
            if self._autoload and entry.name not in self._withdrawn and can:
                cards[entry.name] = Card(
                    entry.name,
                    can[0],
                    entry.source,
                    self._options,
                    entry.tracks,
                    entry.checkpoint,
                    FAMILIES[entry.family][can[0]],
                    True,
                )
        held: list[tuple[Slot | Unloaded, Card]] = [(u, self._card_of_unloaded(u)) for u in self._table.unloaded()]
        held += [(slot, self._card_of_slot(slot)) for slot in self._table.slots()]
        for where, card in held:
            usual = entries.get(card.name) if card.name in cards else None
            stored = usual is not None and (usual.source.path, self._options) == (card.source.path, card.options)
            if where.base is not None:
                cards.setdefault(card.name, card)
            elif isinstance(where, Slot):
                # Of a model that is still loading only the store may tell more.
                known = cards[card.name] if stored and card.model_class is None else None
                cards[card.name] = replace(card, stored=stored) if known is None else replace(known, task=card.task)
            elif not stored or card.task != cards[card.name].task:
                cards[card.name] = replace(card, stored=stored)
        for card in [c for c in cards.values() if c.tracks]:
            second = other_name(card.name, card.task)
            task = VIDEOS if card.task == IMAGES else IMAGES
            cards.setdefault(second, replace(card, name=second, task=task, model_class=_CLASSES[task], of=card.name))
        return cards

    @staticmethod
    def _card_of_unloaded(gone: Unloaded) -> Card:
        if gone.base is not None:
            return Card(gone.base, IMAGES, gone.source, gone.options, True, gone.checkpoint, _CLASSES[IMAGES])
        return Card(gone.name, gone.task, gone.source, gone.options, gone.tracks, gone.checkpoint, gone.model_class)

    @staticmethod
    def _card_of_slot(slot: Slot) -> Card:
        model = slot.model
        checkpoint = None if model is None else model.checkpoint
        if slot.base is not None:
            return Card(slot.base, IMAGES, slot.source, slot.options, True, checkpoint, _CLASSES[IMAGES])
        tracking = tracks_at(slot.source) if model is None else model.tracks
        kind = None if model is None else model.model_class
        return Card(slot.name, slot.task, slot.source, slot.options, tracking, checkpoint, kind)
