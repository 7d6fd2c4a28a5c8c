"""Verdicts on disk: what they depend on, damaged files, disks that cannot be written, several writers."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pixano_edge.engine.models import verdicts
from pixano_edge.engine.models.verdicts import MAX_FILE_BYTES, Verdict, VerdictKey, VerdictStore, verdicts_root
from pixano_edge.engine.runtime.base import DeviceInfo
from tests.engine.models.sam2.test_cache import run_all

INFO = DeviceInfo("NVIDIA RTX 4060", "cuda", 0, "8.9", "580.1", "CUDA 13.0", 8 << 30, 4 << 30)


def key(**changes: str) -> VerdictKey:
    values = {"bundle_hash": "ab" * 32, "precision": "fp16", "backend": "tensorrt", "version": "10.3"} | changes
    return VerdictKey.of(values.pop("bundle_hash"), info=INFO, **values)  # type: ignore[arg-type]


def verdict(of: VerdictKey, problems: tuple[str, ...] = ()) -> Verdict:
    report = SimpleNamespace(samples=2, mean_iou=0.998, min_iou=0.99, seconds=1.5, problems=list(problems))
    return Verdict.of(of, report)


def test_what_was_put_is_found_again(tmp_path: Path) -> None:
    store = VerdictStore(tmp_path / "new" / "folder")
    assert store.get(key()) is None
    passed, failed = verdict(key()), verdict(key(precision="int8"), ("masks: mean IoU 0.5 < 0.98",))
    store.put(passed)
    store.put(failed)
    again = VerdictStore(store.root)
    assert again.get(key()) == passed
    assert again.get(key(precision="int8")) == failed
    assert passed.passed
    assert not failed.passed
    assert "0.5 < 0.98" in failed.text()
    store.put(verdict(key(), ("worse now",)))
    assert not store.get(key()).passed  # type: ignore[union-attr]
    assert sorted(p.suffix for p in store.root.iterdir()) == [".json", ".json"], "no temporary file is left"
    assert store.warnings == []


@pytest.mark.parametrize(
    "other",
    [
        key(bundle_hash="cd" * 32),
        key(precision="fp32"),
        key(backend="onnxruntime"),
        key(version="10.4"),
        key(engine="a.engine 12 34"),
        VerdictKey.of("ab" * 32, "fp16", "tensorrt", "10.3", replace(INFO, name="NVIDIA RTX 4070")),
        VerdictKey.of("ab" * 32, "fp16", "tensorrt", "10.3", replace(INFO, compute_capability="12.0")),
        VerdictKey.of("ab" * 32, "fp16", "tensorrt", "10.3", replace(INFO, driver="581.0")),
    ],
)
def test_another_combination_has_no_verdict(tmp_path: Path, other: VerdictKey) -> None:
    store = VerdictStore(tmp_path)
    store.put(verdict(key()))
    assert store.get(other) is None
    same = VerdictKey.of("ab" * 32, "fp16", "tensorrt", "10.3", replace(INFO, index=1, memory_free=5))
    assert store.get(same) is not None, "the same product in another slot is the same"


def no_json(data: bytes) -> bytes:
    return data[: len(data) // 2]


def no_field(data: bytes) -> bytes:
    values = json.loads(data)
    del values["passed"]
    return json.dumps(values).encode()


def other_key(data: bytes) -> bytes:
    values = json.loads(data)
    values["key"]["driver"] = "1"
    return json.dumps(values).encode()


def no_text(data: bytes) -> bytes:
    return b"\xff\xfe" * 10


def huge(data: bytes) -> bytes:
    return data + b" " * MAX_FILE_BYTES


@pytest.mark.parametrize("damage", [no_json, no_field, other_key, no_text, huge])
def test_a_damaged_file_is_a_warning_and_no_verdict(tmp_path: Path, damage: Any) -> None:
    store = VerdictStore(tmp_path)
    store.put(verdict(key()))
    path = store.path(key())
    path.write_bytes(damage(path.read_bytes()))
    assert store.get(key()) is None
    assert store.get(key()) is None
    assert len(store.warnings) == 1
    assert str(path) in store.warnings[0]
    store.put(verdict(key()))
    assert store.get(key()) is not None


def test_a_disk_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("here is no folder")
    store = VerdictStore(blocked)
    store.put(verdict(key()))
    assert "could not be saved" in store.warnings[0]

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    store = VerdictStore(tmp_path / "full")
    store.put(verdict(key()))
    assert "No space left" in store.warnings[0]
    assert list(store.root.iterdir()) == []


def test_many_writers_leave_whole_files(tmp_path: Path) -> None:
    def write() -> None:
        store = VerdictStore(tmp_path)
        for _ in range(20):
            store.put(verdict(key()))
            assert store.get(key()) is not None
            assert store.warnings == []

    run_all([write] * 4)
    assert [p.name for p in tmp_path.iterdir()] == [f"{key().digest}.json"]


def test_where_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIXANO_EDGE_HOME", str(tmp_path))
    assert verdicts_root() == tmp_path / "verdicts"
    monkeypatch.setattr(verdicts, "verdicts_root", verdicts_root)  # tests get a folder of their own otherwise
    assert VerdictStore().root == tmp_path / "verdicts"
