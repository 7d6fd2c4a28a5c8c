"""The file of far memories: what comes back, places used again, and a full disk."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from pixano_edge.engine.errors import DeviceError
from pixano_edge.engine.models.sam2_video.memory import MapFile

SHAPE, CHANNELS, SIDE = (4, 3, 3), 8, 5


def record(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A map of bfloat16 values, a pointer and logits."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal(SHAPE).astype(np.float32)
    rounded = (features.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded, rng.random(CHANNELS, np.float32), rng.random((SIDE, SIDE), np.float32)


def test_records_come_back_exactly_and_places_are_used_again() -> None:
    file = MapFile(SHAPE, CHANNELS, SIDE)
    for frame in range(5):
        file.put((0, frame), *record(frame))
    file.put((0, 2), *record(20))  # replaces
    file.drop((0, 0))
    file.put((1, 9), *record(9))
    for key, seed in (((0, 1), 1), ((0, 2), 20), ((1, 9), 9)):
        found = file.get(key)
        assert found is not None
        assert all(np.array_equal(a, b) for a, b in zip(found, record(seed)))
    assert file.get((0, 0)) is None
    assert os.fstat(file._file.fileno()).st_size == 5 * file._record
    file.drop_object(0)
    assert len(file) == 1
    file.close()


def test_a_full_disk_keeps_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    file = MapFile(SHAPE, CHANNELS, SIDE)
    file.put((0, 0), *record(0))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DeviceError, match="No space left"):
            file.put((0, 1), *record(1))
    assert (0, 1) not in file
    file.put((0, 1), *record(1))
    for frame in (0, 1):
        found = file.get((0, frame))
        assert found is not None
        assert np.array_equal(found[0], record(frame)[0])
    file.close()
