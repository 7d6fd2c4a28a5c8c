"""The tiny checkpoint, its exported graphs and PyTorch's answers, made once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.export.photos import default_photos
from pixano_edge.export.sam2 import checkpoint, graphs, parity


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def loaded(tiny_checkpoint: Path) -> checkpoint.Checkpoint:
    """The tiny checkpoint as the exporter loads it."""
    return checkpoint.load(tiny_checkpoint, image_only=True)


@pytest.fixture(scope="session")
def suite(loaded: checkpoint.Checkpoint) -> parity.Suite:
    """Stock answers on the default pictures."""
    return parity.build_suite(loaded.model, default_photos(), loaded.constants)


@pytest.fixture(scope="session")
def files(tiny_bundle: Path) -> Callable[[str], dict[str, Path]]:
    """ONNX files of the tiny bundle by graph, for a variant."""
    bundle = Bundle.open(tiny_bundle)

    def find(variant: str) -> dict[str, Path]:
        target = "tensorrt" if variant.endswith("-tensorrt") else "onnx"
        return {g: bundle.graph_path(g, variant, target) for g in bundle.manifest.graphs}

    return find


@pytest.fixture(scope="session")
def run(files: Callable[[str], dict[str, Path]]) -> parity.Runner:
    """The tiny bundle's fp32 graphs in ONNX Runtime."""
    return parity.onnx_runner(files("fp32"), threads=1)


def torch_runner(modules: dict[str, Any], constants: contract.Sam2Constants) -> parity.Runner:
    """Export wrappers in PyTorch, for mistakes that are easier to plant in a module than in a file."""
    specs = contract.graphs(constants)

    def call(graph: str, feeds: parity.Arrays) -> parity.Arrays:
        with torch.no_grad():
            values = modules[graph](*(torch.from_numpy(feeds[t.name]) for t in specs[graph].inputs))
        return {t.name: v.numpy() for t, v in zip(specs[graph].outputs, values)}

    return call


@pytest.fixture
def modules(loaded: checkpoint.Checkpoint) -> dict[str, Any]:
    """Fresh export wrappers around the tiny model."""
    return graphs.modules(loaded.model)
