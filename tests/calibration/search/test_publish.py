"""Files of a bundle when variants come and go: none is left behind, none changes under another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pixano_edge.calibration.publish import publish
from pixano_edge.calibration.work import NewGraph
from pixano_edge.engine.bundle import Bundle, BundleWriter, demo_path
from pixano_edge.engine.bundle.manifest import CalibrationEntry, GraphMemory
from pixano_edge.engine.errors import CalibrationError

GRAPH = "text_encoder"
BIG = "made_up_weight"


def entry(variant: str) -> CalibrationEntry:
    return CalibrationEntry.model_validate(
        {
            "variant": variant, "graphs": ["image_encoder", GRAPH], "metric": "ap", "budget": 0.9, "held_out": 0.95,
            "worst": 0.9, "held_out_samples": 4, "data": "scenes", "data_digest": "0" * 64, "calibration_samples": 8,
            "method": "made up", "created": "2026-01-01T00:00:00Z", "tools": {"onnx": "1"}, "report": None,
        }
    )  # fmt: skip


def graph(path: Path, value: float) -> NewGraph:
    """The demo's text encoder with a weight of its own, which a file beside can hold for it."""
    model = onnx.load(str(Bundle.open(demo_path("owlv2-demo")).graph_path(GRAPH, "fp32")))
    model.graph.initializer.append(numpy_helper.from_array(np.full(4096, value, np.float32), BIG))
    onnx.save(model, str(path))
    return NewGraph(path)


def weight(bundle: Bundle, variant: str) -> float:
    model = onnx.load(str(bundle.graph_path(GRAPH, variant)))
    return float(numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == BIG))[0])


def files(bundle: Bundle, variant: str) -> list[str]:
    return [f for f in bundle.manifest.files if f.startswith(f"graphs/{GRAPH}.{variant}.") and "tensorrt" not in f]


def exported(bundle: Bundle, folder: Path) -> Bundle:
    """The same bundle without a word on calibrations."""
    with BundleWriter(folder) as writer:
        for file in bundle.manifest.files:
            writer.add_file(file, bundle.file(file))
        writer.finish(bundle.manifest.model_dump(exclude={"schema_version", "files", "calibrations"}))
    return Bundle.open(folder)


def test_a_replaced_variant_leaves_no_file_behind(tmp_path: Path) -> None:
    demo = Bundle.open(demo_path("owlv2-demo"))
    first = publish(demo, tmp_path / "a", "int8", "int8", {GRAPH: graph(tmp_path / "1.onnx", 1.0)}, entry("int8"), {})
    bundle = exported(first, tmp_path / "b")
    new = {GRAPH: graph(tmp_path / "2.onnx", 2.0)}
    with pytest.raises(CalibrationError, match="was exported"):
        publish(bundle, tmp_path / "c", "int8", "int8", new, entry("int8"), {})
    made = publish(bundle, tmp_path / "c", "int8", "int8", new, entry("int8"), {}, replace=True)
    assert weight(made, "int8") == 2
    assert files(made, "int8") == [f"graphs/{GRAPH}.int8.onnx"]
    for name in ("fp32", "int8-tensorrt"):
        with pytest.raises(CalibrationError, match="cannot be named"):
            publish(bundle, tmp_path / "d", name, "int8", new, entry(name), {}, replace=True)


def test_a_file_that_another_variant_takes_weights_from_stays_as_it_is(tmp_path: Path) -> None:
    """A second calibration of one variant must not pull the weights from under another."""
    demo = exported(Bundle.open(demo_path("owlv2-demo")), tmp_path / "start")
    one = {GRAPH: graph(tmp_path / "1.onnx", 1.0)}
    bundle = publish(demo, tmp_path / "a", "fp16", "fp16", one, entry("fp16"), {}, replace=True)
    bundle = publish(bundle, tmp_path / "b", "int8", "int8", one, entry("int8"), {})
    assert bundle.graph_path(GRAPH, "int8").stat().st_size < 200_000  # its weights lie in the other's file
    two = {GRAPH: graph(tmp_path / "2.onnx", 2.0)}
    bundle = publish(bundle, tmp_path / "c", "fp16", "fp16", two, entry("fp16"), {})
    assert (weight(bundle, "fp16"), weight(bundle, "int8")) == (2, 1)


def test_every_graph_of_a_variant_has_figures_of_memory(tmp_path: Path) -> None:
    demo = Bundle.open(demo_path("owlv2-demo"))
    told = GraphMemory(
        graph=GRAPH, variant="int8", session_bytes=5, activation_bytes=7, sizes={"N": 1}, measured_with="made up"
    )
    new = {GRAPH: graph(tmp_path / "1.onnx", 1.0)}
    made = publish(demo, tmp_path / "out", "int8", "int8", new, entry("int8"), {}, memory=[told])
    found = {m.graph: m for m in made.manifest.memory if m.variant == "int8"}
    full = {m.graph: m for m in made.manifest.memory if m.variant == "fp32"}
    assert found[GRAPH] == told
    assert found["image_encoder"].session_bytes == full["image_encoder"].session_bytes
    again = publish(made, tmp_path / "again", "int8", "int8", new, entry("int8"), {})
    assert not [m for m in again.manifest.memory if (m.graph, m.variant) == (GRAPH, "int8")]
    assert [m.graph for m in again.manifest.memory if m.variant == "int8"] == ["image_encoder"]
