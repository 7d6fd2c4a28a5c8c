"""Training scenes of the demo as files, and the demo's SAM 2 calibrated on them once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixano_edge.calibration.data import open_data
from pixano_edge.calibration.result import Budget
from pixano_edge.calibration.run import Outcome, Request, calibrate
from pixano_edge.calibration.tasks.base import TaskOptions
from pixano_edge.engine.bundle import Bundle, demo_path

SCENES = 9
THREADS = 1


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of small training scenes with ``scenes.json``; read-only."""
    pytest.importorskip("skimage", reason="the scenes' textures need pixano-edge[benchmarks]")
    from pixano_edge.export.demo.write_scenes import write_scenes

    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, SCENES, size=192, coco=True)
    return folder


@pytest.fixture(scope="session")
def sam2_demo() -> Bundle:
    return Bundle.open(demo_path("sam2-demo"))


def decoder_request(scenes: Path, out: Path, work: Path, budget: str = "mask_iou>=0.95") -> Request:
    """Calibrates the mask decoder alone: a small graph, whose features stay those of fp32."""
    return Request(
        open_data(scenes, allow_few=True),
        Budget.parse(budget),
        TaskOptions(threads=THREADS),
        out,
        graphs=("mask_decoder",),
        search_samples=2,
        work=work,
    )


@pytest.fixture(scope="session")
def calibrated(sam2_demo: Bundle, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A copy of the demo with an int8 variant of its decoder."""
    folder = tmp_path_factory.mktemp("calibrated")
    return calibrate(sam2_demo, decoder_request(scenes, folder / "sam2-int8", folder / "work"))
