"""Finding the engine of a graph for a device: in the bundle first, then in this machine's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..bundle import Bundle
from ..errors import BundleError, DeviceError, MissingDependencyError
from ..runtime.base import DeviceInfo
from ..runtime.engine_file import read_header
from . import library
from .cache import EngineCache, newest_first
from .key import AMPERE_PLUS, SAME_CAPABILITY, VERSION_COMPATIBLE, Box, EngineKey
from .plan import Choice, choices

_SHOWN = 3


def find_engine(
    bundle: Bundle,
    graph: str,
    precision: str,
    device_info: DeviceInfo,
    *,
    cache: EngineCache | None = None,
    boxes: Sequence[Box] | None = None,
) -> Path:
    """The engine file to run a graph on a device: its header is whole, its size right, its key fits.

    The engine's own hash is checked when it is opened (`pixano_edge.engine.runtime.engine_file.read_engine`).

    Engines of the variant prepared for TensorRT go before those of the plain graph, engines of full TensorRT before
    those of TensorRT for RTX, made for this very GPU before compatible ones, newer before older.

    Args:
        bundle: Open bundle.
        graph: Name of the graph.
        precision: Precision, or name of a variant.
        device_info: Of the device that shall run it.
        cache: Another cache than the user's.
        boxes: The device with each TensorRT; asked of this machine (which loads TensorRT) when None.

    Raises:
        BundleError: No such graph or precision.
        DeviceError: Not a CUDA device, or no engine fits; says why each one that is there does not, and the command
            that builds it.
        MissingDependencyError: No TensorRT is installed.
    """
    wanted = choices(bundle, graph, precision)
    if not wanted:
        raise BundleError(
            f"Graph '{graph}' of bundle '{bundle.manifest.name}' has no variant '{precision}'.",
            f"Known: {', '.join(sorted(bundle.manifest.graphs[graph].variants))}.",
        )
    if boxes is None:
        boxes = boxes_of(device_info)
    cache = cache or EngineCache()
    reasons: list[str] = []
    found: list[tuple[tuple[int, ...], Path]] = []
    for place, choice in enumerate(wanted):
        for path, key in _engines(bundle, choice, cache, reasons):
            misfits = [key.misfits(box) for box in boxes]
            if [] not in misfits:
                # The box with the same flavour says most about what differs.
                near = next((i for i, box in enumerate(boxes) if box.flavour == key.flavour), 0)
                reasons.append(f"'{path.name}' was {', '.join(misfits[near])}")
                continue
            rank = misfits.index([])
            compatible = sum(flag in key.flags for flag in (AMPERE_PLUS, SAME_CAPABILITY, VERSION_COMPATIBLE))
            found.append(((place, rank, compatible, len(found)), path))
    if found:
        return min(found)[1]
    reasons += cache.warnings
    detail = f" {'; '.join(dict.fromkeys(reasons[:_SHOWN]))}." if reasons else " None was built yet."
    raise DeviceError(
        f"Bundle '{bundle.manifest.name}' has no engine of graph '{graph}' in {precision} for {device_info.name}."
        f"{detail}",
        f"Build it on this machine: pixano-edge build {bundle.root} --precision {precision}",
    )


def boxes_of(info: DeviceInfo) -> list[Box]:
    """A device with each TensorRT that is installed and loads, full TensorRT first.

    Raises:
        DeviceError: Not a CUDA device, or no TensorRT that is installed loads.
        MissingDependencyError: None is installed.
    """
    from ..runtime.tensorrt_api import load_tensorrt

    here = library.installed()
    if not here:
        raise MissingDependencyError("tensorrt", "tensorrt", "The TensorRT back end")
    found, failures = [], []
    for flavour in here:
        try:
            version = load_tensorrt(flavour).version
        except DeviceError as error:  # the other one may load
            failures.append(error)
            continue
        found.append(Box.of(info, flavour, version, library.cuda_major(flavour)))
    if not found:
        raise failures[0]
    return found


def _engines(
    bundle: Bundle, choice: Choice, cache: EngineCache, reasons: list[str]
) -> Iterator[tuple[Path, EngineKey]]:
    """Engines of a choice's graph: those in the bundle, then those in the cache."""
    for path in newest_first(bundle.root / name for name in (bundle.engines.engines if bundle.engines else ())):
        try:
            header = read_header(path)
            key = EngineKey.from_dict(header.key)
        except BundleError as error:
            reasons.append(error.message)
            continue
        if key.graph_sha256 == choice.sha256 and key.graph == choice.graph:
            yield path, key
    for path, _, key in cache.engines(choice.sha256):
        if key.graph == choice.graph:
            yield path, key
