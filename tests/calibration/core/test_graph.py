"""Reading and cutting graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from pixano_edge.calibration.graph import Graph, cut, digest, infer_shapes, load_graph
from pixano_edge.calibration.histograms import Histogram
from pixano_edge.calibration.observe import plan_groups
from pixano_edge.engine.errors import CalibrationError
from pixano_edge.export.half_weights import narrow
from tests.calibration.core.graphs import TOKENS, WIDTH, pictures, run, transformer

SHAPE = (1, TOKENS, WIDTH)


def test_weights_that_are_stored_in_half_are_read_as_float32(tmp_path: Path) -> None:
    model = transformer(depth=1)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    stored = onnx.ModelProto()
    stored.CopyFrom(model)
    assert narrow(stored) > 0
    onnx.save(stored, tmp_path / "half.onnx")
    loaded = load_graph(tmp_path / "half.onnx")
    assert {t.data_type for t in loaded.graph.initializer} == {TensorProto.FLOAT}
    assert digest(loaded) == digest(model)


def test_what_is_no_fp32_graph_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "graph.onnx"
    file.write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match="not a readable ONNX file"):
        load_graph(file)
    model = transformer(depth=1)
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name))
    onnx.save(model, file)
    with pytest.raises(CalibrationError, match="half precision"):
        load_graph(file)


def test_a_cut_graph_has_what_it_needs_and_no_more() -> None:
    model = transformer()
    feed = pictures(SHAPE, 1)[0]
    part = cut(model, ["layers.0.end"])
    assert {n.output[0].split(".")[1] for n in part.graph.node} == {"0"}
    assert len(part.graph.initializer) * 2 == len(model.graph.initializer)
    rest = cut(model, [model.graph.output[0].name])
    assert np.array_equal(run(rest, feed)[0], run(model, feed)[0])
    assert run(part, feed)[0].shape == SHAPE


def test_a_constant_with_two_readers_is_copied_for_one_of_them() -> None:
    model = transformer(depth=1)
    graph = Graph(model)
    add = next(n for n in model.graph.node if n.output[0] == "layers.0.attn.q.out")
    other = next(n for n in model.graph.node if n.output[0] == "layers.0.attn.k.out")
    graph.move_input(other, 1, add.input[1])
    name = graph.set_value(add.input[1], np.zeros(WIDTH, np.float32), owner=add, index=1)
    assert (add.input[1], other.input[1]) == (name, "layers.0.attn.q.bias")
    held = graph.value("layers.0.attn.q.bias")
    assert held is not None
    assert held.any()
    assert graph.set_value(name, np.ones(WIDTH, np.float32), owner=add, index=1) == name


def test_groups_stay_within_their_bytes() -> None:
    model = transformer()
    feed = pictures(SHAPE, 1)[0]
    shapes = infer_shapes(model, {"x": SHAPE})
    names = [o for n in model.graph.node for o in n.output]
    sizes = {name: 4 * int(np.prod(shapes[name])) for name in names}
    limit = 3 * max(sizes.values())
    groups = plan_groups(model, names[::-1], feed, limit)
    assert [name for group in groups for name in group] == names  # in graph order, so that early ones are cut short
    assert all(sum(sizes[name] for name in group) <= limit for group in groups)
    assert len(groups) > 3
    assert plan_groups(model, names, feed, 1) == [[name] for name in names]


def test_a_histogram_reaches_further_without_counting() -> None:
    histogram = Histogram()
    histogram.update(np.array([1, -2], np.float32))
    histogram.reach(1.5)
    assert histogram.largest == 2
    histogram.reach(100)
    assert (histogram.largest, histogram.count, histogram.counts.sum()) == (100, 2, 2)


def test_no_torch_is_needed() -> None:
    """A box can calibrate itself: it has onnx and ONNX Runtime, not torch."""
    names = [
        "blocks",
        "calibrators",
        "folds",
        "fusion",
        "graph",
        "histograms",
        "islands",
        "observe",
        "outliers",
        "patterns",
        "qdq",
        "smooth",
    ]
    lines = ["import sys", "sys.modules['torch'] = sys.modules['transformers'] = None"]
    lines += [f"import pixano_edge.calibration.{name}" for name in names]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=120)
