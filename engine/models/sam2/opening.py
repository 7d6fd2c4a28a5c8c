"""Opening a SAM 2 bundle for image segmentation; which combination runs is decided in `..opening`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ...bundle import Bundle
from ...contracts import sam2
from ...contracts.sam2 import Sam2Constants
from ...runtime.base import Session
from ..opening import Asked, OpenedGraphs, open_family, open_graphs, takes_cpu_graphs
from ..verdicts import VerdictStore
from .cache import EmbeddingCache
from .clicks import GRAPHS

if TYPE_CHECKING:
    from .predictor import Sam2ImagePredictor

IMAGE_GRAPHS = (sam2.IMAGE_ENCODER, sam2.MASK_DECODER)


def open_predictor(
    cls: type[Sam2ImagePredictor],
    bundle: Bundle | Path | str,
    asked: Asked,
    *,
    cache: EmbeddingCache | None = None,
    check: Callable[[], None] | None = None,
    capture: bool = True,
    verdicts: VerdictStore | None = None,
) -> Sam2ImagePredictor:
    """Does the work of `Sam2ImagePredictor.open`; see there for arguments and errors."""
    bundle = open_family(bundle, sam2.FAMILY)
    constants = Sam2Constants.from_dict(bundle.manifest.constants)
    graphs = open_graphs(bundle, asked, sam2.graphs(constants), check=check, capture=capture, verdicts=verdicts)
    return build_predictor(cls, bundle, graphs, cache=cache, capture=capture, threads=asked.threads)


def build_predictor(
    cls: type[Sam2ImagePredictor],
    bundle: Bundle,
    graphs: OpenedGraphs,
    *,
    cache: EmbeddingCache | None = None,
    capture: bool = True,
    threads: int | None = None,
) -> Sam2ImagePredictor:
    """A predictor on open graphs, which it closes with itself, whatever else runs on them.

    Where those are ONNX Runtime's on a CPU in fp32, and the bundle has the graphs of `clicks`, it opens them too, with
    as many `threads` per call.
    """
    with contextlib.ExitStack() as failed:
        failed.push(graphs.opened)
        clicks = _open_clicks(bundle, graphs, threads)
        predictor = cls(
            graphs.sessions[sam2.IMAGE_ENCODER],
            graphs.sessions[sam2.MASK_DECODER],
            Sam2Constants.from_dict(bundle.manifest.constants),
            bundle_hash=bundle.hash,
            variant=graphs.precision,
            cache=cache,
            description=graphs.description,
            capture=capture,
            clicks=clicks,
        )
        failed.pop_all()
    predictor._opened = graphs.opened
    return predictor


def _open_clicks(bundle: Bundle, graphs: OpenedGraphs, threads: int | None) -> dict[str, Session]:
    """Sessions of the graphs of `clicks`, closed with the others; empty where they are not to run."""
    from ...runtime import open_session

    device, backend = graphs.sessions[sam2.MASK_DECODER].device, graphs.sessions[sam2.MASK_DECODER].backend
    found = {name: graph for name in GRAPHS if (graph := bundle.cpu_graph(name)) is not None}
    if len(found) < len(GRAPHS) or not takes_cpu_graphs(backend, graphs.precision, device.kind):
        return {}
    sessions: dict[str, Session] = {}
    for name, (file, spec) in found.items():
        weights = bundle.weight_bytes(file)
        sessions[name] = open_session(file, spec, device, backend=backend, threads=threads, weight_bytes=weights)
        graphs.opened.callback(sessions[name].close)
    return sessions
