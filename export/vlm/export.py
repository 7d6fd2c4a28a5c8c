"""Checkpoint to bundle for vision-language models: export, measure, keep or throw away."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx

from pixano_edge.engine.bundle.manifest import NAME_PATTERN, GraphMemory, GraphVariant, Postprocess
from pixano_edge.engine.bundle.writer import BundleWriter
from pixano_edge.engine.contracts import decoder as contract
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import BundleError, ExportError
from pixano_edge.export.decoder.graph import build_decoder, build_embedding
from pixano_edge.export.decoder.nodes import OPSET
from pixano_edge.export.decoder.store import WeightStore
from pixano_edge.export.graph_sizes import count_parameters, weight_bytes
from pixano_edge.export.onnx_graph import check_contract
from pixano_edge.export.operators import FINDING, check_tensorrt_10_3
from pixano_edge.export.photos import Photo, default_photos, load_photos
from pixano_edge.export.pipeline import GraphExport, Progress, Steps, default_name, now, tool_versions
from pixano_edge.export.sam2.golden import picture_note
from pixano_edge.export.tensorrt_graph import SUFFIX
from pixano_edge.export.vlm import parity
from pixano_edge.export.vlm.family import VlmFamily
from pixano_edge.export.vlm.golden import add_golden
from pixano_edge.export.work_memory import fills_of, measure_file

VARIANTS = ("fp32", "fp16", "int4")
DEFAULT_VARIANTS = ("fp32", "fp16")
QUESTIONS = ("Describe this image in detail.", "What is on this image, and how many of it?")
TOKENS = 64
"""Of every answer that parity is measured on."""
INT4_NOTE = (
    "int4: the decoder's matrices in 4 bits and lm_head in 8, rounded to nearest in blocks of 32, for ONNX Runtime "
    "alone; everything else is fp32. What it does to answers depends on the checkpoint: see the parity report's tokens."
)
_BUILT = (contract.EMBED_TOKENS, contract.DECODER)


def export_vlm(
    load: Callable[[], VlmFamily],
    destination: Path | str,
    *,
    name: str | None = None,
    variants: Sequence[str] = DEFAULT_VARIANTS,
    photos: Sequence[Path | Photo] | None = None,
    questions: Sequence[str] | None = None,
    tokens: int = TOKENS,
    progress: Progress | None = None,
    force: bool = False,
    threads: int | None = None,
) -> Path:
    """Exports a vision-language model and proves it equal to PyTorch.

    Args:
        load: Loads the checkpoint.
        destination: Folder of the bundle; made only when everything has passed.
        name: Name in the manifest; from the checkpoint if None.
        variants: ``fp32``, perhaps with ``fp16`` and ``int4``.
        photos: Pictures for parity and golden samples (the first two go into the bundle, reduced), files or loaded;
            two real photos of the scikit-image wheel if None.
        questions: Asked about each picture; `QUESTIONS` if None.
        tokens: Tokens of every answer, 2 or more.
        progress: Called before each step.
        force: Replace a bundle at `destination`.
        threads: Threads of ONNX Runtime while measuring.

    Returns:
        The bundle's folder.

    Raises:
        ExportError: The checkpoint cannot be used or exported, or the destination cannot be written; `ParityError` when
            the graphs do not match.
    """
    ordered = check_request(name, variants, tokens)
    step = Steps(progress, count_steps(ordered))
    asked = list(questions or QUESTIONS)
    try:
        # Opened first: a taken or read-only destination is found out before minutes of work.
        with BundleWriter(destination, overwrite=force) as writer:
            step("Loading the checkpoint")
            family = load()
            pictures = load_photos(photos) if photos else default_photos()
            for file, content in family.files.items():
                writer.add_file(file, content)
            vision = GraphExport(
                writer,
                family.specs,
                [v for v in ordered if v != "int4"],
                step,
                threads,
                feeds=family.feeds,
                keep=family.keep,
            )
            vision.export(family.modules(), family.example)
            vision.fit_for_tensorrt()
            step("Writing the decoder")
            built = DecoderExport(writer, family, ordered)
            step("Asking PyTorch")
            answers = [family.ask(photo, question, tokens) for photo in pictures for question in asked]
            measured = []
            for variant, files in vision.measured_variants():
                measured += parity.measure_vision(files, family.specs, answers, variant, threads)
            for variant, held in built.entries[contract.DECODER].items():
                step(f"Measuring the decoder's {variant}")
                path = writer.root / held.file
                measured.append(parity.measure_decoder(path, family.decoder, answers, variant, threads))
            for variant in (v for v in ordered if v != "int4"):
                path = writer.root / built.entries[contract.EMBED_TOKENS][variant].file
                measured.append(parity.compare_embedding(path, answers, variant, threads))
            report = parity.require(family.reference, answers, measured)
            del answers
            entries = {**vision.entries, **built.entries}
            if "int4" in ordered:
                for graph in family.specs:
                    entries[graph] = {**entries[graph], "int4": as_int4(entries[graph]["fp32"])}
            memory = [*vision.measure_memory(), *built.measure_memory(threads)]
            step("Writing golden samples")
            golden = add_golden(writer, family, pictures, asked)
            notes = [*family.notes, *vision.notes, *built.notes]
            notes += [picture_note(g, photo) for g, photo in zip(golden, pictures)]
            return writer.finish(
                {
                    "name": name or default_name(family.source.checkpoint, family.family),
                    "family": family.family,
                    "created": now(),
                    "source": family.source.model_dump(),
                    "licence": family.licence.model_dump(),
                    "tools": tool_versions(),
                    "constants": family.constants,
                    "preprocess": family.preprocess.model_dump(),
                    "postprocess": Postprocess().model_dump(),
                    "graphs": {
                        g: {"variants": {k: v.model_dump() for k, v in held.items()}} for g, held in entries.items()
                    },
                    "memory": [m.model_dump() for m in memory],
                    "parity": report.model_dump(),
                    "golden": [g.model_dump() for g in golden],
                    "notes": notes,
                }
            )
    except BundleError as error:
        raise ExportError(error.message, error.action) from error


def check_request(name: str | None, variants: Sequence[str], tokens: int = TOKENS) -> list[str]:
    """The variants from full to reduced; raises ExportError for what cannot be."""
    if name is not None and not re.fullmatch(NAME_PATTERN, name):
        raise ExportError(f"'{name}' is not a bundle name.", "Use letters, digits, '.', '_' and '-'.")
    unknown = [v for v in variants if v not in VARIANTS]
    if unknown or "fp32" not in variants:
        raise ExportError(f"Variants {list(variants)} cannot be exported.", "Use fp32, and with it fp16 or int4.")
    if tokens < 2:
        raise ExportError(f"Answers of {tokens} tokens measure nothing.", "Use 2 or more, such as 64.")
    return [v for v in VARIANTS if v in variants]


def count_steps(variants: Sequence[str]) -> int:
    """Number of steps that `export_vlm` reports, with one vision graph."""
    floats = sum(v != "int4" for v in variants)
    return 4 + 2 + 2 * floats + 2 * floats + (len(variants) - floats) + 1


def as_int4(plain: GraphVariant) -> GraphVariant:
    """The entry of a graph that the int4 variant runs as it is."""
    return plain.model_copy(update={"precision": "int4", "onnxruntime_only": True})


class DecoderExport:
    """Writes decoder and token embedding in every variant.

    Args:
        writer: The new bundle.
        family: Loaded.
        variants: In order.

    Attributes:
        entries: Manifest entries by graph and variant.
        notes: Remarks for the manifest.
    """

    def __init__(self, writer: BundleWriter, family: VlmFamily, variants: Sequence[str]) -> None:
        self._writer, self._decoder = writer, family.decoder
        self.entries: dict[str, dict[str, GraphVariant]] = {graph: {} for graph in _BUILT}
        self.notes: list[str] = []
        self._parameters = 0
        floats = [v for v in variants if v != "int4"]
        # Where fp16 holds the weights exactly, the fp32 graphs read them from there.
        groups = [floats] if family.weights.fit_half else [[v] for v in floats]
        for precisions in (*groups, *([v] for v in variants if v == "int4")):
            self._write(family, precisions)
        for graph, held in self.entries.items():  # plain ones first
            self.entries[graph] = dict(sorted(held.items(), key=lambda item: item[0].endswith(SUFFIX)))

    def _write(self, family: VlmFamily, precisions: Sequence[str]) -> None:
        """The graphs of precisions that share one file of weights, which is named after the last."""
        quantised = precisions[-1] == "int4"
        graphs: dict[tuple[str, str, str], onnx.ModelProto] = {}
        with WeightStore(self._writer.root / "graphs" / f"decoder.{precisions[-1]}.weights") as store:
            targets = (contract.ONNX,) if quantised else (contract.ONNX, contract.TENSORRT)
            for precision in precisions:
                for target in targets:
                    model = build_decoder(family.weights, store, precision, target)
                    graphs[precision, contract.DECODER, target] = model
                if not quantised:
                    model = build_embedding(family.weights, store, precision)
                    graphs[precision, contract.EMBED_TOKENS, contract.ONNX] = model
        store.seal(*graphs.values())
        for (precision, graph, target), model in graphs.items():
            check_contract(model, self._spec(graph, precision, target))
            tensorrt = target == contract.TENSORRT
            file = f"graphs/{graph}.{precision}{'.tensorrt' if tensorrt else ''}.onnx"
            self._writer.add_file(file, model.SerializeToString(deterministic=True))
            if not self._parameters:
                self._parameters = count_parameters(model)
            contrib = graph == contract.DECODER and not tensorrt
            entry = GraphVariant(
                file=file,
                precision=precision,  # type: ignore[arg-type]
                opset=OPSET,
                target=target,  # type: ignore[arg-type]
                nodes=len(model.graph.node),
                parameters=self._parameters if graph == contract.DECODER else count_parameters(model),
                weight_bytes=weight_bytes(model),
                onnxruntime_only=contrib,
            )
            variant = f"{precision}{SUFFIX}" if tensorrt else precision
            self.entries[graph][variant] = entry
            if not contrib:
                self.notes += [f"{FINDING}{variant} {graph}: {p}" for p in check_tensorrt_10_3(model)]
                if not tensorrt:  # the embedding has nothing to fit
                    self.entries[graph][f"{precision}{SUFFIX}"] = entry.model_copy(update={"target": "tensorrt"})
        if quantised:
            self.entries[contract.EMBED_TOKENS]["int4"] = as_int4(self.entries[contract.EMBED_TOKENS]["fp32"])
            self.notes.append(INT4_NOTE)

    def _spec(self, graph: str, precision: str, target: str) -> GraphSpec:
        if graph == contract.EMBED_TOKENS:
            return contract.embed_tokens(self._decoder)
        return contract.decoder(self._decoder, contract.CACHE_DTYPES[precision], target)

    def measure_memory(self, threads: int | None) -> list[GraphMemory]:
        """Memory of every variant that ONNX Runtime runs."""
        found = []
        for graph, held in self.entries.items():
            for variant, entry in held.items():
                if entry.target != contract.ONNX:
                    continue
                spec = self._spec(graph, entry.precision, contract.ONNX)
                measured = measure_file(self._writer.root / entry.file, spec, threads, fills_of(spec))
                if measured is not None:
                    found.append(GraphMemory(graph=graph, variant=variant, **measured))
        return found
