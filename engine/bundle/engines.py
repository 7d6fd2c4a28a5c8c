"""Engines that travel with a bundle: the folder ``engines/`` with an index of its own.

Engines are made after the bundle, for some GPUs, and by other people than the exporter, so they are not in the
manifest: `Bundle.hash`, and with it every cache and verdict that names it, stays the same with and without them. The
index ``engines/index.json`` lists every file with size and SHA-256 and names the hash of the bundle that they belong
to; it is checked as strictly as the manifest, by `Bundle.open` as well as for packed bundles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import Field, StrictInt, ValidationError

from ..errors import BundleError
from .files import check_names, os_errors
from .manifest import FileEntry, _Model

ENGINES_FOLDER = "engines"
INDEX_NAME = f"{ENGINES_FOLDER}/index.json"
INDEX_VERSION = 1
MAX_INDEX_BYTES = 1 << 20

_REPAIR = "Remove the folder 'engines' and build them again: pixano-edge build <bundle> --bundle-engines"


class EngineIndex(_Model):
    """What ``engines/index.json`` holds."""

    schema_version: StrictInt
    bundle_hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    """`Bundle.hash` of the bundle whose graphs they were built from."""
    engines: dict[str, FileEntry]
    """By POSIX path relative to the bundle."""


def parse_index(data: bytes, bundle_hash: str, taken: Iterable[str] = ()) -> EngineIndex:
    """Reads an index.

    Args:
        data: The file's bytes.
        bundle_hash: Of the bundle that it lies in.
        taken: Other files of the bundle, whose names engines must not have.

    Raises:
        BundleError: Not an index, of another version or bundle, or with names outside of the folder.
    """
    try:
        index = EngineIndex.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise BundleError(f"{INDEX_NAME} is not valid: {where}: {first['msg']}.", _REPAIR) from error
    if index.schema_version != INDEX_VERSION:
        raise BundleError(
            f"{INDEX_NAME} has version {index.schema_version}, this pixano-edge reads {INDEX_VERSION}.", _REPAIR
        )
    if index.bundle_hash != bundle_hash:
        raise BundleError(f"The engines in '{ENGINES_FOLDER}' were built from another bundle.", _REPAIR)
    check_names((*taken, INDEX_NAME, *index.engines))
    if strays := [name for name in index.engines if not name.startswith(f"{ENGINES_FOLDER}/")]:
        raise BundleError(f"{INDEX_NAME} lists files outside of '{ENGINES_FOLDER}': {strays[:5]}.", _REPAIR)
    return index


def read_index(root: Path, bundle_hash: str, taken: Iterable[str] = ()) -> EngineIndex | None:
    """The index of the bundle in `root`, or None where it has none; raises as `parse_index`."""
    file = root / INDEX_NAME
    if not file.is_file():
        return None
    with os_errors(f"reading '{file}'"):
        if file.stat().st_size > MAX_INDEX_BYTES:
            raise BundleError(f"'{file}' is larger than {MAX_INDEX_BYTES} bytes.", _REPAIR)
        return parse_index(file.read_bytes(), bundle_hash, taken)


def index_bytes(bundle_hash: str, engines: Mapping[str, FileEntry]) -> bytes:
    """The file's content for these engines."""
    index = EngineIndex(schema_version=INDEX_VERSION, bundle_hash=bundle_hash, engines=dict(sorted(engines.items())))
    return (index.model_dump_json(indent=2) + "\n").encode()
