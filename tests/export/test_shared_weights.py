"""Two graphs on one set of weights: same numbers, no second copy, and files that tell two models apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pixano_edge.engine.errors import ExportError
from pixano_edge.export.shared_weights import WEIGHTS_FILE, WEIGHTS_SHA256, raw_data_ranges, share_weights

LARGE = (32, 64)


def make_model(seed: int = 0, bias: float = 0.5) -> onnx.ModelProto:
    """y = x @ weight + bias, with one large initialiser and one small."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(LARGE).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["xw"], name="mm"),
            helper.make_node("Add", ["xw", "bias"], ["y"], name="add"),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", LARGE[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", LARGE[1]])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.array(bias, np.float32), "bias")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def run(path: Path, x: np.ndarray) -> np.ndarray:
    import onnxruntime as ort

    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def test_ranges_hold_the_bytes(tmp_path: Path) -> None:
    model = make_model()
    data = save(model, tmp_path / "plain.onnx").read_bytes()
    ranges = raw_data_ranges(data)
    assert set(ranges) == {"weight", "bias"}
    for tensor in model.graph.initializer:
        start, end = ranges[tensor.name]
        assert data[start:end] == tensor.raw_data


def test_shared_graph_is_small_and_gives_the_same_numbers(tmp_path: Path) -> None:
    plain = save(make_model(), tmp_path / "plain.onnx")
    changed = make_model()
    changed.graph.node[1].name = "renamed"
    shared, saved = share_weights(changed, plain)
    path = save(shared, tmp_path / "plain.tensorrt.onnx")
    assert saved == 4 * np.prod(LARGE)
    assert path.stat().st_size < plain.stat().st_size - saved + 600
    x = np.random.default_rng(1).standard_normal((3, LARGE[0])).astype(np.float32)
    assert np.array_equal(run(path, x), run(plain, x))
    # The given model still holds its weights; onnx reads the copy's through the reference.
    assert changed.graph.initializer[0].raw_data == onnx.load(path).graph.initializer[0].raw_data
    props = {p.key: p.value for p in shared.metadata_props}
    assert props[WEIGHTS_FILE] == "plain.onnx"
    assert len(props[WEIGHTS_SHA256]) == 64


def test_small_and_different_initialisers_stay_inside(tmp_path: Path) -> None:
    plain = save(make_model(seed=0), tmp_path / "plain.onnx")
    shared, saved = share_weights(make_model(seed=1), plain)
    assert saved == 0
    assert shared.graph == make_model(seed=1).graph
    assert not shared.metadata_props
    shared, _ = share_weights(make_model(seed=0, bias=0.25), plain)
    inside = {t.name: t.data_location for t in shared.graph.initializer}
    assert inside == {"weight": TensorProto.EXTERNAL, "bias": TensorProto.DEFAULT}


def test_graph_files_of_two_models_differ(tmp_path: Path) -> None:
    """One architecture, other weights: without the hash both files would be equal, and so would their cache keys."""
    files, bare = [], []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        shared, _ = share_weights(make_model(seed), save(make_model(seed), folder / "plain.onnx"))
        files.append(shared.SerializeToString())
        del shared.metadata_props[:]
        bare.append(shared.SerializeToString())
    assert files[0] != files[1]
    assert bare[0] == bare[1]


@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"\xff" * 64, lambda d: b"\x3a\xff\xff\x7f"])
def test_what_is_no_onnx_file_is_refused(damage: object, tmp_path: Path) -> None:
    plain = save(make_model(), tmp_path / "plain.onnx")
    plain.write_bytes(damage(plain.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ExportError, match="no ONNX file"):
        share_weights(make_model(), plain)
