"""Where a request's image comes from: bytes, ``data:`` URIs, and files under the allowed folders."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InvalidRequestError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]{1,15})://")
_SHOWN = 80


class MediaPolicy:
    """Which files a request may name.

    Args:
        roots: Folders whose files may be read. None: any file that this process can read, which fits callers in the
            same process. Empty: none, which fits callers from a network.
    """

    def __init__(self, roots: Sequence[str | Path] | None) -> None:
        self.roots = None if roots is None else tuple(Path(os.path.realpath(r)) for r in roots)

    def read(self, source: Any, max_bytes: int) -> bytes:
        """The encoded image behind `source`: bytes, ``data:`` URI, path; reads at most `max_bytes` + 1 bytes.

        Raises:
            InvalidRequestError: Another kind of source, a file that is absent or not allowed, or too many bytes.
            ImageError: A malformed ``data:`` URI.
        """
        if isinstance(source, bytes | bytearray | memoryview):
            return _checked(bytes(source), max_bytes)
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        if not isinstance(source, str) or not source:
            given = type(source).__name__ if source != "" else "an empty text"
            raise InvalidRequestError(
                f"image must be a 'data:' URI, a path or bytes, got {given}.",
                "Send the encoded file as 'data:image/jpeg;base64,...'.",
            )
        if source[:5].lower() == "data:":
            from ..models.images import load_data_uri

            return _checked(load_data_uri(source, max_bytes), max_bytes)
        scheme = _SCHEME.match(source)
        if scheme:
            raise InvalidRequestError(
                f"Images are not fetched from '{scheme.group(1)}://' addresses: {_short(source)}.",
                "Download the image and send it as a 'data:' URI.",
            )
        return self._file(source, max_bytes)

    def _file(self, source: str, max_bytes: int) -> bytes:
        path = self._allowed(source)
        try:
            with path.open("rb") as file:
                return _checked(file.read(max_bytes + 1), max_bytes)
        except OSError as error:
            raise InvalidRequestError(f"Cannot read {_short(source)}: {error.strerror}.", "Check the file.") from error

    def _allowed(self, source: str) -> Path:
        hint = "Give the path of an image file, or a 'data:image/...;base64,' URI (bare base64 text is not one)."
        if self.roots is not None and not self.roots:
            raise InvalidRequestError(
                f"Paths are not allowed here, and {_short(source)} is not a 'data:' URI.",
                "Send the image as 'data:image/...;base64,...'.",
            )
        candidates = [Path(source)] if self.roots is None else [root / source for root in self.roots]
        for candidate in candidates:
            try:
                # The real path is what is checked and opened, so a link cannot lead out of the folder.
                path = Path(os.path.realpath(candidate, strict=True))
                regular = path.is_file()
            except (OSError, ValueError):
                continue
            if regular and (self.roots is None or any(path.is_relative_to(root) for root in self.roots)):
                return path
        where = "" if self.roots is None else " under the allowed folders"
        raise InvalidRequestError(f"There is no image file {_short(source)}{where}.", hint)


def _checked(data: bytes, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise InvalidRequestError(
            f"The encoded image has more than {max_bytes} bytes.", "Send a smaller image, or raise max_image_bytes."
        )
    return data


def _short(text: str) -> str:
    """At most a line of a text that may hold megabytes."""
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}..."
