"""The TensorRT variants of a bundle: what they hold, that they are checked, and that TensorRT takes them."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pixano_edge.engine.bundle import Bundle, BundleWriter
from pixano_edge.engine.bundle.manifest import GraphVariant
from pixano_edge.engine.bundle.tensorrt_report import TENSORRT_REPORT, TensorrtReport, read_tensorrt_report
from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.engine.errors import ExportError
from pixano_edge.export import tensorrt_graph, tensorrt_rtx
from pixano_edge.export.differences import Arrays
from pixano_edge.export.graph_edit import GraphEditor
from pixano_edge.export.onnx_graph import check_contract
from pixano_edge.export.sam2.feeds import random_feeds

CONSTANTS = contract.Sam2Constants(image_size=128, hidden_dim=32)
SPECS = contract.graphs(CONSTANTS)
GRAPHS = sorted(SPECS)
VARIANTS = ("fp32-tensorrt", "fp16-tensorrt")
Files = Callable[[str], dict[str, Path]]


@pytest.fixture(scope="module")
def report(tiny_bundle: Path) -> TensorrtReport:
    found = read_tensorrt_report(Bundle.open(tiny_bundle))
    assert found is not None
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_variant_keeps_the_contract_and_shares_its_weights(graph: str, variant: str, files: Files) -> None:
    path = files(variant)[graph]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    check_contract(model, SPECS[graph])
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    plain = files(variant.removesuffix(tensorrt_graph.SUFFIX))[graph]
    if variant.startswith("fp32"):  # the plain graphs went through the passes at export
        assert path == plain
        return
    assert path.parent == plain.parent
    # A tiny graph has hardly any weights to save on; it is the nodes that are left.
    assert path.stat().st_size < min(60_000, plain.stat().st_size)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_every_attention_is_the_pattern_that_tensorrt_fuses(graph: str, variant: str, files: Files) -> None:
    """MatMul, Softmax, MatMul with nothing between, one transpose per operand, the scale on the query alone."""
    edit = GraphEditor(onnx.load(files(variant)[graph]))
    readers = collections.Counter(name for n in edit.graph.node for name in n.input)
    softmaxes = list(edit.nodes("Softmax"))
    assert len(softmaxes) == {"image_encoder": 5, "mask_decoder": 7}[graph]
    for softmax in softmaxes:
        product = edit.made_by(softmax.input[0], "MatMul")
        assert product is not None
        assert edit.made_by(product.input[0], "Mul") is not None
        assert edit.made_by(product.input[1], "Transpose") is not None
        assert readers[softmax.output[0]] == 1
        assert any(n.op_type == "MatMul" and softmax.output[0] in n.input for n in edit.graph.node)
        if variant.startswith("fp16"):
            assert edit.types[softmax.output[0]] == TensorProto.FLOAT16


@pytest.mark.parametrize("variant", ["fp32", "fp16", *VARIANTS])
def test_nothing_is_computed_from_sizes(variant: str, files: Files) -> None:
    """ONNX Runtime would do it on the CPU, and could not record the launches of a graph that it also does on a GPU."""
    for graph in GRAPHS:
        nodes = onnx.load(files(variant)[graph]).graph.node
        operators = collections.Counter(n.op_type for n in nodes)
        assert not operators.keys() & {"Shape", "Size", "Expand", "ConstantOfShape", "Range"}
        if graph == "mask_decoder":
            # Only sines beside cosines and the four mask tokens: parts of equal size. For others ONNX Runtime's CUDA
            # kernel reads the sizes from host memory, and its launch cannot be recorded either.
            assert operators["Concat"] == 2
            assert operators["Split"] == operators["Slice"] == 0


def test_report_says_what_was_done(report: TensorrtReport) -> None:
    assert {(v.graph, v.variant) for v in report.variants} == {(g, v) for g in GRAPHS for v in VARIANTS}
    for entry in report.variants:
        assert entry.passes == []  # nothing is left to do after the passes that every graph went through
        if entry.precision == "fp32":
            assert entry.same_as == "fp32"
            continue
        assert entry.same_as is None
        assert entry.weights == f"graphs/{entry.graph}.{entry.precision}.onnx"
        assert {d.tensor for d in entry.differences} == {t.name for t in SPECS[entry.graph].outputs}
        assert all(0 <= d.max_rel <= 0.05 for d in entry.differences)
        assert entry.findings == []
    decoder = report.find("mask_decoder", "fp16")
    assert decoder is not None
    assert len({s["P"] for s in decoder.sizes}) > 2
    assert len({s["N"] for s in decoder.sizes}) > 2


def test_parity_with_pytorch_is_in_the_manifest(tiny_bundle: Path) -> None:
    parity = Bundle.open(tiny_bundle).manifest.parity
    assert parity is not None
    figures = {(t.graph, t.tensor, t.variant): t.max_rel for t in parity.tensors}
    for graph, spec in SPECS.items():
        for tensor in spec.outputs:
            assert figures[graph, tensor.name, "fp32"] < 1e-4  # the file that TensorRT takes too
            assert 1e-5 < figures[graph, tensor.name, "fp16-tensorrt"] < 0.05
    assert {m.variant: m.min_iou > 0.98 for m in parity.masks if "tensorrt" in m.variant} == {"fp16-tensorrt": True}


def test_fp32_layers_are_named_with_their_reason(report: TensorrtReport, files: Files) -> None:
    for entry in report.variants:
        model = onnx.load(files(entry.variant)[entry.graph])
        nodes = {n.name: n for n in model.graph.node}
        if entry.precision == "fp32":
            assert entry.fp32_layers == []
            continue
        assert {layer.node for layer in entry.fp32_layers} <= set(nodes)
        ops = collections.Counter((layer.op, layer.reason) for layer in entry.fp32_layers)
        norms = sum(n.op_type == "LayerNormalization" for n in nodes.values())
        assert ops["LayerNormalization", "normalisation"] == norms > 0
        assert {reason for _, reason in ops} <= {"normalisation", "angles", "converter"} <= set(report.reasons)
        assert {op for op, reason in ops if reason == "converter"} <= {"CumSum", "Min"}  # counting places of tokens
        if entry.graph == "mask_decoder":
            assert ops["Sin", "angles"] == ops["Cos", "angles"] == 1


def test_normalisation_reads_fp32_weights(files: Files) -> None:
    edit = GraphEditor(onnx.load(files("fp16-tensorrt")["image_encoder"]))
    for norm in edit.nodes("LayerNormalization"):
        assert [edit.types[name] for name in (*norm.input, *norm.output)] == [TensorProto.FLOAT] * 4


# A graph of two layers, for what the real ones do not show.

SPEC = GraphSpec("small", (TensorSpec("x", "float32", ("B", 4)),), (TensorSpec("y", "float32", ("B", 4)),),
                 {"B": (1, 2, 8)})  # fmt: skip


def small_model(idle: bool = False) -> onnx.ModelProto:
    """y = relu(x @ w), with a Pad by nothing if `idle`."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"], name="mm")]
    if idle:
        nodes.append(helper.make_node("Pad", ["a", "pads"], ["b"], name="pad"))
    nodes.append(helper.make_node("Relu", ["b" if idle else "a"], ["y"], name="relu"))
    weights = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 4])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.zeros(4, np.int64), "pads")],
    )
    if not idle:
        del graph.initializer[1:]
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def feeds(spec: GraphSpec, sizes: Mapping[str, int], seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {t.name: rng.standard_normal(t.shape(sizes)).astype(np.float32) for t in spec.inputs}


def add_variants(folder: Path, model: onnx.ModelProto) -> tuple[dict[str, GraphVariant], TensorrtReport, int]:
    """Manifest entries, report and number of files of a bundle with this one graph."""
    with BundleWriter(folder / "bundle") as writer:
        plain = {}
        for precision in ("fp32", "fp16"):
            file = f"graphs/{precision}/small.onnx"
            held = model if precision == "fp32" else tensorrt_graph.to_fp16(model)
            writer.add_file(file, held.SerializeToString())
            plain[precision] = GraphVariant(file=file, precision=precision, opset=18, nodes=2, parameters=16)
        variants = tensorrt_graph.TensorrtVariants(writer, feeds, threads=1)
        entries = variants.add(SPEC, plain)
        variants.finish()
        written = TensorrtReport.model_validate_json((writer.root / TENSORRT_REPORT).read_bytes())
        assert variants.findings() == []
        assert variants.changed("fp32-tensorrt") == any(v.same_as is None for v in written.variants)
        return entries, written, sum(1 for p in writer.root.rglob("*") if p.is_file())


def test_graph_that_needs_nothing_is_not_stored_twice(tmp_path: Path) -> None:
    entries, written, count = add_variants(tmp_path, small_model())
    assert {k: (v.file, v.target) for k, v in entries.items()} == {
        f"{p}-tensorrt": (f"graphs/{p}/small.onnx", "tensorrt") for p in ("fp32", "fp16")
    }
    assert [(v.same_as, v.passes, v.weights) for v in written.variants] == [("fp32", [], None), ("fp16", [], None)]
    assert count == 3


def test_graph_with_a_no_op_is_changed(tmp_path: Path) -> None:
    entries, written, count = add_variants(tmp_path, small_model(idle=True))
    assert entries["fp32-tensorrt"].file == "graphs/fp32/small.tensorrt.onnx"
    assert entries["fp32-tensorrt"].nodes == 2
    assert [p.name for p in written.variants[0].passes] == ["drop_no_ops"]
    assert count == 5


# Negative controls: a pass that is wrong must not get past the check.


def half_a_percent(edit: GraphEditor) -> int:
    """Moves one weight a little."""
    (tensor,) = (t for t in edit.graph.initializer if t.name == "w")
    value = numpy_helper.to_array(tensor).copy()
    value[0, 0] *= 1.005
    tensor.CopyFrom(numpy_helper.from_array(value, "w"))
    return 1


def forget_the_relu(edit: GraphEditor) -> int:
    """Leaves a node out."""
    relu = next(edit.nodes("Relu"))
    relu.op_type = "Identity"
    return 1


def divide_by_zero(edit: GraphEditor) -> int:
    """Gives NaN and infinity, which a plain maximum would not see."""
    zero = edit.add_constant(np.array(0.0, np.float32), "zero")
    relu = next(edit.nodes("Relu"))
    relu.input[0] = edit.add_node("Div", [relu.input[0], zero], "div")
    return 1


def fix_the_batch(edit: GraphEditor) -> int:
    """Right for one size of B, and for no other."""
    shape = edit.add_constant(np.array([2, -1], np.int64), "shape")
    relu = next(edit.nodes("Relu"))
    relu.input[0] = edit.add_node("Reshape", [relu.input[0], shape], "fixed")
    return 1


def read_what_is_not_there(edit: GraphEditor) -> int:
    """No ONNX graph any more."""
    next(edit.nodes("Relu")).input[0] = "nothing"
    return 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (half_a_percent, "differs from the fp32 graph: y: "),
        (forget_the_relu, "differs from the fp32 graph: y: "),
        (divide_by_zero, "differs from the fp32 graph"),
        (fix_the_batch, "differs from the fp32 graph|does not run|broke graph"),
        (read_what_is_not_there, "broke graph|cycle"),
    ],
)
def test_wrong_pass_is_caught(
    wrong: Callable[[GraphEditor], int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_graph, "PASSES", (*tensorrt_graph.PASSES, wrong))
    with pytest.raises(ExportError, match=message):
        add_variants(tmp_path, small_model(idle=True))
    assert list(tmp_path.iterdir()) == []


def test_wrong_pass_on_a_real_graph_is_caught(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale of one attention in seven off by 1 %: the masks move by far more than the tolerance."""
    from pixano_edge.export.differences import measure, problems

    model = onnx.load(files("fp32-tensorrt")["mask_decoder"])
    scales = [t for t in model.graph.initializer if t.name.startswith("trt_scale")]
    assert scales
    scales[0].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scales[0]) * np.float32(1.01), scales[0].name))
    onnx.save(model, tmp_path / "wrong.onnx")
    reference, spec = files("fp32")["mask_decoder"], SPECS["mask_decoder"]
    right = measure(reference, files("fp32-tensorrt")["mask_decoder"], spec, random_feeds, threads=1)
    assert not problems(right, tensorrt_graph.FP32_TOLERANCE)
    wrong = measure(reference, tmp_path / "wrong.onnx", spec, random_feeds, threads=1)
    assert len(list(problems(wrong, tensorrt_graph.FP32_TOLERANCE))) == 3
    assert wrong["masks"].relative > 10 * tensorrt_graph.FP32_TOLERANCE


needs_wheels = pytest.mark.skipif(
    tensorrt_rtx.missing_module() is not None,
    reason=f"{tensorrt_rtx.missing_module()} is not installed: pip install 'pixano-edge[tensorrt-rtx]'",
)


@needs_wheels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_tensorrt_builds_every_variant(graph: str, variant: str, files: Files) -> None:
    """Weights come out of the plain file beside it; nothing but these two files is needed."""
    build = tensorrt_rtx.check_build(files(variant)[graph], SPECS[graph], ("SM86", "SM89"))
    assert build.engine_bytes > 10_000


@needs_wheels
def test_border_without_a_cast_is_refused(files: Files, tmp_path: Path) -> None:
    """The casts around fp32 layers are needed: without one of them a strongly typed network does not build."""
    model = onnx.load(files("fp16-tensorrt")["image_encoder"])
    norm = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
    cast = next(n for n in model.graph.node if n.op_type == "Cast" and norm.output[0] in n.input)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == cast.output[0]:
                node.input[index] = norm.output[0]
    model.graph.node.remove(cast)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="does not take 'image_encoder'"):
        tensorrt_rtx.check_build(tmp_path / "model.onnx", SPECS["image_encoder"], ("SM89",))
