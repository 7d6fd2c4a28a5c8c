"""A seeded SmolVLM checkpoint, its bundle and PyTorch's answers, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixano_edge.export.photos import Photo
from pixano_edge.export.smolvlm import export_smolvlm
from pixano_edge.export.smolvlm.checkpoint import SmolVlmCheckpoint, load
from pixano_edge.export.smolvlm.family import SmolVlmFamily
from pixano_edge.export.vlm.family import Answer
from tests.support import vlm
from tests.support.once import once

PHOTOS = [Photo(name, pixels) for name, pixels in vlm.PICTURES]


@pytest.fixture(scope="session")
def smolvlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "checkpoints/tiny-smolvlm", vlm.write_smolvlm)


@pytest.fixture(scope="session")
def loaded_smolvlm(smolvlm_folder: Path) -> SmolVlmCheckpoint:
    return load(smolvlm_folder)


@pytest.fixture(scope="session")
def smolvlm_answer(loaded_smolvlm: SmolVlmCheckpoint) -> Answer:
    """70 greedy tokens about a photo of 2 by 3 tiles."""
    return SmolVlmFamily(loaded_smolvlm).ask(PHOTOS[0], "What is on this image?", 70)


@pytest.fixture(scope="session")
def smolvlm_bundle(smolvlm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In every variant; memory is measured by a test of its own, for it takes a process per graph."""

    def make(folder: Path) -> None:
        with vlm.without_memory():
            export_smolvlm(
                smolvlm_folder,
                folder,
                variants=("fp32", "fp16", "int4"),
                photos=PHOTOS,
                questions=("What is on this image?",),
                threads=1,
            )

    return once(tmp_path_factory, "bundles/smolvlm", make)
