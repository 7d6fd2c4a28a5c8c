"""What each layer of an engine computes in, and why some stayed in fp32.

Ahead of time the report describes the network as TensorRT parsed it: strongly typed, so the types are those that the
kernels will have, though layers are fused and chosen later. What became of them is in the inspector's JSON, which
needs the GPU (`inspect_engine`).

Why a layer of a reduced graph computes in fp32 comes from the export's report in the bundle where there is one, else
from the graph itself: what leads to a sine or cosine (angles), what stands between a cast and the graph's border.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..bundle import Bundle
from ..bundle.tensorrt_report import read_tensorrt_report

_FLOATS = ("float32", "float16", "bfloat16", "fp8", "fp4")
_PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")
_MOVES = ("SHUFFLE", "SLICE", "CONCATENATION", "GATHER", "SQUEEZE", "UNSQUEEZE", "IDENTITY", "SELECT")

ANGLES = "sine or cosine, or leads to one: angles reach tens of radians, where fp16 has steps of 0.03"
AFTER_ANGLES = "result of a sine or cosine in fp32, before it is cast"
BORDER_IN = "an input of the graph, which is fp32, before it is cast"
BORDER_OUT = "an output of the graph, which is fp32, after the cast"
UNKNOWN = "the graph says fp32; the bundle has no reason"


@dataclass(frozen=True)
class Layer:
    """One layer of a report.

    Attributes:
        name: TensorRT's name.
        type: TensorRT's kind of layer, with the operation where that says more.
        node: The ONNX node that it came from, or None.
        precision: Type of its result (``float16`` ...); of a cast and of a product of quantised tensors ``from -> to``.
        shape: Of the first output; -1 is open.
        reason: Why it computes in fp32 within a reduced graph, else None.
    """

    name: str
    type: str
    node: str | None
    precision: str
    shape: tuple[int, ...]
    reason: str | None = None


@dataclass(frozen=True)
class LayerReport:
    """All layers of one graph that compute on floating-point data, constants and shape arithmetic left out.

    Attributes:
        graph: Name of the graph.
        variant: Variant of the bundle.
        precision: Of the variant.
        layers: In the network's order.
        left_out: Number of layers without floating-point results, and of constants.
    """

    graph: str
    variant: str
    precision: str
    layers: tuple[Layer, ...]
    left_out: int

    @property
    def precisions(self) -> dict[str, int]:
        """Layers by precision, the most frequent first."""
        return dict(Counter(layer.precision for layer in self.layers).most_common())

    @property
    def kept(self) -> dict[str, list[str]]:
        """Layers that stayed in fp32, by reason."""
        found: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.reason is not None:
                found.setdefault(layer.reason, []).append(layer.name)
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the summaries."""
        return {**asdict(self), "precisions": self.precisions, "kept_in_fp32": self.kept}


def make_report(
    layers: Sequence[Mapping[str, Any]],
    graph: str,
    variant: str,
    precision: str,
    reasons: Mapping[str, str] | None = None,
) -> LayerReport:
    """Report of parsed layers.

    Args:
        layers: What `pixano_edge.engine.build.layers.describe_layers` returned.
        graph: Name of the graph.
        variant: Name of the variant.
        precision: Of the variant; in an fp32 graph nothing needs a reason.
        reasons: Why a node stayed in fp32, by the name of the ONNX node.
    """
    explain = _Explainer(layers, reasons or {}) if precision != "fp32" else None
    makers = {tensor[0]: layer for layer in layers for tensor in layer["outputs"]}
    kept = []
    for layer in layers:
        outputs = layer["outputs"]
        if layer["type"] == "CONSTANT" or not outputs or outputs[0][1] not in _FLOATS:
            continue
        result = outputs[0][1]
        cast = layer["type"] == "CAST" and layer["inputs"]
        quantised = _quantised(layer, makers)
        read = layer["inputs"][0][1] if cast else quantised
        shown = f"{read} -> {result}" if read else result
        why = None if explain is None or read or result != "float32" else explain(layer)
        kind = layer["type"] if layer["op"] is None else f"{layer['type']} {layer['op']}"
        kept.append(Layer(layer["name"], kind, layer["node"], shown, tuple(outputs[0][2]), why))
    return LayerReport(graph, variant, precision, tuple(kept), len(layers) - len(kept))


def _quantised(layer: Mapping[str, Any], makers: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Type that a product reads where both of its factors are dequantised, which TensorRT takes as one layer."""
    if layer["type"] not in _PRODUCTS or len(layer["inputs"]) < 2:
        return None
    found = set()
    for tensor in layer["inputs"][:2]:
        maker = makers.get(tensor[0])
        while maker is not None and maker["type"] in _MOVES and maker["inputs"]:
            maker = makers.get(maker["inputs"][0][0])
        found.add(maker["inputs"][0][1] if maker is not None and maker["type"] == "DEQUANTIZE" else None)
    return found.pop() if len(found) == 1 else None


def stored_reasons(bundle: Bundle, graph: str, variant: str) -> dict[str, str]:
    """Why nodes of a variant stayed in fp32, as the export wrote it; by node, empty where it wrote nothing.

    Raises:
        BundleError: The bundle's report cannot be read.
    """
    report = read_tensorrt_report(bundle)
    entry = report.find(graph, variant) if report is not None else None
    if report is None or entry is None:
        return {}
    return {layer.node: report.reasons.get(layer.reason, layer.reason) for layer in entry.fp32_layers}


class _Explainer:
    """Finds why a layer is fp32, by the export's word or by where its values come from and go."""

    def __init__(self, layers: Sequence[Mapping[str, Any]], reasons: Mapping[str, str]) -> None:
        self._reasons = reasons
        self._maker: dict[str, Mapping[str, Any]] = {}
        self._readers: dict[str, list[Mapping[str, Any]]] = {}
        for layer in layers:
            self._maker |= {tensor[0]: layer for tensor in layer["outputs"]}
            for tensor in layer["inputs"]:
                self._readers.setdefault(tensor[0], []).append(layer)

    def __call__(self, layer: Mapping[str, Any]) -> str:
        if said := self._said(layer):
            return said
        if _turns(layer):
            return ANGLES
        # What the parser puts around a node (broadcasts, shapes) and what only moves values goes with its reader; a
        # comparison reads fp32 and writes none, so the walk over fp32 values does not reach it.
        readers = self._follow(layer, self._after)
        for reader in [*readers, *(r for r in self._after(layer) if r["type"] != "CAST")]:
            if said := self._said(reader):
                return said
            if _turns(reader):
                return ANGLES
        makers = self._follow(layer, self._before)
        if any(_turns(maker) for maker in makers):
            return AFTER_ANGLES
        if layer["type"] in _MOVES:
            before, after = [layer, *makers], [layer, *readers]
            moved = all(near["type"] in (*_MOVES, "CONSTANT") for near in before)
            if moved and any(tensor[0] not in self._maker for near in before for tensor in near["inputs"]):
                return BORDER_IN
            moved = all(near["type"] in _MOVES for near in after)
            if moved and any(tensor[0] not in self._readers for near in after for tensor in near["outputs"]):
                return BORDER_OUT
        return UNKNOWN

    def _said(self, layer: Mapping[str, Any]) -> str | None:
        return self._reasons.get(layer["node"] or "") or self._reasons.get(layer["name"])

    def _after(self, layer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [reader for tensor in layer["outputs"] for reader in self._readers.get(tensor[0], [])]

    def _before(self, layer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [self._maker[tensor[0]] for tensor in layer["inputs"] if tensor[0] in self._maker]

    def _follow(self, layer: Mapping[str, Any], step: Any) -> list[Mapping[str, Any]]:
        """Layers reached over fp32 values alone, nearest first; casts end the walk and do not count."""
        found: dict[str, Mapping[str, Any]] = {}
        waiting = list(step(layer))
        while waiting:
            near = waiting.pop(0)
            if near["name"] in found or near["type"] == "CAST" or near["outputs"][0][1] != "float32":
                continue
            found[near["name"]] = near
            waiting += step(near)
        return list(found.values())


def _turns(layer: Mapping[str, Any]) -> bool:
    return layer["op"] in ("SIN", "COS")
