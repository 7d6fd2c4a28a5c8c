"""What stays in fp32 in the fp16 graphs of Grounding DINO, beside the angles of sine embeddings.

In the detector: all but the backbone. Its encoder ranks some twenty thousand places by scores that nearly tie, and
what sits at which rank decides where a query looks; its decoder adds up small moves of boxes. In fp16 this is known to
go wrong on TensorRT (github.com/NVIDIA/TensorRT/issues/3413). The text encoder is fp16 as a whole.
"""

from __future__ import annotations

import onnx

from pixano_edge.engine.contracts import grounding_dino as contract
from pixano_edge.engine.errors import ExportError
from pixano_edge.export.tensorrt_graph import RANKING

PROJECTION = "input_proj."
"""Start of the names of the weights that take over from the backbone."""


def kept_in_fp32(graph: str, model: onnx.ModelProto) -> dict[str, str]:
    """Names of the nodes of an fp32 graph that stay in fp32 in its fp16 variants, with the key of their reason."""
    if graph != contract.DETECTOR:
        return {}
    producer = {output: node for node in model.graph.node for output in node.output}
    pending = [
        producer[node.input[0]]
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[1].startswith(PROJECTION) and node.input[0] in producer
    ]
    if not pending:
        raise ExportError("The detector's graph has no projection of the feature maps.", "Please report this.")
    backbone: set[str] = set()
    while pending:
        node = pending.pop()
        if node.name not in backbone and not any(n.startswith(PROJECTION) for n in node.input):
            backbone.add(node.name)
            pending += [producer[i] for i in node.input if i in producer]
    return {node.name: RANKING for node in model.graph.node if node.name not in backbone}
