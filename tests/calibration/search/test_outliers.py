"""What really breaks int8: a few channels that are far larger than the others, as large transformers have them.

The injection preserves the function: gains of normalisations grow fifty times on some channels, and the weights behind
shrink. One scale for the tensor then leaves the other channels hardly a bit.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from pixano_edge.calibration.data import open_data
from pixano_edge.calibration.graph import load_graph
from pixano_edge.calibration.outliers import inject
from pixano_edge.calibration.spool import Spool
from pixano_edge.calibration.tasks import open_task
from pixano_edge.calibration.tasks.base import TaskOptions
from pixano_edge.calibration.variant import VariantFiles, read_source
from pixano_edge.engine.bundle import Bundle

GRAPH = "image_encoder"


def test_masks_survive_outliers_with_smoothing_and_not_without(sam2_demo: Bundle, scenes: Path, tmp_path: Path) -> None:
    task = open_task(sam2_demo, TaskOptions(threads=1))
    split = open_data(scenes, limit=6, allow_few=True).split()
    calibration, held_out = task.refer(split.calibration), task.refer(split.held_out)
    spool = Spool(tmp_path / "spool", "key", limit=4, max_bytes=1 << 30)
    task.collect(calibration, spool)
    path = tmp_path / "injected.onnx"
    onnx.save(inject(load_graph(sam2_demo.graph_path(GRAPH)), seed=0), path)
    assert task.score({GRAPH: path}, held_out).mean > 0.9999
    source = read_source(GRAPH, path, spool.feeds(GRAPH), tmp_path / "seen.npz", 1)
    found = {}
    for name, method, smooth in (("naive", "minmax", None), ("shipped", "auto", "search")):
        files = VariantFiles({GRAPH: source}, tmp_path / name, method, smooth)
        found[name] = task.score(files.files(source.units()), held_out).mean
    assert found["naive"] < 0.85
    assert found["shipped"] > 0.93
