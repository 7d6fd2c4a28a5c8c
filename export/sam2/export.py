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
from torch import Tensor

from pixano_edge.engine.bundle.manifest import NAME_PATTERN, Graph, GraphVariant, ParityReport, Postprocess, Preprocess
from pixano_edge.engine.bundle.writer import BundleWriter
from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.engine.contracts import sam2_video
from pixano_edge.engine.errors import BundleError, ExportError
from pixano_edge.engine.libraries import ORT_WHEELS, installed_version, module_version
from pixano_edge.export.fp16 import rounded, to_fp16
from pixano_edge.export.half_weights import narrow
from pixano_edge.export.onnx_graph import count_parameters, export_graph, weight_bytes
from pixano_edge.export.operators import FINDING, check_tensorrt_10_3
from pixano_edge.export.photos import Photo, default_photos, load_photos
from pixano_edge.export.sam2 import checkpoint as checkpoints
from pixano_edge.export.sam2 import graphs, parity, precision, video_graphs, video_parity
from pixano_edge.export.sam2.feeds import random_feeds
from pixano_edge.export.sam2.golden import add_golden, picture_note, reduced
from pixano_edge.export.sam2.video_golden import add_golden_clip
from pixano_edge.export.shared_weights import share_weights
from pixano_edge.export.tensorrt_graph import SUFFIX, TensorrtVariants

VARIANTS = ("fp32", "fp16")
# Graphs whose weights another one has too; the lender is exported before.
_LENDERS = {sam2_video.TRACK_DECODER: (contract.MASK_DECODER,)}
Progress = Callable[[str, int, int], None]
"""Called at the start of each step with its name, its number from 0, and the number of steps."""


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
    if name is not None and not re.fullmatch(NAME_PATTERN, name):
        raise ExportError(f"'{name}' is not a bundle name.", "Use letters, digits, '.', '_' and '-'.")
    unknown = [v for v in variants if v not in VARIANTS]
    if unknown or "fp32" not in variants:
        raise ExportError(f"Variants {list(variants)} cannot be exported.", "Use fp32, or fp32,fp16.")
    ordered = [v for v in VARIANTS if v in variants]
    step = _Steps(progress, count_steps(ordered, image_only))
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
        step: _Steps,
        threads: int | None,
    ) -> None:
        self._writer, self._loaded, self._variants = writer, loaded, variants
        self._photos, self._step, self._threads = photos, step, threads
        self._constants = loaded.constants.to_dict()
        if loaded.video is not None:
            self._constants[contract.VIDEO] = loaded.video.to_dict()
        self._specs = sam2_video.family_graphs(self._constants)
        self._entries: dict[str, dict[str, GraphVariant]] = {graph: {} for graph in self._specs}
        self._notes = list(loaded.notes)

    def run(self, name: str | None) -> Path:
        """Does everything, and returns the folder of the finished bundle."""
        self._export_graphs()
        self._fit_for_tensorrt()
        report = self._measure()
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
                "created": datetime.now(timezone.utc).replace(microsecond=0),
                "source": self._loaded.source.model_dump(),
                "licence": self._loaded.licence.model_dump(),
                "tools": tool_versions(),
                "constants": self._constants,
                "preprocess": Preprocess(
                    image_size=constants.image_size, mean=constants.mean, std=constants.std
                ).model_dump(),
                "postprocess": Postprocess(mask_threshold=constants.mask_threshold).model_dump(),
                "graphs": {g: Graph(variants=v).model_dump() for g, v in self._entries.items()},
                "parity": report.model_dump(),
                "golden": [g.model_dump() for g in golden],
                "golden_clip": clip,
                "notes": self._notes,
            }
        )

    def _export_graphs(self) -> None:
        """Plain graphs in every precision."""
        modules = graphs.modules(self._loaded.model)
        if self._loaded.video_model is not None:
            modules |= video_graphs.modules(self._loaded.video_model)
        if "fp16" in self._variants:
            self._notes.append(
                "Parity of fp16: every intermediate value rounded to fp16, as a GPU does; "
                "fp16-cpu: the same files in ONNX Runtime's CPU provider, which computes mostly in fp32."
            )
        for graph, spec in self._specs.items():
            self._step(f"Exporting {graph}")
            model = export_graph(modules[graph], spec, self._example(graph))
            for variant in reversed(self._variants):  # fp16 first: fp32 may refer to its weights
                stored = model if variant == "fp32" else to_fp16(model, precision.kept_in_fp32(graph, model))
                self._notes += [f"{FINDING}{variant} {graph}: {p}" for p in check_tensorrt_10_3(stored)]
                self._entries[graph][variant] = self._add_graph(stored, graph, variant)
            self._entries[graph] = {v: self._entries[graph][v] for v in self._variants}

    def _add_graph(self, model: onnx.ModelProto, graph: str, variant: Any) -> GraphVariant:
        """Writes a plain graph; what an earlier file holds already, it refers to."""
        parameters = count_parameters(model)
        full = weight_bytes(model)
        narrowed = narrow(model) if variant == "fp32" else 0
        earlier = [held["fp16"] for held in (self._entries[graph],) if "fp16" in held]
        earlier += [self._entries[other][variant] for other in _LENDERS.get(graph, ()) if other in self._entries]
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

    def _example(self, graph: str) -> tuple[Tensor, ...]:
        constants, video = self._loaded.constants, self._loaded.video
        if video is None or graph in contract.graphs(constants):
            return graphs.example_inputs(graph, constants)
        return video_graphs.example_inputs(graph, constants, video)

    def _fit_for_tensorrt(self) -> None:
        """Variants for TensorRT, and the report on them."""
        tensorrt = TensorrtVariants(self._writer, random_feeds, self._threads, precision.kept_in_fp32)
        for graph, spec in self._specs.items():
            self._step(f"Fitting {graph} for TensorRT")
            self._entries[graph] |= tensorrt.add(spec, dict(self._entries[graph]))
        tensorrt.finish()
        self._notes += [f"{FINDING}{finding}" for finding in tensorrt.findings()]
        self._changed = tensorrt.changed

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
        for variant in [*self._variants, *(v + SUFFIX for v in self._variants)]:
            self._step(f"Measuring {variant}")
            # A TensorRT variant that is the plain file has the plain variant's figures.
            if variant in self._variants or self._changed(variant):
                files = {graph: self._writer.root / held[variant].file for graph, held in self._entries.items()}
                measured += _measure(files, suite, video, variant, self._threads)
        return parity.require(suite, measured)


def count_steps(variants: Sequence[str], image_only: bool = False) -> int:
    """Number of steps that `export_sam2` reports, as long as the checkpoint has what is asked for."""
    return 3 + 2 * (2 if image_only else 5) + 2 * len(variants)


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
        found = parity.compare(run, suite, name)
        if video is not None:
            found.tensors += video_parity.compare_tensors(run, video, name)
            found.clip = video_parity.compare_clip(files, video, name, threads, optimise)
        return found

    if variant.startswith("fp32"):
        return [compare(files, variant)]
    with tempfile.TemporaryDirectory() as folder:
        copies = {graph: Path(folder) / f"{graph}.onnx" for graph in files}
        for graph, file in files.items():
            onnx.save(rounded(onnx.load(file)), copies[graph])
        as_on_gpu = compare(copies, variant, optimise=False)
    if variant != parity.FP16:
        return [as_on_gpu]
    return [as_on_gpu, compare(files, parity.FP16_CPU)]


class _Steps:
    """Numbers the steps for the progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self.total = total
        self._done = 0

    def __call__(self, name: str) -> None:
        if self._progress:
            self._progress(name, self._done, self.total)
        self._done += 1
