"""What a calibration decides before and after the long part of its work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pixano_edge.calibration import run
from pixano_edge.calibration.data import Data, Picture, Truth
from pixano_edge.calibration.make_other import make_half
from pixano_edge.calibration.result import Budget, SampleValue, Score
from pixano_edge.calibration.run import Request, calibrate
from pixano_edge.calibration.tasks.base import TaskOptions
from pixano_edge.calibration.work import Work
from pixano_edge.engine.bundle import Bundle, demo_path
from pixano_edge.engine.errors import BundleError, CalibrationError


def made_up(folder: Path, digest: str = "a", truths: tuple[Truth, ...] = ()) -> Data:
    samples = tuple(Picture(f"{i}.png", folder / f"{i}.png", truths) for i in range(9))
    return Data("data", "images", samples, (), digest, 0, pixels=tuple(f"{digest}{i}" for i in range(9)))


def request(tmp_path: Path, **more: Any) -> Request:
    plain = Request(made_up(tmp_path), Budget("mask_iou", 0.9), TaskOptions(), tmp_path / "out", work=tmp_path / "work")
    return replace(plain, **more)


def test_what_cannot_be_published_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class WorkedError(Exception):
        """The long part has begun."""

    notes: list[str] = []

    def work(self: Work) -> None:
        notes.extend(self.notes)
        raise WorkedError

    monkeypatch.setattr(Work, "refer", work)
    bundle = Bundle.open(demo_path("sam2-demo"))
    with pytest.raises(CalibrationError, match="was exported") as caught:
        calibrate(bundle, request(tmp_path, precision="fp16"))
    assert "--replace" in caught.value.action
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note.txt").write_text("mine")
    with pytest.raises(BundleError, match="something else than a bundle"):
        calibrate(bundle, request(tmp_path, destination=tmp_path / "taken"))
    for options in ({"precision": "fp16", "replace": True}, {"precision": "fp16", "dry_run": True}, {}):
        with pytest.raises(WorkedError):
            calibrate(bundle, request(tmp_path, **options))
    assert not notes
    with pytest.raises(WorkedError):
        calibrate(bundle, request(tmp_path, precision="auto"))
    assert "fp16 was passed over" in notes[0]


def test_work_is_taken_up_again_only_for_the_same_data(tmp_path: Path) -> None:
    bundle = Bundle.open(demo_path("sam2-demo"))
    task: Any = SimpleNamespace(graphs=("image_encoder",), options=TaskOptions())

    def key(**more: Any) -> str:
        return Work(bundle, request(tmp_path, **more), task, lambda what, done, of: None).key

    held_out = made_up(tmp_path / "other", "b")
    annotated = made_up(tmp_path, truths=(Truth("cat", (0, 0, 4, 4)),))
    keys = [key(), key(held_out=held_out), key(held_out=replace(held_out, digest="c")), key(data=annotated)]
    assert len(set(keys)) == 4
    assert key() == keys[0] == key(budget=Budget("mask_iou", 0.5), precision="auto")


def test_two_calibrations_of_the_same_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(demo_path("sam2-demo"))
    task: Any = SimpleNamespace(graphs=("image_encoder",), options=TaskOptions())

    def work(**more: Any) -> Work:
        return Work(bundle, request(tmp_path, **more), task, lambda what, done, of: None)

    first, second = work(), work(precision="auto", resume=False)
    with first.alone():
        first.folder.mkdir()
        with pytest.raises(CalibrationError, match="Another calibration") as caught, second.alone():
            raise AssertionError("two at once")
        assert "--work" in caught.value.action
        assert first.folder.is_dir()
    with second.alone():
        assert not first.folder.exists()
    monkeypatch.setattr("fcntl.flock", lambda *args: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with pytest.raises(CalibrationError, match="No locks available"), work().alone():
        raise AssertionError("without a lock")
    (tmp_path / "file").touch()
    with pytest.raises(CalibrationError, match="cannot be used"), work(work=tmp_path / "file").alone():
        raise AssertionError("no folder")


@pytest.mark.parametrize(("mean", "grain", "refused"), [(0.8, 0.0, True), (0.8, 0.5, False), (0.5, 0.5, True)])
def test_one_golden_answer_does_not_decide(mean: float, grain: float, refused: bool) -> None:
    """A budget of 0.95 asks for 0.85 there; of four answers, one other than fp32's leaves 0.75."""
    task = SimpleNamespace(
        metric="exact", grain=lambda sample: grain, score=lambda files, asked: Score(mean, (SampleValue("x", mean),))
    )
    work: Any = SimpleNamespace(
        golden=lambda: ["one", "two"], task=task, request=SimpleNamespace(budget=Budget("exact", 0.95))
    )
    assert bool(run._golden(work, {})) == refused


def test_half_precision_of_a_language_model_is_the_exporters(tmp_path: Path) -> None:
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(family="smolvlm"))
    assert run.precisions(bundle, request(tmp_path, precision="auto")) == ("int4", "int8")
    with pytest.raises(CalibrationError, match="is exported"):
        make_half(SimpleNamespace(bundle=bundle), "fp16", "fp16")  # type: ignore[arg-type]


def test_clips_are_asked_about_as_pictures_where_such_graphs_may_change(tmp_path: Path) -> None:
    assert run._asks_pictures(request(tmp_path))
    assert run._asks_pictures(request(tmp_path, graphs=("memory_encoder", "mask_decoder")))
    assert not run._asks_pictures(request(tmp_path, graphs=("memory_encoder",)))
