"""What the store offers and where a configuration points."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pixano_edge.engine.bundle import bundle
from pixano_edge.engine.provider.catalogue import Catalogue
from pixano_edge.engine.provider.errors import InferenceError, InvalidRequestError, ModelNotFoundError
from pixano_edge.engine.provider.types import ModelConfig

from .fakes import FolderStore, add_bundle

_TASK = "image_mask_generation"


@pytest.fixture
def known(root: Path) -> Catalogue:
    return Catalogue(FolderStore(root))


def test_scan_reads_a_manifest_once(known: Catalogue, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    parse = bundle.parse_manifest
    monkeypatch.setattr(bundle, "parse_manifest", lambda data: reads.append(1) or parse(data))
    entries, faults = known.scan()
    assert sorted(entries) == ["alpha", "beta"]
    assert entries["alpha"].checkpoint == "test/alpha"
    assert faults == {}
    known.scan()
    assert len(reads) == 2
    os.utime(root / "alpha" / "manifest.json", (1, 1))
    known.scan()
    assert len(reads) == 3


def test_scan_reports_what_is_broken_and_keeps_the_rest(known: Catalogue, root: Path) -> None:
    add_bundle(root, "newer")
    manifest = root / "newer" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version":1', '"schema_version":99'))
    (root / "alpha" / "manifest.json").write_text("{")
    entries, faults = known.scan()
    assert list(entries) == ["beta"]
    assert sorted(faults) == ["alpha", "newer"]
    assert "99" in faults["newer"]


def test_locate_by_name_by_path_and_by_store_name(known: Catalogue, root: Path, tmp_path: Path) -> None:
    by_name = known.locate(ModelConfig("alpha", _TASK))
    assert by_name.path == root / "alpha"
    assert known.locate(ModelConfig("mine", _TASK, root / "alpha")).path == (root / "alpha").resolve()
    assert known.locate(ModelConfig("mine", _TASK, str(root / "beta"))).path == (root / "beta").resolve()
    assert known.locate(ModelConfig("mine", _TASK, "alpha")) == by_name
    packed = tmp_path / "some.pxe"
    packed.write_bytes(b"x")
    assert known.locate(ModelConfig("mine", _TASK, packed)).path == packed.resolve()


@pytest.mark.parametrize(
    ("name", "path"), [("facebook/sam2.1-hiera-tiny", None), ("mine", "facebook/sam2.1-hiera-tiny")]
)
def test_a_hub_id_is_told_to_be_exported_elsewhere(known: Catalogue, name: str, path: str | None) -> None:
    with pytest.raises(InvalidRequestError, match="no torch") as caught:
        known.locate(ModelConfig(name, _TASK, path))
    assert "not a bundle on this box: a hub id or a path that does not exist" in caught.value.message
    assert "pixano-edge export sam2 facebook/sam2.1-hiera-tiny -o sam2.1-hiera-tiny" in caught.value.action


def test_the_home_folder_is_expanded(known: Catalogue, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root))
    assert known.locate(ModelConfig("mine", _TASK, "~/alpha")).path == (root / "alpha").resolve()
    with pytest.raises(InferenceError):
        known.locate(ModelConfig("mine", _TASK, "~nobody-by-that-name/alpha"))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (("gamma", None), ModelNotFoundError, "Known: alpha, beta, loaded"),
        (("mine", "gamma"), ModelNotFoundError, "Known: alpha, beta, loaded"),
        (("mine", "/no/such/folder"), ModelNotFoundError, "no model"),
        (("mine", "../../no-such"), ModelNotFoundError, "no model"),
        (("mine", "a\0b"), InferenceError, "no model|Cannot read"),
        (("mine", "x" * 5000), InferenceError, "no model|Cannot read"),
        (("../alpha", None), InvalidRequestError, "no model name"),
        (("", None), InvalidRequestError, "no model name"),
        ((3, None), InvalidRequestError, "no model name"),
        (("a b", "alpha"), InvalidRequestError, "no model name"),
        (("mine", "weights.pt"), InvalidRequestError, "not a bundle"),
    ],
)
def test_locate_refuses(known: Catalogue, config: tuple[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        known.locate(ModelConfig(config[0], _TASK, config[1]), ["loaded"])


def test_a_checkpoint_is_not_a_bundle(known: Catalogue, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"x")
    for path in (folder, weights):
        with pytest.raises(InvalidRequestError, match="not a bundle"):
            known.locate(ModelConfig("mine", _TASK, path))
