"""One-file bundles: round trip, and archives made to hurt."""

from __future__ import annotations

import errno
import os
import random
import stat
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixano_edge.engine.bundle import Bundle, inspect_archive, pack, unpack
from pixano_edge.engine.bundle.files import check_names, safe_relative
from pixano_edge.engine.errors import BundleError
from tests.engine.bundle.sample import make_bundle


@pytest.fixture
def packed(bundle_dir: Path, tmp_path: Path) -> Path:
    return pack(bundle_dir, tmp_path / "sample.pxe")


def test_round_trip(bundle_dir: Path, packed: Path, tmp_path: Path) -> None:
    made = unpack(packed, tmp_path / "back")
    bundle = Bundle.open(made)
    assert bundle.hash == Bundle.open(bundle_dir).hash
    assert inspect_archive(packed) == (bundle.manifest, bundle.hash)
    assert pack(made, tmp_path / "again.pxe").read_bytes() == packed.read_bytes(), "same bundle, same bytes"


def test_progress_reaches_the_total(bundle_dir: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    file = pack(bundle_dir, tmp_path / "a.pxe", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 12000
    seen.clear()
    unpack(file, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]


def test_pack_refuses(bundle_dir: Path, packed: Path, tmp_path: Path) -> None:
    before = packed.read_bytes()
    with pytest.raises(BundleError, match="exists already"):
        pack(bundle_dir, packed)
    with pytest.raises(BundleError, match="inside the bundle"):
        pack(bundle_dir, bundle_dir / "graphs" / "a.pxe")
    with pytest.raises(BundleError, match="no bundle"):
        pack(tmp_path / "none", tmp_path / "b.pxe")
    (bundle_dir / "golden/one.png").write_bytes(b"PNG")
    with pytest.raises(BundleError, match="damaged"):
        pack(bundle_dir, packed, overwrite=True)
    assert packed.read_bytes() == before


def test_pack_on_a_full_disk_leaves_nothing(bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    out = tmp_path / "out"
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="disk is full"):
        pack(bundle_dir, out / "a.pxe")
    assert list(out.iterdir()) == []


def test_unpack_on_a_full_disk_leaves_nothing(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="disk is full"):
        unpack(packed, tmp_path / "out" / "b")
    assert list((tmp_path / "out").iterdir()) == []


def test_unpack_overwrite(packed: Path, tmp_path: Path) -> None:
    old = make_bundle(tmp_path / "old", seed=1)
    with pytest.raises(BundleError, match="exists already"):
        unpack(packed, old)
    assert Bundle.open(unpack(packed, old, overwrite=True)).hash == inspect_archive(packed)[1]


Edit = Callable[[zipfile.ZipFile], None]


def rebuild(source: Path, target: Path, edit: Edit | None = None, drop: str = "", method: int = 0) -> Path:
    """Copies a zip without `drop`, then lets `edit` add entries."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for info in old.infolist():
            if info.filename != drop:
                new.writestr(info.filename, old.read(info), method)
        if edit:
            edit(new)
    return target


def refused(file: Path, tmp_path: Path, *words: str, **limits: int) -> None:
    """Both reading and unpacking refuse `file`; nothing is written anywhere."""
    out = tmp_path / "refused"
    out.mkdir()
    before = sorted(p for p in tmp_path.rglob("*") if out not in p.parents)
    for call in (lambda: inspect_archive(file, **limits), lambda: unpack(file, out / "in" / "b", **limits)):
        with pytest.raises(BundleError) as caught:
            call()
        assert caught.value.action
        for word in words:
            assert word in str(caught.value)
    assert sorted(p for p in tmp_path.rglob("*") if out not in p.parents) == before
    assert [p for p in out.rglob("*") if p.is_file()] == []
    assert not (out / "in" / "b").exists()


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/tmp/pixano-evil", "C:\\evil", "..\\evil", "a//b", "./a", "a\nb"]
)
def test_traversal_and_absolute_names(packed: Path, tmp_path: Path, name: str) -> None:
    file = rebuild(packed, tmp_path / "evil.pxe", lambda z: z.writestr(name, b"evil"))
    refused(file, tmp_path, "not a plain path")


def test_symlink(packed: Path, tmp_path: Path) -> None:
    def link(archive: zipfile.ZipFile) -> None:
        info = zipfile.ZipInfo("golden/one.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")

    refused(rebuild(packed, tmp_path / "x.pxe", link, drop="golden/one.png"), tmp_path, "link or a special file")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["golden/one.png", "GOLDEN/one.PNG"])
def test_duplicate(packed: Path, tmp_path: Path, name: str) -> None:
    refused(rebuild(packed, tmp_path / "x.pxe", lambda z: z.writestr(name, b"png")), tmp_path, "listed twice")


def test_file_that_is_also_a_folder(packed: Path, tmp_path: Path) -> None:
    file = rebuild(packed, tmp_path / "x.pxe", lambda z: z.writestr("golden/one.png/x", b""))
    refused(file, tmp_path, "file and as a folder")


def test_unlisted_and_missing(packed: Path, tmp_path: Path) -> None:
    refused(rebuild(packed, tmp_path / "x.pxe", lambda z: z.writestr("new", b"")), tmp_path, "does not list", "new")
    (tmp_path / "refused").rename(tmp_path / "refused1")
    refused(rebuild(packed, tmp_path / "y.pxe", drop="golden/one.png"), tmp_path, "lacks", "golden/one.png")


def test_no_manifest_and_newer_schema(packed: Path, tmp_path: Path) -> None:
    refused(rebuild(packed, tmp_path / "x.pxe", drop="manifest.json"), tmp_path, "no manifest.json")
    (tmp_path / "refused").rename(tmp_path / "refused1")
    file = rebuild(
        packed, tmp_path / "y.pxe", lambda z: z.writestr("manifest.json", '{"schema_version": 9}'), drop="manifest.json"
    )
    refused(file, tmp_path, "Install a newer pixano-edge")


def test_changed_content(packed: Path, tmp_path: Path) -> None:
    def other(archive: zipfile.ZipFile) -> None:
        archive.writestr("golden/one.png", b"PNG")

    refused(rebuild(packed, tmp_path / "x.pxe", other, drop="golden/one.png"), tmp_path, "does not match")


def test_limits(packed: Path, tmp_path: Path) -> None:
    refused(packed, tmp_path, "at most 12000", "--max-bytes", max_bytes=12_000)
    (tmp_path / "refused").rename(tmp_path / "refused1")
    refused(packed, tmp_path, "at most 6", max_files=6)
    unpack(packed, tmp_path / "fits", max_files=7)


def test_bomb_by_ratio(packed: Path, tmp_path: Path) -> None:
    def zeros(archive: zipfile.ZipFile) -> None:
        archive.writestr("zeros", bytes(4 << 20), zipfile.ZIP_DEFLATED)

    refused(rebuild(packed, tmp_path / "x.pxe", zeros), tmp_path, "would grow")


def test_bomb_that_lies_about_its_size(packed: Path, tmp_path: Path) -> None:
    """8 MiB of zeros declared as the 3 bytes that the manifest lists."""

    def lie(archive: zipfile.ZipFile) -> None:
        archive.writestr("golden/one.png", bytes(8 << 20), zipfile.ZIP_DEFLATED)
        info = archive.getinfo("golden/one.png")
        info.file_size = 3  # goes into the central directory, which readers trust
        info.CRC = 0xFF41D912

    refused(rebuild(packed, tmp_path / "x.pxe", lie, drop="golden/one.png"), tmp_path)


def test_other_compression_and_password_flag(packed: Path, tmp_path: Path) -> None:
    refused(rebuild(packed, tmp_path / "x.pxe", method=zipfile.ZIP_LZMA), tmp_path, "compression")
    (tmp_path / "refused").rename(tmp_path / "refused1")

    def locked(archive: zipfile.ZipFile) -> None:
        archive.writestr("golden/one.png", b"png")
        archive.getinfo("golden/one.png").flag_bits |= 1

    refused(rebuild(packed, tmp_path / "y.pxe", locked, drop="golden/one.png"), tmp_path, "encrypted")


def test_deflated_by_another_tool_is_fine(packed: Path, tmp_path: Path) -> None:
    def folders(archive: zipfile.ZipFile) -> None:
        archive.mkdir("golden") if hasattr(archive, "mkdir") else archive.writestr("golden/", b"")

    file = rebuild(packed, tmp_path / "x.pxe", folders, method=zipfile.ZIP_DEFLATED)
    assert Bundle.open(unpack(file, tmp_path / "b")).hash == inspect_archive(packed)[1]


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_truncated_archive(packed: Path, tmp_path: Path, keep: float) -> None:
    data = packed.read_bytes()
    file = tmp_path / "cut.pxe"
    file.write_bytes(data[: int(len(data) * keep)])
    refused(file, tmp_path, "damaged, truncated")


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no packed bundle"):
        inspect_archive(tmp_path / "none.pxe")


def test_flipped_bytes_never_unpack_to_something_else(packed: Path, tmp_path: Path) -> None:
    data, digest = packed.read_bytes(), inspect_archive(packed)[1]
    rng = random.Random(0)
    file, caught = tmp_path / "flipped.pxe", 0
    # Headers, manifest and central directory are the interesting part; the rest is covered by the hash test.
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 4))):
            changed[rng.choice((rng.randrange(3000), rng.randrange(len(data) - 900, len(data))))] ^= 1 << rng.randrange(
                8
            )
        file.write_bytes(changed)
        try:
            assert inspect_archive(file)[1] == digest
        except BundleError:
            caught += 1
    assert caught > 100


@given(st.one_of(st.text(max_size=30), st.text(alphabet="ab./\\:~\x00 ", max_size=12)))
@settings(max_examples=300, deadline=None)
def test_accepted_names_stay_inside(name: str) -> None:
    try:
        safe = safe_relative(name)
    except BundleError:
        return
    root = Path(tempfile.gettempdir()) / "root"
    joined = Path(os.path.normpath(root / safe))
    assert root in joined.parents
    assert str(safe) == name, "one spelling per file"


@given(st.lists(st.sampled_from(["a", "A", "b", "a/b", "a/B", "b/c/d", "B/c", "x"]), min_size=1, max_size=5))
def test_accepted_lists_never_collide(names: list[str]) -> None:
    folded = [n.lower() for n in names]
    clash = len(set(folded)) < len(folded) or any(m.startswith(n + "/") for n in folded for m in folded)
    if clash:
        with pytest.raises(BundleError):
            check_names(names)
    else:
        check_names(names)
