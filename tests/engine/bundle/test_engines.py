"""Engines beside a bundle: an index of their own, checked as strictly as the manifest; packing them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.build.cache import file_name
from pixano_edge.engine.build.key import EngineKey
from pixano_edge.engine.build.pack import pack_engines
from pixano_edge.engine.bundle import Bundle, BundleStore, inspect_archive, pack, unpack
from pixano_edge.engine.bundle.engines import INDEX_NAME
from pixano_edge.engine.errors import BundleError
from pixano_edge.engine.runtime.engine_file import write_engine
from tests.engine.build.keys import make_key
from tests.engine.bundle.sample import make_bundle


def make_engine(bundle: Bundle, folder: Path, **changes: Any) -> Path:
    """An engine file for the sample's fp16 decoder."""
    digest = bundle.manifest.files["graphs/mask_decoder.fp16.onnx"].sha256
    key: EngineKey = make_key(**{"graph": "mask_decoder", "graph_sha256": digest, **changes})
    plan = folder / "plan"
    plan.write_bytes(key.digest.encode() * 50)
    path = folder / file_name(key)
    write_engine(path, plan, key.to_dict(), {})
    return path


@pytest.fixture
def packed(bundle_dir: Path, tmp_path: Path) -> Path:
    """The sample with one engine in it."""
    bundle = Bundle.open(bundle_dir)
    pack_engines(bundle, [make_engine(bundle, tmp_path)])
    return bundle_dir


def test_the_hash_of_the_bundle_stays(bundle_dir: Path, tmp_path: Path) -> None:
    before = Bundle.open(bundle_dir)
    assert before.engines is None
    assert pack_engines(before, [make_engine(before, tmp_path)]) == before.root
    after = Bundle.open(bundle_dir)
    assert after.hash == before.hash
    assert after.engines is not None
    (name,) = after.engines.engines
    assert name.startswith("engines/mask_decoder-fp16-")
    assert after.contents() == [*before.contents(), INDEX_NAME, name]
    assert sorted(p.name for p in bundle_dir.parent.iterdir() if p.name.startswith(".")) == []


def test_engines_for_other_gpus_stay_and_for_the_same_gpu_give_way(bundle_dir: Path, tmp_path: Path) -> None:
    old = Bundle.open(bundle_dir)
    pack_engines(old, [make_engine(old, tmp_path), make_engine(old, tmp_path, device_name="Orin NX")])
    bundle = Bundle.open(bundle_dir)
    new = make_engine(bundle, tmp_path, version="10.16.2")
    pack_engines(bundle, [new])
    engines = Bundle.open(bundle_dir).engines
    assert engines is not None
    other = make_key(
        graph="mask_decoder",
        graph_sha256=bundle.manifest.files["graphs/mask_decoder.fp16.onnx"].sha256,
        device_name="Orin NX",
    )
    assert set(engines.engines) == {f"engines/{new.name}", f"engines/{file_name(other)}"}


def test_a_copy_leaves_the_bundle_as_it_was(packed: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(packed)
    before = sorted(p.relative_to(packed) for p in packed.rglob("*"))
    engine = make_engine(bundle, tmp_path, device_name="Orin NX")
    copy = pack_engines(bundle, [engine], tmp_path / "copy")
    opened = Bundle.open(copy)
    assert opened.hash == bundle.hash
    assert opened.engines is not None
    assert len(opened.engines.engines) == 2
    assert sorted(p.relative_to(packed) for p in packed.rglob("*")) == before
    with pytest.raises(BundleError, match="exists already"):
        pack_engines(bundle, [engine], tmp_path / "copy")


def test_an_engine_of_another_bundle_is_refused(bundle_dir: Path, tmp_path: Path) -> None:
    other = Bundle.open(make_bundle(tmp_path / "other", seed=1))
    bundle = Bundle.open(bundle_dir)
    with pytest.raises(BundleError, match="not built from a graph of bundle"):
        pack_engines(bundle, [make_engine(other, tmp_path)])
    assert not (bundle_dir / "engines").exists()


def test_a_failure_leaves_the_engines_that_were_there(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(packed)
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        if Path(target).name == "engines" and ".engines-" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(BundleError, match="disk is full"):
        pack_engines(bundle, [])
    again = Bundle.open(packed)
    assert again.engines == bundle.engines
    assert [p.name for p in packed.parent.iterdir() if p.name.startswith(".")] == []


def change_index(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((root / INDEX_NAME).read_text())
    change(values)
    (root / INDEX_NAME).write_text(json.dumps(values))


def _outside(values: dict[str, Any]) -> None:
    values["engines"]["graphs/x.engine"] = next(iter(values["engines"].values()))


def _escape(values: dict[str, Any]) -> None:
    values["engines"]["engines/../../x"] = next(iter(values["engines"].values()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(bundle_hash="0" * 64), "built from another bundle"),
        (lambda v: v.update(schema_version=2), "has version 2"),
        (lambda v: v.update(schema_version="1"), "not valid"),
        (lambda v: v.update(more=1), "not valid"),
        (lambda v: v.pop("engines"), "not valid"),
        (lambda v: v["engines"].clear(), "does not list"),
        (_outside, "outside of 'engines'"),
        (_escape, "not a plain path"),
        (lambda v: v["engines"].update({"engines/no": {"sha256": "0" * 64, "size": 1}}), "lacks the files"),
    ],
)
def test_a_wrong_index_is_refused_open_and_packed(
    packed: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    archive = pack(packed, tmp_path / "good.pxe")
    change_index(packed, change)
    with pytest.raises(BundleError, match=words):
        Bundle.open(packed)
    bad = tmp_path / "bad.pxe"
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(bad, "w") as target:
        for info in source.infolist():
            data = (packed / INDEX_NAME).read_bytes() if info.filename == INDEX_NAME else source.read(info)
            target.writestr(info, data)
    with pytest.raises(BundleError):
        unpack(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("damage", "words"), [(lambda b: b[:-1], "truncated"), (lambda b: b[:-1] + b"?", "damaged")])
def test_a_damaged_engine_is_refused(packed: Path, damage: Callable[[bytes], bytes], words: str) -> None:
    (engine,) = (packed / "engines").glob("*.engine")
    engine.write_bytes(damage(engine.read_bytes()))
    with pytest.raises(BundleError, match=words) as caught:
        Bundle.open(packed)
    assert "--bundle-engines" in caught.value.action


def test_files_without_an_index_are_refused(packed: Path) -> None:
    (packed / INDEX_NAME).unlink()
    with pytest.raises(BundleError, match="does not list"):
        Bundle.open(packed)


def test_packing_storing_and_unpacking_take_the_engines_along(packed: Path, tmp_path: Path) -> None:
    before = Bundle.open(packed)
    archive = pack(packed, tmp_path / "a.pxe")
    assert inspect_archive(archive)[1] == before.hash
    unpacked = Bundle.open(unpack(archive, tmp_path / "unpacked"))
    assert (unpacked.hash, unpacked.engines) == (before.hash, before.engines)
    store = BundleStore(tmp_path / "store")
    for source, name in ((packed, "one"), (archive, "two")):
        stored = Bundle.open(store.add(source, name))
        assert stored.engines == before.engines
