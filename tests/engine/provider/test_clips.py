"""Clips of requests: frames one by one and video files, with limits and the media policy."""

from __future__ import annotations

import base64
from pathlib import Path

import cv2
import numpy as np
import pytest

from pixano_edge.engine.errors import ImageError
from pixano_edge.engine.models.sam2_video.containers import is_container
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
        open_clip(content[:4096], ANY, OPTIONS)
    with pytest.raises(ImageError, match="not of a known container"):
        open_clip(b"no video at all", ANY, OPTIONS)
    assert list(temporary.iterdir()) == []


LISTS = {
    "parts": "ffconcat version 1.0\nfile {name}\n",
    "playlist": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10.0,\n{path}\n#EXT-X-ENDLIST\n",
    "manifest": "<?xml version='1.0'?><MPD><Period><BaseURL>{path}</BaseURL></Period></MPD>",
}


def test_the_decoder_does_follow_lists(movie: Path, tmp_path: Path) -> None:
    """Why they are refused: this file holds no picture, and five frames come out of it."""
    listed = tmp_path / "list.video"
    (tmp_path / "other.avi").write_bytes(movie.read_bytes())
    listed.write_text(LISTS["parts"].format(name="other.avi"))
    capture = cv2.VideoCapture(str(listed))
    if not capture.read()[0]:
        pytest.skip("this OpenCV does not read lists of parts")


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("start", ["", "RIFF....AVI ", "FLV\x01", "\x1aE\xdf\xa3"])
def test_texts_that_name_other_files_are_refused(movie: Path, temporary: Path, kind: str, start: str) -> None:
    """Also behind the first bytes of a container."""
    (temporary / "other.avi").write_bytes(movie.read_bytes())
    text = start.encode("latin-1") + LISTS[kind].format(name="other.avi", path=temporary / "other.avi").encode()
    listed = temporary / "list.avi"
    listed.write_bytes(text)
    uri = f"data:video/mp4;base64,{base64.b64encode(text).decode()}"
    for source in (text, uri, listed, str(listed)):
        with pytest.raises(ImageError, match="not of a known container"):
            open_clip(source, ANY, OPTIONS)
    assert sorted(p.name for p in temporary.iterdir()) == ["list.avi", "other.avi"]


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "mp4v"), ("a.mov", "mp4v"), ("a.mkv", "MJPG"), ("a.avi", "MJPG"), ("a.flv", "FLV1")]
)
def test_real_containers_pass(tmp_path: Path, name: str, codec: str) -> None:
    writer = cv2.VideoWriter(str(tmp_path / name), cv2.VideoWriter_fourcc(*codec), 10, (64, 48))
    if not writer.isOpened():
        pytest.skip(f"this OpenCV does not write {name}")
    for i in range(3):
        writer.write(np.full((48, 64, 3), 40 * i, np.uint8))
    writer.release()
    assert len(open_clip((tmp_path / name).read_bytes(), ANY, OPTIONS)) == 3


@pytest.mark.parametrize(
    ("head", "passes"),
    [
        (b"G" + bytes(187) + b"G" + bytes(187) + b"G" + bytes(187), True),  # MPEG-TS
        (bytes(4) + b"G" + bytes(191) + b"G" + bytes(191) + b"G" + bytes(187), True),  # M2TS
        (b"G" + bytes(500), False),
        (b"\x00\x00\x01\xba", True),
        (b"\x00\x00\x00\x18ftypmp42", True),
        (b"AAAAftypmp42", False),
        (b"RIFF\x00\x00\x00\x00WAVE", False),
        (b"", False),
    ],
)
def test_heads(head: bytes, passes: bool) -> None:
    assert is_container(head) == passes


def test_pixels_are_counted_before_a_frame_is_decoded(movie: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixano_edge.engine.provider.clips.VideoFrames", None)
    with pytest.raises(InvalidRequestError, match="64x48 pixels, more than the 1000"):
        open_clip(movie, ANY, LoadOptions(max_image_pixels=1000))


@pytest.mark.parametrize(("video", "message"), [([], "no frames"), (None, "NoneType"), (3, "int"), ({}, "dict")])
def test_what_is_no_clip(video: object, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        open_clip(video, ANY, OPTIONS)
    assert "list of frames" in caught.value.action
