"""A seeded Qwen2.5-VL checkpoint, its bundle and PyTorch's answers, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixano_edge.export import pipeline
from pixano_edge.export.photos import Photo
from pixano_edge.export.qwen2_5_vl import export_qwen_vl
from pixano_edge.export.qwen2_5_vl.checkpoint import QwenVlCheckpoint, load
from pixano_edge.export.qwen2_5_vl.family import QwenVlFamily
from pixano_edge.export.vlm import export
from pixano_edge.export.vlm.family import Answer
from tests.support import vlm

PHOTOS = [Photo("wide", vlm.picture(50, 97)), Photo("tall", vlm.picture(70, 40, 1))]


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlm.write_qwen(tmp_path_factory.mktemp("qwen") / "tiny-qwen2.5-vl")


@pytest.fixture(scope="session")
def loaded_qwen(qwen_folder: Path) -> QwenVlCheckpoint:
    return load(qwen_folder)


@pytest.fixture(scope="session")
def qwen_answer(loaded_qwen: QwenVlCheckpoint) -> Answer:
    """70 greedy tokens about a wide photo."""
    return QwenVlFamily(loaded_qwen).ask(PHOTOS[0], "What is on this image?", 70)


@pytest.fixture(scope="session")
def qwen_bundle(qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In fp32 and fp16; memory is not measured, for it takes a process per graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.GraphExport, "measure_memory", lambda self: [])
        patch.setattr(export, "measure_file", lambda *_: None)
        return export_qwen_vl(
            qwen_folder,
            tmp_path_factory.mktemp("qwen") / "bundle",
            photos=PHOTOS,
            questions=("What is on this image?",),
            threads=1,
        )
