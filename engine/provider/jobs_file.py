"""The file of jobs: one process at a time, one schema, and what happens to a file that is damaged or foreign."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path

from .errors import JobStoreError

SCHEMA = 1
APPLICATION = 0x50584A42
"""SQLite's ``application_id`` of a file of jobs."""

_MAGIC = b"SQLite format 3\0"
_ELSEWHERE = "Give another path for the jobs."
_OUTSIDE = ("unable to open", "is locked", "I/O error", "readonly", "is full", "out of memory")
"""In SQLite's messages about what is around a file, not in it."""
_TABLES = f"""
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA application_id = {APPLICATION};
BEGIN;
CREATE TABLE jobs (
    job_id TEXT PRIMARY KEY, number INTEGER NOT NULL, model TEXT NOT NULL, submitted REAL NOT NULL,
    state TEXT NOT NULL, detail TEXT, model_class TEXT NOT NULL, device TEXT NOT NULL, total INTEGER, ended REAL,
    request TEXT, clip_bytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE frames (
    job_id TEXT NOT NULL, position INTEGER NOT NULL, frame TEXT NOT NULL, PRIMARY KEY (job_id, position)
) WITHOUT ROWID;
PRAGMA user_version = {SCHEMA};
COMMIT;
"""


def job_file(path: Path | str) -> Path:
    """The file of jobs that a path names: itself, or ``jobs.sqlite`` in it where it is a folder. A path that is written
    with a slash at its end is one, whether it is there or not."""
    folder = Path(path).is_dir() or (isinstance(path, str) and path.endswith(("/", os.sep)))
    return Path(path) / "jobs.sqlite" if folder else Path(path)


class FileLock:
    """Keeps other processes away from a file of jobs, until `release` or the end of this process.

    Args:
        path: Of the lock file, which stays.

    Raises:
        JobStoreError: Another process, or another store of this one, holds it.
    """

    def __init__(self, path: Path) -> None:
        import fcntl

        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._file, 32).decode("ascii", "replace").strip()
            os.close(self._file)
            raise JobStoreError(
                f"The jobs in '{path.with_suffix('')}' belong to a server that runs already"
                f"{f' (process {holder})' if holder else ''}.",
                f"Stop that one first. {_ELSEWHERE}",
            ) from error
        os.ftruncate(self._file, 0)
        os.write(self._file, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Lets the next one in."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def open_file(path: Path, clips: Path, known: bool) -> tuple[sqlite3.Connection, str | None]:
    """A connection for writing; makes the file where there is none.

    A damaged file is renamed, with its clips, and an empty one takes its place, so that a server starts again after a
    power cut; nothing of it is deleted.

    Args:
        path: The file; locked by the caller.
        clips: Folder of its clips.
        known: Whether something here tells that the file is one of jobs, whatever it looks like.

    Returns:
        The connection, and what was moved aside and why.

    Raises:
        JobStoreError: It was written by a newer version, is another program's, or cannot be opened at all.
    """
    warning = None
    try:
        start = _start(path)
        if start and start != _MAGIC:
            if not known:
                raise JobStoreError(f"'{path}' is no file of jobs.", _ELSEWHERE)
            warning = _aside(path, clips, "it does not begin as a database does")
        try:
            return _connect(path), warning
        except sqlite3.DatabaseError as error:
            if any(words in str(error) for words in _OUTSIDE):
                raise
            warning = _aside(path, clips, str(error))
            return _connect(path), warning
    except (OSError, sqlite3.Error) as error:
        raise JobStoreError(
            f"The jobs in '{path}' cannot be opened: {error}.", f"Check rights and free space. {_ELSEWHERE}"
        ) from error


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC))
    except FileNotFoundError:
        return b""


def _connect(path: Path) -> sqlite3.Connection:
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    # Used by one thread at a time: the opener's, then the writer's.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    done = False
    try:
        _check(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA journal_size_limit = 67108864")
        done = True
        return connection
    finally:
        if not done:
            connection.close()


def _check(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables and not version:
        connection.executescript(_TABLES)
        return
    if application != APPLICATION:
        raise JobStoreError(f"'{path}' is a database of another program.", _ELSEWHERE)
    if version != SCHEMA:
        raise JobStoreError(
            f"The jobs in '{path}' were written by a newer version (schema {version}, this one knows {SCHEMA}).",
            f"Update pixano-edge. {_ELSEWHERE}",
        )
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    for table, column in (("jobs", "clip_bytes"), ("frames", "frame")):
        if column not in {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}:
            raise sqlite3.DatabaseError(f"table {table} is not there")


def _aside(path: Path, clips: Path, reason: str) -> str:
    """Renames the file, what SQLite keeps beside it, and the clips."""
    mark = f".damaged-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
    while path.with_name(path.name + mark).exists():
        mark += "x"
    for part in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm"), clips):
        with contextlib.suppress(FileNotFoundError):
            part.rename(part.with_name(part.name.replace(path.name, path.name + mark, 1)))
    return (
        f"The file of jobs was damaged ({reason:.200}) and is now '{path.name}{mark}'; this server began an empty one. "
        "Jobs from before are in the old one: try 'sqlite3 FILE .recover', or delete it."
    )
