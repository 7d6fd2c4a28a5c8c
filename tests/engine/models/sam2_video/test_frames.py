"""Frames of a clip: what they give, what they keep, and how they refuse."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pixano_edge.engine.errors import ImageError
from pixano_edge.engine.models.sam2_video import frames as frames_module
from pixano_edge.engine.models.sam2_video.frames import FrameError, ImageFrames, VideoFrames, open_frames


def picture(value: int, size: tuple[int, int] = (24, 40)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


def encoded(value: int, size: tuple[int, int] = (24, 40)) -> bytes:
    target = io.BytesIO()
    Image.fromarray(picture(value, size)).save(target, "PNG")
    return target.getvalue()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 12, (64, 48))
    for i in range(50):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[:, :, 2] = 5 * i  # red, in OpenCV's order
        writer.write(frame)
    writer.release()
    return path


def test_arrays_bytes_and_files_alike(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encoded(3))
    frames = open_frames([file, encoded(4), picture(5)])
    assert len(frames) == 3
    assert frames.size == (24, 40)
    assert [int(frames[i].mean()) for i in range(3)] == [3, 4, 5]


def test_folder_in_order_of_names(tmp_path: Path) -> None:
    for name, value in (("b.png", 2), ("a.png", 1), ("notes.txt", 0)):
        (tmp_path / name).write_bytes(encoded(value) if name.endswith("png") else b"text")
    frames = open_frames(tmp_path)
    assert [int(frames[i][0, 0, 0]) for i in range(len(frames))] == [1, 2]


def test_broken_frame_names_itself() -> None:
    frames = ImageFrames([picture(1), b"not a picture", picture(2)])
    with pytest.raises(FrameError, match="Frame 1"):
        frames[1]
    assert int(frames[2].mean()) == 2  # the clip can still be used


def test_another_size_names_itself() -> None:
    frames = ImageFrames([picture(1), picture(2, (24, 41))])
    with pytest.raises(FrameError, match="Frame 1: it is 41x24, the first one 40x24"):
        frames[1]


@pytest.mark.parametrize("index", [-1, 2])
def test_no_such_frame(index: int) -> None:
    with pytest.raises(FrameError, match="the clip has 2"):
        ImageFrames([picture(1), picture(2)])[index]


def test_nothing_at_all(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no frames"):
        open_frames([])
    with pytest.raises(ImageError, match="no picture"):
        open_frames(tmp_path)
    with pytest.raises(ImageError, match="no video"):
        open_frames(tmp_path / "absent.mp4")
    (tmp_path / "text.mp4").write_bytes(b"nonsense")
    with pytest.raises(ImageError, match="no frame that can be decoded"):
        open_frames(tmp_path / "text.mp4")
    with pytest.raises(FrameError, match="Frame 0"):
        ImageFrames([b"broken"])


def test_video_forward_backward_and_jumps(video: Path) -> None:
    frames = VideoFrames(video, stretch=8)
    assert len(frames) == 50
    assert frames.size == (48, 64)
    assert frames.fps == pytest.approx(12)
    order = [*range(50), *range(49, -1, -1), 31, 2, 48, 0]
    for index in order:
        assert abs(int(frames[index][..., 0].mean()) - 5 * index) <= 4, index
        assert len(frames._kept) <= 8
    frames.close()


def test_backwards_decodes_each_stretch_once(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = VideoFrames(video, stretch=10)
    frames[49]
    seeks: list[int] = []
    original = VideoFrames._seek
    monkeypatch.setattr(VideoFrames, "_seek", lambda self, index: (seeks.append(index), original(self, index))[1])
    for index in range(49, -1, -1):
        frames[index]
    assert len(seeks) <= 5


def test_a_frame_is_the_callers_to_keep(video: Path) -> None:
    frames = VideoFrames(video)
    first = frames[0]
    first[:] = 99
    assert int(frames[0].max()) < 99


def test_large_frames_are_kept_within_a_limit(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = VideoFrames(video)[0].nbytes
    for limit, kept in ((5 * one, 5), (one // 2, 2), (100 * one, 16)):
        monkeypatch.setattr(frames_module, "STRETCH_BYTES", limit)
        frames = VideoFrames(video)
        last = frames[19]
        assert len(frames._kept) == kept
        assert np.array_equal(frames[10], VideoFrames(video)[10])  # a step back, beyond what is kept
        assert np.array_equal(frames[19], last)
