"""Passes for CPUs on small graphs: same numbers after them, and hands off where they do not hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, numpy_helper

from pixano_edge.export import cpu_passes as passes
from pixano_edge.export.tensorrt_passes import apply_passes, halve_gelu_last
from tests.export.test_tensorrt_passes import changed, make_model, node, ops, run

WIDTH, NARROW = 8, 3


def same(before: onnx.ModelProto, after: onnx.ModelProto, **sizes: int) -> bool:
    """To rounding: the order of sums is another one."""
    return all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(run(before, **sizes), run(after, **sizes)))


def split(name: str, heads: int) -> list[NodeProto]:
    """(B, L, 8) to (B, heads, L, 8 / heads)."""
    return [
        node("Reshape", [name, f"split{heads}"], [f"{name}_split"]),
        node("Transpose", [f"{name}_split"], [f"{name}_heads"], perm=[0, 2, 1, 3]),
    ]


def attention(heads: int = 1, keys: int | str = "L", second: str = "", masked: bool = False) -> onnx.ModelProto:
    """Queries x (B, S, 8) over memory (B, L, 3), or over it and more, whose values are projected by `second`."""
    rng = np.random.default_rng(0)
    constants = {n: rng.standard_normal((NARROW, WIDTH)).astype(np.float32) for n in ("wk", "wv", "wz")}
    constants |= {"wq": rng.standard_normal((WIDTH, WIDTH)).astype(np.float32), "bv": np.full(WIDTH, 0.5, np.float32)}
    constants |= {"scale": np.array(0.3, np.float32), "bias": np.array(-1.0, np.float32)}
    constants[f"split{heads}"] = np.array([0, 0, heads, WIDTH // heads], np.int64)
    constants["joined"] = np.array([0, 0, WIDTH], np.int64)
    nodes = [node("MatMul", ["x", "wq"], ["q"]), *split("q", heads), node("Mul", ["q_heads", "scale"], ["scaled"])]
    inputs: dict[str, list[int | str]] = {"x": ["B", "S", WIDTH], "memory": ["B", keys, NARROW]}
    sources = ["memory"]
    if second:
        inputs["more"] = ["B", "T", NARROW]
        sources.append("more")
    for index, source in enumerate(sources):
        matrix = "wv" if index == 0 else second
        nodes += [node("MatMul", [source, "wk"], [f"k{index}"]), *split(f"k{index}", heads)]
        nodes += [node("MatMul", [source, matrix], [f"u{index}"]), node("Add", [f"u{index}", "bv"], [f"v{index}"])]
        nodes += split(f"v{index}", heads)
    key, value = "k0_heads", "v0_heads"
    if second:
        nodes += [node("Concat", [f"{n}0_heads", f"{n}1_heads"], [n + "_all"], axis=2) for n in "kv"]
        key, value = "k_all", "v_all"
    nodes += [node("Transpose", [key], ["turned"], perm=[0, 1, 3, 2]), node("MatMul", ["scaled", "turned"], ["scores"])]
    if masked:
        nodes.append(node("Add", ["scores", "bias"], ["biased"]))
    nodes += [
        node("Softmax", ["biased" if masked else "scores"], ["weights"], axis=-1),
        node("MatMul", ["weights", value], ["seen"]),
        node("Transpose", ["seen"], ["back"], perm=[0, 2, 1, 3]),
        node("Reshape", ["back", "joined"], ["y"]),
    ]
    return make_model(nodes, inputs, {"y": ["B", "S", WIDTH]}, constants)


SIZES = {"B": 2, "S": 5, "L": 7, "T": 4}


@pytest.mark.parametrize("second", ["", "wv"])
def test_values_are_projected_after_the_attention(second: str) -> None:
    model = attention(second=second)
    after, places = changed(model, passes.values_after_attention)
    assert places == 1
    assert ops(after).count("MatMul") == ops(model).count("MatMul") - (1 if second else 0)
    assert same(model, after, **SIZES)


def test_values_of_several_heads_or_projections_stay() -> None:
    assert changed(attention(heads=2), passes.values_after_attention)[1] == 0
    assert changed(attention(second="wz"), passes.values_after_attention)[1] == 0


@pytest.mark.parametrize(("heads", "second"), [(1, ""), (2, ""), (4, "wz")])
def test_attention_becomes_one_operator(heads: int, second: str) -> None:
    model = attention(heads, second=second)
    fused, places = changed(model, passes.fuse_attention)
    assert places == 1
    assert "Softmax" not in ops(fused)
    (found,) = [n for n in fused.graph.node if n.op_type == "MultiHeadAttention"]
    assert found.domain == "com.microsoft"
    assert same(model, fused, **SIZES)


def test_both_passes_together() -> None:
    model = attention(second="wv")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    assert apply_passes(copy, passes.CPU_PASSES) == {"values_after_attention": 1, "fuse_attention": 1}
    assert same(model, copy, **SIZES)
    for tensor in copy.graph.initializer:
        if tensor.name == "bv":  # a mistake of the bias is seen
            tensor.CopyFrom(numpy_helper.from_array(np.full(WIDTH, 0.6, np.float32), "bv"))
    assert not same(model, copy, **SIZES)


def test_few_keys_and_masked_scores_are_left_alone() -> None:
    assert changed(attention(keys=passes.MIN_KEYS - 1), passes.fuse_attention)[1] == 0
    assert changed(attention(keys=passes.MIN_KEYS), passes.fuse_attention)[1] == 1
    assert changed(attention(masked=True), passes.fuse_attention)[1] == 0


def gelu(half: float = 0.5) -> onnx.ModelProto:
    constants = {"root": np.array(2**0.5, np.float32), "one": np.array(1, np.float32), "half": np.array(half, "f4")}
    nodes = [
        node("Div", ["x", "root"], ["inner"]),
        node("Erf", ["inner"], ["erf"]),
        node("Add", ["erf", "one"], ["sum"]),
        node("Mul", ["half", "sum"], ["share"]),
        node("Mul", ["x", "share"], ["act"]),
        node("Neg", ["act"], ["y"]),
    ]
    return make_model(nodes, {"x": ["B", 8]}, {"y": ["B", 8]}, constants)


def test_gelu_is_written_as_onnxruntime_knows_it(tmp_path: Path) -> None:
    import onnxruntime as ort

    model = gelu()
    after, places = changed(model, halve_gelu_last)
    assert places == 1
    assert same(model, after, B=3)
    for one, fused in ((model, False), (after, True)):
        options = ort.SessionOptions()
        options.optimized_model_filepath = f"{tmp_path}/{fused}.onnx"
        options.log_severity_level = 3
        ort.InferenceSession(one.SerializeToString(), options, providers=["CPUExecutionProvider"])
        assert ("Gelu" in ops(onnx.load(f"{tmp_path}/{fused}.onnx"))) == fused
