"""What may be calibrated on: real pictures, none of noise, enough of them, and every file that is left out named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pixano_edge.calibration.data import Clip, Data, Picture, open_data, reading_order
from pixano_edge.engine.errors import CalibrationError


def smooth(seed: int, size: int = 48) -> NDArray[np.uint8]:
    """A picture with structure: neighbouring pixels are alike."""
    noise = np.random.default_rng(seed).uniform(0, 255, (size // 8, size // 8, 3)).astype(np.float32)
    return np.clip(cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)


def write(path: Path, image: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(12):
        write(tmp_path / "data" / f"sub-{index % 2}" / f"{index:02d}.png", smooth(index))
    return tmp_path / "data"


def refused(path: Path, *words: str, **options: Any) -> None:
    with pytest.raises(CalibrationError) as caught:
        open_data(path, **options)
    assert caught.value.action
    for word in words:
        assert word in caught.value.message, caught.value.message


def names(data: Data) -> list[str]:
    return [sample.name for sample in data.samples]


def test_a_folder_is_searched_through_and_split_by_its_seed(folder: Path) -> None:
    data = open_data(folder)
    assert (data.kind, data.source, len(data.samples), data.skipped) == ("images", "data", 12, ())
    assert names(data) == names(open_data(folder))
    assert names(data) != names(open_data(folder, seed=1))
    assert data.digest == open_data(folder, seed=1).digest
    split = data.split()
    assert len(split.held_out) == 4
    assert len(split.calibration) == 8
    assert not {s.name for s in split.calibration} & {s.name for s in split.held_out}
    assert len(open_data(folder, limit=5, allow_few=True).samples) == 5


def test_corrupt_files_among_good_ones_are_named_and_counted(folder: Path) -> None:
    (folder / "broken.png").write_bytes((folder / "sub-0" / "00.png").read_bytes()[:200])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "notes.txt").write_text("not asked for")
    data = open_data(folder)
    assert len(data.samples) == 12
    assert {s.name for s in data.skipped} == {"broken.png", "empty.jpg", "text.png"}
    assert all(s.reason for s in data.skipped)


def test_copies_are_left_out_so_that_none_is_judged_on_what_it_was_fitted_to(folder: Path) -> None:
    write(folder / "copy.bmp", cv2.imread(str(folder / "sub-1" / "03.png")))
    data = open_data(folder)
    assert len(data.samples) == 12
    assert "same picture as" in data.skipped[0].reason


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "none", "nothing at")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no picture to calibrate on")
    (tmp_path / "note.txt").write_text("x")
    refused(tmp_path / "note.txt", "no folder, video or COCO JSON")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"x")
    refused(broken, "no picture to calibrate on", "1 left out", "a.png")


def test_one_picture_is_refused_and_few_are_only_on_request(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "one" / "a.png", smooth(0))
    refused(tmp_path / "one", "one picture only")
    refused(tmp_path / "one", "one picture only", allow_few=True)
    few = tmp_path / "few"
    for index in range(3):
        write(few / f"{index}.png", smooth(index))
    refused(few, "3 usable pictures", "fewer than 8")
    data = open_data(few, allow_few=True)
    assert "Only 3" in data.warnings[0]


@pytest.mark.parametrize("kind", ["noise", "one colour"])
def test_random_and_empty_pictures_are_refused(tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(0)
    for index in range(12):
        noise = random.integers(0, 256, (48, 48, 3)).astype(np.uint8)
        flat = np.full((48, 48, 3), 20 * index, np.uint8)
        write(tmp_path / "data" / f"{index}.png", noise if kind == "noise" else flat)
    refused(tmp_path / "data", kind, "12 of 12", allow_few=True)


def test_a_few_such_pictures_among_good_ones_are_left_out(folder: Path) -> None:
    write(folder / "noise.png", np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8))
    write(folder / "black.png", np.zeros((48, 48, 3), np.uint8))
    data = open_data(folder)
    assert len(data.samples) == 12
    assert {(s.name, s.reason.split(":")[0]) for s in data.skipped} == {
        ("noise.png", "noise"),
        ("black.png", "of one colour"),
    }


def test_pictures_that_are_all_dark_warn(tmp_path: Path) -> None:
    for index in range(9):
        write(tmp_path / "dark" / f"{index}.png", (smooth(index) // 10).astype(np.uint8))
    assert "grey levels" in open_data(tmp_path / "dark").warnings[0]


def test_held_out_data_of_its_own_must_be_other_data(folder: Path, tmp_path: Path) -> None:
    data = open_data(folder)
    for index in range(100, 104):
        write(tmp_path / "other" / f"{index}.png", smooth(index))
    other = open_data(tmp_path / "other", allow_few=True)
    split = data.split(other)
    assert split.calibration == data.samples
    assert split.held_out == other.samples
    with pytest.raises(CalibrationError, match="among the calibration data"):
        data.split(data)
    write(tmp_path / "other" / "copy.png", cv2.imread(str(folder / "sub-1" / "03.png")))
    with pytest.raises(CalibrationError, match=r"'copy.png', which is 'sub-1/03.png'"):
        data.split(open_data(tmp_path / "other", allow_few=True))


def test_coco_gives_pictures_classes_and_objects(folder: Path) -> None:
    images = [{"id": i, "file_name": f"sub-{i % 2}/{i:02d}.png"} for i in range(12)]
    images.append({"id": 99, "file_name": "missing.png"})
    images.append({"id": 98, "file_name": "../outside.png"})
    square = [[10, 10, 30, 10, 30, 30, 10, 30]]
    notes: list[dict[str, Any]] = [
        {"image_id": 3, "category_id": 7, "bbox": [10, 10, 20, 20], "segmentation": square},
        {"image_id": 3, "category_id": 7, "bbox": [5, 5, 0, 4]},
        {"image_id": 4, "category_id": 8, "bbox": [1, 2, 3, 4], "segmentation": {"size": [1, 1], "counts": "x"}},
    ]
    content = {"images": images, "annotations": notes, "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "a"}]}
    (folder / "coco.json").write_text(json.dumps(content))
    data = open_data(folder / "coco.json")
    assert (data.kind, data.classes, len(data.samples)) == ("coco", ("cat", "a"), 12)
    assert {s.name for s in data.skipped} == {"missing.png", "../outside.png"}
    picture = next(s for s in data.samples if isinstance(s, Picture) and s.name.endswith("03.png"))
    assert [t.name for t in picture.truths] == ["cat"]
    mask = picture.truths[0].mask(48, 48)
    assert mask is not None
    assert 350 < mask.sum() < 500
    other = next(s for s in data.samples if isinstance(s, Picture) and s.name.endswith("04.png"))
    assert other.truths[0].mask(48, 48) is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"images": [{"id": 1}]}', '{"images": [], "annotations": [{}]}'])
def test_json_that_is_no_coco_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    refused(tmp_path / "x.json", "no COCO file")


def test_a_pixano_dataset_gives_its_media(folder: Path) -> None:
    dataset = folder.parent / "dataset"
    (dataset / "db").mkdir(parents=True)
    (dataset / "info.json").write_text("{}")
    refused(dataset, "no folder 'media'")
    folder.rename(dataset / "media")
    data = open_data(dataset)
    assert (data.kind, len(data.samples)) == ("pixano", 12)


def _video(path: Path, frames: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (48, 48))
    assert writer.isOpened()
    for index in range(frames):
        writer.write(np.roll(smooth(path.stem.count("b")), index, axis=1))
    writer.release()
    return path


def test_a_video_gives_pictures_or_clips(tmp_path: Path) -> None:
    video = _video(tmp_path / "a.avi", 40)
    data = open_data(video, limit=10)
    assert (data.kind, len(data.samples)) == ("video", 10)
    assert "one video" in data.warnings[0]
    clips = open_data(video, clips=True, clip_length=12, allow_few=True)
    assert sorted((s.place, s.length) for s in clips.samples if isinstance(s, Clip)) == [(0, 12), (12, 12), (24, 12)]
    clip = next(s for s in clips.samples if isinstance(s, Clip) and s.place == 12)
    frames = clip.frames()
    assert len(frames) == 12
    assert frames[3].shape == (48, 48, 3)
    frames.close()


def test_folders_of_frames_and_of_videos_give_clips(tmp_path: Path) -> None:
    for clip in range(2):
        for index in range(6):
            write(tmp_path / "clips" / f"clip-{clip}" / f"{index}.png", np.roll(smooth(clip), index, axis=1))
    _video(tmp_path / "clips" / "b.avi", 6)
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"x")
    write(tmp_path / "clips" / "single" / "0.png", smooth(9))
    data = open_data(tmp_path / "clips", clips=True, clip_length=6, allow_few=True)
    assert {s.name.partition("#")[0] for s in data.samples} <= {"clip-0", "clip-1", "b.avi"}
    assert {"broken.mp4", "single"} <= {s.name for s in data.skipped}
    refused(write(tmp_path / "x.png", smooth(0)), "no video", clips=True)


def test_frames_of_one_video_are_calibrated_or_judged_on_as_a_whole(tmp_path: Path) -> None:
    for name in ("a", "ab", "abb"):
        _video(tmp_path / "videos" / f"{name}.avi", 12)
    split = open_data(tmp_path / "videos", limit=12, allow_few=True).split()
    calibration, held_out = ({s.group for s in side} for side in (split.calibration, split.held_out))
    assert len(held_out) == 1
    assert len(calibration) == 2
    assert not calibration & held_out
    alone = open_data(tmp_path / "videos" / "a.avi", limit=12).split()
    assert max(s.place for s in alone.calibration) < min(s.place for s in alone.held_out)
    clips = open_data(tmp_path / "videos", clips=True, clip_length=4, allow_few=True).split()
    assert not {s.group for s in clips.calibration} & {s.group for s in clips.held_out}


def test_a_video_is_opened_once_however_often_it_is_gone_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pixano_edge.engine.models.sam2_video.frames import VideoFrames

    video, opened, plain = _video(tmp_path / "a.avi", 24), [], VideoFrames._exact_count

    def count(self: VideoFrames) -> int:
        opened.append(self)
        return plain(self)

    monkeypatch.setattr(VideoFrames, "_exact_count", count)
    pictures = open_data(video, limit=8, frames=tmp_path / "copies")
    for sample in (*pictures.samples, *pictures.samples):
        assert isinstance(sample, Picture)
        assert sample.load().shape == (48, 48, 3)
    assert len(opened) == 1
    assert len(list((tmp_path / "copies").rglob("*.png"))) == 8
    del pictures, sample
    assert not list((tmp_path / "copies").iterdir())
    clips = open_data(video, clips=True, clip_length=6, allow_few=True)
    ordered = reading_order(clips.samples)
    assert [s.place for s in ordered] == [0, 6, 12, 18]
    for clip in ordered:
        assert isinstance(clip, Clip)
        assert np.array_equal(clip.frames()[5], VideoFrames(video)[clip.place + 5])
    assert len(opened) == 3 + 4  # looking for clips, reading them; and the four of this test


def test_scenes_to_talk_about_are_written_alike(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="the scenes' textures need pixano-edge[benchmarks]")
    from pixano_edge.export.demo.write_scenes import write_talk

    one, other = ([path.read_bytes() for path in write_talk(tmp_path / name, 2)] for name in "ab")
    assert one == other
    assert one[0] != one[1]
    assert cv2.imread(str(tmp_path / "a" / "talk-000001.png")).shape == (128, 128, 3)
