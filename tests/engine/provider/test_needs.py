"""What bundles declare before they are loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.bundle import MANIFEST_NAME, parse_manifest
from pixano_edge.engine.bundle.engines import INDEX_NAME, index_bytes
from pixano_edge.engine.bundle.manifest import FileEntry
from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.provider.needs import declared_needs, manifest_needs
from pixano_edge.engine.provider.settings import LoadOptions
from pixano_edge.engine.runtime.engine_file import write_engine
from pixano_edge.engine.runtime.memory import MemoryUse

from .fakes import add_bundle

MIB = 1 << 20


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty engine cache."""
    monkeypatch.setenv("PIXANO_EDGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Two graphs of 50 bytes each."""
    return add_bundle(tmp_path, "bundle", weights=100)


def _engine(path: Path, size: int, graph_sha256: str = "0" * 64) -> Path:
    """An engine file of `size` bytes that says it was built from a graph."""
    key: dict[str, Any] = {
        "graph": "image_encoder", "graph_sha256": graph_sha256, "variant": "fp32", "precision": "fp32", "profiles": [],
        "flags": [], "flavour": "tensorrt", "version": "10.3", "cuda_major": 12, "compute_capabilities": ["8.7"],
        "device_name": None, "sm_count": None,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_suffix(".plan")
    source.write_bytes(b"x" * size)
    write_engine(path, source, key, {})
    source.unlink()
    return path


def test_files_tensors_and_cache(bundle: Path) -> None:
    found = declared_needs(bundle, LoadOptions(cache_mb=3))
    assert found.weights == 100
    assert found.caches == 3 * MIB
    pixels, features = 3 * 128 * 128 * 4, 4 * (32 * 8 * 8 + 4 * 32 * 32 + 8 * 16 * 16)
    assert found.activations == 24 * (pixels + features)
    prompts = 4 * (2 * 2 + 2 + 32 * 32 + 1 + 4 * 32 * 32 + 4 + 1)  # one prompt with two points, typical sizes
    assert found.bindings == pixels + features + (features + prompts) + 3 * features


def test_what_cannot_be_read_declares_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.pxe").write_bytes(b"PK no zip")
    for name in ("empty", "broken.pxe", "absent"):
        assert declared_needs(tmp_path / name, LoadOptions()) == MemoryUse()


def test_external_weights_count_and_the_tensorrt_graph_is_no_addition(bundle: Path) -> None:
    manifest = parse_manifest((bundle / MANIFEST_NAME).read_bytes())
    sizes = {"image_encoder.onnx": 10, "image_encoder.onnx.data": 1000, "mask_decoder.onnx": 20}
    sizes["image_encoder.tensorrt.onnx"] = 7
    files = {name: FileEntry(sha256="0" * 64, size=size) for name, size in sizes.items()}
    specs = sam2.graphs(sam2.Sam2Constants.from_dict(manifest.constants))
    found = manifest_needs(manifest.model_copy(update={"files": files}), specs, LoadOptions(device="cpu"))
    assert found.weights == 1030


def test_engines_built_here_count_on_gpus(bundle: Path, home: Path) -> None:
    _engine(home / "engines" / ("0" * 16) / "one.engine", 500)
    _engine(home / "engines" / ("0" * 16) / "two.engine", 900)
    _engine(home / "engines" / ("0" * 16) / "other-graph.engine", 7000, "0" * 16 + "1" * 48)
    assert declared_needs(bundle, LoadOptions()).weights == 1800  # both graphs have the same hash here
    assert declared_needs(bundle, LoadOptions(device="cuda:0", backend="tensorrt")).weights == 1800
    assert declared_needs(bundle, LoadOptions(device="cpu")).weights == 100
    assert declared_needs(bundle, LoadOptions(backend="onnxruntime")).weights == 100


def test_engines_that_travel_with_the_bundle_count_on_gpus(bundle: Path) -> None:
    path = _engine(bundle / "engines" / "one.engine", 400)
    digest = hashlib.sha256((bundle / MANIFEST_NAME).read_bytes()).hexdigest()
    entry = FileEntry(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size)
    (bundle / INDEX_NAME).write_bytes(index_bytes(digest, {"engines/one.engine": entry}))
    assert declared_needs(bundle, LoadOptions()).weights == 800
    assert declared_needs(bundle, LoadOptions(device="cpu")).weights == 100
    path.write_bytes(b"damaged")
    assert declared_needs(bundle, LoadOptions()) == MemoryUse()  # opening it raises the error
