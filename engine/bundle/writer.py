"""Writing a bundle: everything goes to a temporary folder, the manifest last, one rename at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import ValidationError

from ..errors import BundleError
from .bundle import check_manifest, parse_manifest
from .files import Staging, hash_file, list_files, os_errors, safe_relative
from .manifest import MANIFEST_NAME, SCHEMA_VERSION, SINCE_2, FileEntry, Manifest


class BundleWriter:
    """Context manager that makes a bundle or leaves nothing.

    Files may be added with `add_file` or written straight into `root`. Leaving the ``with`` block without `finish`,
    by an exception or not, removes the temporary folder. A disk that runs full inside the block becomes a
    BundleError, whoever met it.

    Args:
        destination: Folder of the bundle. Its parents are created.
        overwrite: Replace an existing bundle there; anything else is never replaced. The old bundle stays whole
            until the new one is complete.

    Raises:
        BundleError: On entering, when the destination is taken or cannot be written.
    """

    def __init__(self, destination: Path | str, overwrite: bool = False) -> None:
        self._staging = Staging(destination, overwrite)

    @property
    def root(self) -> Path:
        """Temporary folder beside the destination; valid inside the ``with`` block."""
        return self._staging.root

    def __enter__(self) -> BundleWriter:
        self._staging.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._staging.__exit__(kind, error, trace)

    def add_file(self, rel: str, source: bytes | Path | str) -> Path:
        """Writes one file and returns its path in the temporary folder.

        Args:
            rel: POSIX path inside the bundle.
            source: Content, or a file to copy.

        Raises:
            BundleError: Unsafe or taken name, unreadable source, or full disk.
        """
        target = self.root / safe_relative(rel)
        if target.exists():
            raise BundleError(f"The bundle already has a file '{rel}'.", "Add each file once.")
        with os_errors(f"writing '{rel}'"):
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                target.write_bytes(source)
            else:
                shutil.copyfile(source, target)
        return target

    def finish(self, manifest_fields: dict[str, Any], check: Callable[[Path], None] | None = None) -> Path:
        """Hashes the files, writes the manifest and renames the folder to the destination, which is returned.

        Args:
            manifest_fields: Fields of `Manifest` but `schema_version` and `files`, which are filled in here.
            check: Called with the folder of the complete bundle before it takes its place, which it does not where
                this raises.

        Raises:
            BundleError: The manifest would not open again, or the disk is full. Nothing is left.
        """
        if taken := {"files", "schema_version"} & set(manifest_fields):
            raise BundleError(f"The writer fills in {sorted(taken)} itself.", "Leave them out.")
        root = self.root
        with os_errors(f"reading '{root}'"):
            files = {
                rel: FileEntry(sha256=hash_file(root / rel), size=(root / rel).stat().st_size)
                for rel in list_files(root)
            }
        try:
            version = SCHEMA_VERSION if any(manifest_fields.get(name) for name in SINCE_2) else 1
            manifest = Manifest.model_validate({**manifest_fields, "schema_version": version, "files": files})
        except ValidationError as error:
            raise BundleError(f"The manifest is not complete: {error}", "Fix the fields and write again.") from error
        check_manifest(manifest)
        newer = set(SINCE_2) if version == 1 else None  # names that older versions would refuse
        data = (manifest.model_dump_json(indent=2, exclude=newer) + "\n").encode()
        # What is written must also be readable: NaN, for example, becomes null in JSON.
        parse_manifest(data)
        with os_errors(f"writing '{MANIFEST_NAME}'"):
            (root / MANIFEST_NAME).write_bytes(data)
        if check is not None:
            check(root)
        return self._staging.publish()
