"""Frames of a clip, decoded when they are asked for: a video file, a folder, a list of files, bytes or arrays."""

from __future__ import annotations

import abc
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from ...errors import EdgeError, ImageError
from ..images import decode_image

Image = npt.NDArray[np.uint8]

STRETCH_BYTES = 256 << 20
"""Most that the decoded frames take which a video file's reader keeps; two frames are kept whatever their size."""

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2"})


class FrameError(ImageError):
    """A frame of a clip cannot be used; the message names it."""

    def __init__(self, index: int, problem: str, action: str) -> None:
        super().__init__(f"Frame {index}: {problem}", action)
        self.index = index


class Frames(abc.ABC):
    """A clip of equally large frames. Not thread-safe.

    Attributes:
        size: (height, width) of every frame.
    """

    size: tuple[int, int]

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of frames."""

    @abc.abstractmethod
    def _read(self, index: int) -> Image:
        """Decodes one frame; errors of any `EdgeError` kind are given the frame's number by the caller."""

    def __getitem__(self, index: int) -> Image:
        """(H, W, 3) uint8 RGB of one frame; the caller's to keep.

        Raises:
            FrameError: No such frame, it does not decode, or its size differs from the first one's.
        """
        if not 0 <= index < len(self):
            raise FrameError(index, f"the clip has {len(self)} frames.", "Frame numbers start at 0.")
        try:
            image = self._read(index)
        except FrameError:
            raise
        except EdgeError as error:
            raise FrameError(index, error.message, error.action) from error
        if image.shape[:2] != self.size:
            raise FrameError(
                index,
                f"it is {image.shape[1]}x{image.shape[0]}, the first one {self.size[1]}x{self.size[0]}.",
                "All frames of a clip must have one size.",
            )
        return image

    def name(self, index: int) -> str:
        """File name of a frame where it has one, else its number."""
        return f"{index:06d}"

    def close(self) -> None:  # noqa: B027 (nothing to close by default)
        """Frees files and decoders."""


class ImageFrames(Frames):
    """Frames given one by one.

    Args:
        images: File paths, encoded bytes, or (H, W, 3) uint8 RGB arrays; at least one.

    Raises:
        ImageError: The list is empty.
        FrameError: The first frame does not decode.
    """

    def __init__(self, images: Sequence[Path | bytes | Image]) -> None:
        if len(images) == 0:
            raise ImageError("The clip has no frames.", "Pass at least one image.")
        self._images = images
        self.size = (0, 0)
        try:
            first = self._read(0)
        except EdgeError as error:
            raise FrameError(0, error.message, error.action) from error
        self.size = (first.shape[0], first.shape[1])

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        image = self._images[index]
        return image.name if isinstance(image, Path) else super().name(index)

    def _read(self, index: int) -> Image:
        image = self._images[index]
        if not isinstance(image, np.ndarray):
            return decode_image(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise ImageError(
                f"an array of {image.dtype}{list(image.shape)} is no picture.", "Pass (height, width, 3) uint8 RGB."
            )
        return image


class VideoFrames(Frames):
    """A video file, decoded with OpenCV.

    Going forward decodes each frame once. A step back seeks and decodes a stretch of frames again, which then stays
    in memory, so that tracking backwards does not decode the file over and over.

    Args:
        path: The file.
        stretch: Frames kept, and decoded at once when going back; fewer where they would take more than
            `STRETCH_BYTES`.

    Raises:
        ImageError: It does not open, or holds no frame.
    """

    def __init__(self, path: Path | str, stretch: int = 16) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise ImageError(f"There is no video at '{self._path}'.", "Check the path.")
        self._capture = cv2.VideoCapture(str(self._path))
        self._stretch = stretch
        self._next = 0
        self._kept: OrderedDict[int, Image] = OrderedDict()
        self._count = self._exact_count()
        if not self._count:
            self._capture.release()
            raise ImageError(
                f"'{self._path.name}' holds no frame that can be decoded.",
                "Convert it with: ffmpeg -i input -c:v libx264 -pix_fmt yuv420p output.mp4",
            )
        self.fps = float(self._capture.get(cv2.CAP_PROP_FPS)) or 25.0
        first = self._decode_to(0)
        self._stretch = max(2, min(stretch, STRETCH_BYTES // first.nbytes))
        self.size = (first.shape[0], first.shape[1])

    def _exact_count(self) -> int:
        """Frames that are really there: a container's own count is often an estimate, so it is walked once."""
        if not self._capture.isOpened():
            return 0
        count = 0
        while self._capture.grab():
            count += 1
        self._seek(0)
        return count

    def __len__(self) -> int:
        return self._count

    def _read(self, index: int) -> Image:
        kept = self._kept.get(index)
        if kept is not None:
            return np.array(kept)
        if index < self._next:  # going back: decode the whole stretch that ends here
            start = max(0, index - self._stretch + 1)
            self._seek(start)
        return np.array(self._decode_to(index))

    def _seek(self, index: int) -> None:
        """Opens the file again and walks to `index`: seeking by number is not exact in many containers."""
        self._capture.release()
        self._capture = cv2.VideoCapture(str(self._path))
        self._next = 0
        while self._next < index and self._capture.grab():
            self._next += 1

    def _decode_to(self, index: int) -> Image:
        image: Image | None = None
        while self._next <= index:
            ok, bgr = self._capture.read()
            if not ok or bgr is None:
                raise FrameError(self._next, "it does not decode.", "Check the file, or convert it with ffmpeg.")
            image = np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
            self._kept[self._next] = image
            self._kept.move_to_end(self._next)
            self._next += 1
            while len(self._kept) > self._stretch:
                self._kept.popitem(last=False)
        if image is None:
            raise FrameError(index, "it does not decode.", "Check the file, or convert it with ffmpeg.")
        return image

    def close(self) -> None:
        self._capture.release()
        self._kept.clear()


def declared_size(path: Path | str) -> tuple[int, int]:
    """(height, width) of a video as its head says, before a frame is decoded; zeros where it does not open."""
    capture = cv2.VideoCapture(str(path))
    try:
        return int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)), int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
    finally:
        capture.release()


def open_frames(source: Path | str | Sequence[Path | bytes | Image] | Frames) -> Frames:
    """Frames of a video file, of a folder of pictures in the order of their names, or of a list.

    Raises:
        ImageError: Nothing there, or nothing in it that decodes.
    """
    if isinstance(source, Frames):
        return source
    if not isinstance(source, Path | str):
        return ImageFrames(source)
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ImageError(f"There is no picture in '{path}'.", "Pass a folder of frames or a video file.")
        return ImageFrames(files)
    if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
        return ImageFrames([path])
    return VideoFrames(path)
