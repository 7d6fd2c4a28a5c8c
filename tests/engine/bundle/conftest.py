"""A fresh sample bundle per test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.bundle.sample import make_bundle


@pytest.fixture
def bundle_dir(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "sample")
