"""Graphs of a bundle by contract, in place of torch's exporter, which takes seconds per graph."""

from __future__ import annotations

from typing import Any

import onnx

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts.base import GraphSpec


def stored_graph(bundle: Bundle, spec: GraphSpec) -> Any:
    """The fp32 graph of a bundle that has this contract, weights inside."""
    own = None if spec.name in bundle.specs else bundle.cpu_graph(spec.name)
    return onnx.load(bundle.graph_path(spec.name) if own is None else own[0])
