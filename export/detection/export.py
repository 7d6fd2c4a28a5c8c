"""Checkpoint to bundle for detectors: export, measure, keep or throw away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pixano_edge.engine.bundle.manifest import Postprocess
from pixano_edge.engine.bundle.writer import BundleWriter
from pixano_edge.engine.errors import BundleError, ExportError, PromptError
from pixano_edge.export.detection import parity
from pixano_edge.export.detection.family import DetectorFamily, GraphRun
from pixano_edge.export.detection.golden import add_golden
from pixano_edge.export.photos import Photo, default_photos, load_photos
from pixano_edge.export.pipeline import (
    VARIANTS,
    GraphExport,
    Progress,
    Steps,
    check_request,
    default_name,
    now,
    tool_versions,
)
from pixano_edge.export.sam2.golden import picture_note

GRAPHS = 2
"""Of every family so far."""


def export_detector(
    load: Callable[[], DetectorFamily],
    destination: Path | str,
    *,
    name: str | None = None,
    variants: Sequence[str] = VARIANTS,
    photos: Sequence[Path | Photo] | None = None,
    classes: Sequence[Sequence[str]] | None = None,
    progress: Progress | None = None,
    force: bool = False,
    threads: int | None = None,
) -> Path:
    """Exports a detector and proves it equal to PyTorch.

    Args:
        load: Loads the checkpoint.
        destination: Folder of the bundle; made only when everything has passed.
        name: Name in the manifest; from the checkpoint if None.
        variants: ``fp32``, or ``fp32`` and ``fp16``.
        photos: Pictures for parity and golden samples (the first two go into the bundle, reduced), files or loaded;
            two real photos of the scikit-image wheel if None.
        classes: Lists of class names to ask for on each picture; `parity.CLASS_LISTS` if None. A model that knows few
            words needs its own.
        progress: Called before each step.
        force: Replace a bundle at `destination`.
        threads: Threads of ONNX Runtime while measuring.

    Returns:
        The bundle's folder.

    Raises:
        ExportError: The checkpoint cannot be used or exported, or asked for these classes, or the destination cannot be
            written; `ParityError` when the graphs do not match.
    """
    ordered = check_request(name, variants)
    step = Steps(progress, count_steps(ordered))
    try:
        # Opened first: a taken or read-only destination is found out before minutes of work.
        with BundleWriter(destination, overwrite=force) as writer:
            step("Loading the checkpoint")
            family = load()
            for one in classes or ():
                family.check_classes(one)
            pictures = load_photos(photos) if photos else default_photos()
            for file, content in family.files.items():
                writer.add_file(file, content)
            graphs = GraphExport(
                writer,
                family.specs,
                ordered,
                step,
                threads,
                feeds=family.feeds,
                keep=family.keep,
                settle=lambda spec, want, got: family.settle(GraphRun(spec.name, {}, want), got),
            )
            graphs.export(family.modules(), family.example)
            graphs.fit_for_tensorrt()
            step("Asking PyTorch")
            suite = parity.build_suite(family, pictures, classes)
            measured = []
            for variant, files in graphs.measured_variants():
                measured += parity.measure(family, files, suite, variant, threads)
            report = parity.require(suite, measured)
            memory = graphs.measure_memory()
            step("Writing golden samples")
            golden = add_golden(writer, family, pictures, classes)
            notes = [*family.notes, *graphs.notes, *(picture_note(g, photo) for g, photo in zip(golden, pictures))]
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
                    "graphs": graphs.manifest_graphs(),
                    "memory": [m.model_dump() for m in memory],
                    "parity": report.model_dump(),
                    "golden": [g.model_dump() for g in golden],
                    "notes": notes,
                }
            )
    except BundleError as error:
        raise ExportError(error.message, error.action) from error
    except PromptError as error:
        raise ExportError(f"The classes to measure parity on do not fit. {error.message}", error.action) from error


def count_steps(variants: Sequence[str]) -> int:
    """Number of steps that `export_detector` reports."""
    return 4 + 2 * GRAPHS + 2 * len(variants)
