"""Fixtures of the checks that run inside Pixano's environment."""

from __future__ import annotations

import os

import pytest

from tests.clients.material import Clip, Photo, read_clip, read_photo


@pytest.fixture(scope="session")
def url() -> str:
    """Address of the running server, from the test outside."""
    return os.environ["EDGE_URL"]


@pytest.fixture(scope="session")
def photo() -> Photo:
    return read_photo()


@pytest.fixture(scope="session")
def clip() -> Clip:
    return read_clip()
