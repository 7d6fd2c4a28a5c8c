"""`bench gpu`: who races, on which clocks, what is said about those who cannot, and that a box without a GPU is told.

Run with a recording device; `pytest -m gpu` runs it on a real one (tests/gpu).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pixano_edge.benchmarks import cli_sam2, gpu, gpu_contenders, power
from pixano_edge.benchmarks.contenders import CLICK_CASE, ENCODER_CASE, MASK_CASE
from pixano_edge.benchmarks.gpu_contenders import CASES, DECODER_CASE, ORT_TENSORRT, GpuContender, Way
from pixano_edge.benchmarks.segment import make_inputs
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.errors import DeviceError
from pixano_edge.engine.models.opening import Combination
from pixano_edge.engine.provider.hardware import Hardware
from pixano_edge.engine.runtime import DeviceInfo, StubDevice, StubSession
from tests.engine.models.sam2 import fake
from tests.engine.models.sam2.fake import CONSTANTS, SPECS, encode

GPU = DeviceInfo("Stub GPU", "cuda", 0, "8.9", "600.1", "CUDA 13.0", 10**10, 9 * 10**9, power=50.0)
PREPROCESS = SimpleNamespace(image_size=CONSTANTS.image_size)
BUNDLE: Any = SimpleNamespace(
    manifest=SimpleNamespace(name="stubs", constants=CONSTANTS.to_dict(), preprocess=PREPROCESS)
)
"""All that is read of a bundle whose graphs are stubs."""
EAGER = Way("onnxruntime", "fp32", False)
GRAPH = Way("onnxruntime", "fp32", True)
ORT_TRT = Way(ORT_TENSORRT, "fp16", False)


def decode(inputs: dict[str, Any]) -> dict[str, Any]:
    """The fake decoder, whose mask input shows in the first multimask output."""
    answer = dict(fake.decode(inputs))
    answer[sam2.MASKS] = np.ascontiguousarray(np.roll(answer[sam2.MASKS], 1, axis=1))
    return answer


class Clocked(StubDevice):
    """A deferred stream that counts one millisecond per launch."""

    tensorrt = False
    """Whether ONNX Runtime's TensorRT provider finds its libraries."""

    def __init__(self) -> None:
        super().__init__("cuda:0", deferred=True, discrete=True, captures=True)
        self.free = 9 * 10**9
        self.launches_at: dict[int, int] = {}

    def info(self) -> DeviceInfo:
        self.free -= 10**6
        return DeviceInfo("Stub GPU", "cuda", memory_free=self.free)

    def record(self, timed: bool = False) -> Any:
        event = super().record(timed)
        self.launches_at[event] = sum(op in ("launch", "replay") for op in self.ops)
        return event

    def elapsed(self, start: Any, end: Any) -> float:
        assert not self.pending, "the marks are read before the stream got there"
        return float(self.launches_at[end] - self.launches_at[start])


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[Clocked]:
    """Every device that a contender opens; sessions are stubs that can be recorded."""
    opened: list[Clocked] = []
    work: dict[str, Callable[..., Any]] = {sam2.IMAGE_ENCODER: encode, sam2.MASK_DECODER: decode}

    def device(name: str) -> Clocked:
        assert name == "cuda:0"
        opened.append(Clocked())
        return opened[-1]

    def session(path: Path, spec: Any, on: Clocked, *, backend: str, options: Any) -> StubSession:
        if backend == ORT_TENSORRT and not opened[-1].tensorrt:
            raise DeviceError("No TensorRT library (libnvinfer) is found.", "Install TensorRT.")
        stub = StubSession(SPECS[spec.name], on, work[spec.name], capturable=True)
        monkeypatch.setattr(stub, "info", lambda: {"warnings": ["odd"], "options": options})
        return stub

    def locate(bundle: Bundle, backend: str, precision: str, info: DeviceInfo, graphs: Collection[str]) -> Combination:
        if backend == "tensorrt":
            raise DeviceError("No engine was built.", "Build it: pixano-edge build x")
        return Combination(backend, precision, {name: Path(name) for name in SPECS})

    monkeypatch.setattr(gpu_contenders, "open_device", device)
    monkeypatch.setattr(gpu_contenders, "open_session", session)
    monkeypatch.setattr(gpu_contenders, "locate", locate)
    return opened


def contender(way: Way, bundle: Any = None) -> GpuContender:
    return GpuContender(bundle, CONSTANTS, make_inputs(CONSTANTS), way, "cuda:0")


def test_eager_launches_and_graph_replays(devices: list[Clocked]) -> None:
    for way, op in ((EAGER, "launch"), (GRAPH, "replay")):
        one = contender(way)
        device = devices[-1]
        device.calls.clear()
        one.encode()
        one.decode()
        assert device.ops.count(op) == 2
        assert device.ops.count("synchronize") == 2
        assert "empty" not in device.ops, "a steady call allocates nothing"
        assert one.start.recorded == way.capture
        assert one.start.memory == 10**6  # one reading between
        assert [len(one.milliseconds[c]) for c in CASES] == [1, 1, 0, 0]
        assert one.milliseconds[ENCODER_CASE] == [1.0]
        one.close()
        assert "close" in device.ops


def test_pixels_are_uploaded_within_the_marks_and_filled_once(devices: list[Clocked]) -> None:
    one = contender(EAGER)
    calls = devices[-1].calls
    calls.clear()
    one.encode()
    names = [c[0] for c in calls]
    marks = [i for i, name in enumerate(names) if name == "record"]
    upload, launch = names.index("copy"), names.index("launch")
    assert marks[0] < upload < launch < marks[-1]


def test_answers_are_those_of_the_graphs(devices: list[Clocked]) -> None:
    eager, graph = contender(EAGER), contender(GRAPH)
    for case in CASES:
        a, b = eager.outputs(case), graph.outputs(case)
        assert a.keys() == b.keys()
        for name in a:
            assert np.array_equal(a[name], b[name])
    clicks = eager.outputs(CLICK_CASE)
    assert clicks["masks"].shape == (1, 3, 540, 960)
    assert set(np.unique(clicks["masks"])) == {-1.0, 1.0}
    with_mask, without = graph.outputs(MASK_CASE), graph.outputs(DECODER_CASE)
    assert with_mask["masks"].shape[1] == 3
    assert not np.array_equal(with_mask["masks"], without["masks"])


def test_whole_click_is_the_predictor_on_cached_features(devices: list[Clocked]) -> None:
    for way, op in ((EAGER, "launch"), (GRAPH, "replay")):
        one = contender(way)
        one.enter(CLICK_CASE)
        calls = devices[-1].calls
        calls.clear()
        answer = one.click()
        assert answer.masks.shape == (1, 3, 540, 960)
        names = [c[0] for c in calls]
        assert names.count(op) == 1, "the decoder alone"
        assert names.count("synchronize") == 1
        assert "empty" not in names
        assert "host_empty" not in names
        assert not one.milliseconds[CLICK_CASE]
        one.close()
        assert devices[-1].ops[-1] == "close"


def test_cases_come_back_to_their_own_buffers_after_clicks(devices: list[Clocked]) -> None:
    """The predictor binds the same bindings; what is timed after it must be what was timed before it."""
    for way, op in ((EAGER, "launch"), (GRAPH, "replay")):
        one = contender(way)
        before = {case: one.outputs(case) for case in CASES}
        for case in (*CASES[::-1], *CASES):
            one.enter(case)
            assert not one.milliseconds.get(case)
            devices[-1].calls.clear()
            one.calls()[case]()
            assert devices[-1].ops.count(op) == 1, case
            got = one.outputs(case)
            for name, value in before[case].items():
                assert np.array_equal(got[name], value), (str(way), case, name)


def test_clicks_that_are_not_recorded_are_refused(devices: list[Clocked], monkeypatch: pytest.MonkeyPatch) -> None:
    one = contender(GRAPH)
    monkeypatch.setattr(Clocked, "capture", lambda self, work, **_: (_ for _ in ()).throw(DeviceError("no room.", "")))
    with pytest.raises(DeviceError, match=r"did not work in the predictor\. .*no room"):
        one.enter(CLICK_CASE)
    assert any("no room" in text for text in one.warnings())


def test_onnxruntimes_tensorrt_provider(devices: list[Clocked], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="libnvinfer"):
        contender(ORT_TRT)
    assert "close" in devices[-1].ops
    monkeypatch.setattr(Clocked, "tensorrt", True)
    one = contender(ORT_TRT)
    assert str(one.way) == "ONNX Runtime TensorRT fp16, eager"
    options = one._encoder.info()["options"]
    assert options == {"provider_options": {"trt_fp16_enable": "1"}}
    assert Way(ORT_TENSORRT, "fp32", False).options() is None
    assert not [w for w in gpu.ways(("fp32", "fp16")) if w.backend == ORT_TENSORRT and w.capture]
    assert len(gpu.ways(("fp32", "fp16"))) == 10


def test_a_graph_that_is_none_is_refused(devices: list[Clocked], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clocked, "capture", lambda self, work, **_: (_ for _ in ()).throw(DeviceError("no.", "")))
    with pytest.raises(DeviceError, match="recording did not work"):
        contender(GRAPH)
    assert "close" in devices[-1].ops
    contender(EAGER).close()


def test_sessions_that_cannot_be_recorded_are_refused(devices: list[Clocked], monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_contenders.open_session

    def fixed(*args: Any, **kwargs: Any) -> Any:
        session = real(*args, **kwargs)
        session.capturable = False
        return session

    monkeypatch.setattr(gpu_contenders, "open_session", fixed)
    with pytest.raises(DeviceError, match=r"cannot be recorded\. odd"):
        contender(GRAPH)


@pytest.fixture
def fixed_encoder(devices: list[Clocked], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the encoder can be recorded, as where ONNX Runtime computes the decoder's sizes on the CPU."""
    real = gpu_contenders.open_session

    def session(*args: Any, **kwargs: Any) -> Any:
        made = real(*args, **kwargs)
        made.capturable = made.spec.name == sam2.IMAGE_ENCODER
        return made

    monkeypatch.setattr(gpu_contenders, "open_session", session)


@pytest.mark.usefixtures("fixed_encoder")
def test_one_graph_that_can_be_recorded_is_timed_and_the_other_left_out(on_stub: list[Clocked]) -> None:
    figures = gpu.measure_gpu(BUNDLE, precisions=("fp32",), rounds=2, power_seconds=0)
    ran = {(r.contender, r.case) for r in figures.rows}
    assert ran == {(str(EAGER), case) for case in CASES} | {(str(GRAPH), ENCODER_CASE)}
    assert figures.starts[str(GRAPH)].recorded
    for case in (DECODER_CASE, MASK_CASE, CLICK_CASE):
        assert "launches of 'mask_decoder' cannot be recorded. odd" in figures.skipped[f"{GRAPH}, {case}"]


@pytest.fixture
def on_stub(devices: list[Clocked], monkeypatch: pytest.MonkeyPatch) -> list[Clocked]:
    """A machine that has one GPU, for the whole benchmark; the CPU's answers come from the same stubs."""
    monkeypatch.setattr(gpu, "read_hardware", lambda: Hardware(2, None, None, (GPU,), None))
    monkeypatch.setattr(power, "read_hardware", lambda: Hardware(2, None, None, (GPU,), None))

    def reference(bundle: Any, constants: Any, inputs: Any) -> Any:
        one = GpuContender(bundle, CONSTANTS, inputs, EAGER, "cuda:0")
        return {case: one.outputs(case) for case in CASES}

    monkeypatch.setattr(gpu, "_reference", reference)
    monkeypatch.setattr(gpu, "SETTLE_SECONDS", 0.0)
    return devices


def fake_power(call: Callable[[], object], read: Callable[[], float | None], seconds: float) -> power.Power:
    call()
    return power.Power(read() or 0.0, seconds, 1)


def test_figures(on_stub: list[Clocked], monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr(gpu, "measure_power", fake_power)
    figures = gpu.measure_gpu(BUNDLE, precisions=("fp32",), rounds=3, power_seconds=0.5, step=steps.append)
    names = ["ONNX Runtime CUDA fp32, eager", "ONNX Runtime CUDA fp32, graph"]
    assert list(figures.starts) == names
    assert {r.case for r in figures.rows} == set(CASES)
    for row in figures.rows:
        assert row.wall.count == 3
        if row.case == CLICK_CASE:
            assert row.device is None
            assert row.relative_error is None
        else:
            assert row.device is not None
            assert row.device.count == 3
            assert row.device.p50 == pytest.approx(0.001)
            assert row.relative_error == 0.0
        assert row.mask_iou == (None if row.case == ENCODER_CASE else 1.0)
        assert row.ratio is None
    assert "No engine was built. Build it: pixano-edge build x" in figures.skipped["TensorRT fp32, graph"]
    assert "libnvinfer" in figures.skipped["ONNX Runtime TensorRT fp32, eager"]
    assert any("PyTorch CUDA" in name for name in figures.skipped)
    for name in names:
        assert figures.powers[name] == power.Power(50.0, 0.5, 1)
    assert figures.warnings[names[0]] == ["image_encoder: odd", "mask_decoder: odd"]
    assert {len(row) for row in gpu.table_rows(figures)} == {len(gpu.COLUMNS)}
    assert {len(row) for row in gpu.start_rows(figures)} == {len(gpu.START_COLUMNS)}
    json.dumps(figures.to_dict())
    assert all("close" in d.ops for d in on_stub[1:])
    assert ENCODER_CASE in steps


def test_a_wrong_contender_shows_in_its_accuracy(on_stub: list[Clocked], monkeypatch: pytest.MonkeyPatch) -> None:
    real = GpuContender.outputs

    def shifted(self: GpuContender, case: str) -> Any:
        got = real(self, case)
        return {n: -a for n, a in got.items()} if self.way == GRAPH else got

    monkeypatch.setattr(GpuContender, "outputs", shifted)
    figures = gpu.measure_gpu(BUNDLE, precisions=("fp32",), rounds=1, power_seconds=0)
    errors = {(r.case, r.contender): r.relative_error for r in figures.rows}
    assert errors[ENCODER_CASE, str(EAGER)] == 0.0
    assert (errors[ENCODER_CASE, str(GRAPH)] or 0) > 1
    assert set(figures.powers.values()) == {None}


def test_a_case_that_fails_is_listed_and_stops_nobody(on_stub: list[Clocked], monkeypatch: pytest.MonkeyPatch) -> None:
    real = GpuContender.click

    def click(self: GpuContender) -> Any:
        if self.way == GRAPH:
            raise DeviceError("no room.", "Free some.")
        return real(self)

    monkeypatch.setattr(GpuContender, "click", click)
    figures = gpu.measure_gpu(BUNDLE, precisions=("fp32",), rounds=1, power_seconds=0)
    assert figures.skipped[f"{GRAPH}, {CLICK_CASE}"] == "no room. Free some."
    ran = {(r.contender, r.case) for r in figures.rows}
    assert ran == {(str(w), c) for w in (EAGER, GRAPH) for c in CASES} - {(str(GRAPH), CLICK_CASE)}


def test_nothing_that_runs_is_an_error_with_every_reason(
    on_stub: list[Clocked], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise DeviceError("nothing here.", "")

    monkeypatch.setattr(gpu, "_reference", lambda *_: {})
    monkeypatch.setattr(gpu_contenders, "locate", none)
    with pytest.raises(DeviceError, match=r"ONNX Runtime CUDA fp16, eager: nothing here.*TensorRT fp16, graph"):
        gpu.measure_gpu(BUNDLE, precisions=("fp16",))


def test_a_box_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "read_hardware", lambda: Hardware(2, None, None, (), "No NVIDIA driver answers."))
    result = CliRunner().invoke(app, ["bench", "gpu", "no-such-bundle", "--json"])
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["message"] == "There is no GPU to measure here: No NVIDIA driver answers."
    assert "pixano-edge doctor" in error["action"]
    with pytest.raises(DeviceError, match="'cpu' is not a GPU"):
        gpu.require_gpu("cpu")
    monkeypatch.setattr(gpu, "read_hardware", lambda: Hardware(2, None, None, (GPU,), None))
    assert gpu.require_gpu("cuda") == GPU
    with pytest.raises(DeviceError, match="no 'cuda:1' here"):
        gpu.require_gpu("cuda:1")


def test_command_prints_both_tables_and_what_was_left_out(
    tmp_path: Path, on_stub: list[Clocked], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(cli_sam2, "open_bundle", lambda name: BUNDLE)
    args = ["bench", "gpu", "stubs", "-p", "fp32", "--rounds", "1", "--power-seconds", "0", "-o", str(file)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert "GPU p50 ms" in result.stdout
    assert "First run, memory, power" in result.stdout
    assert "not measured: TensorRT fp32, eager: No engine was built." in result.stdout
    content = json.loads(file.read_text())
    assert content["device"]["name"] == "Stub GPU"
    assert content["rows"]


def test_power_takes_the_second_half_and_says_nothing_without_a_sensor() -> None:
    readings = [0]

    def read() -> float:
        readings[0] += 1
        return 10.0 if readings[0] < 5 else 100.0  # the load comes up late

    def call() -> None:  # as long as it takes for many readings, however slow this machine is
        target = readings[0] + 60
        while readings[0] < target:
            time.sleep(0.001)

    begin = time.perf_counter()
    measured = power.measure_power(call, read, seconds=0.001, interval=0.001)
    assert measured is not None
    assert measured.calls == 1
    assert measured.watts == 100.0
    assert 0 < measured.joules <= 100.0 * (time.perf_counter() - begin)
    assert power.measure_power(lambda: None, lambda: None, seconds=10) is None
    assert power.measure_power(lambda: None, lambda: 1.0, seconds=0.01, interval=1) is None
