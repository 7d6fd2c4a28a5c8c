"""Which back end and precision a bundle opens with: order, verdicts, failures, force. The GPU is a recording stub."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine import runtime
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import (
    BundleError,
    CancelledError,
    DeviceError,
    DeviceMemoryError,
    MissingDependencyError,
)
from pixano_edge.engine.machine import cpu_model
from pixano_edge.engine.models import opening
from pixano_edge.engine.models.opening import GPU_ORDER, OPENVINO, combinations
from pixano_edge.engine.models.sam2 import verify as verify_module
from pixano_edge.engine.models.sam2.opening import IMAGE_GRAPHS
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.verdicts import VerdictStore
from pixano_edge.engine.runtime import StubDevice, StubSession
from pixano_edge.engine.runtime.base import DeviceInfo
from tests.engine.bundle.sample import fields, make_bundle


class Gpu(StubDevice):
    """A GPU by name and behaviour."""

    kind = "cuda"

    def __init__(self, name: str = "cuda:0") -> None:
        super().__init__("cuda:0" if name == "auto" else name, deferred=True, discrete=True, captures=True)

    def info(self) -> DeviceInfo:
        return DeviceInfo("NVIDIA RTX 4060", "cuda", int(self.name[5:]), "8.9", "580.1")


def zeros(spec: GraphSpec) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        sizes = {"P": len(inputs[sam2.POINT_LABELS])} if sam2.POINT_LABELS in inputs else {}
        return {s.name: np.zeros(s.shape(sizes), np.float32) for s in spec.outputs}

    return run


class World:
    """What is installed and what works, and everything that was tried.

    Attributes:
        failed: Combinations whose golden samples fail.
        broken: Combinations that raise this when a session opens.
        engines: Precisions with an engine.
        checked: Combinations whose golden samples ran.
        opened: Devices that were opened.
    """

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failed: set[str] = set()
        self.broken: dict[str, Exception] = {}
        self.engines: set[str] = set()
        self.checked: list[str] = []
        self.opened: list[Any] = []
        self.sessions: list[StubSession] = []
        self.options: list[Any] = []
        self.folder = tmp_path / "engines"
        self.folder.mkdir()
        self.home = tmp_path / "verdicts"
        self.bundle = Bundle.open(make_bundle(tmp_path / "sample"))
        monkeypatch.setattr(runtime, "open_device", self.open_device)
        monkeypatch.setattr(runtime, "open_session", self.open_session)
        monkeypatch.setattr(verify_module, "verify_bundle", self.verify_bundle)
        locate = importlib.import_module("pixano_edge.engine.build.locate")
        monkeypatch.setattr(locate, "find_engine", self.find_engine)

    def open_device(self, name: str = "auto") -> Any:
        device = runtime.CpuDevice() if name == "cpu" else Gpu(name)
        self.opened.append(device)
        return device

    def open_session(
        self, path: Path, spec: GraphSpec, device: Any, *, backend: str, threads: Any, options: Any, weight_bytes: Any
    ) -> Any:
        combination = f"{backend} {next(p for p in ('fp32', 'fp16') if p in Path(path).name)}"
        if combination in self.broken:
            raise self.broken[combination]
        self.options.append(options)
        session = StubSession(spec, device, zeros(spec))
        session.backend = backend
        self.sessions.append(session)
        return session

    def verify_bundle(self, bundle: Bundle, device: str, backend: str, precision: str, **options: Any) -> Any:
        combination = f"{backend} {precision}"
        self.checked.append(combination)
        options["progress"](1, 1)
        if combination in self.broken:
            raise self.broken[combination]
        problems = ["masks: mean IoU 0.5 < 0.99"] if combination in self.failed else []
        return SimpleNamespace(samples=1, mean_iou=0.995, min_iou=0.99, seconds=0.1, problems=problems)

    def find_engine(self, bundle: Bundle, graph: str, precision: str, info: DeviceInfo) -> Path:
        if precision not in self.engines:
            raise DeviceError(f"No engine of '{graph}' in {precision}.", "pixano-edge build")
        path = self.folder / f"{graph}.{precision}.engine"
        if not path.exists():
            path.write_bytes(b"engine")
        return path

    def open(self, **kwargs: Any) -> Sam2ImagePredictor:
        kwargs = {"device": "cuda:0", "verdicts": VerdictStore(self.home), **kwargs}
        return Sam2ImagePredictor.open(kwargs.pop("bundle", self.bundle), **kwargs)

    def chosen(self, **kwargs: Any) -> str:
        with self.open(**kwargs) as predictor:
            info = json.loads(json.dumps(predictor.info()))
        return f"{info['backend']} {info['precision']}"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_auto_takes_the_fastest_that_passes_and_says_why(world: World) -> None:
    with world.open() as predictor:
        info = predictor.info()
    assert (info["backend"], info["precision"]) == ("onnxruntime", "fp16")
    assert "fastest" in info["precision_reason"]
    assert "mean mask IoU 0.9950" in info["precision_reason"]
    assert info["warnings"] == [], "an engine that nobody built is no fault"
    assert [line.split(":")[0] for line in info["left_out"]] == ["tensorrt fp16"]
    assert info["warm_up"]["seconds"] > 0
    world.engines = {"fp16"}
    assert world.chosen() == "tensorrt fp16"
    assert world.checked == ["onnxruntime fp16", "tensorrt fp16"]


def test_the_check_runs_once_per_device(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        assert world.chosen() == "onnxruntime fp16"
    assert world.checked == ["onnxruntime fp16"]
    world.chosen(device="cuda:1")
    assert len(world.checked) == 1, "the same product in another slot"
    monkeypatch.setattr(Gpu, "info", lambda self: DeviceInfo("NVIDIA RTX 4060", "cuda", 0, "8.9", "581.0"))
    world.chosen()
    assert len(world.checked) == 2, "another driver"
    monkeypatch.setattr(opening, "backend_version", lambda backend: "99.0")
    world.chosen()
    assert len(world.checked) == 3, "another release"
    world.chosen(precision="fp32")
    assert world.checked[-1] == "onnxruntime fp32"


def test_an_engine_built_again_is_checked_again(world: World) -> None:
    world.engines = {"fp16"}
    world.chosen()
    world.chosen()
    assert world.checked == ["tensorrt fp16"]
    (world.folder / "mask_decoder.fp16.engine").write_bytes(b"another one")
    world.chosen()
    assert len(world.checked) == 2


def test_a_failed_verdict_disables_the_combination(world: World) -> None:
    world.failed = {"onnxruntime fp16"}
    for _ in range(2):
        with world.open() as predictor:
            info = predictor.info()
        assert info["precision"] == "fp32"
        (warning,) = info["warnings"]
        assert "onnxruntime fp16 is not used" in warning
        assert "0.5 < 0.99" in warning
    assert world.checked == ["onnxruntime fp16", "onnxruntime fp32"]
    with pytest.raises(DeviceError, match="onnxruntime fp16 failed") as caught:
        world.open(backend="onnxruntime", precision="fp16")
    assert "--force" in caught.value.action
    assert all(device.ops[-1] == "close" for device in world.opened), "nothing stays open"


def test_force(world: World) -> None:
    world.failed = {"onnxruntime fp16"}
    with world.open(backend="onnxruntime", precision="fp16", force=True) as predictor:
        info = predictor.info()
    assert info["precision"] == "fp16"
    assert [w for w in info["warnings"] if "forced" in w and "0.5 < 0.99" in w]
    for asked in ({}, {"backend": "onnxruntime"}, {"precision": "fp16"}, {"device": "auto"}):
        with pytest.raises(DeviceError, match="force"):
            world.open(force=True, **asked)


def test_auto_passes_over_what_does_not_load(world: World) -> None:
    world.engines = {"fp16", "fp32"}
    world.broken = {"tensorrt fp16": DeviceError("deserialising failed.", "Build again.")}
    with world.open() as predictor:
        info = predictor.info()
    assert (info["backend"], info["precision"]) == ("onnxruntime", "fp16")
    assert [w for w in info["warnings"] if "deserialising failed" in w]
    assert not [p for p in world.home.iterdir() if "tensorrt" in p.read_text()], "not loading is no verdict"
    with pytest.raises(DeviceError, match="deserialising"):
        world.open(backend="tensorrt", precision="fp16")


def test_the_second_graph_fails_to_open(world: World) -> None:
    """Everything that was opened for a combination is closed before the next one is tried."""
    plain = world.open_session
    calls: list[str] = []

    def second_fails(path: Path, spec: GraphSpec, device: Any, **kwargs: Any) -> Any:
        calls.append(spec.name)
        if len(calls) == 2:
            raise DeviceError("no such kernel.", "")
        return plain(path, spec, device, **kwargs)

    runtime.open_session = second_fails  # type: ignore[assignment]  # put back by the fixture's monkeypatch
    assert world.chosen() == "onnxruntime fp32"
    assert world.sessions[0]._closed


def test_nothing_works(world: World) -> None:
    world.broken = {f"{b} {p}": DeviceError(f"{p} is broken.", "Look.") for b, p in GPU_ORDER}
    with pytest.raises(DeviceError) as caught:
        world.open()
    assert "fp16 is broken" in caught.value.message
    assert "fp32 is broken" in caught.value.message
    with pytest.raises(DeviceError, match=r"^fp32 is broken\."):
        world.open(backend="onnxruntime", precision="fp32")
    with pytest.raises(DeviceError, match="No engine"):
        world.open(backend="tensorrt", precision="fp32")
    assert all(device.ops[-1] == "close" for device in world.opened)


def test_auto_device_falls_back_to_the_cpu_aloud(world: World) -> None:
    world.broken = {f"{b} {p}": MissingDependencyError("onnxruntime", "cuda", "It") for b, p in GPU_ORDER}
    plain = world.open_session

    def on_cpu(path: Path, spec: GraphSpec, device: Any, **kwargs: Any) -> Any:
        if device.kind == "cpu":
            world.broken = {}
            return StubSession(spec, StubDevice("cpu"), zeros(spec))
        return plain(path, spec, device, **kwargs)

    runtime.open_session = on_cpu  # type: ignore[assignment]  # put back by the fixture's monkeypatch
    with world.open(device="auto", warm_up=False) as predictor:
        info = predictor.info()
    assert info["precision"] == "fp32"
    assert [w for w in info["warnings"] if w.startswith("The CPU runs instead of cuda:0")]
    assert [d.kind for d in world.opened] == ["cuda", "cpu"]


def test_too_little_memory_is_not_hidden(world: World) -> None:
    """Whoever keeps the books must hear of it: another model may have to go."""
    world.broken = {"onnxruntime fp16": DeviceMemoryError("12 MiB asked, 3 free.", "")}
    for device in ("cuda:0", "auto"):
        with pytest.raises(DeviceMemoryError):
            world.open(device=device)


def test_a_damaged_verdict_is_taken_again_and_told(world: World) -> None:
    world.chosen()
    (file,) = world.home.iterdir()
    file.write_text("{")
    with world.open() as predictor:
        assert [w for w in predictor.info()["warnings"] if "damaged" in w]
    assert len(world.checked) == 2
    with world.open() as predictor:
        assert predictor.info()["warnings"] == []


def test_a_bundle_without_golden_samples_runs_with_a_warning(world: World, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bare", golden=[])
    with world.open(bundle=bundle) as predictor:
        assert [w for w in predictor.info()["warnings"] if "no golden samples" in w]
    assert world.checked == []


def test_the_check_itself_asks_for_no_verdict(world: World) -> None:
    world.failed = {"onnxruntime fp16"}
    world.chosen()
    with world.open(prove=False) as predictor:
        assert predictor.info()["precision"] == "fp16"
    assert world.checked == ["onnxruntime fp16", "onnxruntime fp32"]


def test_opening_can_be_stopped(world: World) -> None:
    """At any of its steps, the check's own included; everything is closed then."""
    total = [0]

    def count() -> None:
        total[0] += 1

    world.open(check=count).close()
    assert total[0] >= 4
    for stop in range(1, total[0]):
        for file in world.home.iterdir():
            file.unlink()
        left = [stop]

        def check(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise CancelledError("stopped", "")

        with pytest.raises(CancelledError):
            world.open(check=check)
        assert world.opened[-1].ops[-1] == "close"


def test_capture_reaches_the_back_end(world: World) -> None:
    world.engines = {"fp16"}
    world.open(capture=False).close()
    assert world.options[-1] == {"graphs": False}
    world.open().close()
    assert world.options[-1] is None


def test_combinations(world: World) -> None:
    bundle = world.bundle
    assert combinations(bundle, "cpu") == [("onnxruntime", "fp32")]
    assert combinations(bundle, "cpu", precision="fp16") == [("onnxruntime", "fp16")]
    found = combinations(bundle, "cuda")
    assert found == [c for c in GPU_ORDER if c[1] in ("fp16", "fp32")]
    assert combinations(bundle, "cuda", "onnxruntime") == [("onnxruntime", "fp16"), ("onnxruntime", "fp32")]
    assert combinations(bundle, "cuda", precision="fp32") == [("tensorrt", "fp32"), ("onnxruntime", "fp32")]
    assert combinations(bundle, "cuda", "tensorrt", "fp32") == [("tensorrt", "fp32")]
    with pytest.raises(DeviceError, match="CUDA"):
        combinations(bundle, "cpu", "tensorrt")
    with pytest.raises(BundleError, match="int8"):
        world.open(precision="int8")


def test_variants_for_tensorrt_alone(world: World, tmp_path: Path) -> None:
    """A precision that only TensorRT can run is no precision for ONNX Runtime."""
    graphs = fields()["graphs"]
    for graph in graphs.values():
        graph["variants"]["fp16"]["target"] = "tensorrt"
    bundle = Bundle.open(make_bundle(tmp_path / "rt", graphs=graphs))
    assert combinations(bundle, "cuda") == [("tensorrt", "fp16"), ("tensorrt", "fp32"), ("onnxruntime", "fp32")]
    with pytest.raises(BundleError, match="fp16"):
        world.open(bundle=bundle, backend="onnxruntime", precision="fp16")


def test_on_a_cpu_the_export_is_the_proof(world: World, tmp_path: Path) -> None:
    plain = world.open_session
    runtime.open_session = lambda path, spec, device, **k: plain(  # type: ignore[assignment,misc]
        path, spec, StubDevice("cpu"), **k
    )
    with world.open(device="cpu", warm_up=False) as predictor:
        info = predictor.info()
    assert "checked at export" in info["precision_reason"]
    assert world.checked == []
    assert not world.home.exists()
    # A failed `pixano-edge verify` counts here too.
    store = VerdictStore(world.home)
    found = opening.locate(world.bundle, "onnxruntime", "fp32", runtime.CpuDevice().info(), IMAGE_GRAPHS)
    key = opening.combination_key(world.bundle, found, runtime.CpuDevice().info())
    world.failed = {"onnxruntime fp32"}
    report = world.verify_bundle(world.bundle, "cpu", "onnxruntime", "fp32", progress=lambda *a: None)
    store.put(opening.Verdict.of(key, report))
    with pytest.raises(DeviceError, match="failed"):
        world.open(device="cpu", warm_up=False)


def test_openvino_computes_fp32_graphs_in_bf16_and_is_checked_on_this_cpu(world: World) -> None:
    """What export proved was another runtime."""
    plain = world.open_session
    runtime.open_session = lambda path, spec, device, **k: plain(  # type: ignore[assignment,misc]
        path, spec, StubDevice("cpu"), **k
    )
    assert combinations(world.bundle, "cpu", OPENVINO) == [(OPENVINO, "fp32")]
    assert combinations(world.bundle, "cpu", OPENVINO, "bf16") == [(OPENVINO, "bf16")]
    assert combinations(world.bundle, "cpu", precision="bf16") == []
    with world.open(device="cpu", backend=OPENVINO, precision="bf16", warm_up=False) as predictor:
        info = predictor.info()
    assert (info["backend"], info["precision"]) == (OPENVINO, "bf16")
    assert "passed" in info["precision_reason"]
    assert world.checked == [f"{OPENVINO} bf16"]
    assert world.options == [{"precision": "bf16"}] * 2
    found = opening.locate(world.bundle, OPENVINO, "bf16", runtime.CpuDevice().info(), IMAGE_GRAPHS)
    assert all("fp32" in path.name for path in found.files.values())
    assert found.engine == cpu_model()  # bf16 is computed otherwise elsewhere
    assert opening.locate(world.bundle, "onnxruntime", "fp32", runtime.CpuDevice().info(), IMAGE_GRAPHS).engine == ""
    world.failed = {f"{OPENVINO} fp32"}
    with pytest.raises(DeviceError, match="failed"):
        world.open(device="cpu", backend=OPENVINO, warm_up=False)
    with pytest.raises(BundleError, match="no precision 'bf16'"):
        world.open(device="cpu", precision="bf16", warm_up=False)
