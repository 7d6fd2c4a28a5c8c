"""Memory measured at export: what it is compared with, what goes into the manifest, and what is said when it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.bundle.manifest import GraphVariant
from pixano_edge.engine.errors import ExportError
from pixano_edge.engine.runtime.memory import resident_bytes
from pixano_edge.export import work_memory
from pixano_edge.export.work_memory import measure_file, measure_graphs

pytestmark = pytest.mark.skipif(resident_bytes() is None, reason="this system does not tell resident memory")

USER = """
import json, sys
import cv2, numpy as np
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.runtime.memory import resident_bytes

def open_one():
    return Sam2ImagePredictor.open(sys.argv[1], device="cpu", precision=sys.argv[2], threads=1)

first = open_one()  # pays for what the libraries set up once
image = np.zeros((first.constants.image_size,) * 2 + (3,), np.uint8)
cv2.resize(image, (64, 64))
before = resident_bytes()
predictor = open_one()
opened = resident_bytes()
for _ in range(3):
    predictor.predict(predictor.encode(image), [Prompt(points=[[5, 5]], labels=[1])])
after, use = resident_bytes(), predictor.memory()
work = after - opened - use.bindings - use.caches
print(json.dumps({"opened": opened - before, "work": work, "all": after - before}))
"""
"""A user's process: what a predictor and its first clicks really keep."""


def really(bundle: Path, precision: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", USER, str(bundle), precision], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_declared_memory_is_within_a_factor_of_two_of_what_a_process_grows_by(
    tiny_bundle: Path, precision: str
) -> None:
    from pixano_edge.engine.provider.needs import declared
    from pixano_edge.engine.provider.settings import LoadOptions

    told = declared(tiny_bundle, LoadOptions(device="cpu", precision=precision, cache_mb=0))
    assert told.sources == {"weights": "manifest", "work": "manifest"}
    found = really(tiny_bundle, precision)
    for name, declared_bytes in (
        ("opened", told.use.weights),
        ("work", told.use.activations),
        ("all", told.use.total),
    ):
        assert declared_bytes is not None
        assert 0.5 < declared_bytes / found[name] < 2, (name, declared_bytes, found)


def test_manifest_has_each_variant_that_onnx_runtime_runs(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    assert {(m.graph, m.variant) for m in manifest.memory} == {
        (graph, variant) for graph in ("image_encoder", "mask_decoder") for variant in ("fp32", "fp16")
    }
    for entry in manifest.memory:
        assert entry.activation_bytes > 0
        assert entry.session_bytes > 0
        assert entry.sizes == ({} if entry.graph == "image_encoder" else {"P": 1, "N": 2})
        assert "CPUExecutionProvider" in entry.measured_with


def test_larger_inputs_take_more(tiny_bundle: Path) -> None:
    """Four objects have four times the decoder's intermediate tensors; a constant would not show them."""
    bundle = Bundle.open(tiny_bundle)
    spec, path = bundle.specs["mask_decoder"], bundle.graph_path("mask_decoder", "fp32")
    many = replace(spec, ranges={**spec.ranges, "P": (1, 32, 64)})
    one, more = measure_file(path, spec, 1), measure_file(path, many, 1)
    assert one is not None
    assert more is not None
    assert more["activation_bytes"] > 4 * one["activation_bytes"]
    assert more["sizes"]["P"] == 32


def test_what_fails_is_an_export_error_in_the_back_ends_words(tmp_path: Path, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"'broken\.onnx'.*cannot load graph"):
        measure_file(broken, bundle.specs["mask_decoder"])
    with pytest.raises(ExportError, match=r"contract|inputs"):
        measure_file(bundle.graph_path("image_encoder", "fp32"), bundle.specs["mask_decoder"])


def test_a_child_that_dies_or_hangs_is_named(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Bundle.open(tiny_bundle).specs["mask_decoder"]

    def killed(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], -9, "", "Killed\n")

    monkeypatch.setattr(work_memory.subprocess, "run", killed)
    with pytest.raises(ExportError, match="ended with code -9: Killed"):
        measure_file(tmp_path / "x.onnx", spec)

    def slow(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired("x", 1)

    monkeypatch.setattr(work_memory.subprocess, "run", slow)
    with pytest.raises(ExportError, match="took over"):
        measure_file(tmp_path / "x.onnx", spec)


def test_a_system_that_does_not_tell_leaves_the_manifest_without(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle)
    entries: dict[str, dict[str, GraphVariant]] = {g: dict(e.variants) for g, e in bundle.manifest.graphs.items()}
    asked: list[Path] = []

    def silent(path: Path, *_: object) -> None:
        asked.append(path)

    monkeypatch.setattr(work_memory, "measure_file", silent)
    assert measure_graphs(bundle.root, bundle.specs, entries, None) == []
    assert len(asked) == 4
    assert not any("tensorrt" in path.name for path in asked)
    monkeypatch.setattr("pixano_edge.engine.runtime.memory.resident_bytes", lambda: None)
    file = bundle.graph_path("mask_decoder", "fp32")
    assert work_memory.measure(file, bundle.specs["mask_decoder"], 1) == {"unknown": True}
