"""Opening: what a good bundle gives, and that every bad one is refused with what to do next."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.errors import BundleError
from tests.engine.bundle.sample import edit_manifest, make_bundle, npz

GRAPH = "graphs/mask_decoder.fp32.onnx"


def refused(path: Path, *words: str, verify: bool = True) -> BundleError:
    """Opens `path`, which must fail with an action and a message that holds `words`."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(path, verify=verify)
    assert caught.value.action
    for word in words:
        assert word in str(caught.value)
    return caught.value


def test_opens_and_answers(bundle_dir: Path) -> None:
    bundle = Bundle.open(bundle_dir)
    assert bundle.manifest.name == "sample"
    assert bundle.variants() == ["fp32", "fp16"]
    assert bundle.graph_path("mask_decoder") == bundle_dir / GRAPH
    assert bundle.graph_path("mask_decoder", "fp16").name == "mask_decoder.fp16.onnx"
    assert bundle.file("golden/one.png").read_bytes() == b"png"
    assert [s.name for s in bundle.golden()] == ["one"]
    assert bundle.specs["image_encoder"].inputs[0].dims == (1, 3, 64, 64)
    arrays = bundle.load_npz("golden/one.npz")
    assert list(arrays) == ["a"]
    assert arrays["a"].dtype == np.float32


def test_hash_changes_when_any_file_changes(bundle_dir: Path, tmp_path: Path) -> None:
    first = Bundle.open(bundle_dir).hash
    assert Bundle.open(make_bundle(tmp_path / "same")).hash == first
    assert Bundle.open(make_bundle(tmp_path / "other", seed=1)).hash != first
    assert Bundle.open(make_bundle(tmp_path / "note", notes=["x"])).hash != first


def test_unknown_graph_variant_and_file_list_what_exists(bundle_dir: Path) -> None:
    bundle = Bundle.open(bundle_dir)
    with pytest.raises(BundleError, match=r"no graph 'x'.*mask_decoder"):
        bundle.graph_path("x")
    with pytest.raises(BundleError, match=r"no variant 'int8'.*fp16 \(fp16, onnx\), fp32"):
        bundle.graph_path("mask_decoder", "int8")
    with pytest.raises(BundleError, match="for tensorrt"):
        bundle.graph_path("mask_decoder", "fp32", "tensorrt")
    with pytest.raises(BundleError, match="lists no file"):
        bundle.file("../sample/manifest.json")


def test_variant_found_by_precision_and_target(bundle_dir: Path) -> None:
    def add_tensorrt(manifest: dict[str, Any]) -> None:
        variants = manifest["graphs"]["mask_decoder"]["variants"]
        variants["fp16-trt"] = {**variants["fp32"], "precision": "fp16", "target": "tensorrt"}
        variants["bf16"] = {**variants["fp32"], "precision": "bf16"}

    edit_manifest(bundle_dir, add_tensorrt)
    bundle = Bundle.open(bundle_dir)
    assert bundle.graph_path("mask_decoder", "fp16", "tensorrt") == bundle_dir / GRAPH
    assert bundle.graph_path("mask_decoder", "fp16").name == "mask_decoder.fp16.onnx"
    assert bundle.variants() == ["fp32", "fp16"], "bf16 is not there for every graph"


def test_damaged_byte(bundle_dir: Path) -> None:
    data = bytearray((bundle_dir / GRAPH).read_bytes())
    data[100] ^= 1
    (bundle_dir / GRAPH).write_bytes(data)
    refused(bundle_dir, GRAPH, "damaged", "SHA-256", "again")
    Bundle.open(bundle_dir, verify=False)  # sizes alone cannot see it


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_missing_extra(bundle_dir: Path, verify: bool) -> None:
    path = bundle_dir / GRAPH
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    refused(bundle_dir, "truncated", "2999 bytes instead of 3000", verify=verify)
    path.write_bytes(data + b"x")
    refused(bundle_dir, "damaged", verify=verify)
    path.unlink()
    refused(bundle_dir, "lacks", GRAPH, verify=verify)
    path.write_bytes(data)
    (bundle_dir / "graphs/new.onnx").write_bytes(b"")
    refused(bundle_dir, "does not list", "graphs/new.onnx", verify=verify)


def test_newer_schema_says_upgrade(bundle_dir: Path) -> None:
    def newer(manifest: dict[str, Any]) -> None:
        manifest["schema_version"] = 3
        manifest["a_field_of_the_future"] = 1

    edit_manifest(bundle_dir, newer)
    assert "Install a newer pixano-edge" in refused(bundle_dir, "schema version 3", "up to 2").action


MEASURED = {"graph": "mask_decoder", "variant": "fp16", "session_bytes": 1, "activation_bytes": 2, "sizes": {"P": 1}}


def test_memory_figures_may_be_there_or_not(bundle_dir: Path) -> None:
    edit_manifest(bundle_dir, lambda m: m.pop("memory"))  # as bundles were before
    assert Bundle.open(bundle_dir).manifest.memory == []
    edit_manifest(bundle_dir, lambda m: m.update(memory=[{**MEASURED, "measured_with": "x"}]))
    assert Bundle.open(bundle_dir).manifest.memory[0].activation_bytes == 2


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ([{**MEASURED, "measured_with": "x", "variant": "int4"}], "int4"),
        ([{**MEASURED, "measured_with": "x", "graph": "other"}], "other"),
        ([{**MEASURED, "measured_with": "x"}] * 2, "has twice"),
        ([{**MEASURED, "measured_with": "x", "activation_bytes": -1}], "activation_bytes"),
        ([MEASURED], "measured_with"),
    ],
)
def test_memory_figures_that_fit_nothing_are_refused(bundle_dir: Path, memory: list[Any], words: str) -> None:
    edit_manifest(bundle_dir, lambda m: m.update(memory=memory))
    refused(bundle_dir, words)


CALIBRATION = {
    "variant": "fp16", "graphs": ["mask_decoder"], "metric": "mask_iou", "budget": 0.98, "held_out": 0.99, "worst": 0.9,
    "held_out_samples": 3, "data": "photos", "calibration_samples": 9, "method": "auto",
    "created": "2026-01-01T00:00:00Z", "tools": {},
}  # fmt: skip


def test_calibrations_may_be_there_or_not(bundle_dir: Path) -> None:
    assert "calibrations" not in json.loads((bundle_dir / "manifest.json").read_text())  # older versions read it
    assert Bundle.open(bundle_dir).manifest.calibrations == []
    edit_manifest(bundle_dir, lambda m: m.update(schema_version=2, calibrations=[CALIBRATION]))
    assert Bundle.open(bundle_dir).manifest.calibrations[0].held_out == 0.99


@pytest.mark.parametrize(
    ("calibrations", "words"),
    [
        ([{**CALIBRATION, "variant": "int8"}], "mask_decoder"),
        ([{**CALIBRATION, "graphs": ["other"]}], "other"),
        ([{**CALIBRATION, "graphs": []}], "listed twice, or of graphs"),
        ([CALIBRATION] * 2, "listed twice"),
        ([{**CALIBRATION, "budget": 1.5}], "budget"),
        ([{**CALIBRATION, "report": "reports/none.json"}], "reports/none.json"),
    ],
)
def test_calibrations_that_fit_nothing_are_refused(bundle_dir: Path, calibrations: list[Any], words: str) -> None:
    edit_manifest(bundle_dir, lambda m: m.update(schema_version=2, calibrations=calibrations))
    refused(bundle_dir, words)


def test_unknown_family_says_upgrade(bundle_dir: Path) -> None:
    edit_manifest(bundle_dir, lambda m: m.update(family="sam9"))
    assert "newer pixano-edge" in refused(bundle_dir, "sam9").action


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.5, None])
def test_schema_version_must_be_a_known_integer(bundle_dir: Path, version: object) -> None:
    edit_manifest(bundle_dir, lambda m: m.update(schema_version=version))
    refused(bundle_dir)


def test_half_written(bundle_dir: Path, tmp_path: Path) -> None:
    (bundle_dir / "manifest.json").unlink()
    refused(bundle_dir, "no manifest.json", "interrupted")
    refused(tmp_path / "none", "There is no bundle")
    (tmp_path / "a.pxe").write_bytes(b"PK")
    assert "bundle unpack" in refused(tmp_path / "a.pxe", "is a file").action


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": 1}', "\x00", "[" * 100_000, '{"a": NaN}'])
def test_wrong_json(bundle_dir: Path, text: str) -> None:
    (bundle_dir / "manifest.json").write_text(text)
    refused(bundle_dir, "manifest.json")


def test_truncated_manifest(bundle_dir: Path) -> None:
    path = bundle_dir / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    refused(bundle_dir, "manifest.json")


def test_not_utf8_and_huge_manifest(bundle_dir: Path) -> None:
    (bundle_dir / "manifest.json").write_bytes(b'{"name": "\xff"}')
    refused(bundle_dir, "manifest.json")
    with (bundle_dir / "manifest.json").open("wb") as file:
        file.truncate((16 << 20) + 1)
    refused(bundle_dir, "larger than")


def _set(*keys: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_set("unknown", value=1), "unknown"),
        (_set("name", value="../x"), "name"),
        (_set("licence", value=None), "licence"),
        (_set("constants", "image_size", value=65), "image_size"),
        (_set("constants", "image_size", value="64"), "constants"),
        (_set("constants", "nonsense", value=1), "nonsense"),
        (_set("constants", "mean", value=[0.5, 0.5]), "mean"),
        (_set("preprocess", "image_size", value=128), "image_size"),
        (_set("postprocess", "mask_threshold", value=0.5), "mask_threshold"),
        (_set("graphs", value={}), "image_encoder"),
        (_set("graphs", "mask_decoder", "variants", value={}), "no variant"),
        (_set("graphs", "mask_decoder", "variants", "fp32", "file", value="graphs/none.onnx"), "graphs/none.onnx"),
        (_set("graphs", "mask_decoder", "variants", "fp32", "file", value="../../etc/passwd"), "passwd"),
        (_set("golden", value=[{"name": "g", "image": "/etc/passwd", "tensors": "golden/one.npz"}]), "/etc/passwd"),
        (_set("files", "golden/one.png", value={"sha256": "x", "size": 3}), "sha256"),
        (_set("files", "golden/one.png", value={"sha256": "0" * 64, "size": -3}), "size"),
    ],
)
def test_wrong_manifest(bundle_dir: Path, change: Callable[[dict[str, Any]], None], word: str) -> None:
    edit_manifest(bundle_dir, change)
    refused(bundle_dir, word)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/hostname",
        "a/../../b",
        "./a",
        "a//b",
        "a/",
        "",
        "C:\\x",
        "a\\..\\b",
        "a\nb",
        "a\x00b",
        "x" * 300,
        "manifest.json",
        "MANIFEST.json",
        "golden/ONE.png",
        "golden/one.png/x",
    ],
)
def test_manifest_path_traversal(bundle_dir: Path, name: str) -> None:
    (bundle_dir.parent / "outside").write_bytes(b"png")
    edit_manifest(bundle_dir, lambda m: m["files"].update({name: dict(m["files"]["golden/one.png"])}))
    error = refused(bundle_dir)
    assert "lacks the files" not in str(error), "must be refused by its name, not for being absent"


def test_links_are_refused(bundle_dir: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    shutil.copy(bundle_dir / GRAPH, outside)
    (bundle_dir / GRAPH).unlink()
    (bundle_dir / GRAPH).symlink_to(outside)  # same content, so hashes would match
    refused(bundle_dir, "link")


def test_root_may_be_a_link(bundle_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(bundle_dir)
    assert Bundle.open(tmp_path / "alias").hash == Bundle.open(bundle_dir).hash


def test_special_file_is_refused(bundle_dir: Path) -> None:
    os.mkfifo(bundle_dir / "pipe")
    refused(bundle_dir, "special file")


def _replace(bundle_dir: Path, rel: str, data: bytes) -> None:
    """Replaces a file and its hash, as someone with bad intent would."""
    import hashlib

    (bundle_dir / rel).write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    edit_manifest(bundle_dir, lambda m: m["files"].update({rel: entry}))


@pytest.mark.parametrize(
    "data",
    [npz(a=np.array([{"x": 1}], dtype=object)), b"", b"not a zip", npz(a=np.arange(9))[:-40]],
    ids=["pickle", "empty", "text", "truncated"],
)
def test_bad_npz(bundle_dir: Path, data: bytes) -> None:
    _replace(bundle_dir, "golden/one.npz", data)
    with pytest.raises(BundleError, match="cannot be read as arrays"):
        Bundle.open(bundle_dir).load_npz("golden/one.npz")


def _flag_entry(data: bytes, offset: int, value: int) -> bytes:
    """Sets a 16-bit field of the first entry's local and central header (`offset` counts in the local one)."""
    changed = bytearray(data)
    changed[offset : offset + 2] = value.to_bytes(2, "little")
    central = data.index(b"PK\x01\x02") + offset + 2
    changed[central : central + 2] = value.to_bytes(2, "little")
    return bytes(changed)


def _huge_header() -> bytes:
    """An array that says it has 2**44 floats."""
    inner = io.BytesIO()
    np.lib.format.write_array_header_1_0(inner, {"descr": "<f4", "fortran_order": False, "shape": (1 << 44,)})
    outer = io.BytesIO()
    with zipfile.ZipFile(outer, "w") as archive:
        archive.writestr("a.npy", inner.getvalue())
    return outer.getvalue()


@pytest.mark.parametrize(
    "data",
    [_flag_entry(npz(a=np.arange(9)), 6, 1), _flag_entry(npz(a=np.arange(9)), 8, 99), _huge_header()],
    ids=["encrypted", "unknown compression", "more than the memory"],
)
def test_npz_that_zipfile_or_numpy_give_up_on(bundle_dir: Path, data: bytes) -> None:
    _replace(bundle_dir, "golden/one.npz", data)
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle_dir).load_npz("golden/one.npz")
    assert caught.value.action


def test_npz_bomb(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixano_edge.engine.bundle.bundle.MAX_NPZ_BYTES", 1000)
    _replace(bundle_dir, "golden/one.npz", npz(a=np.zeros(1000, np.uint8)))
    with pytest.raises(BundleError, match="unpacks to more than 1000"):
        Bundle.open(bundle_dir).load_npz("golden/one.npz")


def test_manifest_holds_no_local_path(bundle_dir: Path) -> None:
    text = (bundle_dir / "manifest.json").read_text()
    assert str(bundle_dir.parent) not in text
    assert json.loads(text)["schema_version"] == 1
