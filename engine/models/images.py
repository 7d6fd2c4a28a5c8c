"""Image files and data URIs to RGB arrays, with the limits checked on the header before anything is decoded."""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ..errors import EdgeError, ImageError

Rgb = npt.NDArray[np.uint8]

_MIB = 1 << 20
_DATA_URI = re.compile(r"data:image/[A-Za-z0-9][A-Za-z0-9.+-]{0,63};base64,", re.ASCII)

# Pillow's decoders raise all of these on damaged files (a test flips and cuts bytes of every format).
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RuntimeError,
    NotImplementedError,
    Image.DecompressionBombError,
)


_WARNINGS = threading.Lock()

_ORIENTATION = 0x0112
# What Pillow does for each orientation -> what takes it back (only the rotations by 90 degrees differ).
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class ImageLimits:
    """What `decode_image` accepts.

    Attributes:
        max_bytes: Size of the encoded file.
        max_pixels: Width times height, read from the header.
        max_side: Longest side in pixels, read from the header (65535 is JPEG's own limit).
        formats: Pillow format names; the content decides, file name and MIME type do not.
    """

    max_bytes: int = 50 * _MIB
    max_pixels: int = 100_000_000
    max_side: int = 65_535
    formats: tuple[str, ...] = ("JPEG", "JPEG2000", "PNG", "BMP", "GIF", "TIFF", "WEBP")


DEFAULT_LIMITS = ImageLimits()


def decode_image(source: bytes | Path | str, limits: ImageLimits = DEFAULT_LIMITS) -> Rgb:
    """Decodes an image to RGB, as stored: EXIF orientation is not applied, as in Pixano.

    Gray is repeated over the channels; 16-bit values keep their high byte (``value >> 8``); alpha is dropped, not
    blended; palettes are looked up; CMYK and YCbCr are converted by Pillow without colour profiles; of animated or
    multi-page files the first frame is taken. 32-bit integers are read as 16-bit values; floating-point pixels have
    no agreed range and are refused.

    Args:
        source: File content, a path, or a string that is a data URI (``data:image/...``) or else a path. A server
            that must not read local files passes bytes.
        limits: Checked before decoding.

    Returns:
        (H, W, 3) uint8, C-contiguous, owned by the caller.

    Raises:
        ImageError: Missing, empty, too large, of another format, truncated or damaged.
        EdgeError: Not enough memory.
    """
    content, name = _read(source, limits)
    if not content:
        raise ImageError(f"{name} is empty (0 bytes).", "Upload or copy the image again.")
    if len(content) > limits.max_bytes:
        raise _too_many_bytes(name, len(content), limits)
    try:
        with _open(content, limits) as image:
            _check_size(name, image.width, image.height, limits)
            with _without_bomb_warning(image.width * image.height > (Image.MAX_IMAGE_PIXELS or 0)):
                return _to_rgb(name, _as_stored(image))
    except MemoryError as error:
        raise EdgeError(
            f"There is not enough memory to decode {name}.", "Downscale it, or free memory on this machine."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not an image that can be read: unknown format or damaged header.",
            f"Use one of {', '.join(limits.formats)}.",
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name} has more than {limits.max_pixels} pixels: {error}", "Downscale it or cut it into tiles."
        ) from error
    except _DECODE_ERRORS as error:
        raise ImageError(
            f"{name} is truncated or damaged: {type(error).__name__}: {error}.",
            "Save or upload the image again.",
        ) from error


def load_data_uri(uri: str, max_bytes: int = DEFAULT_LIMITS.max_bytes) -> bytes:
    """Content of a ``data:image/<type>;base64,<data>`` URI; the size is checked before decoding.

    Raises:
        ImageError: Not of that form, not valid base64 (no white space, correct padding), empty, or too large.
    """
    header = _DATA_URI.match(uri)
    if header is None:
        raise ImageError(
            f"Not an image data URI: {uri[:40]!r}.", "Send data:image/<type>;base64,<content> with an image type."
        )
    size = (len(uri) - header.end()) // 4 * 3
    if size > max_bytes + 2:
        raise _too_many_bytes("The data URI", size, ImageLimits(max_bytes=max_bytes))
    try:
        content = base64.b64decode(uri[header.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"The data URI is not valid base64: {error}.", "Encode the file's bytes again.") from error
    if not content:
        raise ImageError("The data URI holds no image (0 bytes).", "Encode the file's bytes again.")
    return content


def _read(source: bytes | Path | str, limits: ImageLimits) -> tuple[bytes, str]:
    """Content and a name for messages; never reads more than the limit allows."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source), "The image"
    if isinstance(source, str) and source.startswith("data:"):
        return load_data_uri(source, limits.max_bytes), "The image"
    if not isinstance(source, (str, Path)):
        raise ImageError(
            f"An image source must be bytes, a path or a data URI, got {type(source).__name__}.",
            "Pass the file's bytes or its path.",
        )
    path = Path(source)
    name = f"Image '{path.name[:100]}'"
    try:
        with path.open("rb") as file:
            content = file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{name} cannot be read: {reason}.", "Check the path and the permissions.") from error
    return content, name


def _open(content: bytes, limits: ImageLimits) -> Image.Image:
    """Reads the header; `ImageLimits` decides on the size, not Pillow's warning."""
    with _without_bomb_warning():
        return Image.open(io.BytesIO(content), formats=limits.formats)


@contextmanager
def _without_bomb_warning(large: bool = True) -> Iterator[None]:
    """Silences Pillow's warning about large images; for others (`large` False) there is nothing to do."""
    if not large:
        yield
        return
    # The filters belong to the whole process: without the lock two threads could leave each other's in place.
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _as_stored(image: Image.Image) -> Image.Image:
    """The decoded image without the rotation that Pillow applies to TIFF files, and only to them, while loading."""
    if image.format != "TIFF":
        return image
    applied = image.getexif().get(_ORIENTATION, 1)
    image.load()
    back = _UNDO.get(applied)
    if back is None or image.getexif().get(_ORIENTATION, 1) == applied:  # Pillow deletes the tag when it rotates
        return image
    return image.transpose(back)


def _check_size(name: str, width: int, height: int, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width}x{height}).", "Save the image again.")
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise ImageError(
            f"{name} has {width}x{height} pixels; the limits are {limits.max_pixels} pixels and "
            f"{limits.max_side} per side.",
            "Downscale it or cut it into tiles.",
        )


def _to_rgb(name: str, image: Image.Image) -> Rgb:
    """Decodes the first frame; the modes are those of Pillow's concepts page."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "I" and (values.min() < 0 or values.max() > 0xFFFF):
            raise ImageError(
                f"{name} holds 32-bit integers from {values.min()} to {values.max()}.",
                "Convert it to 8 or 16 bits per channel.",
            )
        gray = (values.astype(np.uint16, copy=False) >> 8).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ImageError(
            f"{name} holds floating-point pixels, which have no agreed range.",
            "Convert it to 8 or 16 bits per channel.",
        )
    return np.array(image.convert("RGB"))


def _too_many_bytes(name: str, size: int, limits: ImageLimits) -> ImageError:
    return ImageError(
        f"{name} has more than {limits.max_bytes / _MIB:g} MiB ({size / _MIB:.1f} MiB read).",
        "Compress or downscale it, or raise the limit.",
    )
