"""What bundles declare before they are loaded."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.bundle import MANIFEST_NAME, BundleStore, parse_manifest
from pixano_edge.engine.bundle.engines import INDEX_NAME, index_bytes
from pixano_edge.engine.bundle.manifest import FileEntry
from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.provider.budget import Booking, DeviceMemory
from pixano_edge.engine.provider.found import MAX_KEPT, Found
from pixano_edge.engine.provider.needs import SOURCES, declared, declared_needs, manifest_needs
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


def _engine(path: Path, size: int, graph_sha256: str = "0" * 64, **facts: Any) -> Path:
    """An engine file of `size` bytes that says it was built from a graph."""
    key: dict[str, Any] = {
        "graph": "image_encoder", "graph_sha256": graph_sha256, "variant": "fp32", "precision": "fp32", "profiles": [],
        "flags": [], "flavour": "tensorrt", "version": "10.3", "cuda_major": 12, "compute_capabilities": ["8.7"],
        "device_name": None, "sm_count": None,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_suffix(".plan")
    source.write_bytes(b"x" * size)
    write_engine(path, source, key, facts)
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
    assert found.use.weights == 1030


def test_what_clicks_on_a_cpu_prepare_of_an_image_counts() -> None:
    path = BundleStore().path("sam2-demo")
    c = sam2.Sam2Constants.from_dict(parse_manifest((path / MANIFEST_NAME).read_bytes()).constants)
    cells, d = c.embed_size**2, c.hidden_dim
    prepared = 4 * cells * (d + 3 * d // 2 + 2 * d + d)
    bindings = [declared_needs(path, LoadOptions(device=device)).bindings or 0 for device in ("cpu", "cuda:0")]
    assert bindings[0] - bindings[1] == prepared


def test_openvino_takes_the_files_of_fp32_for_bf16_and_no_graphs_for_cpus() -> None:
    demo = BundleStore().path("sam2-demo")

    def weights(backend: str, precision: str) -> int:
        return declared(demo, LoadOptions(device="cpu", backend=backend, precision=precision)).use.weights

    plain, through = weights("onnxruntime", "fp32"), weights("onnxruntime-openvino", "fp32")
    assert 0 < through < plain
    assert weights("onnxruntime-openvino", "bf16") == through


@pytest.mark.parametrize("name", ["grounding-dino-demo", "owlv2-demo", "smolvlm-demo"])
def test_features_that_lie_in_ram_are_no_memory_of_a_gpu(name: str) -> None:
    path, features = BundleStore().path(name), 3 * MIB
    on_cpu, on_gpu = (declared_needs(path, LoadOptions(device=device, cache_mb=3)) for device in ("cpu", "cuda:0"))
    assert (on_cpu.host, on_gpu.host) == (None, features)
    assert (on_cpu.caches or 0) - (on_gpu.caches or 0) == features


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


def _measured(bundle: Path, *entries: tuple[str, str, int, int], hashes: bool = False) -> None:
    """Writes memory figures (graph, variant, session, activations) into the manifest of a bundle of `add_bundle`, and
    an fp16 variant of each graph; with `hashes`, files differ in their SHA-256."""
    file = bundle / MANIFEST_NAME
    manifest = json.loads(file.read_text())
    for number, (name, graph) in enumerate(manifest["graphs"].items()):
        graph["variants"]["fp16"] = {**graph["variants"]["fp32"], "precision": "fp16", "file": f"{name}.fp16.onnx"}
        manifest["files"][f"{name}.fp16.onnx"] = {"sha256": "f" * 64, "size": 30}
        if hashes:
            manifest["files"][f"{name}.onnx"]["sha256"] = str(number) * 64
    manifest["memory"] = [
        {"graph": g, "variant": v, "session_bytes": s, "activation_bytes": a, "sizes": {}, "measured_with": "x"}
        for g, v, s, a in entries
    ]
    file.write_text(json.dumps(manifest))


ALL = (
    ("image_encoder", "fp32", 70, 1000),
    ("image_encoder", "fp16", 80, 2000),
    ("mask_decoder", "fp32", 7, 10),
    ("mask_decoder", "fp16", 8, 20),
)


@pytest.mark.parametrize(
    ("options", "weights", "work", "source"),
    [
        (LoadOptions(device="cpu"), 77, 1010, "manifest"),  # what a CPU takes unasked
        (LoadOptions(device="cpu", precision="fp16"), 88, 2020, "manifest"),
        (LoadOptions(device="cuda:0", precision="fp16"), 60, 2020, "files"),  # what a CPU makes of weights is its own
        (LoadOptions(), 100, 2020, "files"),  # whichever needs most
    ],
)
def test_measured_figures_of_the_manifest(
    bundle: Path, options: LoadOptions, weights: int, work: int, source: str
) -> None:
    _measured(bundle, *ALL)
    found = declared(bundle, options)
    assert (found.use.weights, found.use.activations, found.use.shared) == (weights, work, None)
    assert found.sources == {"weights": source, "work": "manifest"}


def test_without_figures_they_are_estimates_and_say_so(bundle: Path) -> None:
    found = declared(bundle, LoadOptions(device="cpu"))
    assert found.sources == {"weights": "files", "work": "estimate"}
    whole = found.use.activations
    _measured(bundle, ALL[0])  # the encoder alone: the decoder's part is still a guess
    partly = declared(bundle, LoadOptions(device="cpu"))
    assert partly.sources == {"weights": "files", "work": "estimate"}
    assert partly.use.weights == 70 + 50
    assert 1000 < (partly.use.activations or 0) < (whole or 0) + 1000


def test_an_engines_own_scratch_memory_goes_before_what_was_measured_at_export(bundle: Path, home: Path) -> None:
    _measured(bundle, *ALL, hashes=True)
    folder = home / "engines"
    _engine(folder / ("0" * 16) / "encoder.engine", 500, "0" * 64, scratch_bytes=[300, 900])
    _engine(folder / ("0" * 16) / "older.engine", 400, "0" * 64, scratch_bytes=None, scratch_reason="no GPU")
    mixed = declared(bundle, LoadOptions())
    assert (mixed.use.shared, mixed.use.activations) == (900, 20)  # the decoder has no engine yet
    assert mixed.sources == {"weights": "files", "work": "manifest"}  # the weakest
    _engine(folder / ("1" * 16) / "decoder.engine", 600, "1" * 64, scratch_bytes=[400])
    both = declared(bundle, LoadOptions(device="cuda:0", backend="tensorrt"))
    assert (both.use.shared, both.use.activations) == (900, None)  # used in turns: the hungriest, not the sum
    assert both.use.weights == 1100
    assert both.sources == {"weights": "engine", "work": "engine"}
    for options in (LoadOptions(device="cpu"), LoadOptions(backend="onnxruntime")):
        assert declared(bundle, options).use.shared is None


@pytest.mark.parametrize("told", [None, [], [1, None], [1.5], [-1], [True], "900", 900])
def test_a_header_that_tells_nothing_sound_is_passed_over(bundle: Path, home: Path, told: Any) -> None:
    _measured(bundle, *ALL)
    _engine(home / "engines" / ("0" * 16) / "one.engine", 500, scratch_bytes=told)
    found = declared(bundle, LoadOptions(device="cuda:0"))
    assert found.use.shared is None
    assert found.work_from == "manifest"


def test_what_a_load_found_goes_before_everything_declared(bundle: Path, home: Path) -> None:
    _measured(bundle, *ALL)
    _engine(home / "engines" / ("0" * 16) / "one.engine", 500, scratch_bytes=[900])
    told = declared(bundle, LoadOptions(device="cuda:0"))
    assert told.sources == {"weights": "engine", "work": "engine"}
    found = told.corrected(MemoryUse(weights=3, activations=5, shared=7))
    assert (found.use.weights, found.use.activations, found.use.shared) == (3, 5, 7)
    assert (found.use.bindings, found.use.caches) == (told.use.bindings, told.use.caches)
    assert found.sources == {"weights": "load", "work": "load"}
    assert told.corrected(MemoryUse(weights=3)).sources == {"weights": "load", "work": "engine"}
    assert list(SOURCES) == ["load", "engine", "manifest", "files", "estimate"]


def _left(device: str = "cuda:0", **used: int) -> Booking:
    booking = Booking("model", DeviceMemory(device), MemoryUse(), {})
    booking.used = MemoryUse(**used)
    return booking


def test_what_was_found_is_recalled_for_the_same_bundle_settings_and_device(bundle: Path) -> None:
    kept, options = Found(), LoadOptions()
    kept.note(bundle, options, _left(weights=10))
    assert kept.recall(bundle, options, ["cuda:0"]) is None  # its work memory was never measured
    kept.note(bundle, options, _left(weights=10, activations=20, bindings=30, caches=40))
    assert kept.recall(bundle, options, ["cpu", "cuda:0"]) == MemoryUse(weights=10, activations=20)
    assert kept.recall(bundle, options, ["cuda:1"]) is None
    assert kept.recall(bundle, LoadOptions(precision="fp16"), ["cuda:0"]) is None
    os.utime(bundle / MANIFEST_NAME, ns=(1, 1))  # another bundle in its place
    assert kept.recall(bundle, options, ["cuda:0"]) is None
    assert kept.recall(bundle / "gone", options, ["cuda:0"]) is None


def test_what_was_found_is_kept_for_so_many_models(bundle: Path) -> None:
    kept = Found()
    for threads in range(1, MAX_KEPT + 2):
        kept.note(bundle, LoadOptions(threads=threads), _left(shared=threads))
    assert kept.recall(bundle, LoadOptions(threads=1), ["cuda:0"]) is None
    assert kept.recall(bundle, LoadOptions(threads=MAX_KEPT + 1), ["cuda:0"]) == MemoryUse(shared=MAX_KEPT + 1)
