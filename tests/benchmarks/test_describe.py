"""`bench describe` without models: turns, rows, memory, bytes of a step."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pixano_edge.benchmarks import describe
from pixano_edge.benchmarks.bandwidth import last_level_cache, measure_read
from pixano_edge.benchmarks.describe import Accuracy, Bound, Figures, bound_lines, step_bytes, take_turns
from pixano_edge.benchmarks.describe_contenders import Answered
from pixano_edge.benchmarks.segment import REFERENCE
from pixano_edge.benchmarks.vlm_checkpoints import random_smolvlm
from pixano_edge.engine.errors import DeviceError, EdgeError
from pixano_edge.engine.runtime.ort_providers import OPENVINO
from pixano_edge.export.half_weights import narrow


def test_memory_is_read() -> None:
    found = measure_read(2, 8 << 20, passes=1)
    assert found.read_bytes == 8 << 20
    assert found.threads == 2
    assert 1e7 < found.bytes_per_second < 1e13
    assert found.kernel in ("memchr", "numpy max", "numpy sum")


def test_last_level_cache(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "32M")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")
    assert last_level_cache(tmp_path) == 32 << 20
    assert last_level_cache(tmp_path / "nowhere") == 0


def test_turns_rotate_and_warm_ups_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "SETTLE_SECONDS", 0)
    order: list[str] = []

    def call(name: str) -> Answered:
        order.append(name)
        return Answered(1.0, 2.0, 11)

    found = take_turns({name: lambda n=name: call(n) for name in "ab"}, rounds=2)
    assert {name: len(answers) for name, answers in found.items()} == {"a": 2, "b": 2}
    assert order == ["b", "a", "a", "b", "b", "a"]


def test_rows_are_medians_and_ratios() -> None:
    times = ((1.0, 2.0, 1.5), (3.0, 4.0, 3.0), (2.0, 2.0, 1.6))
    mine = [Answered(first, rest, 11, 300, graph=graph) for first, rest, graph in times]
    theirs = [Answered(4.0, 10.0, 11, 300)]
    row = describe._row("case", "me", mine, theirs, 10.0)
    assert (row.first, row.rate, row.ratio, row.of_bound, row.graph_share) == (2.0, 5.0, 5.0, 0.5, 0.75)
    row = describe._row("case", REFERENCE, theirs, None, None)
    assert (row.ratio, row.of_bound, row.graph_share) == (None, None, None)
    bandwidth = measure_read(1, 1 << 20, passes=1)
    figures = Figures(
        [row], [Accuracy("me", 64, 64, 1e-6)], [Bound("fp32", 540_000_000, 50_000_000, 18.5, 17.0)], bandwidth
    )
    assert describe.table_rows(figures)[0][:3] == ("case", REFERENCE, "300")
    assert "540 MB of weights per token, 18.5 tokens/s" in bound_lines(figures)[1]
    assert describe.accuracy_rows(figures) == [("me", "64", "64", "1.0e-06")]


def test_bytes_of_a_step_count_widened_weights_in_full(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])
    weights = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    model = helper.make_model(
        helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [value], [value], [weights])
    )
    assert narrow(model)
    onnx.save(model, tmp_path / "g.onnx")
    assert step_bytes(tmp_path / "g.onnx") == 64 * 64 * 4


def test_bytes_of_a_step_leave_out_rotary_tables(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.zeros((4, 8), np.float32), "w")
    packed = numpy_helper.from_array(np.zeros((4, 2, 16), np.uint8), "q")
    tables = [numpy_helper.from_array(np.zeros((1000, 4), np.float32), name) for name in ("cos", "sin")]
    node = helper.make_node(
        "GroupQueryAttention", ["x", "", "", "k", "v", "s", "t", "cos", "sin"], ["y"], domain="com.microsoft"
    )
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([node], "g", [value], [value], [weights, packed, *tables])
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    assert step_bytes(tmp_path / "g.onnx") == 4 * 8 * 4 + 4 * 2 * 16


def test_unknown_size() -> None:
    with pytest.raises(EdgeError, match="no random SmolVLM '9B'"):
        random_smolvlm("9B")


def test_openvino_takes_part_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Engine:
        def __init__(self, *given: Any) -> None:
            *_, self.precision, backend = given
            if (backend, self.precision) == (OPENVINO, "bf16"):
                raise DeviceError("this CPU has no bf16", "")
            if self.precision == "int3":
                raise DeviceError("no such variant", "")

        def close(self) -> None:
            closed.append(self.precision)

    monkeypatch.setattr(describe, "EngineAnswers", Engine)
    left_out: dict[str, str] = {}
    bundle: Any = None
    with ExitStack() as opened:
        found = describe.open_engines(bundle, np.zeros((1, 1, 3), np.uint8), 2, 1, ["fp32", "int4"], opened, left_out)
        assert list(found) == ["pixano-edge fp32", "pixano-edge int4", "pixano-edge fp32, OpenVINO"]
        assert left_out == {"pixano-edge bf16, OpenVINO": "this CPU has no bf16"}
        with pytest.raises(DeviceError, match="no such variant"):  # what was asked for is not left out
            describe.open_engines(bundle, np.zeros((1, 1, 3), np.uint8), 2, 1, ["int3"], opened, {})
    assert sorted(closed) == ["fp32", "fp32", "int4"]
