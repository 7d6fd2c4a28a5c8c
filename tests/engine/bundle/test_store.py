"""The local store: names, never paths."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pixano_edge.engine.bundle import DEMO_NAMES, Bundle, BundleStore, pack
from pixano_edge.engine.bundle import store as store_module
from pixano_edge.engine.errors import BundleError


@pytest.fixture
def no_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(store_module, "demo_path", lambda name: tmp_path / "no-demo" / name)


@pytest.fixture
def store(tmp_path: Path, no_demo: None) -> BundleStore:
    return BundleStore(tmp_path / "store")


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIXANO_EDGE_HOME", str(tmp_path))
    assert BundleStore().root == tmp_path / "bundles"
    monkeypatch.delenv("PIXANO_EDGE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert BundleStore().root == tmp_path / ".local/share/pixano-edge/bundles"
    assert not BundleStore().root.exists(), "looking makes no folder"


def test_add_list_path_remove(store: BundleStore, bundle_dir: Path, tmp_path: Path) -> None:
    assert store.list() == []
    with pytest.raises(BundleError, match=r"no bundle 'sample'.*empty"):
        store.path("sample")
    assert store.add(bundle_dir) == tmp_path / "store" / "sample"
    assert store.add(pack(bundle_dir, tmp_path / "a.pxe"), "second") == tmp_path / "store" / "second"
    assert store.list() == ["sample", "second"]
    assert Bundle.open(store.path("second")).hash == Bundle.open(bundle_dir).hash
    with pytest.raises(BundleError, match="already"):
        store.add(bundle_dir)
    store.remove("sample")
    assert store.list() == ["second"]
    assert [p.name for p in store.root.iterdir()] == ["second"]
    with pytest.raises(BundleError, match=r"Known: second"):
        store.remove("sample")


@pytest.mark.parametrize("name", ["..", ".", "", "../x", "a/b", "/etc", ".hidden", "a\n", "a" * 129, "ä", "a b"])
def test_bad_names(store: BundleStore, bundle_dir: Path, name: str) -> None:
    for call in (store.path, store.remove):
        with pytest.raises(BundleError):
            call(name)
    if name:
        with pytest.raises(BundleError, match="not a bundle name"):
            store.add(bundle_dir, name)
    assert not store.root.exists() or list(store.root.iterdir()) == []


def test_half_written_and_foreign_folders_are_not_listed(store: BundleStore, bundle_dir: Path) -> None:
    (store.root / "half").mkdir(parents=True)
    shutil.copytree(bundle_dir, store.root / ".sample.tmp-abc")
    (store.root / "file").write_text("")
    assert store.list() == []


def test_damaged_source_changes_nothing(store: BundleStore, bundle_dir: Path) -> None:
    (bundle_dir / "golden/one.png").write_bytes(b"PNG")
    with pytest.raises(BundleError, match="damaged"):
        store.add(bundle_dir)
    assert store.list() == []
    assert not store.root.exists() or list(store.root.iterdir()) == []


def test_demo_is_always_there_and_read_only(tmp_path: Path, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "demo_path", lambda name: bundle_dir)
    store = BundleStore(tmp_path / "store")
    assert store.list() == sorted(DEMO_NAMES)
    for name in DEMO_NAMES:
        assert store.path(name) == bundle_dir
        with pytest.raises(BundleError, match=f"'{name}' is part of the package"):
            store.remove(name)
        with pytest.raises(BundleError, match="already"):
            store.add(bundle_dir, name)
    Bundle.open(bundle_dir)


@pytest.mark.parametrize("name", DEMO_NAMES)
def test_demo_path_is_in_the_package(name: str) -> None:
    assert store_module.demo_path(name).parts[-2:] == ("assets", name)
