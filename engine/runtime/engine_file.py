"""The ``*.engine`` file: a serialised TensorRT engine behind a header that says what it was built from and for.

Layout, numbers little-endian:

| bytes       | content                                                                                  |
|-------------|------------------------------------------------------------------------------------------|
| 0..7        | ``PXENGINE``                                                                             |
| 8..11       | version of this layout, uint32, now 1                                                    |
| 12..15      | length H of the header, uint32                                                           |
| 16..47      | SHA-256 of the header                                                                    |
| 48..48+H    | header: JSON object in UTF-8                                                             |
| ..P         | zeros up to P, the next multiple of 64                                                   |
| P..end      | the engine as TensorRT serialised it                                                     |

The header's ``engine_bytes`` and ``engine_sha256`` are the size and hash of the engine; ``key`` is
`pixano_edge.engine.build.key.EngineKey` (what must be equal for the engine to be used), ``facts`` what was seen while
building. In ``facts``, ``scratch_bytes`` has the device memory that a context needs per profile, or null and
``scratch_reason`` says why it is not known: only a GPU tells, and TensorRT for RTX builds without one. `read_engine`
checks both hashes and the exact size, so neither a truncated, padded or damaged file nor a foreign one (a plain plan of
trtexec, for example) gets as far as TensorRT. The hashes find damage, they do not prove where a file came from: an
engine is code, take it from sources you trust only.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import secrets
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BundleError

SUFFIX = ".engine"
SCRATCH = "scratch_bytes"
SCRATCH_REASON = "scratch_reason"
MAGIC = b"PXENGINE"
LAYOUT = 1
MAX_HEADER_BYTES = 16 << 20
_ALIGN = 64
_CHUNK = 1 << 20
_PREAMBLE = struct.Struct("<8sII32s")
_REBUILD = "Build the engine again: pixano-edge build <bundle>"


@dataclass(frozen=True)
class EngineHeader:
    """What an engine file says about itself.

    Attributes:
        key: `EngineKey` as a dictionary; ``flavour`` and ``version`` in it name the TensorRT that built it.
        facts: Build time, sizes, machine; for reports, never compared.
        engine_bytes: Size of the serialised engine.
        engine_sha256: Its hash.
        offset: Where it starts in the file.
    """

    key: Mapping[str, Any]
    facts: Mapping[str, Any]
    engine_bytes: int
    engine_sha256: str
    offset: int

    @property
    def flavour(self) -> str:
        """``tensorrt`` or ``tensorrt_rtx``."""
        return str(self.key.get("flavour", ""))

    @property
    def scratch_bytes(self) -> int | None:
        """Device memory that its hungriest profile needs; None where the builder could not tell."""
        told = self.facts.get(SCRATCH)
        if not isinstance(told, list):
            return None
        numbers = [n for n in told if type(n) is int and n >= 0]
        return max(numbers) if numbers and len(numbers) == len(told) else None


def write_engine(
    path: Path,
    source: Path,
    key: Mapping[str, Any],
    facts: Mapping[str, Any],
    tick: Callable[[int], None] | None = None,
) -> EngineHeader:
    """Writes an engine file; it appears under its name only when complete and on disk.

    Args:
        path: File to make; an older one is replaced in one step.
        source: The serialised engine alone.
        key: JSON-ready.
        facts: JSON-ready.
        tick: Called with the bytes copied at each step.

    Raises:
        BundleError: It cannot be written (rights, full disk), or `source` is empty.
    """
    temporary = path.with_name(f".{path.name[:100]}.tmp-{secrets.token_hex(4)}")
    try:
        digest, size = hashlib.sha256(), 0
        with source.open("rb") as reader:
            while chunk := reader.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
        if not size:
            raise BundleError(f"'{source}' holds no engine.", _REBUILD)
        values = {"key": dict(key), "facts": dict(facts), "engine_bytes": size, "engine_sha256": digest.hexdigest()}
        text = json.dumps(values, sort_keys=True, allow_nan=False).encode()
        offset = -(-(_PREAMBLE.size + len(text)) // _ALIGN) * _ALIGN
        path.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as reader, temporary.open("xb") as writer:
            writer.write(_PREAMBLE.pack(MAGIC, LAYOUT, len(text), hashlib.sha256(text).digest()))
            writer.write(text.ljust(offset - _PREAMBLE.size, b"\0"))
            while chunk := reader.read(_CHUNK):
                writer.write(chunk)
                if tick is not None:
                    tick(len(chunk))
            writer.flush()
            os.fsync(writer.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise BundleError(
            f"The engine file '{path}' cannot be written: {error.strerror or error}.", "Check rights and free space."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return EngineHeader(values["key"], values["facts"], size, digest.hexdigest(), offset)  # type: ignore[arg-type]


def read_header(path: Path) -> EngineHeader:
    """The header of an engine file; its own hash and the file's exact size are checked, the engine is not read.

    Raises:
        BundleError: No such file, not an engine file, truncated, damaged, or of a newer layout.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_PREAMBLE.size)
            if start[:8] != MAGIC:
                raise _broken(path, "is not an engine file of pixano-edge")
            if len(start) < _PREAMBLE.size:
                raise _broken(path, "is truncated")
            _, layout, length, digest = _PREAMBLE.unpack(start)
            if layout != LAYOUT:
                raise _broken(path, f"has layout {layout}, this version reads {LAYOUT}")
            if length > MAX_HEADER_BYTES:
                raise _broken(path, "is damaged: its header cannot be that long")
            text = file.read(length)
    except FileNotFoundError as error:
        raise _broken(path, "does not exist") from error
    except OSError as error:
        raise BundleError(f"The engine file '{path}' cannot be read: {error.strerror or error}.", _REBUILD) from error
    if len(text) != length:
        raise _broken(path, "is truncated")
    if hashlib.sha256(text).digest() != digest:
        raise _broken(path, "is damaged: the SHA-256 of its header differs")
    header = _parse(path, text)
    expected = header.offset + header.engine_bytes
    if size != expected:
        kind = "truncated" if size < expected else "damaged"
        raise _broken(path, f"is {kind}: {size} bytes instead of {expected}")
    return header


def read_engine(path: Path) -> tuple[EngineHeader, memoryview]:
    """Header and engine, with every hash checked.

    Returns:
        The header and a read-only view of the mapped file, which stays open as long as the view lives.

    Raises:
        BundleError: As `read_header`, or the engine's hash differs.
    """
    header = read_header(path)
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise BundleError(f"The engine file '{path}' cannot be read: {error}.", _REBUILD) from error
    engine = memoryview(mapped)[header.offset :]
    if engine.nbytes != header.engine_bytes or hashlib.sha256(engine).hexdigest() != header.engine_sha256:
        raise _broken(path, "is damaged: the SHA-256 of its engine differs")
    return header, engine


def _parse(path: Path, text: bytes) -> EngineHeader:
    try:
        values = json.loads(text)
        key, facts = values["key"], values["facts"]
        size, digest = values["engine_bytes"], values["engine_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise _broken(path, f"is damaged: its header cannot be read ({error})") from error
    fits = isinstance(key, dict) and isinstance(facts, dict) and isinstance(digest, str)
    if not fits or not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        raise _broken(path, "is damaged: its header lacks values")
    offset = -(-(_PREAMBLE.size + len(text)) // _ALIGN) * _ALIGN
    return EngineHeader(key, facts, size, digest, offset)


def _broken(path: Path, what: str) -> BundleError:
    return BundleError(f"The engine file '{path}' {what}.", _REBUILD)
