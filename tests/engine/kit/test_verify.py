"""What a kit must be to verify: whole, unchanged, signed by the right key, with nothing added."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.kit import signing
from pixano_edge.engine.kit.create import Made
from pixano_edge.engine.kit.manifest import KitRefused, parse_manifest
from pixano_edge.engine.kit.verify import read_public_key, verify


def _refused(kit: Path, key: bytes | None, allow_unsigned: bool = False) -> str:
    with pytest.raises(KitRefused) as caught:
        verify(kit, key, allow_unsigned)
    assert caught.value.action
    return caught.value.message


def _part(kit: Path) -> Path:
    return kit / "wheels" / "small_part-2.5-py3-none-any.whl"


def _rewrite(kit: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((kit / "kit.json").read_text())
    change(manifest)
    (kit / "kit.json").write_text(json.dumps(manifest))


def test_a_good_kit(kit: Path, public: bytes) -> None:
    said: list[str] = []
    manifest = verify(kit, public, say=said.append)
    assert said == []
    assert [pin.name for pin in manifest.pins] == ["pip", "pixano-edge", "small-part"]
    assert [bundle.name for bundle in manifest.bundles] == ["mine"]
    on_disk = {p.relative_to(kit).as_posix() for p in kit.rglob("*") if p.is_file()}
    assert set(manifest.files) | {"kit.json", "kit.sig"} == on_disk


def test_without_a_key_it_is_refused(kit: Path) -> None:
    assert "No public key" in _refused(kit, None)


def test_without_a_key_when_told_so(kit: Path) -> None:
    said: list[str] = []
    verify(kit, None, True, said.append)
    assert len(said) == 1
    assert said[0].startswith("WARNING: the origin of this kit is not checked")
    assert "whoever alters a kit can write new checksums into it" in said[0]


def test_the_wrong_key(kit: Path, keys: Path) -> None:
    other = bytes.fromhex(signing.public_digits(signing.load(keys / "other", str)))
    assert "does not fit" in _refused(kit, other)
    assert "does not fit" in _refused(kit, other, True)


def test_a_kit_without_a_signature(kit: Path, public: bytes) -> None:
    (kit / "kit.sig").unlink()
    assert "no signature" in _refused(kit, public)
    assert "no signature" in _refused(kit, public, True)  # a key was given, so it counts
    verify(kit, None, True)


@pytest.mark.parametrize("text", ["", "zz", "00" * 64, "ab" * 63, "00" * 600, "\u00e9"])
def test_a_signature_that_is_none(kit: Path, public: bytes, text: str) -> None:
    (kit / "kit.sig").write_text(text)
    _refused(kit, public)


def test_an_altered_manifest(kit: Path, public: bytes) -> None:
    (kit / "kit.json").write_bytes((kit / "kit.json").read_bytes() + b" ")
    assert "does not fit" in _refused(kit, public)


def test_an_altered_file_with_new_checksums(kit: Path, public: bytes) -> None:
    """What a signature is for: the checksums fit, and without a key nobody could tell."""
    import hashlib

    _part(kit).write_bytes(b"evil")
    entry = {"size": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
    _rewrite(kit, lambda m: m["files"].__setitem__(f"wheels/{_part(kit).name}", entry))
    verify(kit, None, True)
    assert "does not fit" in _refused(kit, public)


@pytest.mark.parametrize("name", ["install.pyz", "requirements.txt", "README.txt", "bundles/mine/manifest.json"])
def test_every_file_is_covered(kit: Path, public: bytes, name: str) -> None:
    data = bytearray((kit / name).read_bytes())
    data[len(data) // 2] ^= 1
    (kit / name).write_bytes(data)
    assert "SHA-256 differs" in _refused(kit, public)
    assert "SHA-256 differs" in _refused(kit, None, True)


def test_a_truncated_file(kit: Path, public: bytes) -> None:
    _part(kit).write_bytes(_part(kit).read_bytes()[:-1])
    assert "truncated" in _refused(kit, public)


def test_a_longer_file(kit: Path, public: bytes) -> None:
    with _part(kit).open("ab") as file:
        file.write(b"\0")
    assert "longer" in _refused(kit, public)


def test_a_missing_file(kit: Path, public: bytes) -> None:
    _part(kit).unlink()
    assert "lacks 1 of its files" in _refused(kit, public)


@pytest.mark.parametrize("name", ["wheels/evil-1-py3-none-any.whl", "json.py", ".hidden", "bundles/mine/graphs/x"])
def test_a_file_too_many(kit: Path, public: bytes, name: str) -> None:
    (kit / name).write_text("")
    assert "does not list" in _refused(kit, public)


def test_links_are_refused_although_their_target_fits(kit: Path, public: bytes, tmp_path: Path) -> None:
    moved = tmp_path / "moved.whl"
    os.rename(_part(kit), moved)
    _part(kit).symlink_to(moved)
    assert "is a link" in _refused(kit, public)


def test_a_linked_folder(kit: Path, public: bytes, tmp_path: Path) -> None:
    os.rename(kit / "wheels", tmp_path / "wheels")
    (kit / "wheels").symlink_to(tmp_path / "wheels")
    assert "is a link" in _refused(kit, public)


def test_a_linked_manifest(kit: Path, public: bytes, tmp_path: Path) -> None:
    os.rename(kit / "kit.json", tmp_path / "kit.json")
    (kit / "kit.json").symlink_to(tmp_path / "kit.json")
    assert "is a link" in _refused(kit, public)


def test_a_pipe_does_not_hang(kit: Path, public: bytes) -> None:
    _part(kit).unlink()
    os.mkfifo(_part(kit))
    assert "not a plain file" in _refused(kit, public)


def test_no_kit(tmp_path: Path, public: bytes) -> None:
    assert "There is no kit" in _refused(tmp_path / "none", public)
    assert "lacks the file 'kit.json'" in _refused(tmp_path, public)


def _file(manifest: dict[str, Any], name: str) -> None:
    manifest["files"][name] = {"size": 0, "sha256": "0" * 64}


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a parent folder": lambda m: _file(m, "../evil"),
    "a parent folder inside": lambda m: _file(m, "wheels/../../evil"),
    "an absolute path": lambda m: _file(m, "/etc/evil"),
    "a backslash": lambda m: _file(m, "wheels\\evil"),
    "a drive": lambda m: _file(m, "C:evil"),
    "a control character": lambda m: _file(m, "wheels/a\nb"),
    "an empty part": lambda m: _file(m, "wheels//a"),
    "itself": lambda m: _file(m, "kit.json"),
    "its signature in capitals": lambda m: _file(m, "KIT.SIG"),
    "a twin in capitals": lambda m: _file(m, "INSTALL.PYZ"),
    "a bundle's name that leads out": lambda m: m["bundles"][0].update(name="../mine"),
    "a bundle's name with a dot in front": lambda m: m["bundles"][0].update(name=".mine"),
    "a bundle's folder that leads out": lambda m: m["bundles"][0].update(folder="../mine"),
    "a bundle that is not listed": lambda m: m["bundles"][0].update(folder="bundles/other"),
    "a wheel that is not listed": lambda m: m["requirements"][0].update(wheel="wheels/other.whl"),
    "an option for pip": lambda m: m["requirements"][0].update(name="--index-url"),
    "a line end in a version": lambda m: m["requirements"][0].update(version="1\n--index-url=x"),
    "a negative size": lambda m: m["files"]["README.txt"].update(size=-1),
    "a size that is true": lambda m: m["files"]["README.txt"].update(size=True),
    "a short digest": lambda m: m["files"]["README.txt"].update(sha256="0" * 63),
    "files as a list": lambda m: m.update(files=[]),
    "no files": lambda m: m.pop("files"),
    "another format": lambda m: m.update(format="other"),
    "another version": lambda m: m.update(version=2),
    "a strange Python": lambda m: m.update(python="3.11; rm"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_manifests_that_are_refused(kit: Path, what: str) -> None:
    """Signed or not, names never lead out of the kit."""
    verify(kit, None, True)
    _rewrite(kit, CHANGES[what])
    _refused(kit, None, True)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"\xff", b'{"format": 1, "format": 2}', b"[" * 100_000, b'{"a": NaN']
)
def test_no_manifests_at_all(data: bytes) -> None:
    with pytest.raises(KitRefused):
        parse_manifest(data)


def test_a_key_that_stands_there_twice(kit: Path) -> None:
    text = (kit / "kit.json").read_text()
    (kit / "kit.json").write_text(text.replace('"format"', '"format": "x",\n "format"', 1))
    assert "twice" in _refused(kit, None, True)


def test_public_keys(keys: Path, public: bytes, tmp_path: Path) -> None:
    assert read_public_key(public.hex()) == public
    assert read_public_key(" ".join([public.hex()[:32].upper(), public.hex()[32:]])) == public
    assert read_public_key(str(keys / "maker.pub")) == public
    (tmp_path / "digits").write_text(public.hex() + "\n")
    assert read_public_key(str(tmp_path / "digits")) == public


def test_what_is_no_public_key(keys: Path, tmp_path: Path) -> None:
    with pytest.raises(KitRefused, match="private key"):
        read_public_key(str(keys / "maker"))
    (tmp_path / "other").write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    for text in (str(tmp_path / "other"), str(tmp_path / "none"), "abcd", "zz" * 32):
        with pytest.raises(KitRefused):
            read_public_key(text)


def test_the_signature_is_plain_ed25519(signed: Made, public: bytes) -> None:
    """So that other tools can check it: 64 bytes, in hexadecimal, over the manifest's bytes."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    signature = bytes.fromhex((signed.folder / "kit.sig").read_text())
    Ed25519PublicKey.from_public_bytes(public).verify(signature, (signed.folder / "kit.json").read_bytes())
