"""Which back end and precision a bundle opens with for tracking: as for images, on all five graphs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine import runtime
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2_video
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import DeviceError
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.model import Sam2VideoModel
from pixano_edge.engine.models.verdicts import VerdictStore
from pixano_edge.engine.runtime import StubSession
from pixano_edge.engine.runtime.base import DeviceInfo
from tests.engine.models.sam2.test_opening import World
from tests.support.tracking import moving_squares


def zeros(spec: GraphSpec) -> Any:
    """A graph of zeros, of the sizes that its inputs have."""

    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        sizes = {
            dim: size for s in spec.inputs for dim, size in zip(s.dims, inputs[s.name].shape) if isinstance(dim, str)
        }
        return {s.name: np.zeros(s.shape(sizes), np.float32) for s in spec.outputs}

    return run


class VideoWorld(World):
    """What is installed and works; `broken_graphs` raise when they open, as ``"<combination> <graph>"``."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
        super().__init__(tmp_path, monkeypatch)
        self.bundle = Bundle.open(bundle)
        self.broken_graphs: set[str] = set()
        self.missing_engines: set[str] = set()
        monkeypatch.setattr(importlib.import_module("pixano_edge.engine.build.locate"), "find_engine", self.find_engine)

    def open_session(self, path: Path, spec: GraphSpec, device: Any, *, backend: str, **options: Any) -> Any:
        precision = "fp16" if "fp16" in str(path.relative_to(path.parents[1])) else "fp32"
        combination = f"{backend} {precision}"
        if combination in self.broken:
            raise self.broken[combination]
        if f"{combination} {spec.name}" in self.broken_graphs:
            raise DeviceError(f"{spec.name} does not load.", "")
        session = StubSession(spec, device, zeros(spec), capturable=True)
        session.backend = backend
        self.sessions.append(session)
        return session

    def find_engine(self, bundle: Bundle, graph: str, precision: str, info: DeviceInfo) -> Path:
        if graph in self.missing_engines:
            raise DeviceError(f"No engine of '{graph}' in {precision}.", "pixano-edge build")
        return super().find_engine(bundle, graph, precision, info)

    def open_video(self, **kwargs: Any) -> Sam2VideoModel:
        kwargs = {"device": "cuda:0", "verdicts": VerdictStore(self.home), **kwargs}
        return Sam2VideoModel.open(self.bundle, **kwargs)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking_bundle: Path) -> VideoWorld:
    return VideoWorld(tmp_path, monkeypatch, tracking_bundle)


def test_auto_proves_warms_up_and_tracks(world: VideoWorld) -> None:
    with world.open_video() as model:
        info = model.info()
        assert (info["backend"], info["precision"]) == ("onnxruntime", "fp16")
        assert "fastest" in info["precision_reason"]
        assert info["warnings"] == []
        assert [line.split(":")[0] for line in info["left_out"]] == ["tensorrt fp16"]
        assert all(count > 0 for count in model.runs.values()), "no user waits for a first run"
        with model.track(moving_squares(4)) as tracker:
            tracker.add_prompt(1, 0, Prompt(points=[[25, 35]]))
            assert len(list(tracker.propagate())) == 4
    assert world.checked == ["onnxruntime fp16"]
    assert world.opened[-1].ops[-1] == "close"
    assert all(session._closed for session in world.sessions)
    assert len(world.sessions) == 5


def test_images_and_videos_share_the_verdict(world: VideoWorld) -> None:
    world.open_video().close()
    Sam2ImagePredictor.open(world.bundle, device="cuda:0", verdicts=VerdictStore(world.home), warm_up=False).close()
    assert world.checked == ["onnxruntime fp16"]


def test_failed_samples_and_graphs_that_do_not_load(world: VideoWorld) -> None:
    world.failed = {"onnxruntime fp16"}
    with world.open_video() as model:
        info = model.info()
    assert info["precision"] == "fp32"
    assert [w for w in info["warnings"] if "onnxruntime fp16 is not used" in w and "0.5 < 0.99" in w]
    with pytest.raises(DeviceError, match="onnxruntime fp16 failed"):
        world.open_video(backend="onnxruntime", precision="fp16")
    with world.open_video(backend="onnxruntime", precision="fp16", force=True) as model:
        assert [w for w in model.info()["warnings"] if "forced" in w]


def test_one_video_graph_that_does_not_load(world: VideoWorld) -> None:
    world.broken_graphs = {f"onnxruntime fp16 {sam2_video.MEMORY_ATTENTION}"}
    with world.open_video() as model:
        info = model.info()
        assert info["precision"] == "fp32"
        assert [w for w in info["warnings"] if "memory_attention does not load" in w]
    assert all(session._closed for session in world.sessions)


def test_engines_of_images_alone_are_no_engines_for_videos(world: VideoWorld) -> None:
    world.engines = {"fp16"}
    world.missing_engines = {sam2_video.TRACK_DECODER}
    with world.open_video() as model:
        info = model.info()
    assert info["backend"] == "onnxruntime"
    assert any("track_decoder" in line for line in info["left_out"])
    assert world.chosen(warm_up=False) == "tensorrt fp16"
    world.missing_engines = set()
    with world.open_video() as model:
        assert model.info()["backend"] == "tensorrt"


def test_auto_device_falls_back_to_the_cpu_aloud(world: VideoWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world.broken = {f"{b} {p}": DeviceError(f"{p} is broken.", "") for b, p in _gpu_order()}
    plain = world.open_session

    def on_cpu(path: Path, spec: GraphSpec, device: Any, **kwargs: Any) -> Any:
        if device.kind == "cpu":
            world.broken = {}
            return StubSession(spec, runtime.StubDevice("cpu"), zeros(spec))
        return plain(path, spec, device, **kwargs)

    monkeypatch.setattr(runtime, "open_session", on_cpu)
    with world.open_video(device="auto") as model:
        warnings = model.info()["warnings"]
    assert [w for w in warnings if w.startswith("The CPU runs instead of cuda:0")]
    assert [d.kind for d in world.opened] == ["cuda", "cpu"]


def _gpu_order() -> Any:
    from pixano_edge.engine.models.opening import GPU_ORDER

    return GPU_ORDER
