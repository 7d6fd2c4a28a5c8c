"""A tiny SAM 2 with its five graphs in ONNX Runtime, and its PyTorch original."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2_video.frames import open_frames
from pixano_edge.engine.models.sam2_video.steps import Stepper
from pixano_edge.engine.models.sam2_video.tracker import VideoTracker
from pixano_edge.engine.runtime import open_device, open_session


@dataclass
class Tiny:
    """The original and everything to track with it."""

    model: Any
    constants: sam2.Sam2Constants
    video: sam2_video.Sam2VideoConstants
    stepper: Stepper

    def tracker(self, frames: Any, **options: Any) -> VideoTracker:
        return VideoTracker(self.stepper, open_frames(frames), **options)


@contextlib.contextmanager
def opened(
    model: Any, folder: Path, constants: sam2.Sam2Constants, video: sam2_video.Sam2VideoConstants
) -> Iterator[Tiny]:
    """A model and its graph files, ready to track."""
    device = open_device("cpu")
    specs = {**sam2.graphs(constants), **sam2_video.graphs(constants, video)}
    sessions = {n: open_session(folder / f"{n}.onnx", s, device, threads=1) for n, s in specs.items()}
    predictor = Sam2ImagePredictor(
        sessions[sam2.IMAGE_ENCODER], sessions[sam2.MASK_DECODER], constants, bundle_hash="tiny", variant="fp32"
    )
    yield Tiny(model, constants, video, Stepper(predictor, sessions, video))
    for session in sessions.values():
        session.close()


@pytest.fixture
def tiny_video(tiny_graphs: tuple[Any, Path, Any, Any]) -> Iterator[Tiny]:
    with opened(*tiny_graphs) as tiny:
        yield tiny
