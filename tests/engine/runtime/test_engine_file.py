"""Engine files: whole or refused."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from pixano_edge.engine.errors import BundleError
from pixano_edge.engine.runtime.engine_file import read_engine, read_header, write_engine

PLAN = bytes(range(256)) * 40


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    source = tmp_path / "plan"
    source.write_bytes(PLAN)
    path = tmp_path / "folder" / "a.engine"
    write_engine(path, source, {"flavour": "tensorrt", "graph": "g"}, {"seconds": 1.5})
    return path


def test_comes_back_as_it_was_written(engine: Path) -> None:
    header, data = read_engine(engine)
    assert bytes(data) == PLAN
    assert data.readonly
    assert header.key == {"flavour": "tensorrt", "graph": "g"}
    assert header.facts == {"seconds": 1.5}
    assert header.flavour == "tensorrt"
    assert header.engine_bytes == len(PLAN)
    assert header.engine_sha256 == hashlib.sha256(PLAN).hexdigest()
    assert read_header(engine) == header


def test_layout_is_as_documented(engine: Path) -> None:
    raw = engine.read_bytes()
    magic, layout, length, digest = struct.unpack("<8sII32s", raw[:48])
    assert (magic, layout) == (b"PXENGINE", 1)
    assert hashlib.sha256(raw[48 : 48 + length]).digest() == digest
    start = -(-(48 + length) // 64) * 64
    assert raw[start:] == PLAN
    assert not any(raw[48 + length : start])
    assert read_header(engine).offset == start


def _flip(at: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw[:60], "truncated"),
        (lambda raw: raw[:20], "truncated"),
        (lambda raw: raw + b"\0", "damaged"),
        (lambda raw: b"", "not an engine file"),
        (lambda raw: raw[64:], "not an engine file"),
        (lambda raw: PLAN, "not an engine file"),
        (_flip(50), "header differs"),
        (_flip(20), "header differs"),
        (lambda raw: raw[:8] + struct.pack("<I", 2) + raw[12:], "layout 2"),
        (lambda raw: raw[:12] + struct.pack("<I", 1 << 31) + raw[16:], "cannot be that long"),
    ],
)
def test_a_damaged_file_is_refused(engine: Path, change: Callable[[bytes], bytes], message: str) -> None:
    engine.write_bytes(change(engine.read_bytes()))
    for read in (read_header, read_engine):
        with pytest.raises(BundleError, match=message) as caught:
            read(engine)
        assert "pixano-edge build" in caught.value.action


def test_a_flipped_bit_in_the_engine_is_found(engine: Path) -> None:
    raw = engine.read_bytes()
    engine.write_bytes(_flip(len(raw) - 5)(raw))
    read_header(engine)
    with pytest.raises(BundleError, match="SHA-256 of its engine differs"):
        read_engine(engine)


@pytest.mark.parametrize("text", [b"[]", b"{}", b'{"key": {}, "facts": {}, "engine_bytes": -1, "engine_sha256": ""}'])
def test_a_header_without_its_values_is_refused(engine: Path, text: bytes) -> None:
    raw = struct.pack("<8sII32s", b"PXENGINE", 1, len(text), hashlib.sha256(text).digest()) + text
    engine.write_bytes(raw.ljust(192, b"\0"))
    with pytest.raises(BundleError, match="damaged"):
        read_header(engine)


def test_a_missing_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist") as caught:
        read_engine(tmp_path / "no.engine")
    assert "pixano-edge build" in caught.value.action


def test_a_failed_write_leaves_the_old_file_alone(engine: Path, tmp_path: Path) -> None:
    before = engine.read_bytes()
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(BundleError, match="holds no engine"):
        write_engine(engine, empty, {}, {})
    with pytest.raises(BundleError, match="cannot be written"):
        write_engine(engine, tmp_path / "absent", {}, {})
    assert engine.read_bytes() == before
    assert list(engine.parent.iterdir()) == [engine]


def test_an_interrupted_write_leaves_nothing(engine: Path, tmp_path: Path) -> None:
    before = engine.read_bytes()

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_engine(engine, tmp_path / "plan", {}, {}, stop)
    assert engine.read_bytes() == before
    assert list(engine.parent.iterdir()) == [engine]
