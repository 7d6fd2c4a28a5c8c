"""Fixtures of the provider tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pixano_edge.engine.provider import EdgeProvider

from .fakes import FakeOpener, add_bundle, make_provider


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folder of a store with the bundles ``alpha`` and ``beta``."""
    add_bundle(tmp_path, "alpha")
    add_bundle(tmp_path, "beta")
    return tmp_path


@pytest.fixture
def opener() -> FakeOpener:
    return FakeOpener()


@pytest.fixture
async def provider(root: Path, opener: FakeOpener) -> AsyncIterator[EdgeProvider]:
    edge = make_provider(root, opener)
    yield edge
    opener.gate.set()
    for held in (*opener.opened, *opener.videos, *opener.detectors, *opener.vlms):
        held.gate.set()
    await edge.close()
