"""What stays in fp32 in the fp16 graphs of tracking, beside the angles of Fourier features (`pixano_edge.export.fp16`).

In the memory encoder: the mask on its way from logits to the first convolution. Logits are resized and compared with 0;
rounded to fp16 they fall on the other side of it near the border, which put the memory maps of random masks off by 8 %
where the rest of the graph costs 0.1 %. The nodes are pointwise, and a resize.

Not in the memory attention: fp32 in its softmax over all keys, and in the products around it, saves next to nothing of
the error (`memory_sweep`, figures in docs/design.md), and TensorRT fuses no attention that has an fp32 island. Sums
within softmax and normalisation are accumulated in fp32 by every back end's fp16 kernels; TensorRT's variants keep the
normalisations in fp32 as those of all graphs do.
"""

from __future__ import annotations

import onnx

from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.export.tensorrt_graph import MASK

_SCORES = (sam2.OBJECT_SCORE_LOGITS, sam2_video.POINTER_SCORE_LOGITS, sam2_video.BINARIZE)


def kept_in_fp32(graph: str, model: onnx.ModelProto) -> dict[str, str]:
    """Names of the nodes of an fp32 graph that stay in fp32 in its fp16 variants, with the key of their reason."""
    if graph != sam2_video.MEMORY_ENCODER:
        return {}
    reached = {sam2_video.MASK_LOGITS}
    kept = {}
    for node in model.graph.node:
        if node.op_type != "Conv" and reached.intersection(node.input):
            reached.update(node.output)
            kept[node.name] = MASK
        elif set(node.input).intersection(_SCORES):  # compared with 0 or 0.5
            kept[node.name] = MASK
    return kept
