"""Clips of requests: frames one by one and video files, with limits and the media policy."""

from __future__ import annotations

import base64
from pathlib import Path

import cv2
import numpy as np
import pytest

from pixano_edge.engine.errors import ImageError
from pixano_edge.engine.models.sam2_video.frames import FrameError
from pixano_edge.engine.provider import InvalidRequestError
from pixano_edge.engine.provider.clips import open_clip
from pixano_edge.engine.provider.media import MediaPolicy
from pixano_edge.engine.provider.settings import LoadOptions

from .fakes import data_uri, png

ANY, NONE = MediaPolicy(None), MediaPolicy([])
OPTIONS = LoadOptions()


@pytest.fixture(scope="module")
def movie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five frames of 64x48, brighter and brighter."""
    path = tmp_path_factory.mktemp("movie") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for i in range(5):
        writer.write(np.full((48, 64, 3), 40 * i, np.uint8))
    writer.release()
    return path


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_frames_of_any_form_are_decoded_in_turn(tmp_path: Path) -> None:
    file = tmp_path / "two.png"
    file.write_bytes(png(color=(2, 2, 2)))
    clip = open_clip([data_uri(png(color=(0, 0, 0))), png(color=(1, 1, 1)), str(file), file], ANY, OPTIONS)
    assert len(clip) == 4
    assert clip.size == (30, 40)
    assert [int(clip[i].mean()) for i in range(4)] == [0, 1, 2, 2]
    clip.close()
    assert len(clip) == 0  # the request's data are let go


def test_a_broken_frame_names_itself_when_it_is_its_turn() -> None:
    clip = open_clip([png(), b"no picture", png(20, 20), "gone.png"], ANY, OPTIONS)
    assert clip[0].shape == (30, 40, 3)
    for index, message in ((1, "Frame 1: .*not an image"), (2, "Frame 2: it is 20x20"), (3, "Frame 3: .*gone.png")):
        with pytest.raises(FrameError, match=message) as caught:
            clip[index]
        assert caught.value.index == index
    with pytest.raises(FrameError, match=r"Frame 0: .*not an image"):
        open_clip([b"no picture"], ANY, OPTIONS)


def test_limits_and_policy_hold_for_each_frame() -> None:
    with pytest.raises(FrameError, match=r"Frame 0: .*1000 pixels"):
        open_clip([png()], ANY, LoadOptions(max_image_pixels=1000))
    with pytest.raises(FrameError, match=r"Frame 0: .*10 bytes"):
        open_clip([png()], ANY, LoadOptions(max_image_bytes=10))
    with pytest.raises(FrameError, match="Frame 0: Paths are not allowed"):
        open_clip(["/etc/hostname"], NONE, OPTIONS)
    with pytest.raises(FrameError, match="Frame 0: Images are not fetched"):
        open_clip(["http://10.0.0.1/a.png"], ANY, OPTIONS)


@pytest.mark.parametrize("form", ["path", "text", "bytes", "uri"])
def test_a_video_file(movie: Path, temporary: Path, form: str) -> None:
    content = movie.read_bytes()
    uri = f"data:video/avi;base64,{base64.b64encode(content).decode()}"
    clip = open_clip({"path": movie, "text": str(movie), "bytes": content, "uri": uri}[form], ANY, OPTIONS)
    assert len(clip) == 5
    assert clip.size == (48, 64)
    means = [float(clip[i].mean()) for i in (0, 4, 1)]
    assert means[0] < means[2] < means[1]
    clip.close()
    assert list(temporary.iterdir()) == []
    assert movie.is_file()


def test_video_files_that_are_refused_leave_nothing(movie: Path, temporary: Path) -> None:
    content = movie.read_bytes()
    short = LoadOptions(max_video_bytes=100)
    uri = f"data:video/avi;base64,{base64.b64encode(content).decode()}"
    for source in (movie, content, uri):
        with pytest.raises(InvalidRequestError, match="encoded video has more than 100 bytes"):
            open_clip(source, ANY, short)
        with pytest.raises(InvalidRequestError, match="64x48 pixels, more than the 1000"):
            open_clip(source, ANY, LoadOptions(max_image_pixels=1000))
    for source, message in (
        (str(movie), "Paths are not allowed"),
        ("http://10.0.0.1/a.mp4", "Videos are not fetched"),
        (data_uri(png()), "Not a video data URI"),
        ("data:video/mp4;base64,a*b=", "not valid base64"),
        ("", "video must be a 'data:' URI"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            open_clip(source, NONE, OPTIONS)
    with pytest.raises(ImageError, match=r"the video.* holds no frame"):
        open_clip(b"no video at all", ANY, OPTIONS)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("video", "message"), [([], "no frames"), (None, "NoneType"), (3, "int"), ({}, "dict")])
def test_what_is_no_clip(video: object, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        open_clip(video, ANY, OPTIONS)
    assert "list of frames" in caught.value.action
