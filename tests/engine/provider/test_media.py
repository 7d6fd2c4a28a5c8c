"""Which image sources are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pixano_edge.engine.errors import ImageError
from pixano_edge.engine.provider.errors import InvalidRequestError
from pixano_edge.engine.provider.media import MediaPolicy

from .fakes import data_uri

_MAX = 1000


def test_bytes_and_data_uris() -> None:
    policy = MediaPolicy([])
    assert policy.read(b"abc", _MAX) == b"abc"
    assert policy.read(memoryview(b"abc"), _MAX) == b"abc"
    assert policy.read(data_uri(b"abc"), _MAX) == b"abc"


def test_any_file_of_the_process_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"abc")
    monkeypatch.chdir(tmp_path)
    policy = MediaPolicy(None)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), "a.png"):
        assert policy.read(source, _MAX) == b"abc"


def test_only_under_the_roots(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / "a.png").write_bytes(b"abc")
    (outside / "b.png").write_bytes(b"secret")
    os.symlink(outside / "b.png", inside / "link.png")
    os.symlink(inside / "a.png", inside / "fine.png")
    policy = MediaPolicy([inside])
    for source in ("a.png", "fine.png", inside / "a.png"):
        assert policy.read(source, _MAX) == b"abc"
    for source in ("../out/b.png", str(outside / "b.png"), "link.png", f"{inside}/../out/b.png", "absent.png"):
        with pytest.raises(InvalidRequestError, match="under the allowed folders"):
            policy.read(source, _MAX)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://host/a.png", "not fetched from 'http://'"),
        ("https://host/a.png", "not fetched"),
        ("s3://bucket/a.png", "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("", "empty text"),
        (None, "NoneType"),
        (7, "int"),
        ([1], "list"),
        ("absent.png", "no image file"),
        ("a\0b", "no image file"),
        ("x" * 100_000, "no image file"),
        ("/dev/zero", "no image file"),
        ("/", "no image file"),
    ],
)
def test_refused(source: object, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        MediaPolicy(None).read(source, _MAX)
    assert len(str(caught.value)) < 400


def test_no_paths_for_callers_from_a_network(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"abc")
    with pytest.raises(InvalidRequestError, match="Paths are not allowed"):
        MediaPolicy([]).read(str(tmp_path / "a.png"), _MAX)


def test_too_many_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x" * (_MAX + 1))
    for source in (b"x" * (_MAX + 1), tmp_path / "a.png", data_uri(b"x" * (_MAX + 1))):
        with pytest.raises((InvalidRequestError, ImageError), match=r"more than"):
            MediaPolicy(None).read(source, _MAX)


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidRequestError, match="no image file"):
        MediaPolicy(None).read(tmp_path / "pipe", _MAX)
