"""The demo bundle of the package: what it says, and that TensorRT takes its graphs."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.export import tensorrt_rtx
from pixano_edge.export.operators import check_tensorrt_10_3

MAX_BYTES = 15_000_000
GRAPHS = (contract.IMAGE_ENCODER, contract.MASK_DECODER)


def test_it_says_what_it_is(demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    manifest = bundle.manifest
    assert manifest.family == contract.FAMILY
    assert manifest.source.format == "transformers"
    assert manifest.source.architecture.startswith("sam2")
    assert manifest.licence.spdx == "Apache-2.0"
    assert manifest.parity is not None
    assert manifest.parity.passed
    assert {"fp32", "fp16"} <= {m.variant for m in manifest.parity.masks}
    assert not any("TensorRT" in note for note in manifest.notes)
    assert bundle.golden()


def test_it_is_small(demo_bundle: Path) -> None:
    assert sum(f.stat().st_size for f in demo_bundle.rglob("*") if f.is_file()) < MAX_BYTES


@pytest.mark.parametrize("graph", GRAPHS)
def test_operators_suit_tensorrt(graph: str, demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    assert {"fp32", "fp16"} <= set(bundle.variants())
    for variant in bundle.variants():
        assert check_tensorrt_10_3(onnx.load(bundle.graph_path(graph, variant))) == [], variant


@pytest.mark.parametrize("variant", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_tensorrt_builds_it_for_two_kinds_of_cards(graph: str, variant: str, demo_bundle: Path) -> None:
    if tensorrt_rtx.missing_module():
        pytest.skip(f"{tensorrt_rtx.missing_module()} is not installed: pip install 'pixano-edge[tensorrt-rtx]'")
    bundle = Bundle.open(demo_bundle)
    spec = contract.graphs(contract.Sam2Constants.from_dict(bundle.manifest.constants))[graph]
    build = tensorrt_rtx.check_build(bundle.graph_path(graph, variant), spec, ("SM86", "SM89"))
    assert build.engine_bytes > 10_000
