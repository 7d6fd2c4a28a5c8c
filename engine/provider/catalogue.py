"""What can be loaded: the bundles of the local store, and where a `ModelConfig` points. Reads manifests only."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..bundle.files import ZIP_ERRORS
from ..bundle.names import MANIFEST_NAME, NAME_PATTERN
from ..contracts import sam2
from ..errors import BundleError, ContractError
from .errors import InvalidRequestError, ModelNotFoundError
from .families import FAMILIES, tracks
from .needs import read_manifest
from .types import ModelConfig

_NAME = re.compile(NAME_PATTERN)
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".safetensors", ".bin", ".onnx")


FilesState = tuple[tuple[str, int, int], ...]
"""What tells that any file of a bundle changed, without reading them."""


class Store(Protocol):
    """The part of `BundleStore` used here."""

    def list(self) -> list[str]: ...

    def path(self, name: str) -> Path: ...


@dataclass(frozen=True)
class Source:
    """Where a model is loaded from: a bundle folder or a ``.pxe`` file, with what tells a later change of it."""

    path: Path
    stamp: tuple[int, int]


@dataclass(frozen=True)
class Entry:
    """A bundle of the store, from its manifest; `tracks` says whether it has what tracking needs."""

    name: str
    source: Source
    family: str
    checkpoint: str
    tracks: bool = False


class Catalogue:
    """Cheap view of the store: a manifest is read again only when its file changed. Safe to use from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._known: dict[tuple[str, Source], Entry | str] = {}

    def scan(self) -> tuple[dict[str, Entry], dict[str, str]]:
        """Bundles by name, and what is wrong with those that cannot be used."""
        entries: dict[str, Entry] = {}
        faults: dict[str, str] = {}
        fresh: dict[tuple[str, Source], Entry | str] = {}
        for name in self._store.list():
            try:
                source = self._stored(name)
            except (BundleError, OSError) as error:
                faults[name] = f"Bundle '{name}' cannot be read: {error}"
                continue
            with self._lock:
                found = self._known.get((name, source))
            if found is None:
                found = _read_entry(name, source)
            fresh[name, source] = found
            if isinstance(found, Entry):
                entries[name] = found
            else:
                faults[name] = found
        with self._lock:
            self._known = fresh
        return entries, faults

    def _stored(self, name: str) -> Source:
        path = self._store.path(name)
        return Source(path, _stamp(path / MANIFEST_NAME))

    def locate(self, config: ModelConfig, loaded: Iterable[str] = ()) -> Source:
        """The bundle that `config` means.

        Without a path: the store's bundle called `config.name`. With one: a bundle folder, a ``.pxe`` file, or the
        name of a bundle in the store.

        Args:
            config: Name and path are read.
            loaded: Names to list as known besides the store's.

        Raises:
            InvalidRequestError: A hub id, a checkpoint, or an unusable name.
            ModelNotFoundError: Nothing there; lists what is known.
        """
        if not isinstance(config.name, str) or not _NAME.fullmatch(config.name):
            if isinstance(config.name, str) and config.path is None and _HUB_ID.fullmatch(config.name):
                raise _hub_id(config.name)
            raise InvalidRequestError(
                f"{config.name!r} is no model name.",
                "Use up to 128 letters, digits, '.', '_' and '-', starting with a letter or digit.",
            )
        wanted = config.name if config.path is None else str(config.path)
        if config.path is not None:
            source = _at_path(wanted)
            if source is not None:
                return source
        names = self._store.list()
        if wanted in names:
            return self._stored(wanted)
        if _HUB_ID.fullmatch(wanted) and not wanted.startswith(("./", "../")):
            raise _hub_id(wanted)
        if wanted.lower().endswith(_CHECKPOINT_SUFFIXES):
            raise _checkpoint(wanted)
        raise unknown_model(wanted, {*names, *loaded})


def refreshed(source: Source) -> Source:
    """The same place as it is now, for loading a model again.

    Raises:
        ModelNotFoundError: The bundle is gone.
    """
    path = source.path
    try:
        return Source(path, _stamp(path / MANIFEST_NAME if path.is_dir() else path))
    except OSError as error:
        raise ModelNotFoundError(
            f"The bundle at '{path}' cannot be read again: {error}.", "Put it back, or load the model from elsewhere."
        ) from error


def tracks_at(source: Source) -> bool:
    """Whether the bundle there has what tracking needs; False for one that cannot be read, which loading tells."""
    from ..bundle.bundle import parse_manifest

    try:
        manifest = parse_manifest(read_manifest(source.path))
        return tracks(manifest.family, manifest.constants)
    except (BundleError, ContractError, OSError, KeyError, *ZIP_ERRORS):
        return False


def unknown_model(name: str, known: Iterable[str]) -> ModelNotFoundError:
    """The error for a name that means nothing here."""
    listed = ", ".join(sorted(known)) or "none"
    return ModelNotFoundError(
        f"There is no model '{str(name)[:200]}'.",
        f"Known: {listed}. Add a bundle with 'pixano-edge bundle unpack' or export one with 'pixano-edge export'.",
    )


def _at_path(text: str) -> Source | None:
    """A bundle folder or file at a path (``~`` is the user's home), None where nothing is there."""
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            if (path / MANIFEST_NAME).is_file():
                return Source(path.resolve(), _stamp(path / MANIFEST_NAME))
            raise _checkpoint(str(path))
        if path.is_file():
            if path.suffix.lower() == ".pxe":
                return Source(path.resolve(), _stamp(path))
            raise _checkpoint(str(path))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        raise InvalidRequestError(f"Cannot read {text[:200]!r}: {error}.", "Check the path.") from error
    return None


def files_state(folder: Path) -> FilesState:
    """Name, time of change and size of every file below a folder; costs no more than listing it."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            found.append((str(path), *_stamp(path)))
    return tuple(sorted(found))


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _read_entry(name: str, source: Source) -> Entry | str:
    from ..bundle.bundle import parse_manifest

    try:
        manifest = parse_manifest((source.path / MANIFEST_NAME).read_bytes())
        tracking = tracks(manifest.family, manifest.constants)
    except (BundleError, ContractError, OSError) as error:
        return f"Bundle '{name}' cannot be used: {error}"
    return Entry(name, source, manifest.family, manifest.source.checkpoint, tracking)


def _hub_id(hub_id: str) -> InvalidRequestError:
    short = hub_id.split("/")[-1]
    return InvalidRequestError(
        f"'{hub_id}' is not a bundle on this box: a hub id or a path that does not exist. Checkpoints cannot be "
        "converted here: there is no torch.",
        "Check the path, or export the checkpoint on another machine with "
        f"'pixano-edge export {_exporter(short)} {hub_id} -o {short}' and copy the bundle here.",
    )


def _checkpoint(path: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"'{path[:200]}' is not a bundle (a folder with {MANIFEST_NAME}, or a .pxe file).",
        "If it is a checkpoint, export it where torch is: "
        f"'pixano-edge export {_exporter(Path(path).name)} <checkpoint> -o <bundle>'.",
    )


def _exporter(name: str) -> str:
    """The exporter that a checkpoint called so is meant for."""
    return next((family for family in FAMILIES if name.lower().startswith(family)), sam2.FAMILY)
