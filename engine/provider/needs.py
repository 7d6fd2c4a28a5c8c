"""What a model will take, from its bundle's manifest, before anything is loaded.

A bundle that tracks is loaded with all of its graphs to track, and with the two for images otherwise. Weights are the
sizes of the graph files of the variant that will run (the largest one while that is not known yet), or of a TensorRT
engine that was built from them on this machine; bindings and caches follow from the contract and the settings.
Activations are an estimate until the first runs were measured: a multiple of the largest graph's inputs and outputs.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..bundle.bundle import MAX_MANIFEST_BYTES, check_manifest, parse_manifest
from ..bundle.files import ZIP_ERRORS
from ..bundle.manifest import MANIFEST_NAME, Graph, Manifest
from ..contracts.base import GraphSpec, TensorSpec
from ..errors import BundleError, ContractError
from ..runtime.memory import MemoryUse
from .families import IMAGES
from .settings import LoadOptions
from .video_needs import graphs_for, with_tracking

ACTIVATION_FACTOR = 24
"""Activations per byte of a graph's inputs and outputs. An estimate, not a measurement: SAM 2 at 1024 pixels has 29 MB
of them in its image encoder, and two 4096 x 4096 score matrices of 4 heads in unfused attention, 0.5 GB, on top of
feature maps of 25 to 100 MB."""

SPARE_FEATURES = 3
"""Sets of image features beside the cache: one being computed, and two that `BufferPool` keeps for the next."""


def declared_needs(path: Path, options: LoadOptions, task: str = IMAGES) -> MemoryUse:
    """Reads the manifest of a bundle folder or ``.pxe`` file.

    Args:
        path: The bundle.
        options: How it will be loaded.
        task: What for.

    A bundle that cannot be read needs nothing here: opening it, which comes next, raises the error.
    """
    try:
        data = read_manifest(path)
        manifest = parse_manifest(data)
        specs = graphs_for(task, check_manifest(manifest))
        bundled = _bundled(path, manifest, hashlib.sha256(data).hexdigest()) if _may_use_engines(options) else {}
    except (BundleError, ContractError, OSError, KeyError, *ZIP_ERRORS):
        return MemoryUse()
    return with_tracking(manifest_needs(manifest, specs, options, bundled), manifest, task)


def manifest_needs(
    manifest: Manifest, specs: dict[str, GraphSpec], options: LoadOptions, bundled: Mapping[str, int] | None = None
) -> MemoryUse:
    """The figures for a manifest and the contracts of its graphs.

    Args:
        manifest: Of the bundle.
        specs: From `check_manifest`.
        options: Settings of the model.
        bundled: Size of the largest engine in the bundle by the SHA-256 of its graph.
    """
    tensors = {name: _nbytes((*spec.inputs, *spec.outputs), spec) for name, spec in specs.items()}
    first = next(iter(specs.values()))
    return MemoryUse(
        weights=sum(_graph(manifest, manifest.graphs[name], options, bundled or {}) for name in specs),
        activations=ACTIVATION_FACTOR * max(tensors.values()),
        bindings=sum(tensors.values()) + SPARE_FEATURES * _nbytes(first.outputs, first),
        caches=int(options.cache_mb * (1 << 20)),
    )


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


def _graph(manifest: Manifest, graph: Graph, options: LoadOptions, bundled: Mapping[str, int]) -> int:
    """Largest of the variants that these settings may load, external weights and built engines included."""
    # Not by target: a TensorRT variant may have its weights in the file of the plain one.
    wanted = [v for k, v in graph.variants.items() if options.precision in (k, v.precision, "auto")]
    sizes = [variant.weight_bytes or _file(manifest, variant.file) for variant in wanted]
    if _may_use_engines(options):
        hashes = [manifest.files[v.file].sha256 for v in wanted]
        sizes += [max(_built(digest), bundled.get(digest, 0)) for digest in hashes]
    return max(sizes, default=0)


def _may_use_engines(options: LoadOptions) -> bool:
    return options.device != "cpu" and options.backend != "onnxruntime"


def _built(graph_sha256: str) -> int:
    """Size of the largest engine in this machine's cache that was built from a graph; 0 without one."""
    from ..build.cache import EngineCache

    return max((header.engine_bytes for _, header, _ in EngineCache().engines(graph_sha256)), default=0)


def _bundled(path: Path, manifest: Manifest, digest: str) -> dict[str, int]:
    """Size of the largest engine by the SHA-256 of its graph, of those that a bundle folder lists in its index.

    Raises:
        BundleError: The index or an engine's header cannot be read.
    """
    from ..bundle.engines import read_index
    from ..runtime.engine_file import SUFFIX, read_header

    index = read_index(path, digest, manifest.files) if path.is_dir() else None
    found: dict[str, int] = {}
    for name in index.engines if index is not None else ():
        if name.endswith(SUFFIX):
            header = read_header(path / name)
            graph = str(header.key.get("graph_sha256", ""))
            found[graph] = max(found.get(graph, 0), header.engine_bytes)
    return found


def _file(manifest: Manifest, file: str) -> int:
    """Size of a graph file and of the weight files named after it, as in ``decoder.onnx`` and ``decoder.onnx.data``."""
    stem = f"{file.rsplit('.', 1)[0]}."
    return sum(
        entry.size
        for name, entry in manifest.files.items()
        if name == file or (name.startswith(stem) and not name.endswith(".onnx"))
    )
