"""Checkpoint to bundle: load, export, measure, keep or throw away."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pixano_edge.engine.bundle.manifest import ParityReport, Postprocess, Preprocess
from pixano_edge.engine.bundle.writer import BundleWriter
from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.engine.contracts import sam2_video
from pixano_edge.engine.errors import BundleError, ExportError
from pixano_edge.export.photos import Photo, default_photos, load_photos
from pixano_edge.export.pipeline import (
    VARIANTS,
    GraphExport,
    Progress,
    Steps,
    check_request,
    default_name,
    now,
    rounded_files,
    tool_versions,
)
from pixano_edge.export.sam2 import checkpoint as checkpoints
from pixano_edge.export.sam2 import graphs, parity, precision, video_graphs, video_parity
from pixano_edge.export.sam2.cpu_graphs import fit_for_cpu
from pixano_edge.export.sam2.feeds import random_feeds
from pixano_edge.export.sam2.golden import add_golden, picture_note, reduced
from pixano_edge.export.sam2.video_golden import add_golden_clip

# Graphs whose weights another one has too; the lender is exported before.
_LENDERS = {sam2_video.TRACK_DECODER: (contract.MASK_DECODER,)}


def export_sam2(
    checkpoint: str | Path,
    destination: Path | str,
    *,
    name: str | None = None,
    variants: Sequence[str] = VARIANTS,
    photos: Sequence[Path | Photo] | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
    licence: str | None = None,
    force: bool = False,
    threads: int | None = None,
    image_only: bool = False,
) -> Path:
    """Exports SAM 2 / 2.1, with tracking where the checkpoint has it, and proves it equal to PyTorch.

    Args:
        checkpoint: Folder in transformers' format, hub id, or original ``.pt`` file.
        destination: Folder of the bundle; made only when everything has passed.
        name: Name in the manifest; from the checkpoint if None.
        variants: ``fp32``, or ``fp32`` and ``fp16``.
        photos: Pictures for parity and golden samples (the first two go into the bundle, reduced), files or loaded;
            two real photos of the scikit-image wheel if None. A model that knows no photos needs pictures of its own
            kind.
        progress: Called before each step.
        revision: Branch, tag or commit of a hub id.
        licence: SPDX identifier that overrides what the checkpoint says.
        force: Replace a bundle at `destination`.
        threads: Threads of ONNX Runtime while measuring.
        image_only: Leave tracking out. A checkpoint without memory modules gives a bundle without it in any case,
            and a note says so.

    Returns:
        The bundle's folder.

    Raises:
        ExportError: The checkpoint cannot be used or exported, or the destination cannot be written;
            `parity.ParityError` when the graphs do not match.
    """
    ordered = check_request(name, variants)
    step = Steps(progress, count_steps(ordered, image_only))
    try:
        # Opened first: a taken or read-only destination is found out before minutes of work.
        with BundleWriter(destination, overwrite=force) as writer:
            step("Loading the checkpoint")
            loaded = checkpoints.load(checkpoint, revision=revision, licence=licence, image_only=image_only)
            step.total = count_steps(ordered, loaded.video is None)
            pictures = load_photos(photos) if photos else default_photos()
            return _Export(writer, loaded, ordered, pictures, step, threads).run(name)
    except BundleError as error:
        raise ExportError(error.message, error.action) from error


class _Export:
    """One export, step by step.

    Args:
        writer: The new bundle.
        loaded: Its checkpoint.
        variants: ``fp32``, perhaps ``fp16``, in this order.
        photos: For parity and golden samples.
        step: Reports progress.
        threads: Threads of ONNX Runtime.
    """

    def __init__(
        self,
        writer: BundleWriter,
        loaded: checkpoints.Checkpoint,
        variants: Sequence[str],
        photos: Sequence[Photo],
        step: Steps,
        threads: int | None,
    ) -> None:
        self._writer, self._loaded, self._variants = writer, loaded, variants
        self._photos, self._step, self._threads = photos, step, threads
        self._constants = loaded.constants.to_dict()
        if loaded.video is not None:
            self._constants[contract.VIDEO] = loaded.video.to_dict()
        specs = sam2_video.family_graphs(self._constants)
        self._graphs = GraphExport(
            writer, specs, variants, step, threads, feeds=random_feeds, keep=precision.kept_in_fp32, lenders=_LENDERS
        )
        self._notes = list(loaded.notes)

    def run(self, name: str | None) -> Path:
        """Does everything, and returns the folder of the finished bundle."""
        modules = graphs.modules(self._loaded.model)
        if self._loaded.video_model is not None:
            modules |= video_graphs.modules(self._loaded.video_model)
        self._graphs.export(modules, self._example)
        self._graphs.fit_for_tensorrt()
        fit_for_cpu(self._graphs, self._loaded)
        self._notes += self._graphs.notes
        report = self._measure()
        memory = self._graphs.measure_memory()
        self._step("Writing golden samples")
        golden = add_golden(self._writer, self._loaded.model, self._photos, self._loaded.constants)
        self._notes += [picture_note(g, photo) for g, photo in zip(golden, self._photos)]
        constants, video = self._loaded.constants, self._loaded.video
        clip = None
        if video is not None:
            picture = reduced(self._photos[0], constants).pixels
            model = self._loaded.video_model
            clip = add_golden_clip(self._writer, model, golden[0].image, picture, constants, video).model_dump()
        return self._writer.finish(
            {
                "name": name or default_name(self._loaded.source.checkpoint),
                "family": contract.FAMILY,
                "created": now(),
                "source": self._loaded.source.model_dump(),
                "licence": self._loaded.licence.model_dump(),
                "tools": tool_versions(),
                "constants": self._constants,
                "preprocess": Preprocess(
                    image_size=constants.image_size, mean=constants.mean, std=constants.std
                ).model_dump(),
                "postprocess": Postprocess(mask_threshold=constants.mask_threshold).model_dump(),
                "graphs": self._graphs.manifest_graphs(),
                "cpu_graphs": {g: v.model_dump() for g, v in self._graphs.cpu_entries.items()},
                "memory": [m.model_dump() for m in memory],
                "parity": report.model_dump(),
                "golden": [g.model_dump() for g in golden],
                "golden_clip": clip,
                "notes": self._notes,
            }
        )

    def _example(self, graph: str) -> tuple[Tensor, ...]:
        constants, video = self._loaded.constants, self._loaded.video
        if video is None or graph in contract.graphs(constants):
            return graphs.example_inputs(graph, constants)
        return video_graphs.example_inputs(graph, constants, video)

    def _measure(self) -> ParityReport:
        """Every variant against PyTorch; raises `parity.ParityError` when one is too far off."""
        self._step("Asking PyTorch")
        suite = parity.build_suite(self._loaded.model, self._photos, self._loaded.constants)
        video = None
        if self._loaded.video is not None:
            video = video_parity.build_suite(
                self._loaded.video_model, self._photos, self._loaded.constants, self._loaded.video
            )
            if 4 * video.shown < len(video.answers) * len(video.clip.objects):
                self._notes.append(
                    f"Only {video.shown} of the clip's masks are not empty: for this model its IoU says little."
                )
        measured = []
        for variant, files in self._graphs.measured_variants():
            measured += _measure(files, suite, video, variant, self._threads)
        return parity.require(suite, measured)


def count_steps(variants: Sequence[str], image_only: bool = False) -> int:
    """Number of steps that `export_sam2` reports, as long as the checkpoint has what is asked for."""
    return 6 + 2 * (2 if image_only else 5) + 2 * len(variants)


def _measure(
    files: dict[str, Path],
    suite: parity.Suite,
    video: video_parity.VideoSuite | None,
    variant: str,
    threads: int | None,
) -> list[parity.VariantParity]:
    """Figures of one variant; fp16 twice, since ONNX Runtime's CPU provider hides most of its error."""

    def compare(files: dict[str, Path], name: str, optimise: bool = True) -> parity.VariantParity:
        run = parity.onnx_runner(files, threads, optimise)
        if contract.CLICK_DECODER in files:
            run = parity.click_runner(run)
        found = parity.compare(run, suite, name)
        if video is not None:
            found.tensors += video_parity.compare_tensors(run, video, name)
            found.clip = video_parity.compare_clip(files, video, name, threads, optimise)
        return found

    if variant.startswith("fp32"):
        return [compare(files, variant)]
    with rounded_files(files) as copies:
        as_on_gpu = compare(copies, variant, optimise=False)
    if variant != parity.FP16:
        return [as_on_gpu]
    return [as_on_gpu, compare(files, parity.FP16_CPU)]
