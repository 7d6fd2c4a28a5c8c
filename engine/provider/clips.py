"""The clip of a tracking request: frames one by one or a video file, decoded as the tracker asks for them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import EdgeError, ImageError
from ..models.images import ImageLimits, decode_image
from ..models.sam2_video.containers import HEAD_BYTES, is_container
from ..models.sam2_video.frames import FrameError, Frames, Image, VideoFrames, declared_size
from .errors import InvalidRequestError
from .media import MediaPolicy
from .settings import LoadOptions

_ADVICE = "Send a list of frames (data URIs, paths or bytes), or one video file."


def open_clip(video: Any, media: MediaPolicy, options: LoadOptions) -> Frames:
    """Frames of `video`; the caller closes them. Reads a whole video file once, to count its frames.

    Args:
        video: A list of images, each a ``data:`` URI, a path or bytes; or one video file in one of these forms.
        media: Which files may be read.
        options: Limits for images and videos.

    Raises:
        InvalidRequestError: Another kind of value, an empty list, a file that is not allowed or too large.
        ImageError: The first frame does not decode.
    """
    if isinstance(video, str | bytes | bytearray | memoryview | os.PathLike):
        return _video_file(media.video(video, options.max_video_bytes), options)
    if not isinstance(video, Sequence):
        raise InvalidRequestError(f"video must be a list or a file, got {type(video).__name__}.", _ADVICE)
    if not video:
        raise InvalidRequestError("The video has no frames.", _ADVICE)
    return RequestFrames(video, media, options)


class RequestFrames(Frames):
    """The frames of a request, each read and decoded when it is its turn.

    Args:
        images: At least one; kept, not copied.
        media: Which files may be read.
        options: Limits of one image.

    Raises:
        FrameError: The first frame does not decode.
    """

    def __init__(self, images: Sequence[Any], media: MediaPolicy, options: LoadOptions) -> None:
        self._images = images
        self._media = media
        self._max_bytes = options.max_image_bytes
        self._limits = ImageLimits(max_bytes=options.max_image_bytes, max_pixels=options.max_image_pixels)
        self.size = (0, 0)
        self.size = self._first_size()

    def _first_size(self) -> tuple[int, int]:
        try:
            height, width = self._read(0).shape[:2]
        except EdgeError as error:
            raise FrameError(0, error.message, error.action) from error
        return height, width

    def __len__(self) -> int:
        return len(self._images)

    def _read(self, index: int) -> Image:
        return decode_image(self._media.read(self._images[index], self._max_bytes), self._limits)

    def close(self) -> None:
        """Lets the request's data go."""
        self._images = ()


def _video_file(source: bytes | Path, options: LoadOptions) -> Frames:
    if isinstance(source, Path):
        try:
            with source.open("rb") as file:
                _check_head(file.read(HEAD_BYTES))
        except OSError as error:
            raise InvalidRequestError(f"The video cannot be read: {error.strerror}.", "Check the file.") from error
        _check_pixels(declared_size(source), options)
        return _within(VideoFrames(source), options)
    _check_head(source[:HEAD_BYTES])
    # OpenCV decodes files only.
    handle, name = tempfile.mkstemp(prefix="pixano-edge-", suffix=".video")
    path = Path(name)
    opened = False
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(source)
        _check_pixels(declared_size(path), options)
        frames = _within(_TemporaryVideo(path), options)
        opened = True
        return frames
    except ImageError as error:
        raise ImageError(error.message.replace(path.name, "the video"), error.action) from error
    finally:
        if not opened:
            path.unlink(missing_ok=True)


class _TemporaryVideo(VideoFrames):
    """A video whose file goes away with it."""

    def close(self) -> None:
        super().close()
        self._path.unlink(missing_ok=True)


def _check_head(head: bytes) -> None:
    """Nothing but containers goes to FFmpeg, which would follow a list of files."""
    if not is_container(head):
        raise ImageError(
            "The video is not of a known container: MP4, MOV, Matroska, WebM, AVI, MPEG, FLV, Ogg, WMV or GIF.",
            "Convert it with: ffmpeg -i input -c:v libx264 -pix_fmt yuv420p output.mp4",
        )


def _check_pixels(size: tuple[int, int], options: LoadOptions) -> None:
    height, width = size
    if height * width > options.max_image_pixels:
        raise InvalidRequestError(
            f"The frames have {width}x{height} pixels, more than the {options.max_image_pixels} allowed.",
            "Send a smaller video, or raise max_image_pixels.",
        )


def _within(frames: VideoFrames, options: LoadOptions) -> Frames:
    """Compares the decoded size as well, which need not be what the head said."""
    try:
        _check_pixels(frames.size, options)
    except InvalidRequestError:
        frames.close()
        raise
    return frames
