"""Where a request's image or video comes from: bytes, ``data:`` URIs, and files under the allowed folders."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InvalidRequestError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]{1,15})://")
_VIDEO_URI = re.compile(r"data:video/[A-Za-z0-9][A-Za-z0-9.+-]{0,63};base64,", re.ASCII)
_EXAMPLES = {"image": "image/jpeg", "video": "video/mp4"}
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
        text = _text(source, "image")
        if text[:5].lower() == "data:":
            from ..models.images import load_data_uri

            return _checked(load_data_uri(text, max_bytes), max_bytes)
        path = self._allowed(text, "image")
        try:
            with path.open("rb") as file:
                return _checked(file.read(max_bytes + 1), max_bytes)
        except OSError as error:
            raise InvalidRequestError(f"Cannot read {_short(text)}: {error.strerror}.", "Check the file.") from error

    def video(self, source: Any, max_bytes: int) -> bytes | Path:
        """The file behind a video that comes in one piece: its content, or its path where it is on this machine.

        Raises:
            InvalidRequestError: Another kind of source, a file that is absent or not allowed, or too many bytes.
        """
        if isinstance(source, bytes | bytearray | memoryview):
            return _checked(bytes(source), max_bytes, "video")
        text = _text(source, "video")
        header = _VIDEO_URI.match(text)
        if header is not None:
            if (len(text) - header.end()) // 4 * 3 > max_bytes + 2:
                raise _too_large(max_bytes, "video")
            try:
                return _checked(base64.b64decode(text[header.end() :], validate=True), max_bytes, "video")
            except (binascii.Error, ValueError) as error:
                raise InvalidRequestError(
                    f"The video's data URI is not valid base64: {error}.", "Encode the file's bytes again."
                ) from error
        if text[:5].lower() == "data:":
            raise InvalidRequestError(
                f"Not a video data URI: {text[:40]!r}.", "Send 'data:video/mp4;base64,...', or a list of frames."
            )
        path = self._allowed(text, "video")
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InvalidRequestError(f"Cannot read {_short(text)}: {error.strerror}.", "Check the file.") from error
        if size > max_bytes:
            raise _too_large(max_bytes, "video")
        return path

    def file(self, source: str) -> Path | None:
        """The file that a request may name by this path; None where there is none or it is not allowed."""
        try:
            return self._allowed(source, "image")
        except InvalidRequestError:
            return None

    def _allowed(self, source: str, kind: str) -> Path:
        scheme = _SCHEME.match(source)
        if scheme:
            raise InvalidRequestError(
                f"{kind.capitalize()}s are not fetched from '{scheme.group(1)}://' addresses: {_short(source)}.",
                f"Download the {kind} and send it as a 'data:' URI.",
            )
        hint = f"Give the path of the {kind} file, or a 'data:{kind}/...;base64,' URI (bare base64 text is not one)."
        if self.roots is not None and not self.roots:
            raise InvalidRequestError(
                f"Paths are not allowed here, and {_short(source)} is not a 'data:' URI.",
                f"Send the {kind} as 'data:{kind}/...;base64,...'.",
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
        raise InvalidRequestError(f"There is no {kind} file {_short(source)}{where}.", hint)


def _text(source: Any, kind: str) -> str:
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str) or not source:
        given = type(source).__name__ if source != "" else "an empty text"
        raise InvalidRequestError(
            f"{kind} must be a 'data:' URI, a path or bytes, got {given}.",
            f"Send the encoded file as 'data:{_EXAMPLES[kind]};base64,...'.",
        )
    return source


def _checked(data: bytes, max_bytes: int, kind: str = "image") -> bytes:
    if len(data) > max_bytes:
        raise _too_large(max_bytes, kind)
    return data


def _too_large(max_bytes: int, kind: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The encoded {kind} has more than {max_bytes} bytes.", f"Send a smaller {kind}, or raise max_{kind}_bytes."
    )


def _short(text: str) -> str:
    """At most a line of a text that may hold megabytes."""
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}..."
