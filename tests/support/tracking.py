"""A tiny SAM 2 that tracks: its five graphs, and a clip to track in."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2, sam2_video

SIDE, WIDTH = 128, 128  # the video part of transformers needs a width of more than 64


def unpack_graphs(bundle: Path, folder: Path) -> tuple[Any, Path, sam2.Sam2Constants, sam2_video.Sam2VideoConstants]:
    """Writes the fp32 graphs of the bundle of `make_tracking_model` as ``NAME.onnx``, each a file for itself.

    Returns:
        The PyTorch model, the folder and the constants.
    """
    import onnx
    import torch

    from tests.support.tiny import make_tracking_model

    torch.set_num_threads(1)
    opened = Bundle.open(bundle)
    for name in opened.manifest.graphs:
        onnx.save(onnx.load(opened.graph_path(name)), folder / f"{name}.onnx")
    video = sam2_video.constants_of(opened.manifest.constants)
    assert video is not None
    constants = sam2.Sam2Constants.from_dict(opened.manifest.constants)
    assert (constants.image_size, constants.hidden_dim) == (SIDE, WIDTH)
    return make_tracking_model(SIDE), folder, constants, video


def export_graphs(
    model: Any, constants: sam2.Sam2Constants, folder: Path, names: Collection[str] = ()
) -> sam2_video.Sam2VideoConstants:
    """Writes a model's graphs, or some of them, as ``NAME.onnx``."""
    import onnx

    from pixano_edge.export.onnx_graph import export_graph
    from pixano_edge.export.sam2 import graphs, video_graphs

    video = video_graphs.video_constants(model)
    image_specs, video_specs = sam2.graphs(constants), sam2_video.graphs(constants, video)
    modules = {**graphs.modules(model), **video_graphs.modules(model)}
    for name, spec in {**image_specs, **video_specs}.items():
        if names and name not in names:
            continue
        example = (
            graphs.example_inputs(name, constants)
            if name in image_specs
            else video_graphs.example_inputs(name, constants, video)
        )
        onnx.save(export_graph(modules[name], spec, example), folder / f"{name}.onnx")
    return video


def moving_squares(count: int) -> list[np.ndarray]:
    """A clip of N frames, 96x144: two squares that move and cross over a textured ground."""
    rng = np.random.default_rng(0)
    ground = (rng.random((12, 18, 3)) * 120).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    frames = []
    for i in range(count):
        frame = ground.copy()
        x = 10 + 3 * i % 100
        frame[20:52, x : x + 30] = (230, 60, 40)
        frame[40:70, 110 - x // 2 : 134 - x // 2] = (40, 90, 240)
        frames.append(frame)
    return frames
