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
from pathlib import Path
from typing import BinaryIO

from ..errors import BundleError
from .bundle import MAX_MANIFEST_BYTES, Bundle, check_manifest, parse_manifest
from .files import CHUNK, ZIP_ERRORS, Progress, Staging, check_names, os_errors
from .manifest import MANIFEST_NAME, Manifest

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
    names = [MANIFEST_NAME, *sorted(bundle.manifest.files)]
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
        entries, manifest, data = _check(archive, file, max_bytes, max_files)
        with Staging(destination, overwrite) as staging:
            for rel in manifest.files:
                target = staging.root / rel
                with os_errors(f"writing '{target}'"):
                    target.parent.mkdir(parents=True, exist_ok=True)
            _stream(archive, entries, manifest, staging.root, progress)
            with os_errors(f"writing '{staging.destination}'"):
                (staging.root / MANIFEST_NAME).write_bytes(data)
            return staging.publish()


def inspect_archive(
    file: Path | str, *, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES
) -> tuple[Manifest, str]:
    """Checks a packed bundle like `unpack` does, without writing. Returns its manifest and its bundle hash."""
    with _open_archive(file) as archive:
        entries, manifest, data = _check(archive, file, max_bytes, max_files)
        _stream(archive, entries, manifest, None, None)
    return manifest, hashlib.sha256(data).hexdigest()


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


def _check(
    archive: zipfile.ZipFile, file: Path | str, max_bytes: int, max_files: int
) -> tuple[dict[str, zipfile.ZipInfo], Manifest, bytes]:
    """Everything that can be known before unpacking. Returns the entries, the manifest and its bytes."""
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
    present, listed = set(entries) - {MANIFEST_NAME}, set(manifest.files)
    if missing := sorted(listed - present):
        raise BundleError(f"'{file}' lacks the files {missing[:5]}.", _DAMAGED)
    if extra := sorted(present - listed):
        raise BundleError(f"'{file}' holds files that its manifest does not list: {extra[:5]}.", _DISTRUST)
    for rel, entry in manifest.files.items():
        if entries[rel].file_size != entry.size:
            raise BundleError(
                f"'{rel}' in '{file}' has {entries[rel].file_size} bytes, the manifest says {entry.size}.", _DAMAGED
            )
    return entries, manifest, data


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


def _stream(
    archive: zipfile.ZipFile,
    entries: dict[str, zipfile.ZipInfo],
    manifest: Manifest,
    root: Path | None,
    progress: Progress | None,
) -> None:
    """Reads every file, checks size and hash, and writes it below `root` if given."""
    done, total = 0, sum(entry.size for entry in manifest.files.values())
    for rel, entry in manifest.files.items():
        digest, size = hashlib.sha256(), 0
        with archive.open(entries[rel]) as reader, _sink(root, rel) as writer:
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
