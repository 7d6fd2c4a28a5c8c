"""Blocks: every layer once, under the name that the checkpoint gives it."""

from __future__ import annotations

import onnx

from pixano_edge.calibration.blocks import blocks
from tests.calibration.core.graphs import HIDDEN, TOKENS, WIDTH, Builder, convolutions, transformer


def test_a_transformer() -> None:
    found = {b.name: b for b in blocks(transformer())}
    parts = ["attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert sorted(found) == sorted(f"layers.{i}.{part}" for i in range(2) for part in parts)
    assert {b.parent for b in found.values()} == {"layers.0", "layers.1"}
    assert {n for n, b in found.items() if b.first} == {f"layers.0.attn.{p}" for p in "qkv"}
    assert {n for n, b in found.items() if b.last} == {"layers.1.mlp.fc2"}
    fc1 = found["layers.0.mlp.fc1"]
    assert (fc1.kind, fc1.macs, fc1.weight_bytes) == ("mlp", TOKENS * WIDTH * HIDDEN, 4 * WIDTH * HIDDEN)
    assert found["layers.0.attn.q"].kind == "attention"


def test_convolutions_and_a_head() -> None:
    stem, body, head = blocks(convolutions())
    assert [b.name for b in (stem, body, head)] == ["stem.conv", "body.conv", "head"]
    assert stem.macs == 16 * 16 * 32 * 3 * 25
    assert body.macs == 8 * 8 * 64 * 32 * 9
    assert (stem.first, body.first, body.last, head.last) == (True, False, False, True)
    assert (body.kind, head.kind) == ("conv", "linear")


def _reused() -> onnx.ModelProto:
    made = Builder()
    weight = made.weight("shared.weight", 64, 64)
    first = made.node("MatMul", ["x", weight], "first")
    second = made.node("MatMul", [first, weight], "second")
    small = made.node("MatMul", [second, made.weight("tiny.weight", 64, 4)], "third")
    return made.model([1, "T", 64], small)


def test_one_weight_used_twice_is_one_block_and_small_ones_are_none() -> None:
    (found,) = blocks(_reused())
    assert found.name == "shared"
    assert found.nodes == ("node_first", "node_second")
    assert found.macs == 2 * 64 * 64  # open sizes count once
    (found,) = blocks(_reused(), {"x": (1, 10, 64)})
    assert found.macs == 2 * 10 * 64 * 64
