"""Graphs for CPUs added to a bundle that was exported before there were any."""

from __future__ import annotations

from pathlib import Path

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.bundle.writer import BundleWriter
from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.engine.contracts import sam2_video
from pixano_edge.engine.errors import ExportError
from pixano_edge.engine.models.sam2.verify import verify_bundle
from pixano_edge.export.pipeline import GraphExport, Progress, Steps
from pixano_edge.export.sam2 import checkpoint as checkpoints
from pixano_edge.export.sam2 import click_graphs, graphs, precision
from pixano_edge.export.sam2.feeds import random_feeds

FITTED = (contract.IMAGE_ENCODER, sam2_video.MEMORY_ATTENTION)
"""Graphs that get a second form; the mask decoder's are the graphs of clicks."""


def fit_for_cpu(exporter: GraphExport, loaded: checkpoints.Checkpoint) -> None:
    """Adds what a bundle of SAM 2 has for ONNX Runtime's CPU provider; its plain graphs are written already."""
    exporter.fit_for_cpu(
        [graph for graph in FITTED if graph in exporter.entries],
        click_graphs.parts(loaded.model, loaded.constants),
        lambda spec: graphs.random_inputs(spec, {"P": 2, "N": 3}),
    )


def add_cpu_graphs(
    bundle: Path | str, checkpoint: Path | str, *, threads: int | None = None, progress: Progress | None = None
) -> Path:
    """Replaces a bundle by itself with graphs for CPUs, whose answers are compared with its golden samples.

    Args:
        bundle: Folder of a bundle of SAM 2.
        checkpoint: What it was exported from.
        threads: Threads of ONNX Runtime while comparing.
        progress: Called before each step.

    Returns:
        The bundle's folder.

    Raises:
        BundleError: No bundle there, or its golden samples are gone.
        ExportError: Another checkpoint, or the answers differ from PyTorch's: then the bundle is as it was.
    """
    folder = Path(bundle)
    old = Bundle.open(folder)
    step = Steps(progress, 3)
    step("Loading the checkpoint")
    loaded = checkpoints.load(checkpoint, image_only=True)
    if old.manifest.family != contract.FAMILY or loaded.source.sha256 != old.manifest.source.sha256:
        raise ExportError(
            f"'{checkpoint}' is not what '{old.manifest.name}' was exported from.",
            "Give its own checkpoint, or export this one to a new bundle.",
        )
    with BundleWriter(folder, overwrite=True) as writer:
        for name in old.manifest.files:
            if name not in {entry.file for entry in old.manifest.cpu_graphs.values()}:
                writer.add_file(name, old.file(name))
        exporter = GraphExport(
            writer, old.specs, ("fp32",), step, threads, feeds=random_feeds, keep=precision.kept_in_fp32
        )
        exporter.entries = {name: dict(graph.variants) for name, graph in old.manifest.graphs.items()}
        fit_for_cpu(exporter, loaded)
        fields = old.manifest.model_dump(exclude={"files", "schema_version"})
        fields["cpu_graphs"] = {g: v.model_dump() for g, v in exporter.cpu_entries.items()}
        step("Comparing with the golden samples")
        return writer.finish(fields, check=lambda root: _compare(root, threads))


def _compare(bundle: Path, threads: int | None) -> None:
    report = verify_bundle(bundle, "cpu", threads=threads)
    if not report.passed:
        raise ExportError(
            f"With the graphs for CPUs the answers differ from PyTorch's: {'; '.join(report.problems)}.",
            "The bundle is as it was. Please report this.",
        )
