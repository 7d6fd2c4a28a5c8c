"""Changes to a graph that ONNX Runtime gains from on a CPU; each keeps the numbers and says what it saves.

They run on the plain fp32 graph, whose weights the result refers to, and the result is for ONNX Runtime's own CPU
provider alone: `MultiHeadAttention` is an operator of its domain (``com.microsoft``).
"""

from __future__ import annotations

import numpy as np
from onnx import helper

from pixano_edge.export.graph_edit import GraphEditor, Shape, attribute
from pixano_edge.export.tensorrt_passes import Pass, halve_gelu_last, only_reader

DOMAIN = "com.microsoft"
MIN_KEYS = 1024
"""Fewest keys of an attention that is fused: below, the scores fit into a cache, and the operator's own copies cost
more than it saves."""


def values_after_attention(edit: GraphEditor) -> int:
    """Projects what an attention of one head returns instead of all its values: ``A (x W + b) = (A x) W + b``.

    A row of weights sums to 1, so the bias stays as it is. Only where the values have fewer channels before their
    projection: SAM 2's memories have 64 and become 256, so the product over all keys takes a quarter.
    """
    changes = 0
    for node in edit.nodes("MatMul"):
        weights, shape = edit.made_by(node.input[0], "Softmax"), edit.shapes.get(node.input[1])
        if weights is None or shape is None or len(shape) != 4 or shape[1] != 1 or node.output[0] in edit.outputs:
            continue
        parts = [_projected(edit, name) for name in _concatenated(edit, node.input[1])]
        if any(part is None for part in parts) or len({part[1:] for part in parts if part is not None}) != 1:
            continue
        sources = [part[0] for part in parts if part is not None]
        _, matrix, bias = parts[0] or ("", "", "")
        channels = edit.shapes[sources[0]][-1]
        if not isinstance(channels, int) or not isinstance(shape[-1], int) or channels >= shape[-1]:
            continue
        flat = edit.add_constant(np.array([0, 1, -1, channels], np.int64), "flat")
        tokens = [edit.add_node("Reshape", [source, flat], "values") for source in sources]
        values = tokens[0] if len(tokens) == 1 else edit.add_node("Concat", tokens, "values", axis=2)
        edit.shapes[values] = (*shape[:3], channels)
        seen = edit.add_node("MatMul", [node.input[0], values], "seen")
        edit.shapes[seen] = (*edit.shapes[node.output[0]][:3], channels)
        projected = edit.add_node("MatMul", [seen, matrix], "projected")
        result = edit.add_node("Add", [projected, bias], "projected") if bias else projected
        edit.shapes[projected] = edit.shapes[result] = edit.shapes[node.output[0]]
        changes += edit.replace(node.output[0], result)
    return changes


def _concatenated(edit: GraphEditor, name: str) -> list[str]:
    """The tensors (B, 1, L, D) that are joined along L; the tensor itself where none are."""
    node = edit.made_by(name, "Concat")
    return list(node.input) if node is not None and attribute(node, "axis") in (2, -2) else [name]


def _projected(edit: GraphEditor, name: str) -> tuple[str, str, str] | None:
    """What was projected, the matrix and the bias (empty for none), for a tensor that was only reshaped since."""
    while (node := edit.producer(name)) is not None and node.op_type in ("Reshape", "Transpose"):
        if node.op_type == "Transpose":
            shape = edit.shapes.get(node.input[0])
            # (B, L, 1, D) to (B, 1, L, D): the order of the values stays.
            if attribute(node, "perm") != [0, 2, 1, 3] or shape is None or 1 not in shape[1:3]:
                return None
        name = node.input[0]
    bias = ""
    if node is not None and node.op_type == "Add":
        bias = next((i for i in node.input if edit.constant(i) is not None), "")
        name = next((i for i in node.input if i != bias), "")
        node = edit.producer(name)
    if node is None or node.op_type != "MatMul" or not _is_constant(edit, node.input[1]):
        return None
    return (node.input[0], node.input[1], bias) if edit.shapes.get(node.input[0]) else None


def _is_constant(edit: GraphEditor, name: str) -> bool:
    """Whether a tensor is an initialiser, or the transposition of one."""
    turned = edit.made_by(name, "Transpose")
    return edit.constant(turned.input[0] if turned is not None else name) is not None


def fuse_attention(edit: GraphEditor) -> int:
    """`MultiHeadAttention` for MatMul, Softmax, MatMul over many keys.

    ONNX Runtime's CPU provider computes it block by block in the second-level cache (``MlasFlashAttention``) where
    there is no mask. Written out, the scores of SAM 2's memory attention with 7 memories are 470 MB per layer.
    """
    changes = 0
    for softmax in edit.nodes("Softmax"):
        product = edit.made_by(softmax.input[0], "MatMul")
        readers = [n for n in edit.graph.node if softmax.output[0] in n.input]
        if product is None or len(readers) != 1 or readers[0].op_type != "MatMul" or softmax.output[0] in edit.outputs:
            continue
        last = readers[0]
        turned = edit.made_by(product.input[1], "Transpose")
        query, value = edit.shapes.get(product.input[0]), edit.shapes.get(last.input[1])
        if turned is None or last.input[0] != softmax.output[0] or not _heads_fit(query, value):
            continue
        assert query is not None
        assert value is not None
        if (isinstance(value[2], int) and value[2] < MIN_KEYS) or attribute(softmax, "axis", -1) not in (-1, 3):
            continue
        perm = attribute(turned, "perm")
        if perm == [0, 2, 3, 1]:
            key = _merged(edit, turned.input[0], int(query[1]) * int(query[3]))
        elif perm == [0, 1, 3, 2]:
            key = _by_token(edit, turned.input[0])
        else:
            continue
        source, scale = _unscaled(edit, product.input[0])
        name = edit.add_node(
            "MultiHeadAttention",
            [_by_token(edit, source), key, _by_token(edit, last.input[1])],
            "attention",
            domain=DOMAIN,
            num_heads=int(query[1]),
            scale=scale,
        )
        heads, channels = int(query[1]), int(value[3])
        split = edit.add_constant(np.array([0, 0, heads, channels], np.int64), "split")
        tokens = edit.add_node("Reshape", [name, split], "attention")
        back = only_reader(edit, last.output[0], "Transpose")
        if back is not None and attribute(back, "perm") == [0, 2, 1, 3]:
            changes += edit.replace(back.output[0], tokens)
        else:
            result = edit.add_node("Transpose", [tokens], "attention", perm=[0, 2, 1, 3])
            changes += edit.replace(last.output[0], result)
    if changes and DOMAIN not in {o.domain for o in edit.model.opset_import}:
        edit.model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return changes


def _heads_fit(query: Shape | None, value: Shape | None) -> bool:
    """Whether both are (B, heads, L, D) with known heads and channels."""
    return all(
        shape is not None and len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[3], int)
        for shape in (query, value)
    )


def _unscaled(edit: GraphEditor, name: str) -> tuple[str, float]:
    """A query without the multiplication by its scale, and the scale; 1 where there is none."""
    node = edit.made_by(name, "Mul")
    for tensor, other in (node.input, node.input[::-1]) if node is not None else ():
        value = edit.constant(other)
        if value is not None and value.size == 1 and edit.shapes.get(tensor) == edit.shapes.get(name):
            return tensor, float(value.reshape(-1)[0])
    return name, 1.0


def _by_token(edit: GraphEditor, name: str) -> str:
    """(B, heads, L, D) to (B, L, heads * D)."""
    shape = edit.shapes[name]
    heads, channels = int(shape[1]), int(shape[3])
    turn = edit.made_by(name, "Transpose")
    if turn is not None and attribute(turn, "perm") == [0, 2, 1, 3]:
        return _merged(edit, turn.input[0], heads * channels)
    if heads == 1:
        flat = edit.add_constant(np.array([0, -1, channels], np.int64), "merge")
        return edit.add_node("Reshape", [name, flat], "tokens")
    tokens = edit.add_node("Transpose", [name], "tokens", perm=[0, 2, 1, 3])
    return _merged(edit, tokens, heads * channels)


def _merged(edit: GraphEditor, name: str, width: int) -> str:
    """(B, L, heads, D) to (B, L, heads * D)."""
    return edit.add_node("Reshape", [name, edit.add_constant(np.array([0, 0, width], np.int64), "merge")], "tokens")


CPU_PASSES: tuple[Pass, ...] = (halve_gelu_last, values_after_attention, fuse_attention)
"""In this order: an operator of ONNX Runtime's own has no shapes for the passes after it. The first is for plain graphs
that were exported without it."""
