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
    made = share_weights(changed, plain)
    shared = made.model
    path = save(shared, tmp_path / "plain.tensorrt.onnx")
    assert made.saved == {"plain.onnx": 4 * np.prod(LARGE)}
    assert made.holder == "plain.onnx"
    assert path.stat().st_size < plain.stat().st_size - 4 * np.prod(LARGE) + 600
    x = np.random.default_rng(1).standard_normal((3, LARGE[0])).astype(np.float32)
    assert np.array_equal(run(path, x), run(plain, x))
    # The given model still holds its weights; onnx reads the copy's through the reference.
    assert changed.graph.initializer[0].raw_data == onnx.load(path).graph.initializer[0].raw_data
    props = {p.key: p.value for p in shared.metadata_props}
    assert props[WEIGHTS_FILE] == "plain.onnx"
    assert len(props[WEIGHTS_SHA256]) == 64


def test_small_and_different_initialisers_stay_inside(tmp_path: Path) -> None:
    plain = save(make_model(seed=0), tmp_path / "plain.onnx")
    made = share_weights(make_model(seed=1), plain)
    assert made.saved == {}
    assert made.holder is None
    assert made.model.graph == make_model(seed=1).graph
    assert not made.model.metadata_props
    shared = share_weights(make_model(seed=0, bias=0.25), plain).model
    inside = {t.name: t.data_location for t in shared.graph.initializer}
    assert inside == {"weight": TensorProto.EXTERNAL, "bias": TensorProto.DEFAULT}


def test_graph_files_of_two_models_differ(tmp_path: Path) -> None:
    """One architecture, other weights: without the hash both files would be equal, and so would their cache keys."""
    files, bare = [], []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        shared = share_weights(make_model(seed), save(make_model(seed), folder / "plain.onnx")).model
        files.append(shared.SerializeToString())
        del shared.metadata_props[:]
        bare.append(shared.SerializeToString())
    assert files[0] != files[1]
    assert bare[0] == bare[1]


def test_contents_are_found_under_another_name_and_behind_another_reference(tmp_path: Path) -> None:
    """A third graph refers to the file that holds the bytes, not to the one that refers to them itself."""
    first = save(make_model(), tmp_path / "first.onnx")
    second = save(share_weights(make_model(), first).model, tmp_path / "second.onnx")
    third = make_model()
    third.graph.initializer[0].name = third.graph.node[0].input[1] = "renamed"
    made = share_weights(third, second)
    assert set(made.saved) == {"first.onnx"}
    path = save(made.model, tmp_path / "third.onnx")
    x = np.random.default_rng(1).standard_normal((3, LARGE[0])).astype(np.float32)
    assert np.array_equal(run(path, x), run(first, x))
    # What was read from shared files can be shared again; it names its files once.
    again = share_weights(onnx.load(path), first).model
    assert [p.key for p in again.metadata_props] == [WEIGHTS_FILE, WEIGHTS_SHA256]


def test_two_holders_are_both_named(tmp_path: Path) -> None:
    """A graph file must change with either of the files that it refers to."""
    model, other = make_model(), make_model(seed=5)
    weight = numpy_helper.to_array(other.graph.initializer[0])
    model.graph.initializer.append(numpy_helper.from_array(weight.T.copy(), "second"))
    model.graph.node[1].output[0] = "z"
    model.graph.node.append(helper.make_node("MatMul", ["z", "second"], ["zw"], name="mm2"))
    model.graph.node.append(helper.make_node("MatMul", ["zw", "weight"], ["y"], name="mm3"))
    holders = [save(make_model(), tmp_path / "a.onnx")]
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight.T.copy(), "weight"))
    holders.append(save(other, tmp_path / "b.onnx"))
    made = share_weights(model, *holders)
    props = {p.key: p.value for p in made.model.metadata_props}
    assert props[WEIGHTS_FILE] == "a.onnx, b.onnx"
    holders[1].write_bytes(holders[1].read_bytes() + b"r\x00")  # an empty entry of the metadata
    changed = {p.key: p.value for p in share_weights(model, *holders).model.metadata_props}
    assert changed[WEIGHTS_SHA256] != props[WEIGHTS_SHA256]
    x = np.random.default_rng(1).standard_normal((3, LARGE[0])).astype(np.float32)
    assert np.array_equal(run(save(made.model, tmp_path / "c.onnx"), x), run(save(model, tmp_path / "d.onnx"), x))


@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"\xff" * 64, lambda d: b"\x3a\xff\xff\x7f"])
def test_what_is_no_onnx_file_is_refused(damage: object, tmp_path: Path) -> None:
    plain = save(make_model(), tmp_path / "plain.onnx")
    plain.write_bytes(damage(plain.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ExportError, match="no ONNX file"):
        share_weights(make_model(), plain)
