"""TensorRT variants of a bundle's graphs: changed where TensorRT gains, checked against the fp32 graph, weights shared.

Strongly typed networks take every precision from the graph, so what stays in fp32 within an fp16 graph is decided
here, with `Cast` at the borders:

* Angles of Fourier features, up to their Sin and Cos: they reach tens of radians, where fp16 has steps of 0.03.
* Normalisation with its scale and shift. TensorRT's own compute precision for it (fp32 unless told otherwise) is
  deprecated in 10.16 and gone in 11, where the inputs' type rules; "Running layernorm after self-attention in FP16
  may cause overflow" is TensorRT's own warning (github.com/NVIDIA/TensorRT/issues/2564, 2781, 4111). In TensorRT for
  RTX 1.7.1 the casts cost nothing: they join the normalisation's kernel, and the number of kernels stays the same.
* Coordinates of sampling: fp16 places a sample no better than 1/1000 of the picture.

Softmax and the products around it stay in fp16: fused attention takes no fp32 (its matrices must be fp16, bf16 or
fp8; head size a multiple of 8, 16 to 256), and an fp32 island inside cost a factor of four where it was measured
(github.com/tier4/autoware-ml/pull/95). Resize to the nearest pixel and the other movers of data round nothing. Masks
and scores end in fp16 and are cast to fp32: a logit of 20 has steps of 0.016, and `fp16-tensorrt` in the parity
report is what all of it costs.

What the passes gain is known in part. TensorRT for RTX 1.7.1 fuses every attention of SAM 2 in the plain graphs and
in these; the small demo model's decoder compiles to the same kernels, its encoder to 72 generated kernels instead of
74. On 10.3 (JetPack 6), where attention blocks were seen unfused (github.com/NVIDIA/TensorRT/issues/4167), nothing has
been built yet.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import onnx
from onnx import TensorProto

from pixano_edge.engine.bundle.manifest import GraphVariant, Precision
from pixano_edge.engine.bundle.tensorrt_report import (
    TENSORRT_REPORT,
    Difference,
    Fp32Layer,
    PassEntry,
    TensorrtReport,
    TensorrtVariant,
)
from pixano_edge.engine.bundle.writer import BundleWriter
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import ExportError
from pixano_edge.export.differences import Feeds, Settle, Worst, measure, problems, sizes_to_try
from pixano_edge.export.fp16 import fp32_nodes, rounded, to_fp16
from pixano_edge.export.graph_sizes import count_parameters, weight_bytes
from pixano_edge.export.grid_sample import SAMPLE
from pixano_edge.export.half_weights import narrow, widen
from pixano_edge.export.onnx_graph import check_contract
from pixano_edge.export.operators import check_tensorrt_10_3
from pixano_edge.export.shared_weights import share_weights
from pixano_edge.export.tensorrt_passes import PASSES, apply_passes, unwelcome

SUFFIX = "-tensorrt"
"""A TensorRT variant is named after the plain one: ``fp16-tensorrt``."""
FP32_TOLERANCE = 1e-5
"""Relative; re-ordered fp32 arithmetic alone gives some 1e-6."""

ANGLES, NORMALISATION, SAMPLING, MASK = "angles", "normalisation", "sampling", "mask"
HEAD, RANKING, CONVERTER = "head", "ranking", "converter"
REASONS = {
    ANGLES: "Angles of Fourier features reach tens of radians, where fp16 has steps of 0.03.",
    NORMALISATION: "Mean and variance overflow or lose precision in fp16; TensorRT 11 computes in the inputs' type.",
    SAMPLING: "Coordinates in fp16 place a sample no better than 1/1000 of the picture.",
    MASK: "Logits of a mask are resized and compared with 0; rounded ones fall on the other side of it at the border.",
    HEAD: "A box in fp16 is no better than 1/2000 of the picture; a score's scale acts on all of it; squares overflow.",
    RANKING: "Queries are ranked by scores that nearly tie, and boxes refined layer by layer.",
    CONVERTER: "The fp16 conversion of ONNX Runtime leaves this operator in fp32.",
}
Keep = Callable[[str, onnx.ModelProto], dict[str, str]]
"""Nodes of a graph, by its name and model, that stay in fp32 in fp16 variants: name to key of `REASONS`."""
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_NORMALISATIONS = ("GroupNormalization", "InstanceNormalization", "LayerNormalization")


@dataclass(frozen=True)
class Fitted:
    """A graph made for TensorRT.

    Attributes:
        model: Weights inside.
        passes: Places changed, by the pass's name; passes that found nothing are left out.
    """

    model: onnx.ModelProto
    passes: dict[str, int]


def fit(model: onnx.ModelProto) -> Fitted:
    """Applies every pass to an fp32 graph, which is changed in place.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        ExportError: A pass left a graph that is no ONNX any more.
    """
    return Fitted(model, apply_passes(model, PASSES))


def kept_in_fp32(model: onnx.ModelProto) -> dict[str, str]:
    """Nodes of an fp32 graph that stay in fp32 when it becomes fp16: name to key of `REASONS`."""
    kept = {n.name: NORMALISATION for n in model.graph.node if n.op_type in _NORMALISATIONS}
    kept |= {n.name: SAMPLING for n in model.graph.node if n.name.startswith(f"node_trt_{SAMPLE}")}
    return kept | dict.fromkeys(fp32_nodes(model), ANGLES)


def fp32_layers(model: onnx.ModelProto, kept: Mapping[str, str]) -> list[Fp32Layer]:
    """Nodes of an fp16 graph that compute in fp32, found in the graph itself; casts are the borders, not layers.

    A node computes in what it writes. One that writes no floats, such as a comparison, computes in what it reads.
    """
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {t.name: t.data_type for t in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        types[value.name] = value.type.tensor_type.elem_type
    found = []
    for node in model.graph.node:
        floats = [types.get(name) for name in node.output if types.get(name) in _FLOATS]
        floats = floats or [types.get(name) for name in node.input]
        if node.op_type != "Cast" and TensorProto.FLOAT in floats:
            found.append(Fp32Layer(node=node.name, op=node.op_type, reason=kept.get(node.name, CONVERTER)))
    return found


class TensorrtVariants:
    """Adds the TensorRT variants of a bundle's graphs, and in the end their report.

    Args:
        writer: The bundle; its plain graphs are written already.
        feeds: Makes inputs to compare with.
        threads: Threads of ONNX Runtime while comparing.
        keep: What stays in fp32 in the family's plain fp16 graphs, and why; it does here too.
        settle: Differences that mean nothing; see `Settle`.
    """

    def __init__(
        self,
        writer: BundleWriter,
        feeds: Feeds,
        threads: int | None = None,
        keep: Keep | None = None,
        settle: Settle | None = None,
    ) -> None:
        self._settle = settle
        self._writer = writer
        self._feeds = feeds
        self._threads = threads
        self._keep = keep
        self._entries: list[TensorrtVariant] = []

    def add(self, spec: GraphSpec, plain: Mapping[str, GraphVariant]) -> dict[str, GraphVariant]:
        """Makes the variants of one graph.

        Where no pass applies, the variant names the plain file. Where one does, a small file beside the plain one
        holds the nodes and refers to its weights.

        Args:
            spec: The graph's contract.
            plain: Plain variants by precision; ``fp32`` must be there.

        Returns:
            Manifest entries by variant name.

        Raises:
            ExportError: A changed graph no longer gives the numbers of the fp32 graph, or breaks its contract; or a
                variant is neither fp32 nor fp16.
        """
        reference = self._writer.root / plain["fp32"].file
        model = onnx.load(reference)
        widen(model)
        fitted = fit(model)
        # In the plain graph already, so it is no change: the family's own rules, and angles.
        own = self._keep(spec.name, fitted.model) if self._keep is not None else {}
        kept = {**kept_in_fp32(fitted.model), **own}
        return {
            f"{name}{SUFFIX}": self._add(spec, name, entry, fitted, kept, reference) for name, entry in plain.items()
        }

    def finish(self) -> None:
        """Writes the report; call it once, after every `add`."""
        import onnxruntime

        report = TensorrtReport(
            reference=f"the bundle's fp32 ONNX graphs in ONNX Runtime {onnxruntime.__version__}, unoptimised, CPU",
            tolerance=FP32_TOLERANCE,
            reasons=REASONS,
            variants=self._entries,
        )
        self._writer.add_file(TENSORRT_REPORT, (json.dumps(report.model_dump(), indent=1) + "\n").encode())

    def findings(self) -> list[str]:
        """What TensorRT 10.3 may refuse or handle badly in a changed graph, with its name and variant."""
        return [f"{v.variant} {v.graph}: {f}" for v in self._entries if v.same_as is None for f in v.findings]

    def changed(self, variant: str) -> bool:
        """Whether any graph of this variant differs from the plain one."""
        return any(v.variant == variant and v.same_as is None for v in self._entries)

    def _add(
        self, spec: GraphSpec, name: str, entry: GraphVariant, fitted: Fitted, kept: Mapping[str, str], reference: Path
    ) -> GraphVariant:
        if entry.precision not in ("fp32", "fp16"):
            raise ExportError(
                f"Graph '{spec.name}' has a variant in {entry.precision}, which is not made for TensorRT here.",
                "Quantised graphs bring their own TensorRT variants.",
            )
        half = entry.precision == "fp16"
        plain = self._writer.root / entry.file
        unchanged = not fitted.passes and not (half and NORMALISATION in kept.values())
        file, weights = entry.file, None
        if unchanged:
            graph = onnx.load(plain) if half else fitted.model
            variant = entry.model_copy(update={"target": "tensorrt"})
            differences: dict[str, Worst] = {}
        else:
            graph = to_fp16(fitted.model, kept) if half else fitted.model
            check_contract(graph, spec)
            file = str(PurePosixPath(entry.file).with_suffix(".tensorrt.onnx"))
            loaded = weight_bytes(graph)
            weights = self._write(graph, file, plain, half)
            variant = _entry(graph, file, entry.precision, loaded if weights else None)
            differences = self._compare(spec, name, graph, reference, self._writer.root / file, half)
        self._entries.append(
            TensorrtVariant(
                graph=spec.name,
                variant=f"{name}{SUFFIX}",
                precision=entry.precision,
                file=file,
                same_as=name if unchanged else None,
                weights=weights,
                passes=[PassEntry(name=p, places=n, reason=_reason(p)) for p, n in fitted.passes.items()],
                fp32_layers=fp32_layers(graph, kept) if half else [],
                differences=[
                    Difference(tensor=t, max_abs=w.absolute, max_rel=w.relative) for t, w in differences.items()
                ],
                sizes=[] if unchanged else sizes_to_try(spec),
                findings=[*check_tensorrt_10_3(graph), *unwelcome(graph)],
            )
        )
        return variant

    def _write(self, graph: onnx.ModelProto, file: str, plain: Path, half: bool) -> str | None:
        """Writes the graph beside the plain one; returns the file that holds its weights."""
        narrowed = 0 if half else narrow(graph)
        shared = share_weights(graph, plain)
        self._writer.add_file(file, shared.model.SerializeToString(deterministic=True))
        if narrowed:
            widen(graph)  # the fp16 variant is made from it too
        return None if shared.holder is None else str(PurePosixPath(file).with_name(shared.holder))

    def _compare(
        self, spec: GraphSpec, name: str, graph: onnx.ModelProto, reference: Path, file: Path, half: bool
    ) -> dict[str, Worst]:
        """Errors against the fp32 graph; fp16 as a GPU computes it, every intermediate value rounded."""
        if half:
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / "rounded.onnx"
                onnx.save(rounded(graph), copy)
                worst = measure(reference, copy, spec, self._feeds, self._threads, self._settle)
        else:
            worst = measure(reference, file, spec, self._feeds, self._threads, self._settle)
        # fp16 has no bound of its own here: the masks' IoU in the parity report is its bar. It must be finite.
        found = problems(worst, float("inf") if half else FP32_TOLERANCE)
        if found or any(w.absolute == float("inf") for w in worst.values()):
            raise ExportError(
                f"The TensorRT graph '{spec.name}' ({name}) differs from the fp32 graph: "
                f"{'; '.join(found) or 'values are not finite'}.",
                "No bundle was written. Please report this with the checkpoint's name.",
            )
        return worst


def _entry(model: onnx.ModelProto, file: str, precision: Precision, loaded: int | None) -> GraphVariant:
    return GraphVariant(
        file=file,
        precision=precision,
        opset=next(o.version for o in model.opset_import if not o.domain),
        target="tensorrt",
        nodes=len(model.graph.node),
        parameters=count_parameters(model),
        weight_bytes=loaded,
    )


def _reason(name: str) -> str:
    """First line of the pass's docstring."""
    change = next(p for p in PASSES if p.__name__ == name)
    return (change.__doc__ or "").strip().splitlines()[0]
