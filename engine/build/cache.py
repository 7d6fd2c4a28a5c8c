"""Engines kept on disk by key, and TensorRT's timing caches.

Layout below the root (``$PIXANO_EDGE_HOME/engines`` or ``~/.cache/pixano-edge/engines``):

* ``<first 16 of the graph's SHA-256>/<graph>-<variant>-<first 16 of the key's digest>.engine``
* ``timing/<flavour>-<version>-<GPU>.cache``: one per TensorRT version and GPU, as NVIDIA asks for
* ``work/``: folders of builds under way

Files appear complete or not at all, so any number of processes may share a cache.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import BundleError
from ..runtime.engine_file import SUFFIX, EngineHeader, read_engine, read_header, write_engine
from .key import Box, EngineKey

ABANDONED_SECONDS = 2 * 24 * 3600.0
"""Age at which the folder of a build that was killed is removed by the next one."""


def default_root() -> Path:
    """``$PIXANO_EDGE_HOME/engines``, or ``~/.cache/pixano-edge/engines`` (``$XDG_CACHE_HOME`` counts)."""
    if home := os.environ.get("PIXANO_EDGE_HOME"):
        return Path(home).expanduser() / "engines"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixano-edge" / "engines"


class EngineCache:
    """Engines on disk.

    Args:
        root: Folder; `default_root` if not given. Made at the first build.

    Attributes:
        warnings: Files that were passed over because they are damaged.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root).expanduser() if root is not None else default_root()
        self.warnings: list[str] = []

    def path(self, key: EngineKey) -> Path:
        """Where the engine of `key` is or would be."""
        return self.root / key.graph_sha256[:16] / file_name(key)

    def get(self, key: EngineKey) -> Path | None:
        """The engine of exactly this key, checked byte by byte; None when there is none.

        A damaged file counts as none and is named in `warnings`; the next build replaces it.
        """
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            header, engine = read_engine(path)
            engine.release()
            return path if EngineKey.from_dict(header.key) == key else None
        except BundleError as error:
            self.warnings.append(error.message)
            return None

    def put(self, key: EngineKey, source: Path, facts: Mapping[str, Any]) -> Path:
        """Keeps the serialised engine in file `source` under `key`.

        Raises:
            BundleError: The disk is full or not writable.
        """
        path = self.path(key)
        write_engine(path, source, key.to_dict(), facts)
        return path

    def engines(self, graph_sha256: str) -> Iterator[tuple[Path, EngineHeader, EngineKey]]:
        """Every engine of a graph whose header can be read, newest first; others go to `warnings`."""
        folder = self.root / graph_sha256[:16]
        for path in newest_first(folder.glob(f"*{SUFFIX}") if folder.is_dir() else ()):
            try:
                header = read_header(path)
                key = EngineKey.from_dict(header.key)
            except BundleError as error:
                self.warnings.append(error.message)
                continue
            if key.graph_sha256 == graph_sha256:
                yield path, header, key

    def timing_path(self, box: Box) -> Path:
        """Timing cache for a TensorRT version on a GPU."""
        gpu = f"{box.device_name}-sm{box.compute_capability}-{box.sm_count}"
        return self.root / "timing" / f"{_slug(f'{box.flavour}-{box.version}-{gpu}')}.cache"

    @contextmanager
    def work_folder(self) -> Iterator[Path]:
        """A folder for one build, on the cache's disk; removed at the end, however that comes.

        Raises:
            BundleError: It cannot be made.
        """
        work = self.root / "work"
        folder = work / f"{os.getpid()}-{secrets.token_hex(4)}"
        try:
            work.mkdir(parents=True, exist_ok=True)
            for left in work.iterdir():
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
            folder.mkdir()
        except OSError as error:
            raise BundleError(
                f"The engine cache '{self.root}' cannot be written: {error.strerror or error}.",
                "Check its permissions, or set PIXANO_EDGE_HOME to another folder.",
            ) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def file_name(key: EngineKey) -> str:
    """File name of an engine in a cache or a bundle."""
    return f"{_slug(key.graph)}-{_slug(key.variant)}-{key.digest[:16]}{SUFFIX}"


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Files by age."""
    return sorted(paths, key=lambda path: (-path.stat().st_mtime, str(path)))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip(".")[:120]
