"""A tiny SAM 2 with its five graphs in ONNX Runtime, and its PyTorch original."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2_video.frames import open_frames
from pixano_edge.engine.models.sam2_video.steps import Stepper
from pixano_edge.engine.models.sam2_video.tracker import VideoTracker
from pixano_edge.engine.runtime import open_device, open_session

SIDE, WIDTH = 128, 128  # the video part of transformers needs a width of more than 64


@dataclass
class Tiny:
    """The original and everything to track with it."""

    model: Any
    constants: sam2.Sam2Constants
    video: sam2_video.Sam2VideoConstants
    stepper: Stepper

    def tracker(self, frames: Any, **options: Any) -> VideoTracker:
        return VideoTracker(self.stepper, open_frames(frames), **options)


@pytest.fixture(scope="session")
def tiny_graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any, Any]:
    onnx = pytest.importorskip("onnx", reason="the graphs are exported here: pip install 'pixano-edge[export]'")
    torch = pytest.importorskip("torch", reason="the reference: pip install 'pixano-edge[export]'")
    from pixano_edge.export.onnx_graph import export_graph
    from pixano_edge.export.sam2 import graphs, video_graphs
    from tests.support.tiny import make_tracking_model

    torch.set_num_threads(1)
    model = make_tracking_model(SIDE)
    constants = sam2.Sam2Constants(image_size=SIDE, hidden_dim=WIDTH)
    video = video_graphs.video_constants(model)
    folder = tmp_path_factory.mktemp("video-graphs")
    modules = {**graphs.modules(model), **video_graphs.modules(model)}
    for name, spec in {**sam2.graphs(constants), **sam2_video.graphs(constants, video)}.items():
        example = (
            graphs.example_inputs(name, constants)
            if name in sam2.graphs(constants)
            else video_graphs.example_inputs(name, constants, video)
        )
        onnx.save(export_graph(modules[name], spec, example), folder / f"{name}.onnx")
    return model, folder, constants, video


@pytest.fixture
def tiny_video(tiny_graphs: tuple[Any, Path, Any, Any]) -> Iterator[Tiny]:
    model, folder, constants, video = tiny_graphs
    device = open_device("cpu")
    specs = {**sam2.graphs(constants), **sam2_video.graphs(constants, video)}
    sessions = {n: open_session(folder / f"{n}.onnx", s, device, threads=1) for n, s in specs.items()}
    predictor = Sam2ImagePredictor(
        sessions[sam2.IMAGE_ENCODER], sessions[sam2.MASK_DECODER], constants, bundle_hash="tiny", variant="fp32"
    )
    yield Tiny(model, constants, video, Stepper(predictor, sessions, video))
    for session in sessions.values():
        session.close()


@pytest.fixture(scope="session")
def moving() -> Callable[[int], list[np.ndarray]]:
    """A clip of N frames, 96x144: two squares that move and cross over a textured ground."""

    def make(count: int) -> list[np.ndarray]:
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

    return make
