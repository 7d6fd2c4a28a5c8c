"""Where to look when golden samples fail: which tensor is the first to be too far off, and which graph made it.

Errors travel down the pipeline, so the first tensor beyond its tolerance names the graph; later ones may only have
inherited. A tolerance of a reduced precision is what the exporter measured for that variant, with some room for
another device's rounding: it points at a graph, it does not decide whether the check passes (`verify.judge` does).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...bundle import Bundle
from ...bundle.tensorrt_report import read_tensorrt_report
from ...contracts import sam2, sam2_video
from ...errors import BundleError

if TYPE_CHECKING:
    from .verify import TensorError

PREPROCESSING = "pre-processing"
"""Stands for a graph's name where no graph ran yet."""

GRAPH_OF = {
    sam2.PIXEL_VALUES: PREPROCESSING,
    sam2.IMAGE_EMBED: sam2.IMAGE_ENCODER,
    sam2.HIGH_RES_0: sam2.IMAGE_ENCODER,
    sam2.HIGH_RES_1: sam2.IMAGE_ENCODER,
    sam2.MASKS: sam2.MASK_DECODER,
    sam2.IOU_SCORES: sam2.MASK_DECODER,
    sam2.OBJECT_SCORE_LOGITS: sam2.MASK_DECODER,
}
"""Which part of the pipeline makes a tensor, in pipeline order. For tracking see `graph_of`."""

FP32_MAX_REL = 1e-4
"""Largest relative error of any tensor at full precision."""
ROOM = 5.0
"""Times the exporter's figure: other kernels round elsewhere, and the decoder's inputs carry the encoder's error."""
REDUCED_MAX_REL = {"fp16": 2e-2, "bf16": 1e-1, "int8": 3e-1, "int4": 5e-1}
"""Tolerance of a reduced precision where the bundle has no figure of its own."""
NAMED_LAYERS = 5
"""Layers named in one line of advice; the rest is counted."""


@dataclass(frozen=True)
class Suspect:
    """Where the error comes in.

    Attributes:
        graph: Graph of the contract, or `PREPROCESSING`.
        tensor: First tensor beyond its tolerance in pipeline order; the nearest to it where none is beyond.
        max_rel: Its relative error.
        tolerance: Of that tensor.
        exceeded: Whether it is beyond.
        advice: What to look at, and what to try.
    """

    graph: str
    tensor: str
    max_rel: float
    tolerance: float
    exceeded: bool
    advice: list[str] = field(default_factory=list)

    def text(self) -> str:
        """One line."""
        if self.exceeded:
            return (
                f"'{self.tensor}' of {self.graph} is the first beyond its tolerance "
                f"({self.max_rel:.1e} > {self.tolerance:.1e})"
            )
        return (
            f"no tensor is beyond its tolerance; '{self.tensor}' of {self.graph} is the nearest "
            f"({self.max_rel:.1e}, tolerance {self.tolerance:.1e})"
        )


def graph_of(bundle: Bundle) -> dict[str, str]:
    """`GRAPH_OF` with the tensors of tracking, as ``<graph>.<tensor>``, where the bundle tracks."""
    from ..sam2_video.check import tensor_names

    video = sam2_video.constants_of(bundle.manifest.constants)
    if video is None:
        return GRAPH_OF
    return GRAPH_OF | tensor_names(sam2.Sam2Constants.from_dict(bundle.manifest.constants), video)


def tolerances(bundle: Bundle, precision: str) -> dict[str, float]:
    """Largest relative error that is expected of each tensor, in pipeline order."""
    graphs = graph_of(bundle)
    measured: dict[str, float] = {}
    for entry in bundle.manifest.parity.tensors if bundle.manifest.parity else ():
        if entry.variant == precision and math.isfinite(entry.max_rel):
            name = entry.tensor if entry.graph in GRAPH_OF.values() else f"{entry.graph}.{entry.tensor}"
            measured[name] = max(entry.max_rel, measured.get(name, 0.0))
    found = {}
    for name in graphs:
        if precision == "fp32" or name == sam2.PIXEL_VALUES:  # pre-processing is float32 whatever the variant
            found[name] = FP32_MAX_REL
        elif name in measured:
            found[name] = max(ROOM * measured[name], FP32_MAX_REL)
        else:
            found[name] = REDUCED_MAX_REL.get(precision, FP32_MAX_REL)
    return found


def find_suspect(
    tensors: Sequence[TensorError], bundle: Bundle, precision: str, backend: str, info: dict[str, Any] | None = None
) -> Suspect | None:
    """The place to look at first.

    Args:
        tensors: Errors in pipeline order.
        bundle: What ran.
        precision: Variant that ran.
        backend: Back end that ran.
        info: `Sam2ImagePredictor.info` of the run, for facts of the session.

    Returns:
        None without tensors.
    """
    limits, graphs = tolerances(bundle, precision), graph_of(bundle)
    return name_suspect(
        [(t, limits[t.name], graphs[t.name]) for t in tensors if t.name in limits], bundle, precision, backend, info
    )


def name_suspect(
    checked: Sequence[tuple[TensorError, float, str]],
    bundle: Bundle,
    precision: str,
    backend: str,
    info: dict[str, Any] | None = None,
) -> Suspect | None:
    """The same for any family: errors in pipeline order, each with its tolerance and the graph that made it."""
    if not checked:
        return None
    ratios = [(_ratio(tensor.max_rel, limit), tensor, limit, graph) for tensor, limit, graph in checked]
    beyond = [entry for entry in ratios if entry[0] > 1]
    ratio, tensor, limit, graph = beyond[0] if beyond else max(ratios, key=lambda entry: entry[0])
    advice = _advice(bundle, graph, precision, backend, (info or {}).get(graph) or {})
    return Suspect(graph, tensor.name, tensor.max_rel, limit, ratio > 1, advice)


def _ratio(error: float, tolerance: float) -> float:
    return error / tolerance if math.isfinite(error) else math.inf


def _advice(bundle: Bundle, graph: str, precision: str, backend: str, facts: dict[str, Any]) -> list[str]:
    if graph == PREPROCESSING:
        return [
            "No graph is to blame: the picture was decoded or resized otherwise than at export.",
            "Compare the versions of OpenCV and Pillow with those of the export: pixano-edge info "
            f"{bundle.manifest.name}",
        ]
    lines = []
    if backend == "tensorrt":
        lines += _tensorrt_advice(bundle, graph, precision, facts)
    else:
        lines += _onnxruntime_advice(graph, facts)
    lines += [f"Session of {graph}: {text}" for text in facts.get("warnings", [])]
    if precision != "fp32" and "fp32" in bundle.variants():
        lines.append(f"Does full precision pass? --backend {backend} --precision fp32")
    if backend == "tensorrt":
        lines.append(f"Does the same graph pass without TensorRT? --backend onnxruntime --precision {precision}")
    return lines


def _onnxruntime_advice(graph: str, facts: dict[str, Any]) -> list[str]:
    provider = facts.get("provider", "its provider")
    return [f"Look at graph '{graph}' in {provider}; does it pass on --device cpu?"]


def _tensorrt_advice(bundle: Bundle, graph: str, precision: str, facts: dict[str, Any]) -> list[str]:
    engine = facts.get("engine") or {}
    file = engine.get("file") if isinstance(engine, dict) else None
    lines = [
        f"Look at the layers of '{graph}'{f' ({file})' if file else ''}; what each computes in, and why: "
        f"pixano-edge build {bundle.root} --graph {graph} --precision {precision} --report",
    ]
    try:
        report = read_tensorrt_report(bundle)
    except BundleError as error:
        return [*lines, f"The bundle's list of fp32 layers cannot be read: {error.message}"]
    entry = report.find(graph, precision) if report is not None else None
    if entry is None:
        return [*lines, f"The bundle says nothing about '{graph}' in {precision} for TensorRT; export it again."]
    layers = [layer.node for layer in entry.fp32_layers]
    if layers:
        more = f" and {len(layers) - NAMED_LAYERS} more" if len(layers) > NAMED_LAYERS else ""
        lines.append(
            f"Computed in fp32 within it: {', '.join(layers[:NAMED_LAYERS])}{more} (reports/tensorrt.json). A layer "
            "that overflows and is not in that list is the likely cause."
        )
    elif precision != "fp32":
        lines.append("The bundle keeps none of its layers in fp32 (reports/tensorrt.json).")
    return lines + [f"Known about this graph: {finding}" for finding in entry.findings]
