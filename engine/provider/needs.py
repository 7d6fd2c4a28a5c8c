"""What a model will take, from its bundle's manifest, before anything is loaded.

Each figure is the best one there is, and says which one that is (`Declared`):

* weights: what an open graph was measured to take at export, on a CPU; elsewhere the sizes of the graph files of the
  variant that will run (the largest one while that is not known yet), or of a TensorRT engine that was built from them;
* work memory: the scratch memory that an engine's file states; else the activations that were measured at export on a
  CPU; else an estimate, a multiple of the largest graph's inputs and outputs;
* bindings and caches follow from the contract and the settings.

What a load on this machine really took replaces them, in the books (`MemoryBudget.correct`) and, for a model that comes
back, here (`Declared.corrected`).

A bundle that tracks is loaded with all of its graphs to track, and with the two for images otherwise.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..bundle.files import ZIP_ERRORS
from ..bundle.names import MANIFEST_NAME, MAX_MANIFEST_BYTES
from ..contracts import grounding_dino, sam2
from ..contracts.base import GraphSpec, TensorSpec
from ..errors import BundleError, ContractError
from ..models.detection.text_cache import TEXT_BYTES
from ..runtime.engine_file import SUFFIX, EngineHeader, read_header
from ..runtime.memory import MemoryUse
from ..runtime.ort_providers import OWN, stored_precision
from .families import IMAGES
from .settings import LoadOptions
from .text_needs import with_conversations, without_caches
from .video_needs import graphs_for, with_tracking

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest

ACTIVATION_FACTOR = 24
"""Activations per byte of a graph's inputs and outputs. An estimate, not a measurement: SAM 2 at 1024 pixels has 29 MB
of them in its image encoder, and two 4096 x 4096 score matrices of 4 heads in unfused attention, 0.5 GB, on top of
feature maps of 25 to 100 MB."""

FULL = "fp32"
"""Variant that a CPU runs unasked."""

SPARE_FEATURES = 3
"""Sets of SAM 2's image features beside the cache: one being computed, two that `BufferPool` keeps for the next."""


LOAD, ENGINE, MANIFEST, FILES, ESTIMATE = "load", "engine", "manifest", "files", "estimate"
SOURCES = {
    LOAD: "found at a load on this device",
    ENGINE: "stated by the engine that was built",
    MANIFEST: "measured at export, on a CPU",
    FILES: "size of the files",
    ESTIMATE: "an estimate",
}
"""Where a figure comes from, in words; the best first."""


@dataclass(frozen=True)
class Declared:
    """What a model is expected to take.

    Attributes:
        use: The figures.
        weights_from: A key of `SOURCES`, for the weights; the weakest where graphs differ.
        work_from: The same for work memory, which is activations and shared scratch memory.
    """

    use: MemoryUse = field(default_factory=MemoryUse)
    weights_from: str = FILES
    work_from: str = ESTIMATE

    @property
    def sources(self) -> dict[str, str]:
        """``weights`` and ``work`` to a key of `SOURCES`; JSON-ready."""
        return {"weights": self.weights_from, "work": self.work_from}

    def corrected(self, found: MemoryUse) -> Declared:
        """With what an earlier load on the same device was found to take."""
        work = found.activations is not None or found.shared is not None
        return Declared(
            self.use.corrected(found),
            self.weights_from if found.weights is None else LOAD,
            LOAD if work else self.work_from,
        )


@dataclass(frozen=True)
class EngineFacts:
    """Of the engines of one graph, the largest figures.

    Attributes:
        size: Bytes of the engine.
        scratch: Scratch memory; None where no engine's file tells.
    """

    size: int = 0
    scratch: int | None = None

    def __or__(self, other: EngineFacts) -> EngineFacts:
        told = [s for s in (self.scratch, other.scratch) if s is not None]
        return EngineFacts(max(self.size, other.size), max(told, default=None))

    @classmethod
    def of(cls, header: EngineHeader) -> EngineFacts:
        """Those of one engine file."""
        return cls(header.engine_bytes, header.scratch_bytes)


Engines = Mapping[str, EngineFacts]
"""By the SHA-256 of the graph that they were built from."""


def declared(path: Path, options: LoadOptions, task: str = IMAGES) -> Declared:
    """Reads the manifest of a bundle folder or ``.pxe`` file.

    Args:
        path: The bundle.
        options: How it will be loaded.
        task: What for.

    A bundle that cannot be read needs nothing here: opening it, which comes next, raises the error.
    """
    from ..bundle.bundle import check_manifest, parse_manifest

    try:
        data = read_manifest(path)
        manifest = parse_manifest(data)
        specs = graphs_for(task, check_manifest(manifest))
        bundled = _bundled(path, manifest, hashlib.sha256(data).hexdigest()) if _may_use_engines(options) else {}
    except (BundleError, ContractError, OSError, KeyError, *ZIP_ERRORS):
        return Declared()
    found = manifest_needs(manifest, specs, options, bundled)
    return replace(found, use=with_tracking(found.use, manifest, task, found.work_from == ESTIMATE))


def declared_needs(path: Path, options: LoadOptions, task: str = IMAGES) -> MemoryUse:
    """The figures of `declared` alone."""
    return declared(path, options, task).use


def manifest_needs(
    manifest: Manifest, specs: dict[str, GraphSpec], options: LoadOptions, bundled: Engines | None = None
) -> Declared:
    """The figures for a manifest and the contracts of its graphs.

    Args:
        manifest: Of the bundle.
        specs: From `check_manifest`.
        options: Settings of the model.
        bundled: Engines in the bundle.
    """
    specs = without_caches(manifest, specs)
    tensors = {name: _nbytes((*spec.inputs, *spec.outputs), spec) for name, spec in specs.items()}
    first = next(iter(specs.values()))
    graphs = {name: _graph(manifest, name, options, bundled or {}) for name in specs}
    scratch = [g.scratch for g in graphs.values() if g.scratch is not None]
    own = [g.activations for g in graphs.values() if g.activations is not None]
    unknown = [tensors[name] for name, g in graphs.items() if g.work_from == ESTIMATE]
    if unknown:
        own.append(ACTIVATION_FACTOR * max(unknown))
    caches, spare = int(options.cache_mb * (1 << 20)), SPARE_FEATURES * _nbytes(first.outputs, first)
    if manifest.family != sam2.FAMILY:
        spare = 0
    if manifest.family == grounding_dino.FAMILY:  # it keeps features of text alone
        caches = min(caches, TEXT_BYTES)
    in_ram = manifest.family != sam2.FAMILY and options.device != "cpu"  # wherever the graphs run
    use = MemoryUse(
        weights=sum(g.weights for g in graphs.values()),
        activations=sum(own) if own else None,
        shared=max(scratch, default=None),
        bindings=sum(tensors.values()) + spare,
        caches=0 if in_ram else caches,
        host=caches if in_ram else None,
    )
    use += _own_on_cpu(manifest, options)
    use = with_conversations(use, manifest, options)
    return Declared(
        use, _weakest(g.weights_from for g in graphs.values()), _weakest(g.work_from for g in graphs.values())
    )


def _own_on_cpu(manifest: Manifest, options: LoadOptions) -> MemoryUse:
    """The graphs that only ONNX Runtime on a CPU loads, beside those that they stand for: their weights, and what they
    prepare of an image. What they prepare of more images comes out of the cache."""
    if options.device != "cpu" or options.precision not in ("auto", FULL) or options.backend not in ("auto", OWN):
        return MemoryUse()
    own = {name: entry for name, entry in manifest.cpu_graphs.items() if name not in manifest.graphs}
    prepared = 0
    if sam2.IMAGE_PREPARE in own:
        spec = sam2.click_graphs(sam2.Sam2Constants.from_dict(manifest.constants))[sam2.IMAGE_PREPARE]
        prepared = _nbytes(spec.outputs, spec)
    return MemoryUse(
        weights=sum(entry.weight_bytes or _file(manifest, entry.file) for entry in own.values()), bindings=prepared
    )


def _weakest(sources: Iterable[str]) -> str:
    order = list(SOURCES)
    return max(sources, key=order.index)


def read_manifest(path: Path) -> bytes:
    """Bytes of the manifest; cut off past its largest size, which `parse_manifest` then refuses."""
    if not path.is_file():
        return (path / MANIFEST_NAME).read_bytes()
    with zipfile.ZipFile(path) as archive, archive.open(MANIFEST_NAME) as stream:
        return stream.read(MAX_MANIFEST_BYTES)


def _nbytes(tensors: tuple[TensorSpec, ...], spec: GraphSpec) -> int:
    """Bytes of tensors at the typical sizes."""
    sizes = {dim: typical for dim, (_, typical, _) in spec.ranges.items()}
    return sum(int(np.prod(t.shape(sizes), dtype=np.int64)) * t.np_dtype.itemsize for t in tensors)


@dataclass(frozen=True)
class _GraphNeeds:
    """One graph's part: either `scratch`, which engines use in turns, or `activations` of its own, or neither."""

    weights: int
    weights_from: str
    work_from: str
    scratch: int | None = None
    activations: int | None = None


def _graph(manifest: Manifest, name: str, options: LoadOptions, bundled: Engines) -> _GraphNeeds:
    """Largest of the variants that these settings may load, external weights and built engines included."""
    # Not by target: a TensorRT variant may have its weights in the file of the plain one.
    variants = manifest.graphs[name].variants
    asked = stored_precision(options.backend, options.precision, {v.precision for v in variants.values()})
    wanted = {k: v for k, v in variants.items() if asked in (k, v.precision, "auto")}
    measured = [m for m in manifest.memory if m.graph == name and m.variant in wanted]
    if options.device == "cpu" and options.precision == "auto":  # what `combinations` takes there
        measured = [m for m in measured if m.variant == FULL] or measured
    files = max((v.weight_bytes or _file(manifest, v.file) for v in wanted.values()), default=0)
    engines = EngineFacts()
    if _may_use_engines(options):
        for digest in {manifest.files[v.file].sha256 for v in wanted.values()}:
            engines = engines | _built(digest) | bundled.get(digest, EngineFacts())
    if options.device == "cpu" and measured:
        weights, weights_from = max(m.session_bytes for m in measured), MANIFEST
    else:
        weights, weights_from = max(files, engines.size), ENGINE if engines.size > files else FILES
    if engines.scratch is not None:
        return _GraphNeeds(weights, weights_from, ENGINE, scratch=engines.scratch)
    if measured:
        return _GraphNeeds(weights, weights_from, MANIFEST, activations=max(m.activation_bytes for m in measured))
    return _GraphNeeds(weights, weights_from, ESTIMATE)


def _may_use_engines(options: LoadOptions) -> bool:
    return options.device != "cpu" and options.backend != "onnxruntime"


def _built(graph_sha256: str) -> EngineFacts:
    """Of the engines in this machine's cache that were built from a graph."""
    from ..build.cache import EngineCache

    found = EngineFacts()
    for _, header, _ in EngineCache().engines(graph_sha256):
        found = found | EngineFacts.of(header)
    return found


def _bundled(path: Path, manifest: Manifest, digest: str) -> dict[str, EngineFacts]:
    """Of the engines that a bundle folder lists in its index.

    Raises:
        BundleError: The index or an engine's header cannot be read.
    """
    from ..bundle.engines import read_index

    index = read_index(path, digest, manifest.files) if path.is_dir() else None
    found: dict[str, EngineFacts] = {}
    for name in index.engines if index is not None else ():
        if name.endswith(SUFFIX):
            header = read_header(path / name)
            graph = str(header.key.get("graph_sha256", ""))
            found[graph] = found.get(graph, EngineFacts()) | EngineFacts.of(header)
    return found


def _file(manifest: Manifest, file: str) -> int:
    """Size of a graph file and of the weight files named after it, as in ``decoder.onnx`` and ``decoder.onnx.data``."""
    stem = f"{file.rsplit('.', 1)[0]}."
    return sum(
        entry.size
        for name, entry in manifest.files.items()
        if name == file or (name.startswith(stem) and not name.endswith(".onnx"))
    )
