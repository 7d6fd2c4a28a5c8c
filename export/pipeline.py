"""The steps from modules to a bundle's graphs that every family takes: export, precisions, fitting for TensorRT.

What differs from family to family (loading, parity, golden samples) is in the family's own files, which call these.
"""

from __future__ import annotations

import platform
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from pixano_edge.engine.bundle.manifest import NAME_PATTERN, Graph, GraphMemory, GraphVariant
from pixano_edge.engine.bundle.writer import BundleWriter
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import ExportError
from pixano_edge.engine.libraries import ORT_WHEELS, installed_version, module_version
from pixano_edge.export.cpu_passes import CPU_PASSES
from pixano_edge.export.differences import Feeds, Settle
from pixano_edge.export.fp16 import rounded, to_fp16
from pixano_edge.export.graph_sizes import count_parameters, weight_bytes
from pixano_edge.export.half_weights import narrow, widen
from pixano_edge.export.onnx_graph import export_graph
from pixano_edge.export.operators import FINDING, check_tensorrt_10_3
from pixano_edge.export.shared_weights import share_weights
from pixano_edge.export.tensorrt_graph import SUFFIX, Keep, TensorrtVariants
from pixano_edge.export.tensorrt_passes import apply_passes
from pixano_edge.export.work_memory import measure_graphs

VARIANTS = ("fp32", "fp16")
CPU = "fp32-cpu"
"""In reports and file names: what ONNX Runtime's CPU provider runs in fp32 where a bundle has graphs for it."""
FP16_NOTE = (
    "Parity of fp16: every intermediate value rounded to fp16, as a GPU does; "
    "fp16-cpu: the same files in ONNX Runtime's CPU provider, which computes mostly in fp32."
)
Progress = Callable[[str, int, int], None]
"""Called at the start of each step with its name, its number from 0, and the number of steps."""


def check_request(name: str | None, variants: Sequence[str]) -> list[str]:
    """The variants from full to reduced; raises ExportError for a name or variants that cannot be."""
    if name is not None and not re.fullmatch(NAME_PATTERN, name):
        raise ExportError(f"'{name}' is not a bundle name.", "Use letters, digits, '.', '_' and '-'.")
    unknown = [v for v in variants if v not in VARIANTS]
    if unknown or "fp32" not in variants:
        raise ExportError(f"Variants {list(variants)} cannot be exported.", "Use fp32, or fp32,fp16.")
    return [v for v in VARIANTS if v in variants]


class Steps:
    """Numbers the steps for the progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self.total = total
        self._done = 0

    def __call__(self, name: str) -> None:
        if self._progress:
            self._progress(name, self._done, self.total)
        self._done += 1


class GraphExport:
    """The graphs of one bundle, step by step.

    Args:
        writer: The new bundle.
        specs: The family's graphs by name.
        variants: ``fp32``, perhaps ``fp16``, in this order.
        step: Reports progress.
        threads: Threads of ONNX Runtime.
        feeds: Makes inputs to compare TensorRT's variants with.
        keep: What stays in fp32 in the family's fp16 graphs, and why.
        lenders: Graphs whose weights another one has too: its name to theirs; lenders come first in `specs`.
        settle: Differences that mean nothing between TensorRT's variants and the plain graphs.

    Attributes:
        entries: Manifest entries by graph and variant.
        cpu_entries: Manifest entries of graphs for ONNX Runtime's CPU provider, by graph.
        notes: Remarks for the manifest.
    """

    def __init__(
        self,
        writer: BundleWriter,
        specs: Mapping[str, GraphSpec],
        variants: Sequence[str],
        step: Callable[[str], None],
        threads: int | None,
        *,
        feeds: Feeds,
        keep: Keep,
        lenders: Mapping[str, Collection[str]] | None = None,
        settle: Settle | None = None,
    ) -> None:
        self.entries: dict[str, dict[str, GraphVariant]] = {graph: {} for graph in specs}
        self.notes: list[str] = []
        self._writer, self._specs, self._variants = writer, specs, variants
        self._step, self._threads = step, threads
        self._feeds, self._keep, self._lenders, self._settle = feeds, keep, lenders or {}, settle
        self._tensorrt: TensorrtVariants | None = None
        self.cpu_entries: dict[str, GraphVariant] = {}

    def export(self, modules: Mapping[str, nn.Module], example: Callable[[str], tuple[Tensor, ...]]) -> None:
        """Plain graphs in every precision.

        Args:
            modules: By graph.
            example: Inputs to trace a graph with, by its name.

        Raises:
            ExportError: See `export_graph`.
        """
        if "fp16" in self._variants:
            self.notes.append(FP16_NOTE)
        for graph, spec in self._specs.items():
            self._step(f"Exporting {graph}")
            model = export_graph(modules[graph], spec, example(graph))
            for variant in reversed(self._variants):  # fp16 first: fp32 may refer to its weights
                stored = model if variant == "fp32" else to_fp16(model, self._keep(graph, model))
                self.notes += [f"{FINDING}{variant} {graph}: {p}" for p in check_tensorrt_10_3(stored)]
                self.entries[graph][variant] = self._add_graph(stored, graph, variant)
            self.entries[graph] = {v: self.entries[graph][v] for v in self._variants}

    def fit_for_tensorrt(self) -> None:
        """Variants for TensorRT, and the report on them."""
        self._tensorrt = TensorrtVariants(self._writer, self._feeds, self._threads, self._keep, self._settle)
        for graph, spec in self._specs.items():
            self._step(f"Fitting {graph} for TensorRT")
            self.entries[graph] |= self._tensorrt.add(spec, dict(self.entries[graph]))
        self._tensorrt.finish()
        self.notes += [f"{FINDING}{finding}" for finding in self._tensorrt.findings()]

    def fit_for_cpu(
        self,
        graphs: Collection[str],
        parts: Mapping[str, tuple[nn.Module, GraphSpec]],
        example: Callable[[GraphSpec], tuple[Tensor, ...]],
    ) -> None:
        """Graphs for ONNX Runtime's CPU provider, in fp32, beside the plain ones.

        Args:
            graphs: Plain graphs to change; one in which no pass finds anything gets no second form.
            parts: Modules that stand for a plain graph together, with their contracts, by name.
            example: Inputs to trace a part with.

        Raises:
            ExportError: See `export_graph` and `apply_passes`.
        """
        self._step("Fitting for a CPU")
        plain = [held[v] for held in self.entries.values() for v in ("fp16", "fp32") if v in held]
        holders = [self._writer.root / entry.file for entry in plain]
        for graph in graphs:
            model = onnx.load(self._writer.root / self.entries[graph]["fp32"].file)
            widen(model)
            if apply_passes(model, CPU_PASSES):
                self.cpu_entries[graph] = self._add_cpu_graph(model, graph, holders)
        for name, (module, spec) in parts.items():
            self.cpu_entries[name] = self._add_cpu_graph(export_graph(module, spec, example(spec)), name, holders)

    def measured_variants(self) -> Iterator[tuple[str, dict[str, Path]]]:
        """Variants that parity is measured for, with their files by graph, each a step of its own. `CPU` comes last.

        A TensorRT variant that is the plain file has the plain variant's figures and is left out.
        """
        assert self._tensorrt is not None  # `fit_for_tensorrt` comes before
        for variant in [*self._variants, *(v + SUFFIX for v in self._variants)]:
            self._step(f"Measuring {variant}")
            if variant in self._variants or self._tensorrt.changed(variant):
                yield variant, {g: self._writer.root / held[variant].file for g, held in self.entries.items()}
        if self.cpu_entries:
            self._step(f"Measuring {CPU}")
            files = {g: held["fp32"].file for g, held in self.entries.items()}
            files |= {g: entry.file for g, entry in self.cpu_entries.items()}
            yield CPU, {g: self._writer.root / file for g, file in files.items()}

    def measure_memory(self) -> list[GraphMemory]:
        """Memory of every plain variant."""
        self._step("Measuring memory")
        return measure_graphs(self._writer.root, self._specs, self.entries, self._threads)

    def manifest_graphs(self) -> dict[str, Any]:
        """The manifest's ``graphs``."""
        return {g: Graph(variants=v).model_dump() for g, v in self.entries.items()}

    def _add_cpu_graph(self, model: onnx.ModelProto, name: str, holders: Sequence[Path]) -> GraphVariant:
        """Writes a graph for a CPU; what another file holds already, it refers to."""
        parameters, full = count_parameters(model), weight_bytes(model)
        narrow(model)
        shared = share_weights(model, *holders)
        file = f"graphs/{name}.{CPU}.onnx"
        self._writer.add_file(file, shared.model.SerializeToString(deterministic=True))
        return GraphVariant(
            file=file,
            precision="fp32",
            opset=next(o.version for o in model.opset_import if not o.domain),
            nodes=len(model.graph.node),
            parameters=parameters,
            weight_bytes=full,
            onnxruntime_only=True,
        )

    def _add_graph(self, model: onnx.ModelProto, graph: str, variant: Any) -> GraphVariant:
        """Writes a plain graph; what an earlier file holds already, it refers to."""
        parameters = count_parameters(model)
        full = weight_bytes(model)
        narrowed = narrow(model) if variant == "fp32" else 0
        earlier = [held["fp16"] for held in (self.entries[graph],) if "fp16" in held]
        earlier += [self.entries[other][variant] for other in self._lenders.get(graph, ()) if other in self.entries]
        shared = share_weights(model, *(self._writer.root / e.file for e in earlier))
        file = f"graphs/{graph}.{variant}.onnx"
        self._writer.add_file(file, shared.model.SerializeToString(deterministic=True))
        return GraphVariant(
            file=file,
            precision=variant,
            opset=next(o.version for o in model.opset_import if not o.domain),
            nodes=len(model.graph.node),
            parameters=parameters,
            weight_bytes=full if narrowed or shared.saved else None,
        )


@contextmanager
def rounded_files(files: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """Copies of fp16 files that compute as a GPU does (see `rounded`); run them without graph optimisations."""
    with tempfile.TemporaryDirectory() as folder:
        copies = {graph: Path(folder) / f"{graph}.onnx" for graph in files}
        for graph, file in files.items():
            onnx.save(rounded(onnx.load(file)), copies[graph])
        yield copies


def default_name(checkpoint: str, fallback: str = "sam2") -> str:
    """Bundle name from a hub id or file name: ``facebook/sam2.1-hiera-tiny`` gives ``sam2.1-hiera-tiny``."""
    stem = re.sub(r"\.(pt|pth)$", "", checkpoint.rsplit("/", 1)[-1])
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-")[:128]
    return cleaned or fallback


def tool_versions() -> dict[str, str]:
    """Versions of everything that shapes the graphs."""
    packages = ("pixano-edge", "torch", "transformers", "onnx", "onnxscript")
    return {
        "python": platform.python_version(),
        **{package: installed_version(package) or "not installed as a package" for package in packages},
        "onnxruntime": module_version("onnxruntime", ORT_WHEELS) or "not installed",
    }


def now() -> datetime:
    """UTC, to the second."""
    return datetime.now(timezone.utc).replace(microsecond=0)
