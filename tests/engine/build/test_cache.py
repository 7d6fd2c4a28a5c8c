"""The engine cache: hits, misses, damage, and nothing half done."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pixano_edge.engine.build.cache import ABANDONED_SECONDS, EngineCache, default_root
from pixano_edge.engine.errors import BundleError

from .keys import make_box, make_key
from .test_key import CHANGES


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan"
    path.write_bytes(b"engine" * 100)
    return path


def test_hit_only_for_the_very_key(cache: EngineCache, plan: Path) -> None:
    path = cache.put(make_key(), plan, {"seconds": 1.0})
    assert cache.get(make_key()) == path
    for name, value in CHANGES.items():
        assert cache.get(make_key(**{name: value})) is None, name
    assert cache.warnings == []


def test_a_file_under_another_keys_name_is_a_miss(cache: EngineCache, plan: Path) -> None:
    other = make_key(version="11.0")
    cache.path(other).parent.mkdir(parents=True)
    os.replace(cache.put(make_key(), plan, {}), cache.path(other))
    assert cache.get(other) is None


@pytest.mark.parametrize("keep", [-1, 100, 10])
def test_a_truncated_engine_is_a_miss_and_named(cache: EngineCache, plan: Path, keep: int) -> None:
    path = cache.put(make_key(), plan, {})
    path.write_bytes(path.read_bytes()[:keep])
    assert cache.get(make_key()) is None
    assert path.name in cache.warnings[0]
    assert list(cache.engines("a" * 64)) == []


def test_lists_the_engines_of_a_graph_newest_first(cache: EngineCache, plan: Path) -> None:
    old = cache.put(make_key(), plan, {})
    new = cache.put(make_key(version="10.4"), plan, {})
    cache.put(make_key(graph_sha256="b" * 64), plan, {})
    os.utime(old, (1, 1))
    assert [path for path, _, _ in cache.engines("a" * 64)] == [new, old]
    assert list(cache.engines("c" * 64)) == []


def test_timing_caches_differ_by_release_and_gpu(cache: EngineCache) -> None:
    boxes = [make_box(), make_box(version="10.4"), make_box(device_name="a/b"), make_box(sm_count=8)]
    paths = {cache.timing_path(box) for box in boxes}
    assert len(paths) == len(boxes)
    assert {path.parent for path in paths} == {cache.root / "timing"}


def test_work_folders_are_removed_whatever_happens(cache: EngineCache) -> None:
    def interrupted() -> None:
        with cache.work_folder() as folder:
            (folder / "engine").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((cache.root / "work").iterdir()) == []


def test_what_a_killed_build_left_goes_later(cache: EngineCache) -> None:
    left, young = cache.root / "work" / "1-dead", cache.root / "work" / "2-alive"
    for folder in (left, young):
        folder.mkdir(parents=True)
    old = time.time() - ABANDONED_SECONDS - 60
    os.utime(left, (old, old))
    with cache.work_folder():
        assert not left.exists()
        assert young.exists()


def test_a_root_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="cannot be written"), EngineCache(tmp_path / "file" / "x").work_folder():
        pass


def test_default_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIXANO_EDGE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "engines"
    monkeypatch.delenv("PIXANO_EDGE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_root() == tmp_path / "x" / "pixano-edge" / "engines"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_root() == Path.home() / ".cache" / "pixano-edge" / "engines"
