"""The request of a tracking job on disk, so that the job can be resumed after a restart.

Frames become files in the job's folder, named by their digest, so that equal frames are kept once and a damaged file
is noticed. Files that a request names by path stay where they are; only their size and time are noted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EdgeError
from .errors import InvalidRequestError, JobStoreError
from .media import MediaPolicy
from .video_types import EdgeVideoMaskGenerationInput

_FIELDS = ("objects_ids", "frame_indexes", "points", "labels", "boxes", "propagate", "interval", "keyframes")
_AGAIN = "Submit the job again."


class KeptFile:
    """An encoded frame or video in a job's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        """Its content, checked against its name.

        Raises:
            InvalidRequestError: It is gone or damaged.
        """
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise InvalidRequestError(f"A kept frame cannot be read: {error.strerror}.", _AGAIN) from error
        if _digest(content) != self.path.name:
            raise InvalidRequestError(f"A kept frame is damaged on disk ({self.path.name}).", _AGAIN)
        return content


class NamedFile:
    """A file that the request named by path: where it was, and what it looked like."""

    def __init__(self, path: str, size: int, time_ns: int) -> None:
        self.path = path
        self.size = size
        self.time_ns = time_ns

    def __fspath__(self) -> str:
        return self.path


class KeptMedia(MediaPolicy):
    """Reads what `KeptClip` kept, and what the first request's policy allows.

    Args:
        media: That policy.
    """

    def __init__(self, media: MediaPolicy) -> None:
        self.roots = media.roots
        self._media = media

    def read(self, source: Any, max_bytes: int) -> bytes:
        return self._media.read(self._content(source), max_bytes)

    def video(self, source: Any, max_bytes: int) -> bytes | Path:
        content = self._content(source)
        return source.path if isinstance(source, KeptFile) else self._media.video(content, max_bytes)

    def _content(self, source: Any) -> Any:
        if isinstance(source, KeptFile):
            return source.read()
        if isinstance(source, NamedFile):
            found = self._media.file(source.path)
            now = None if found is None else found.stat()
            if now is None or (now.st_size, now.st_mtime_ns) != (source.size, source.time_ns):
                raise InvalidRequestError(
                    f"'{source.path}' is gone or was changed since the job was submitted.", _AGAIN
                )
            return source.path
        return source


class KeptClip:
    """Writes a request's clip into a folder.

    Args:
        folder: Made when there is something to write.
        max_bytes: Most that may be written.

    Attributes:
        nbytes: Bytes written.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self.nbytes = 0

    def keep(self, request: Any, media: MediaPolicy) -> dict[str, Any] | None:
        """The request as JSON-ready values, its clip written; None where the clip has more than `max_bytes`.

        What is malformed is kept as it is: the run says what is wrong with it.

        Raises:
            JobStoreError: The disk is full or refuses.
        """
        video = getattr(request, "video", None)
        several = isinstance(video, Sequence) and not isinstance(video, str | bytes | bytearray | memoryview)
        items: list[Any] = []
        given: Any = video if several else [video]
        for item in given:
            kept = self._item(item, media, not several)
            if kept is None:
                return None
            items.append(kept)
        values = {name: plain(getattr(request, name, None)) for name in _FIELDS}
        return {**values, "model": plain(getattr(request, "model", None)), "video": items if several else items[0]}

    def _item(self, item: Any, media: MediaPolicy, whole: bool) -> dict[str, Any] | None:
        if isinstance(item, os.PathLike):
            item = os.fspath(item)
        inline = isinstance(item, str) and item[:5].lower() == "data:"
        if isinstance(item, str) and not inline:
            found = media.file(item)
            if found is None:
                return {"text": item}
            stat = found.stat()
            return {"path": item, "size": stat.st_size, "time_ns": stat.st_mtime_ns}
        try:
            content = media.video(item, 1 << 40) if whole else media.read(item, 1 << 40)
        except EdgeError:
            return {"text": item if isinstance(item, str) else repr(item)[:100]}
        assert isinstance(content, bytes)
        name = _digest(content)
        path = self._folder / name
        if not path.exists():
            if self.nbytes + len(content) > self._max_bytes:
                return None
            self.nbytes += len(content)
            try:
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                path.write_bytes(content)
            except OSError as error:
                raise JobStoreError(
                    f"The job's clip cannot be kept: {error.strerror}.",
                    "Free space on the disk.",
                ) from error
        return {"file": name}


def kept_request(values: Mapping[str, Any], folder: Path) -> EdgeVideoMaskGenerationInput:
    """The request that `KeptClip.keep` wrote; its clip is for `KeptMedia`."""
    video = values["video"]
    source = [_source(item, folder) for item in video] if isinstance(video, list) else _source(video, folder)
    return EdgeVideoMaskGenerationInput(
        video=source,  # type: ignore[arg-type]
        model=values["model"],
        **{name: values[name] for name in _FIELDS},
    )


def _source(item: Mapping[str, Any], folder: Path) -> KeptFile | NamedFile | str:
    if "file" in item:
        return KeptFile(folder / Path(item["file"]).name)
    if "path" in item:
        return NamedFile(item["path"], item["size"], item["time_ns"])
    return str(item["text"])


def plain(value: Any) -> Any:
    """JSON-ready, of arrays, numpy's numbers and any mapping or sequence."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return value.decode("ascii", "replace")
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(one) for one in value]
    return value


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=20).hexdigest()
