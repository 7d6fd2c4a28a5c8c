"""Decoding: every mode has a defined result, every bad file one clear ImageError."""

from __future__ import annotations

import base64
import io
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixano_edge.engine.errors import EdgeError, ImageError
from pixano_edge.engine.models.images import ImageLimits, decode_image, load_data_uri

FORMATS = {"JPEG": {}, "JPEG2000": {}, "PNG": {}, "BMP": {}, "GIF": {}, "TIFF": {}, "WEBP": {"lossless": True}}


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def gradient(height: int = 12, width: int = 17) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 14, y * 20, (x + y) * 8], axis=2).astype(np.uint8)


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends after its header: anything that decodes pixels fails on it in another way."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_the_pixels(kind: str) -> None:
    image = decode_image(encode(Image.fromarray(gradient()), kind, **FORMATS[kind]))
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable
    assert np.array_equal(image, gradient())


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000", "GIF"])
def test_lossy_formats_give_rgb(kind: str) -> None:
    image = decode_image(encode(Image.fromarray(gradient()), kind))
    assert image.shape == (12, 17, 3)
    assert np.abs(image.astype(int) - gradient()).mean() < 20


def test_path_text_path_and_data_uri_agree(tmp_path: Path) -> None:
    content = encode(Image.fromarray(gradient()))
    file = tmp_path / "a.jpg"  # the content decides, not the name
    file.write_bytes(content)
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    for source in (content, file, str(file), uri):
        assert np.array_equal(decode_image(source), gradient())


def test_one_pixel() -> None:
    assert decode_image(encode(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


def test_gray_is_repeated() -> None:
    gray = gradient()[:, :, 0]
    assert np.array_equal(decode_image(encode(Image.fromarray(gray))), np.repeat(gray[:, :, None], 3, axis=2))


def test_one_bit() -> None:
    bits = gradient()[:, :, 0] > 100
    assert np.array_equal(decode_image(encode(Image.fromarray(bits)))[:, :, 1], bits * 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_gray_keeps_the_high_byte(kind: str) -> None:
    values = (np.arange(12 * 17, dtype=np.uint16) * 300).reshape(12, 17)
    image = decode_image(encode(Image.fromarray(values), kind))
    assert np.array_equal(image, np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_thirty_two_bit_integers() -> None:
    values = (np.arange(12 * 17, dtype=np.int32) * 300).reshape(12, 17)
    assert np.array_equal(decode_image(encode(Image.fromarray(values), "TIFF"))[:, :, 0], values >> 8)
    for wrong in (values - 1, values + 65_536):
        with pytest.raises(ImageError, match="32-bit integers"):
            decode_image(encode(Image.fromarray(wrong), "TIFF"))


def test_float_pixels_are_refused() -> None:
    with pytest.raises(ImageError, match="floating-point"):
        decode_image(encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


def test_alpha_is_dropped_not_blended() -> None:
    alpha = np.full((12, 17, 1), 3, np.uint8)
    rgba = Image.fromarray(np.concatenate([gradient(), alpha], axis=2))
    assert np.array_equal(decode_image(encode(rgba)), gradient())
    la = np.concatenate([gradient()[:, :, :1], alpha], axis=2)
    assert np.array_equal(decode_image(encode(Image.fromarray(la)))[:, :, 2], gradient()[:, :, 0])


def test_palette_with_transparency() -> None:
    image = Image.new("P", (3, 2), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    content = encode(image, transparency=1)
    assert np.array_equal(decode_image(content), np.full((2, 3, 3), (200, 100, 50), np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    image = decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind))
    assert image.shape == (8, 8, 3)
    assert np.abs(image[4, 4].astype(int) - (255, 0, 0)).max() <= 3


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (5, 4), color) for color in ((250, 0, 0), (0, 250, 0))]
    for kind in ("GIF", "TIFF"):
        image = decode_image(encode(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert image[0, 0, 0] > 200
        assert image[0, 0, 1] < 50


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
    ids=["jpeg", "png", "webp", "tiff", "tiff-lzw"],
)
def test_exif_orientation_is_ignored(kind: str, options: dict[str, Any], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(Image.fromarray(gradient(12, 17)), kind, exif=exif, **options)
    with Image.open(io.BytesIO(content)) as written:
        assert written.getexif().get(0x0112, 1) == orientation  # the file really asks for the rotation
    image = decode_image(content)
    assert image.shape == (12, 17, 3)
    assert image.flags.c_contiguous
    assert np.abs(image.astype(int) - gradient(12, 17)).mean() < 3


def test_no_memory_is_not_called_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(EdgeError, match="not enough memory") as caught:
        decode_image(encode(Image.fromarray(gradient())))
    assert not isinstance(caught.value, ImageError)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_the_cap_decides_and_pillow_does_not_warn(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode(Image.fromarray(gradient()), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)  # the picture has 204
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert np.array_equal(decode_image(content), gradient())
    assert seen == []


@pytest.mark.filterwarnings("error")
def test_size_is_refused_from_the_header() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="12000x9000"):
            decode_image(png_header(12000, 9000))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(ImageError):  # Pillow's own limit, far above ours
        decode_image(png_header(60000, 60000))
    with pytest.raises(ImageError, match="per side"):
        decode_image(png_header(70000, 1))
    with pytest.raises(ImageError, match="5 pixels"):
        decode_image(encode(Image.new("RGB", (3, 2))), ImageLimits(max_pixels=5))


def test_too_many_bytes(tmp_path: Path) -> None:
    content = encode(Image.fromarray(gradient()))
    limits = ImageLimits(max_bytes=len(content) - 1)
    file = tmp_path / "a.png"
    file.write_bytes(content)
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    for source in (content, file, uri):
        with pytest.raises(ImageError, match="MiB"):
            decode_image(source, limits)
        assert decode_image(source, ImageLimits(max_bytes=len(content))).shape == (12, 17, 3)


@pytest.mark.parametrize(
    "source", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", "", "missing.png", 3, None]
)
def test_no_image(source: Any) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(source)
    assert caught.value.action


def test_folder_and_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match="0 bytes"):
        decode_image(tmp_path / "empty.png")
    with pytest.raises(ImageError):
        decode_image(tmp_path)


def test_formats_outside_the_list_are_refused() -> None:
    image = Image.fromarray(gradient())
    for kind in ("PPM", "ICO", "TGA"):
        with pytest.raises(ImageError, match="unknown format"):
            decode_image(encode(image, kind))
    with pytest.raises(ImageError):
        decode_image(encode(image, "BMP"), ImageLimits(formats=("PNG",)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "JPEG2000"])
def test_truncated(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encode(Image.fromarray(noise), kind)
    for part in (0.02, 0.3, 0.7):
        with pytest.raises(ImageError):
            decode_image(content[: int(len(content) * part)])


SMALL = {kind: encode(Image.fromarray(gradient()), kind, **options) for kind, options in FORMATS.items()}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SMALL)), st.integers(0, 1 << 16), st.integers(0, 255), st.booleans())
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_decode_or_raise_image_error(kind: str, position: int, byte: int, cut: bool) -> None:
    content = bytearray(SMALL[kind])
    content[position % len(content)] = byte
    if cut:
        del content[position * 7 % len(content) :]
    try:
        image = decode_image(bytes(content), ImageLimits(max_pixels=1_000_000))
    except ImageError:
        return
    assert image.ndim == 3


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "data:",
        "data:image/png,abcd",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:image/png;base64,ab cd",
        "data:image/png;base64,abc",
        "data:image/png;base64,ab\ncd",
        "data:image/png;base64,ab*d",
        "data:image/png;base64,abcdé",
        "data:image/png;charset=utf-8;base64,abcd",
        "data:text/plain;base64,abcd",
        "data:image/;base64,abcd",
        " data:image/png;base64,abcd",
        "iVBORw0KGgo=",
    ],
)
def test_malformed_data_uris(uri: str) -> None:
    with pytest.raises(ImageError):
        load_data_uri(uri)


def test_data_uri_content() -> None:
    assert load_data_uri("data:image/svg+xml;base64,YWJj") == b"abc"
    assert load_data_uri("data:image/x-y.z;base64,YWI=", max_bytes=2) == b"ab"
