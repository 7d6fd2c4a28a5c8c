"""What several workers of pytest-xdist need: made by the first that asks, waited for by the others."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = "PYTEST_XDIST_WORKER"
"""Environment variable that a worker has, and what it starts."""


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of this run, the same for all its workers.

    Args:
        factory: Knows the run's temporary folder.
        name: Of the folder, below one for all of them.
        make: Writes it; gets a path that is not there, below a folder that is. Called once, unless it raises.
    """
    base = factory.getbasetemp()
    place = (base.parent if WORKER in os.environ else base) / "once" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    done = place.with_name(f"{place.name}.done")
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)  # what another worker left when it failed
            make(place)
            done.touch()
    return place
