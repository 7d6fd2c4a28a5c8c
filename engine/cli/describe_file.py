"""The JSON Lines file of `describe -o`: one line for each image, and what a later run finds done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from ..errors import EdgeError
from .output import make_folder


class CaptionFile:
    """Lines of captions. Each is written at once and as a whole; one that a crash cut off is removed at opening.

    A line holds ``file``, ``sha256`` of the file's content, ``settings`` (see `settings_digest`) and the answer.

    Args:
        path: The file; made when it is not there.
        settings: Of this run. Lines of other settings stay and count for nothing.

    Attributes:
        repaired: Whether half a line was removed.

    Raises:
        EdgeError: It cannot be read or written, or holds a line that is none of a caption file.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path = path
        self.settings = settings
        self.repaired = False
        self._done: dict[tuple[str, str], dict[str, Any]] = {}
        self._contents: dict[str, dict[str, Any]] = {}
        self._out: IO[bytes] | None = None

    def __enter__(self) -> CaptionFile:
        make_folder(self.path.resolve().parent)
        try:
            end = self._read() if self.path.exists() else 0
            self._out = self.path.open("ab")
            if self.repaired:
                self._out.truncate(end)
        except OSError as error:
            raise self._cannot(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._out is not None:
            self._out.close()
            self._out = None

    def has(self, file: Path, digest: str) -> bool:
        """Whether this content under this name is done."""
        return (str(file), digest) in self._done

    def same(self, digest: str) -> dict[str, Any] | None:
        """The line of this content under another name."""
        return self._contents.get(digest)

    def append(self, file: Path, digest: str, told: dict[str, Any]) -> None:
        """Writes one line, to the disk."""
        assert self._out is not None
        line = {**told, "file": str(file), "sha256": digest, "settings": self.settings}
        try:
            self._out.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            self._out.flush()
            os.fsync(self._out.fileno())
        except OSError as error:
            raise self._cannot(error) from error
        self._note(line)

    def _note(self, line: dict[str, Any]) -> None:
        if line["settings"] == self.settings:
            self._done[line["file"], line["sha256"]] = line
            self._contents.setdefault(line["sha256"], line)

    def _read(self) -> int:
        """Notes what is done; where the last whole line ends."""
        end = 0
        with self.path.open("rb") as content:
            for number, raw in enumerate(content, 1):
                whole = raw.endswith(b"\n")
                try:
                    line = json.loads(raw)
                    fits = isinstance(line, dict) and all(
                        isinstance(line.get(k), str) for k in ("file", "sha256", "settings")
                    )
                except ValueError:
                    fits = False
                if not whole:
                    self.repaired = True
                    return end
                if not fits:
                    raise EdgeError(
                        f"Line {number} of '{self.path}' is no caption.", "Name another file, or remove that line."
                    )
                self._note(line)
                end += len(raw)
        return end

    def _cannot(self, error: OSError) -> EdgeError:
        return EdgeError(f"'{self.path}' cannot be written: {error.strerror}.", "Check rights and free space.")
