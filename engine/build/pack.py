"""Engines into a bundle, so that a box without a network or a builder gets both in one copy (`--bundle-engines`).

They lie in ``engines/`` beside the manifest with an index of their own; see `pixano_edge.engine.bundle.engines` for
why the bundle's hash does not change. ``pixano-edge bundle pack`` takes them along.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..bundle.engines import ENGINES_FOLDER, INDEX_NAME, index_bytes
from ..bundle.files import Staging, hash_file, os_errors
from ..bundle.manifest import FileEntry
from ..errors import BundleError
from ..runtime.engine_file import read_header
from .key import EngineKey


def pack_engines(bundle: Bundle, engines: Sequence[Path], destination: Path | None = None) -> Path:
    """Puts engine files into a bundle's folder, or into a copy of the bundle.

    Engines that are there stay, but one for the same graph, variant and GPU gives way to the new one. The bundle is
    whole at every moment: the folder of engines is made beside it and renamed.

    Args:
        bundle: Open bundle.
        engines: Engine files built from its graphs.
        destination: Folder of the copy; None changes the bundle itself.

    Returns:
        The folder of the bundle with the engines.

    Raises:
        BundleError: An engine belongs to another bundle or is damaged, or a folder cannot be written.
    """
    files = _merged(bundle, engines)
    if destination is None:
        _replace_engines(bundle, files)
        return bundle.root
    with Staging(destination) as staging:
        with os_errors(f"copying to '{destination}'"):
            for rel in bundle.contents():
                if not rel.startswith(f"{ENGINES_FOLDER}/") or rel in bundle.manifest.files:
                    target = staging.root / rel
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(bundle.root / rel, target)
            _write_engines(staging.root / ENGINES_FOLDER, files, bundle.hash)
        Bundle.open(staging.root)  # what was copied may have changed since it was checked
        return staging.publish()


def _merged(bundle: Bundle, engines: Sequence[Path]) -> dict[str, Path]:
    """File name to file: the new engines, and those of the bundle that none of them replaces."""
    hashes = {entry.sha256 for entry in bundle.manifest.files.values()}
    found: dict[str, Path] = {}
    replaced = set()
    for path in engines:
        key = EngineKey.from_dict(read_header(path).key)
        if key.graph not in bundle.specs or key.graph_sha256 not in hashes:
            raise BundleError(
                f"The engine '{path}' was not built from a graph of bundle '{bundle.manifest.name}'.",
                f"Build it again: pixano-edge build {bundle.root}",
            )
        found[path.name] = path
        replaced.add(_slot(key))
    for rel in bundle.engines.engines if bundle.engines is not None else ():
        path = bundle.root / rel
        if path.name not in found and _slot(EngineKey.from_dict(read_header(path).key)) not in replaced:
            found[path.name] = path
    return found


def _slot(key: EngineKey) -> tuple[Any, ...]:
    """What two engines of a bundle must differ in to be there side by side."""
    return (key.graph, key.variant, key.flavour, key.cuda_major, key.compute_capabilities, key.device_name)


def _write_engines(folder: Path, files: dict[str, Path], bundle_hash: str) -> None:
    folder.mkdir()
    entries = {}
    for name, path in files.items():
        copy = folder / name
        shutil.copyfile(path, copy)
        entries[f"{ENGINES_FOLDER}/{name}"] = FileEntry(sha256=hash_file(copy), size=copy.stat().st_size)
    (folder / Path(INDEX_NAME).name).write_bytes(index_bytes(bundle_hash, entries))


def _replace_engines(bundle: Bundle, files: dict[str, Path]) -> None:
    root = bundle.root.resolve()
    if ENGINES_FOLDER in {name.partition("/")[0] for name in bundle.manifest.files}:
        raise BundleError(
            f"Bundle '{bundle.manifest.name}' has files of its own in '{ENGINES_FOLDER}'.",
            "Make a copy with the engines instead: --output <folder>",
        )
    mark = secrets.token_hex(4)
    new, old = (root.parent / f".{root.name[:100]}.{kind}-{mark}" for kind in ("engines", "old-engines"))
    place = root / ENGINES_FOLDER
    try:
        with os_errors(f"writing '{place}'"):
            _write_engines(new, files, bundle.hash)
            if place.exists():
                os.rename(place, old)
            try:
                os.rename(new, place)
            finally:
                if old.exists() and not place.exists():
                    os.rename(old, place)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
