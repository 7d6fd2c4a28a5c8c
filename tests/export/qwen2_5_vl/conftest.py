"""PyTorch's answers by the seeded Qwen2.5-VL, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixano_edge.export.photos import Photo
from pixano_edge.export.qwen2_5_vl.checkpoint import QwenVlCheckpoint, load
from pixano_edge.export.qwen2_5_vl.family import QwenVlFamily
from pixano_edge.export.vlm.family import Answer
from tests.support import vlm

PHOTOS = [Photo(name, pixels) for name, pixels in vlm.PICTURES]


@pytest.fixture(scope="session")
def loaded_qwen(qwen_folder: Path) -> QwenVlCheckpoint:
    return load(qwen_folder)


@pytest.fixture(scope="session")
def qwen_answer(loaded_qwen: QwenVlCheckpoint) -> Answer:
    """70 greedy tokens about a wide photo."""
    return QwenVlFamily(loaded_qwen).ask(PHOTOS[0], "What is on this image?", 70)
