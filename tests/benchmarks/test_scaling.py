"""Fits by hand, the cost model's arithmetic, and small real runs of `bench scaling` and `bench graphs`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pixano_edge.benchmarks import cost_model, fitting, openvino_contender, scaling, svg, torch_options
from pixano_edge.benchmarks.graphs import sizes_of, worst
from pixano_edge.benchmarks.readings import read_graphs, read_scaling
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.engine.errors import EdgeError


def _invoke(*args: object):
    return CliRunner().invoke(app, ["bench", *(str(a) for a in args)])


def test_fits_by_hand() -> None:
    line = fitting.fit({1: 0.5, 2: 0.7, 4: 1.1})
    assert line is not None
    assert (line.a, line.b, line.r2, line.worst) == pytest.approx((0.3, 0.2, 1, 0), abs=1e-9)
    square = fitting.fit({2: 0.4 + 4, 4: 0.4 + 16, 8: 0.4 + 64}, "x^2")
    assert square is not None
    assert (square.a, square.b) == pytest.approx((0.4, 1))
    threads = fitting.fit({1: 1.1, 2: 0.6, 4: 0.35}, "1/x")
    assert threads is not None
    assert (threads.a, threads.b, threads.at(10)) == pytest.approx((0.1, 1, 0.2))
    bad = fitting.fit({1: 1.0, 2: 3.0, 3: 1.0, 4: 3.0})
    assert bad is not None
    assert bad.r2 < 0.5
    assert bad.worst > 0.3
    assert fitting.fit({1: 0.5, 2: 0.7}) is None
    curve = fitting.make_curve("case", "axis", "unit", {1: [0.5], 2: [0.7, 0.7, 9.0], 4: [1.1]})
    assert curve["points"][1]["seconds"]["p50"] == 0.7
    assert curve["fit"]["text"] == "300 ms + 200 ms * unit; R2 1.000, off by 0 % at most"
    assert fitting.curve_rows([curve])[0][2] == "1: 500.0, 2: 700.0, 4: 1100.0"


def test_plots_put_points_where_they_belong() -> None:
    text = svg.curve("t", [(0, 0), (8, 90)], [(0, 0), (8, 90)], "x", "y")
    assert 'cx="64.0" cy="196.0"' in text  # the origin
    assert ">10<" in text  # the axes end at round numbers above the data
    assert ">100<" in text
    rows = [svg.BarRow("a", 1.0, None, "1", True), svg.BarRow("b <", 2.0, 4.0, "2", False)]
    drawn = svg.bars("t", rows)
    assert 'width="90.0"' in drawn
    assert 'width="180.0"' in drawn
    assert "b &lt;" in drawn
    assert drawn.count("whisker") == 1


def test_times_follow_from_flops_and_bytes() -> None:
    machine = cost_model.Machine("m", 1e12, 4e12, 1e9, "made up")
    busy = cost_model.Work("busy", 8e12, 1e9)
    assert busy.floor(machine, "fp16") == 2
    assert busy.floor(machine, "fp32") == 8
    assert busy.bound(machine, "fp16") == "computing"
    reading = cost_model.Work("reading", 1e9, 3e9)
    assert reading.floor(machine, "fp16") == 6
    assert reading.floor(machine, "fp32") == 12
    assert reading.bound(machine, "fp32") == "memory"
    # Two layers of width 3 and inner width 5 over 7 tokens, by hand.
    work = cost_model.transformer_work("t", 2, 3, 5, 7)
    weights = 2 * (4 * 9 + 2 * 15)
    assert work.numbers == weights + 2 * 7 * 3
    assert work.flops == 2 * 7 * weights + 2 * (2 * 2 * 7 * 7 * 3)
    shared = cost_model.transformer_work("t", 1, 4, 5, 1, kv_width=2, gated=True)
    assert shared.numbers == 2 * 16 + 2 * 4 * 2 + 3 * 20 + 8
    assert [cost_model.number(v) for v in (606.4, 55.4, 9.06, 1.34, 0.0064)] == ["606", "55", "9.1", "1.3", "0.0064"]
    table = cost_model.time_table([busy], "fp16")
    assert "| busy | 188 (376 to 753), computing |" in table  # 8 TFLOP at 42.5 TFLOP/s


@pytest.mark.slow
def test_flops_of_sam2_are_those_of_its_products() -> None:
    """Counted by PyTorch, against the memory attention's products by hand. Building on the meta device takes long."""
    pytest.importorskip("torch", reason="counting needs pixano-edge[export]")
    work = {w.name: w for w in cost_model.sam2_work("tiny", 256)}
    tokens, keys = 16 * 16, 7 * 16 * 16 + 64
    attention = work[f"SAM 2.1, memory attention, {keys} keys"]
    products = 4 * (4 * tokens * keys * 256 + 4 * tokens * tokens * 256)
    assert products < attention.flops < 2.5 * products
    assert work["SAM 2.1 tiny, encoder"].numbers > 26e6  # its weights


def test_the_documented_tables_are_those_of_the_command() -> None:
    """What needs no torch of docs/cost-model.md is made again."""
    from tests.conftest import ROOT

    text = (ROOT / "docs" / "cost-model.md").read_text(encoding="utf-8")
    for work in (cost_model.owlv2_work(), cost_model.decode_work("256M"), cost_model.decode_work("500M")):
        for table in (
            cost_model.work_table([work]), cost_model.time_table([work], "fp16"), cost_model.time_table([work], "fp32")
        ):  # fmt: skip
            assert table.splitlines()[-1] in text
    for machine in cost_model.MACHINES:
        assert f"| {machine.name} | {machine.how} |" in text


def test_a_short_run_of_every_cheap_axis(demo_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="the photo needs pixano-edge[benchmarks]")
    file, page = tmp_path / "scaling.json", tmp_path / "scaling.html"
    axes = [word for axis in ("picture", "prompts", "objects", "frames", "threads") for word in ("--axis", axis)]
    args = ("--bundle", demo_bundle, "--quick", "--threads", 1, *axes, "-o", file, "--page", page)
    result = _invoke("scaling", *args)
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    curves = {(c["case"], c["axis"]): c for c in content["curves"]}
    assert {axis for _, axis in curves} == {"picture", "prompts", "objects", "frames", "threads"}
    objects = curves["a tracked frame", "objects"]
    assert [p["x"] for p in objects["points"]] == [1, 2, 3]
    assert all(p["seconds"]["p50"] > 0 for c in content["curves"] for p in c["points"])
    frames = curves["a whole clip, one object", "frames"]["points"]
    assert frames[0]["seconds"]["p50"] < frames[-1]["seconds"]["p50"]  # a longer clip includes the shorter one
    threads = curves["encoding a picture", "threads"]
    assert threads["fit"] is None  # one point
    assert "R2" in result.stdout
    assert page.read_text().count("<svg") == len(content["curves"])
    assert len(read_scaling(content).figures) == sum(len(c["points"]) for c in content["curves"])


def test_unknown_axes_and_missing_libraries(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = _invoke("scaling", "--bundle", demo_bundle, "--axis", "weather")
    assert result.exit_code == 1
    assert "weather" in result.stderr
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "torch" else real(n, *a))
    monkeypatch.setattr(scaling, "measure", lambda *a, **k: ([], {}))
    result = _invoke("scaling", "--bundle", demo_bundle, "--quick", "--json")
    assert result.exit_code == 0, result.output
    assert "pip install 'pixano-edge[export]'" in json.loads(result.stdout)["left_out"]["input"]
    result = _invoke("scaling", "--bundle", demo_bundle, "--axis", "input")
    assert result.exit_code == 1
    assert "export" in result.stderr


def test_graphs_run_alike_and_openvino_is_told(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="the photo needs pixano-edge[benchmarks]")
    file = tmp_path / "graphs.json"
    result = _invoke("graphs", "--bundle", "owlv2-demo", "--rounds", 1, "--threads", 1, "-o", file)
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    read = read_graphs(content)
    assert {row["graph"].split(" ")[0] for row in content["rows"]} == {"image_encoder", "text_encoder"}
    assert all(check.passed for check in read.checks)
    assert len(read.checks) == 2
    if openvino_contender.is_here():
        assert {f.contender for f in read.figures} >= {"OpenVINO fp32"}
    else:
        assert "openvino-runtime" in read.left_out["OpenVINO fp32"]
        assert "openvino-runtime" in result.stderr


def test_sizes_and_errors_of_graphs() -> None:
    spec = GraphSpec("g", (TensorSpec("a", "float32", ("P", 2, "N")),), (TensorSpec("b", "float32", ("P",)),))
    assert sizes_of(spec, {"a": np.zeros((3, 2, 5), np.float32)}) == {"P": 3, "N": 5}
    one, two = np.float32([1, 2]), np.int64([1, 2])
    assert worst({"x": one, "y": two}, {"x": one, "y": two}) == 0
    assert worst({"x": one, "y": two + 1}, {"x": one, "y": two}) == float("inf")
    assert worst({"x": one + 0.2, "y": two}, {"x": one, "y": two}) == pytest.approx(0.1)


def test_pytorch_gets_its_best_number_of_threads() -> None:
    now, current = 0.0, 0
    seconds = {4: 3.0, 2: 1.0, 1: 2.0}

    def set_threads(number: int) -> None:
        nonlocal current
        current = number

    def call() -> None:
        nonlocal now
        now += seconds[current]

    assert torch_options.use_best_threads(call, 4, set_threads=set_threads, clock=lambda: now) == 2
    assert current == 2
    assert torch_options.use_best_threads(call, 1, set_threads=set_threads, clock=lambda: now) == 1
    assert torch_options.candidates(6) == [6, 3, 1]
    seconds = {4: 1.0, 2: 0.97, 1: 2.0}  # a difference that may be chance
    assert torch_options.use_best_threads(call, 4, set_threads=set_threads, clock=lambda: now) == 4

    class Model:
        part = None

    with pytest.raises(EdgeError, match="vision"):
        torch_options.compile_modules(Model(), ["vision"])


def test_openvino_is_left_out_for_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_contender, "is_here", lambda: True)
    assert openvino_contender.left_out(("AVX512-BF16",)) == {}
    assert "OpenVINO bf16" in openvino_contender.left_out(("AVX2",))
    monkeypatch.setattr(openvino_contender, "is_here", lambda: False)
    assert set(openvino_contender.left_out(("AVX2",))) == {"OpenVINO fp32", "OpenVINO bf16"}
