from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pixano_edge.engine.bundle.store import demo_path
from pixano_edge.engine.kit import signing
from pixano_edge.engine.kit.create import Made, create
from pixano_edge.engine.kit.wheels import Target

from .small import small_wheels


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two key pairs, ``maker`` and ``other``."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("maker", "other"):
        signing.generate(folder / name)
    return folder


@pytest.fixture(scope="session")
def public(keys: Path) -> bytes:
    """The maker's public key."""
    return bytes.fromhex(signing.public_digits(signing.load(keys / "maker", str)))


@pytest.fixture(scope="session")
def signed(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A small signed kit with a real bundle; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("signed")
    return create(
        folder / "kit",
        target=Target.of(None, None),
        extras=["cpu"],
        bundles=[("mine", demo_path())],
        wheels=small_wheels(folder / "wheels"),
        key=signing.load(keys / "maker", str),
    )


@pytest.fixture
def kit(signed: Made, tmp_path: Path) -> Path:
    """A copy of the small kit."""
    return Path(shutil.copytree(signed.folder, tmp_path / "kit"))
