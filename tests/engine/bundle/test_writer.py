"""Writing: all or nothing."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from pixano_edge.engine.bundle import Bundle, BundleWriter
from pixano_edge.engine.errors import BundleError
from tests.engine.bundle.sample import add_files, fields, make_bundle


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_writes_a_bundle_and_no_other_file(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "deep" / "er" / "sample")
    assert made == tmp_path / "deep/er/sample"
    assert [p.name for p in made.parent.iterdir()] == ["sample"]
    assert set(Bundle.open(made).manifest.files) >= {"golden/one.png", "graphs/mask_decoder.fp32.onnx"}


def test_files_written_straight_into_root_count(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        add_files(writer)
        (writer.root / "extra").mkdir()
        (writer.root / "extra" / "x.bin").write_bytes(b"123")
        made = writer.finish(fields())
    assert Bundle.open(made).manifest.files["extra/x.bin"].size == 3


def test_copies_files(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    with BundleWriter(tmp_path / "b") as writer:
        assert writer.add_file("a/b", tmp_path / "source").read_bytes() == b"abc"
        with pytest.raises(BundleError, match="already has"):
            writer.add_file("a/b", b"")
        with pytest.raises(BundleError, match="not a plain path"):
            writer.add_file("../b", b"")
        with pytest.raises(BundleError, match="Failed writing 'c'"):
            writer.add_file("c", tmp_path / "none")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_interrupted_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with BundleWriter(tmp_path / "b") as writer:
            add_files(writer)
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        add_files(writer)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BundleError, match="not open"):
        writer.add_file("late", b"")


def test_nothing_at_the_destination_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append((Path(a) / "manifest.json").is_file()), rename(a, b)))
    with BundleWriter(tmp_path / "b") as writer:
        add_files(writer)
        assert not (tmp_path / "b").exists()
        assert not (writer.root / "manifest.json").exists()
        writer.finish(fields())
    assert seen == [True], "one rename, of a folder whose manifest is complete"


@pytest.mark.parametrize("where", ["write_bytes", "fsync", "rename", "body"])
def test_full_disk_leaves_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def write() -> None:
        with BundleWriter(tmp_path / "b") as writer:
            add_files(writer)
            if where == "write_bytes":
                monkeypatch.setattr(Path, "write_bytes", full_disk)
            elif where == "body":  # an exporter that writes into root by itself
                full_disk()
            else:
                monkeypatch.setattr(os, where, full_disk)
            writer.finish(fields())

    with pytest.raises(BundleError, match="disk is full") as caught:
        write()
    assert "space" in caught.value.action
    assert list(tmp_path.iterdir()) == []


def test_existing_bundle_is_kept_without_overwrite(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "b")
    digest = Bundle.open(made).hash
    with pytest.raises(BundleError, match="exists already"):
        make_bundle(made, seed=1)
    assert Bundle.open(made).hash == digest
    assert Bundle.open(make_bundle(made, seed=1, overwrite=True)).hash != digest
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_old_bundle_survives_a_failed_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_bundle(tmp_path / "b")
    digest = Bundle.open(made).hash
    rename = os.rename

    def second_fails(source: Path, target: Path) -> None:
        if ".tmp-" in str(source):
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(BundleError, match="broken"):
        make_bundle(made, seed=1, overwrite=True)
    assert Bundle.open(made).hash == digest
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_never_replaces_what_is_not_a_bundle(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("docs", "file"):
        with pytest.raises(BundleError, match="exists and"):
            make_bundle(tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "docs" / "thesis.txt").read_text() == "years of work"


def test_empty_folder_may_exist(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    Bundle.open(make_bundle(tmp_path / "b"))


def test_two_writers_one_wins(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)
    failed: list[BundleError] = []

    def write(seed: int) -> None:
        try:
            with BundleWriter(tmp_path / "b") as writer:
                add_files(writer, seed)
                barrier.wait()
                writer.finish(fields())
        except BundleError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 1
    Bundle.open(tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(
    "changes", [{"graphs": {}}, {"name": "a b"}, {"constants": {"image_size": 1}}, {"nonsense": 1}, {"files": {}}]
)
def test_a_manifest_that_would_not_open_is_not_written(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(BundleError):
        make_bundle(tmp_path / "b", **changes)
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_parity_report_is_refused(tmp_path: Path) -> None:
    parity = fields()["parity"]
    parity["masks"][0]["mean_iou"] = float("nan")
    with pytest.raises(BundleError, match="mean_iou"):
        make_bundle(tmp_path / "b", parity=parity)


def test_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert make_bundle(tmp_path / "b").stat().st_mode == (tmp_path / "plain").stat().st_mode
