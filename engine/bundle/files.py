"""Paths, hashes and staging folders: what reading and writing a bundle have in common."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..errors import BundleError
from .names import MANIFEST_NAME

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

CHUNK = 1 << 20
"""Bytes read at a time."""

# What zipfile and zlib raise for damaged input; RuntimeError for encryption and unknown methods.
ZIP_ERRORS = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def safe_relative(path: str) -> PurePosixPath:
    """Checks a file name taken from a manifest or an archive: relative, below the bundle, printable.

    Raises:
        BundleError: Absolute, with ``..``, a backslash, a colon or a control character, or too long.
    """
    parts = path.split("/")
    safe = (
        all(part not in ("", ".", "..") for part in parts)
        and not any(c in "\\:" or not c.isprintable() for c in path)
        and all(len(part.encode("utf-8", "surrogatepass")) <= 200 for part in parts)
        and len(path) <= 1000
    )
    if not safe:
        raise BundleError(
            f"The file name {path[:200]!r} is not a plain path inside the bundle.",
            "The bundle is damaged or was made to write elsewhere; get it again from a source you trust.",
        )
    return PurePosixPath(path)


def check_names(names: Iterable[str]) -> None:
    """Checks every name with `safe_relative`, and that no two of them would meet on any file system.

    Raises:
        BundleError: An unsafe name, two equal names (ignoring case), or a name that is another one's folder.
    """
    seen: set[str] = set()
    for name in names:
        safe_relative(name)
        folded = name.casefold()
        if folded in seen:
            raise BundleError(f"The file '{name}' is listed twice (ignoring case).", "Export the bundle again.")
        seen.add(folded)
    for folded in seen:
        for parent in PurePosixPath(folded).parents:
            if str(parent) in seen:
                raise BundleError(f"'{parent}' is listed both as a file and as a folder.", "Export the bundle again.")


def hash_file(path: Path, tick: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, hexadecimal; `tick` gets the bytes read at each step."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            if tick:
                tick(len(chunk))
    return digest.hexdigest()


def list_files(root: Path) -> list[str]:
    """POSIX paths of every file below `root`, sorted.

    Raises:
        BundleError: A symbolic link or anything else that is neither a file nor a folder.
    """
    found = []
    for folder, subfolders, files in os.walk(root):
        for name in (*subfolders, *files):
            path = Path(folder) / name
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise BundleError(
                    f"'{path}' is a link or a special file; a bundle holds plain files only.",
                    "Replace it by a copy of the file, or export the bundle again.",
                )
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files]
    return sorted(found)


@contextmanager
def os_errors(doing: str) -> Iterator[None]:
    """Turns OSError into BundleError; says so when the disk is full. `doing` reads like ``writing 'x'``."""
    try:
        yield
    except OSError as error:
        raise os_error(doing, error) from error


def os_error(doing: str, error: OSError) -> BundleError:
    """The BundleError for an OSError met while `doing`."""
    if error.errno in _DISK_FULL:
        return BundleError(f"The disk is full ({doing}).", "Free some space or choose another disk, then try again.")
    return BundleError(f"Failed {doing}: {error.strerror or error}.", "Check that the path exists and its permissions.")


class Staging:
    """A temporary folder beside `destination` that becomes it in one rename.

    Until `publish` nothing exists at `destination` (or the old bundle is still there, whole). Leaving the context
    without `publish` removes the temporary folder.

    Args:
        destination: Folder to create. An empty folder may exist there.
        overwrite: Replace an existing bundle. Anything that is not a bundle is never replaced.
    """

    def __init__(self, destination: Path | str, overwrite: bool = False) -> None:
        # resolve(): a link to a bundle means the bundle itself, and the rename must stay on one file system.
        self.destination = Path(destination).expanduser().resolve()
        self.overwrite = overwrite
        self._root: Path | None = None
        self._published = False

    @property
    def root(self) -> Path:
        """The temporary folder; only inside the context."""
        if self._root is None:
            raise BundleError("This bundle writer is not open.", "Use it in a 'with' block.")
        return self._root

    def __enter__(self) -> Staging:
        self._check_destination()
        parent, name = self.destination.parent, self.destination.name
        with os_errors(f"creating a folder in '{parent}'"):
            parent.mkdir(parents=True, exist_ok=True)
            # mkdir, not mkdtemp: the folder becomes the bundle, so it gets the user's usual permissions.
            root = parent / f".{name[:100]}.tmp-{secrets.token_hex(4)}"
            root.mkdir()
            self._root = root
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._root is not None and not self._published:
            shutil.rmtree(self._root, ignore_errors=True)
        self._root = None
        # Whoever wrote into the folder (an exporter, for example) met the full disk as a bare OSError.
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise os_error(f"writing '{self.destination}'", error) from error

    def publish(self) -> Path:
        """Flushes every file to disk and renames the folder to `destination`, which is returned.

        An old bundle is moved aside first, put back should the second rename fail, and deleted last.
        """
        root, destination = self.root, self.destination
        self._check_destination()
        with os_errors(f"writing '{destination}'"):
            for folder, _, files in os.walk(root):
                for name in files:
                    _fsync(Path(folder) / name)
                _fsync(Path(folder))
            old: Path | None = None
            if self.overwrite and (destination / MANIFEST_NAME).exists():
                old = destination.with_name(f".{destination.name[:100]}.old-{secrets.token_hex(4)}")
                os.rename(destination, old)
            try:
                os.rename(root, destination)
            finally:
                if old is not None and not destination.exists():
                    os.rename(old, destination)
            self._published = True
            _fsync(destination.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        return destination

    def _check_destination(self) -> None:
        destination = self.destination
        if not destination.exists():
            return
        if not destination.is_dir():
            raise BundleError(f"'{destination}' exists and is not a folder.", "Choose another destination.")
        with os_errors(f"reading '{destination}'"):
            empty = next(destination.iterdir(), None) is None
        if empty:
            return
        if not (destination / MANIFEST_NAME).is_file():
            raise BundleError(
                f"'{destination}' exists and holds something else than a bundle.",
                "Choose another destination; Pixano Edge does not delete it.",
            )
        if not self.overwrite:
            raise BundleError(
                f"A bundle exists already at '{destination}'.", "Choose another destination or ask to overwrite it."
            )


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
