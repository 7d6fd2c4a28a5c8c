"""The table of the optimised graph, and the command that prints it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from pixano_edge.calibration import qdq
from pixano_edge.calibration.fusion import main
from pixano_edge.calibration.observe import observe
from tests.calibration.core.graphs import convolutions, pictures


def test_the_command_tells_what_runs_in_int8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = convolutions()
    observations = observe(model, pictures((1, 3, 16, 16)), qdq.tensors(model), threads=1)
    quantised, _ = qdq.quantize(model, observations)
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    onnx.save(quantised, good)
    assert main([str(good)]) == 0
    table = capsys.readouterr().out
    assert "2  QLinearConv" in table
    assert "3 products in int8, 0 with int8 weights left in float" in table
    # Without the pair behind it a convolution stays in float.
    pair = next(n for n in quantised.graph.node if n.output[0] == "body.conv.out")
    before = next(n for n in quantised.graph.node if n.output[0] == pair.input[0])
    reader = next(n for n in quantised.graph.node if "body.conv.out" in n.input)
    reader.input[0] = before.input[0]
    onnx.save(quantised, bad)
    assert main([str(bad)]) == 1
    assert "1 with int8 weights left in float\nnode_body.conv.out" in capsys.readouterr().out


def test_a_file_that_is_no_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.onnx"
    file.write_text("no graph")
    assert main([str(file)]) == 2
    assert "not a readable ONNX file" in capsys.readouterr().err
