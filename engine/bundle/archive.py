"""One file per bundle: ``*.pxe``, a zip whose entries are not trusted.

Entries are stored, not deflated: weights hardly shrink, and the same bundle always gives the same bytes. Reading
also takes deflated entries, as made by other zip tools.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import BundleError
from .bundle import Bundle, check_manifest, parse_manifest
from .engines import INDEX_NAME, MAX_INDEX_BYTES, parse_index
from .files import CHUNK, ZIP_ERRORS, Progress, Staging, check_names, os_errors
from .manifest import FileEntry, Manifest
from .names import MANIFEST_NAME, MAX_MANIFEST_BYTES

MAX_BYTES = 32 << 30
MAX_FILES = 1000
MAX_RATIO = 100
"""Unpacked to packed size of one entry, above `RATIO_FREE_BYTES`; JSON reaches about 20, weights about 1.1."""
RATIO_FREE_BYTES = 1 << 20

_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
_DAMAGED = "Download or copy the file again, or pack it again from the bundle."
_DISTRUST = "Do not use it; get the bundle from a source you trust."


def pack(folder: Path | str, file: Path | str, *, overwrite: bool = False, progress: Progress | None = None) -> Path:
    """Packs a bundle folder into one file and returns its path.

    The bundle is verified first. The file appears under its name only when complete.

    Args:
        folder: The bundle.
        file: Usually ``*.pxe``.
        overwrite: Replace an existing file.
        progress: Called with (bytes packed, bytes in all).

    Raises:
        BundleError: Not a valid bundle, the file exists, or the disk is full.
    """
    bundle = Bundle.open(folder)
    target = Path(file).expanduser().resolve()
    if target.is_dir() or (target.exists() and not overwrite):
        raise BundleError(f"'{target}' exists already.", "Choose another name or ask to overwrite it.")
    if bundle.root.resolve() in target.parents:
        raise BundleError(f"'{target}' is inside the bundle.", "Choose a name outside of it.")
    names = bundle.contents()
    total = sum((bundle.root / name).stat().st_size for name in names)
    temporary = target.with_name(f".{target.name[:100]}.tmp-{secrets.token_hex(4)}")
    done = 0
    try:
        with os_errors(f"writing '{target}'"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as raw:
                with zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as archive:
                    for name in names:
                        for count in _add(archive, bundle.root / name, name):
                            done += count
                            if progress:
                                progress(done, total)
                raw.flush()
                os.fsync(raw.fileno())
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def unpack(
    file: Path | str,
    destination: Path | str,
    *,
    max_bytes: int = MAX_BYTES,
    max_files: int = MAX_FILES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Unpacks a packed bundle into a new folder and returns it.

    Names, kinds, counts and sizes are checked before anything is written; sizes and hashes again while writing.
    The folder appears under its name only when every file matches the manifest.

    Args:
        file: The packed bundle.
        destination: Folder to create.
        max_bytes: Most bytes it may unpack to.
        max_files: Most entries it may have.
        overwrite: Replace an existing bundle at `destination`.
        progress: Called with (bytes unpacked, bytes in all).

    Raises:
        BundleError: Damaged, truncated, hostile, too large, or the destination is taken or full.
    """
    with _open_archive(file) as archive:
        found = _check(archive, file, max_bytes, max_files)
        with Staging(destination, overwrite) as staging:
            for rel in found.listed:
                target = staging.root / rel
                with os_errors(f"writing '{target}'"):
                    target.parent.mkdir(parents=True, exist_ok=True)
            _stream(archive, found, staging.root, progress)
            with os_errors(f"writing '{staging.destination}'"):
                if found.index is not None:
                    (staging.root / INDEX_NAME).parent.mkdir(exist_ok=True)  # an index may list nothing
                    (staging.root / INDEX_NAME).write_bytes(found.index)
                (staging.root / MANIFEST_NAME).write_bytes(found.data)
            return staging.publish()


def inspect_archive(
    file: Path | str, *, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES
) -> tuple[Manifest, str]:
    """Checks a packed bundle like `unpack` does, without writing. Returns its manifest and its bundle hash."""
    with _open_archive(file) as archive:
        found = _check(archive, file, max_bytes, max_files)
        _stream(archive, found, None, None)
    return found.manifest, hashlib.sha256(found.data).hexdigest()


@dataclass(frozen=True)
class _Checked:
    """A packed bundle whose names and sizes are right: its entries by name, what is listed of them, and the lists."""

    entries: dict[str, zipfile.ZipInfo]
    manifest: Manifest
    data: bytes
    listed: dict[str, FileEntry]
    index: bytes | None


def _add(archive: zipfile.ZipFile, source: Path, name: str) -> Iterator[int]:
    info = zipfile.ZipInfo(name, _ZIP_EPOCH)
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    info.file_size = source.stat().st_size
    with source.open("rb") as reader, archive.open(info, "w") as writer:
        while chunk := reader.read(CHUNK):
            writer.write(chunk)
            yield len(chunk)


@contextmanager
def _open_archive(file: Path | str) -> Iterator[zipfile.ZipFile]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise BundleError(f"There is no packed bundle at '{path}'.", "Check the path.")
    try:
        with os_errors(f"reading '{path}'"), zipfile.ZipFile(path) as archive:
            yield archive
    except ZIP_ERRORS as error:
        raise BundleError(f"'{path}' is damaged, truncated or not a packed bundle: {error}", _DAMAGED) from error


def _check(archive: zipfile.ZipFile, file: Path | str, max_bytes: int, max_files: int) -> _Checked:
    """Everything that can be known before unpacking."""
    infos = archive.infolist()
    # A cut archive may end in an .npz, which is a zip itself: its entries would be taken for the bundle's.
    if not infos or min(info.header_offset for info in infos) != 0:
        raise BundleError(f"'{file}' is damaged, truncated or not a packed bundle: it does not start as one.", _DAMAGED)
    if len(infos) > max_files:
        raise BundleError(f"'{file}' has {len(infos)} entries, at most {max_files} are accepted.", _DISTRUST)
    total = sum(info.file_size for info in infos)
    if total > max_bytes:
        raise BundleError(
            f"'{file}' unpacks to {total} bytes, at most {max_bytes} are accepted.",
            "If you trust it, unpack it with a higher limit: pixano-edge bundle unpack --max-bytes.",
        )
    for info in infos:
        _check_entry(info)
    # Folder entries of other zip tools are passed over; files bring their own folders.
    files = [info for info in infos if not info.is_dir()]
    check_names(info.filename for info in files)
    entries = {info.filename: info for info in files}
    if MANIFEST_NAME not in entries:
        raise BundleError(f"'{file}' has no {MANIFEST_NAME}: it is not a packed bundle, or half of one.", _DAMAGED)
    if entries[MANIFEST_NAME].file_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"The manifest in '{file}' is larger than {MAX_MANIFEST_BYTES} bytes.", _DISTRUST)
    data = archive.read(entries[MANIFEST_NAME])
    manifest = parse_manifest(data)
    check_manifest(manifest)
    listed, index = dict(manifest.files), None
    present = set(entries) - {MANIFEST_NAME}
    if INDEX_NAME in present - set(listed):
        if entries[INDEX_NAME].file_size > MAX_INDEX_BYTES:
            raise BundleError(f"'{INDEX_NAME}' in '{file}' is larger than {MAX_INDEX_BYTES} bytes.", _DISTRUST)
        index = archive.read(entries[INDEX_NAME])
        listed |= parse_index(index, hashlib.sha256(data).hexdigest(), (MANIFEST_NAME, *listed)).engines
        present -= {INDEX_NAME}
    if missing := sorted(set(listed) - present):
        raise BundleError(f"'{file}' lacks the files {missing[:5]}.", _DAMAGED)
    if extra := sorted(present - set(listed)):
        raise BundleError(f"'{file}' holds files that its manifest does not list: {extra[:5]}.", _DISTRUST)
    for rel, entry in listed.items():
        if entries[rel].file_size != entry.size:
            raise BundleError(
                f"'{rel}' in '{file}' has {entries[rel].file_size} bytes, the manifest says {entry.size}.", _DAMAGED
            )
    return _Checked(entries, manifest, data, listed, index)


def _check_entry(info: zipfile.ZipInfo) -> None:
    name = info.filename
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or info.orig_filename != name:
        raise BundleError(f"The archive's entry '{name}' is a link or a special file.", _DISTRUST)
    if info.flag_bits & 0x1:
        raise BundleError(f"The archive's entry '{name}' is encrypted.", "Pack the bundle without a password.")
    # zipfile bounds how much deflate unpacks at a time; it does not for bzip2 and LZMA.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BundleError(f"The archive's entry '{name}' uses an unknown compression.", "Pack it with pixano-edge.")
    if info.file_size > RATIO_FREE_BYTES and info.file_size > MAX_RATIO * info.compress_size:
        raise BundleError(
            f"The archive's entry '{name}' would grow from {info.compress_size} to {info.file_size} bytes.", _DISTRUST
        )


def _stream(archive: zipfile.ZipFile, found: _Checked, root: Path | None, progress: Progress | None) -> None:
    """Reads every file, checks size and hash, and writes it below `root` if given."""
    done, total = 0, sum(entry.size for entry in found.listed.values())
    for rel, entry in found.listed.items():
        digest, size = hashlib.sha256(), 0
        with archive.open(found.entries[rel]) as reader, _sink(root, rel) as writer:
            # The entry's declared size may lie, so what really comes out is counted.
            while chunk := reader.read(CHUNK):
                size += len(chunk)
                if size > entry.size:
                    break
                digest.update(chunk)
                if writer:
                    writer.write(chunk)
                done += len(chunk)
                if progress:
                    progress(done, total)
        if size != entry.size or digest.hexdigest() != entry.sha256:
            raise BundleError(f"'{rel}' in the packed bundle is damaged: it does not match the manifest.", _DAMAGED)


@contextmanager
def _sink(root: Path | None, rel: str) -> Iterator[BinaryIO | None]:
    if root is None:
        yield None
        return
    with (root / rel).open("xb") as file:
        yield file
