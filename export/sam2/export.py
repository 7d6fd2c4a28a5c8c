"""Checkpoint to bundle: load, export, measure, keep or throw away."""

from __future__ import annotations

import platform
import re
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import onnx

from pixano_edge.engine.bundle.manifest import NAME_PATTERN, Graph, GraphVariant, Postprocess, Preprocess
from pixano_edge.engine.bundle.writer import BundleWriter
from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.engine.errors import BundleError, ExportError
from pixano_edge.engine.libraries import ORT_WHEELS, installed_version, module_version
from pixano_edge.export.fp16 import rounded, to_fp16
from pixano_edge.export.onnx_graph import count_parameters, export_graph
from pixano_edge.export.operators import FINDING, check_tensorrt_10_3
from pixano_edge.export.photos import default_photos, load_photos
from pixano_edge.export.sam2 import checkpoint as checkpoints
from pixano_edge.export.sam2 import graphs, parity
from pixano_edge.export.sam2.feeds import random_feeds
from pixano_edge.export.sam2.golden import add_golden, picture_note
from pixano_edge.export.tensorrt_graph import SUFFIX, TensorrtVariants
from pixano_edge.export.work_memory import measure_graphs

VARIANTS = ("fp32", "fp16")
Progress = Callable[[str, int, int], None]
"""Called at the start of each step with its name, its number from 0, and the number of steps."""


def export_sam2(
    checkpoint: str | Path,
    destination: Path | str,
    *,
    name: str | None = None,
    variants: Sequence[str] = VARIANTS,
    photos: Sequence[Path] | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
    licence: str | None = None,
    force: bool = False,
    threads: int | None = None,
) -> Path:
    """Exports SAM 2 / 2.1 image segmentation and proves it equal to PyTorch.

    Args:
        checkpoint: Folder in transformers' format, hub id, or original ``.pt`` file.
        destination: Folder of the bundle; made only when everything has passed.
        name: Name in the manifest; from the checkpoint if None.
        variants: ``fp32``, or ``fp32`` and ``fp16``.
        photos: Picture files for parity and golden samples (the first two go into the bundle, reduced); two real
            photos of the scikit-image wheel if None. A model that knows no photos needs pictures of its own kind.
        progress: Called before each step.
        revision: Branch, tag or commit of a hub id.
        licence: SPDX identifier that overrides what the checkpoint says.
        force: Replace a bundle at `destination`.
        threads: Threads of ONNX Runtime while measuring.

    Returns:
        The bundle's folder.

    Raises:
        ExportError: The checkpoint cannot be used or exported, or the destination cannot be written;
            `parity.ParityError` when the graphs do not match.
    """
    try:
        return _export(
            checkpoint, Path(destination), name, variants, photos, progress, revision, licence, force, threads
        )
    except BundleError as error:
        raise ExportError(error.message, error.action) from error


def _export(
    checkpoint: str | Path,
    destination: Path,
    name: str | None,
    variants: Sequence[str],
    photos: Sequence[Path] | None,
    progress: Progress | None,
    revision: str | None,
    licence: str | None,
    force: bool,
    threads: int | None,
) -> Path:
    unknown = [v for v in variants if v not in VARIANTS]
    if unknown or "fp32" not in variants:
        raise ExportError(f"Variants {list(variants)} cannot be exported.", "Use fp32, or fp32,fp16.")
    if name is not None and not re.fullmatch(NAME_PATTERN, name):
        raise ExportError(f"'{name}' is not a bundle name.", "Use letters, digits, '.', '_' and '-'.")
    ordered = [v for v in VARIANTS if v in variants]
    step = _Steps(progress, total=count_steps(ordered))

    # Opened first: a taken or read-only destination is found out before minutes of work.
    with BundleWriter(destination, overwrite=force) as writer:
        step("Loading the checkpoint")
        loaded = checkpoints.load(checkpoint, revision=revision, licence=licence)
        pictures = load_photos(photos) if photos else default_photos()
        constants = loaded.constants
        specs = contract.graphs(constants)
        modules = graphs.modules(loaded.model)
        entries: dict[str, dict[str, GraphVariant]] = {graph: {} for graph in specs}
        notes = list(loaded.notes)
        if "fp16" in ordered:
            notes.append(
                "Parity of fp16: every intermediate value rounded to fp16, as a GPU does; "
                "fp16-cpu: the same files in ONNX Runtime's CPU provider, which computes mostly in fp32."
            )

        for graph, spec in specs.items():
            step(f"Exporting {graph}")
            model = export_graph(modules[graph], spec, graphs.example_inputs(graph, constants))
            for variant in ordered:
                stored = model if variant == "fp32" else to_fp16(model)
                notes += [f"{FINDING}{variant} {graph}: {p}" for p in check_tensorrt_10_3(stored)]
                entries[graph][variant] = _add_graph(writer, stored, graph, variant)
        tensorrt = TensorrtVariants(writer, random_feeds, threads)
        for graph, spec in specs.items():
            step(f"Fitting {graph} for TensorRT")
            entries[graph] |= tensorrt.add(spec, dict(entries[graph]))
        tensorrt.finish()
        notes += [f"{FINDING}{finding}" for finding in tensorrt.findings()]
        step("Asking PyTorch")
        suite = parity.build_suite(loaded.model, pictures, constants)
        measured = []
        for variant in [*ordered, *(v + SUFFIX for v in ordered)]:
            step(f"Measuring {variant}")
            # A TensorRT variant that is the plain file has the plain variant's figures.
            if variant in ordered or tensorrt.changed(variant):
                files = {graph: writer.root / entries[graph][variant].file for graph in specs}
                measured += _measure(files, suite, variant, threads)
        report = parity.require(suite, measured)
        step("Measuring memory")
        memory = measure_graphs(writer.root, specs, entries, threads)
        step("Writing golden samples")
        golden = add_golden(writer, loaded.model, pictures, constants)
        notes += [picture_note(g, photo) for g, photo in zip(golden, pictures)]
        return writer.finish(
            {
                "name": name or default_name(loaded.source.checkpoint),
                "family": contract.FAMILY,
                "created": datetime.now(timezone.utc).replace(microsecond=0),
                "source": loaded.source.model_dump(),
                "licence": loaded.licence.model_dump(),
                "tools": tool_versions(),
                "constants": constants.to_dict(),
                "preprocess": Preprocess(
                    image_size=constants.image_size, mean=constants.mean, std=constants.std
                ).model_dump(),
                "postprocess": Postprocess(mask_threshold=constants.mask_threshold).model_dump(),
                "graphs": {g: Graph(variants=v).model_dump() for g, v in entries.items()},
                "memory": [m.model_dump() for m in memory],
                "parity": report.model_dump(),
                "golden": [g.model_dump() for g in golden],
                "notes": notes,
            }
        )


def count_steps(variants: Sequence[str]) -> int:
    """Number of steps that `export_sam2` reports for these variants."""
    return 4 + 2 * len(contract.graphs(contract.Sam2Constants())) + 2 * len(variants)


def default_name(checkpoint: str) -> str:
    """Bundle name from a hub id or file name: ``facebook/sam2.1-hiera-tiny`` gives ``sam2.1-hiera-tiny``."""
    stem = re.sub(r"\.(pt|pth)$", "", checkpoint.rsplit("/", 1)[-1])
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-")[:128]
    return cleaned or "sam2"


def tool_versions() -> dict[str, str]:
    """Versions of everything that shapes the graphs."""
    packages = ("pixano-edge", "torch", "transformers", "onnx", "onnxscript")
    return {
        "python": platform.python_version(),
        **{package: installed_version(package) or "not installed as a package" for package in packages},
        "onnxruntime": module_version("onnxruntime", ORT_WHEELS) or "not installed",
    }


def _add_graph(writer: BundleWriter, model: onnx.ModelProto, graph: str, variant: Any) -> GraphVariant:
    file = f"graphs/{variant}/{graph}.onnx"
    writer.add_file(file, model.SerializeToString())
    return GraphVariant(
        file=file,
        precision=variant,
        opset=next(o.version for o in model.opset_import if not o.domain),
        nodes=len(model.graph.node),
        parameters=count_parameters(model),
    )


def _measure(
    files: dict[str, Path], suite: parity.Suite, variant: str, threads: int | None
) -> list[parity.VariantParity]:
    """Figures of one variant; fp16 twice, since ONNX Runtime's CPU provider hides most of its error."""
    if variant.startswith("fp32"):
        return [parity.compare(parity.onnx_runner(files, threads), suite, variant)]
    with tempfile.TemporaryDirectory() as folder:
        copies = {graph: Path(folder) / f"{graph}.onnx" for graph in files}
        for graph, file in files.items():
            onnx.save(rounded(onnx.load(file)), copies[graph])
        as_on_gpu = parity.compare(parity.onnx_runner(copies, threads, optimise=False), suite, variant)
    if variant != parity.FP16:
        return [as_on_gpu]
    return [as_on_gpu, parity.compare(parity.onnx_runner(files, threads), suite, parity.FP16_CPU)]


class _Steps:
    """Numbers the steps for the progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def __call__(self, name: str) -> None:
        if self._progress:
            self._progress(name, self._done, self._total)
        self._done += 1
