"""Fixtures that several workers share: made once, made again where that failed, and only then there."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.support.once import WORKER, once


class Factory:
    """Stands for `TempPathFactory`."""

    def __init__(self, base: Path) -> None:
        self._base = base

    def getbasetemp(self) -> Path:
        return self._base


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Factory]:
    """Of two workers."""
    monkeypatch.setenv(WORKER, "gw0")
    return [Factory(tmp_path / name) for name in ("popen-gw0", "popen-gw1")]


def test_two_workers_make_it_once(factories: list[Factory]) -> None:
    made: list[Path] = []
    found: list[str] = []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.1)
        folder.mkdir()
        (folder / "file").write_text("whole")

    def ask(factory: Factory) -> None:
        found.append((once(factory, "kind/thing", make) / "file").read_text())  # type: ignore[arg-type]

    workers = [threading.Thread(target=ask, args=(factory,)) for factory in factories]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert len(made) == 1
    assert found == ["whole", "whole"]


def test_what_failed_is_made_anew(factories: list[Factory]) -> None:
    def broken(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        once(factories[0], "thing", broken)  # type: ignore[arg-type]
    place = once(factories[1], "thing", lambda folder: folder.mkdir())  # type: ignore[arg-type]
    assert place.is_dir()
    assert not list(place.iterdir())


def test_runs_without_workers_have_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKER, raising=False)
    places = {once(Factory(tmp_path / name), "thing", lambda folder: folder.mkdir()) for name in "ab"}  # type: ignore[arg-type]
    assert len(places) == 2
