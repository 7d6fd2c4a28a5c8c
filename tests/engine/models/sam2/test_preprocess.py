"""Pre-processing against PyTorch's antialiased interpolation: frozen vectors and real photos."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.errors import ContractError, ImageError
from pixano_edge.engine.models.images import decode_image
from pixano_edge.engine.models.sam2.preprocess import Scratch, antialias_taps, preprocess
from tests.support.make_preprocess_reference import CASES, REFERENCE, procedural_image, torch_reference

TOLERANCE = 1e-5


def run(image: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.float32]:
    out = np.full((1, 3, size, size), np.nan, np.float32)
    preprocess(image, Sam2Constants(image_size=size), out)
    return out


def opencv_linear(image: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.float32]:
    """The tempting shortcut, right in everything but the filter."""
    constants = Sam2Constants(image_size=size)
    pixels = cv2.resize(image.astype(np.float32) / 255, (size, size), interpolation=cv2.INTER_LINEAR)
    normalised = (pixels.reshape(size, size, 3) - constants.mean) / constants.std
    return normalised.transpose(2, 0, 1)[None].astype(np.float32)


@pytest.mark.parametrize(("height", "width", "size"), CASES)
def test_matches_the_frozen_torch_vectors(height: int, width: int, size: int) -> None:
    with np.load(REFERENCE) as reference:
        expected = reference[f"{height}x{width}_to_{size}"]
    assert np.abs(run(procedural_image(height, width), size)[0] - expected).max() <= TOLERANCE


def test_controls_would_be_caught() -> None:
    image = procedural_image(97, 161)
    with np.load(REFERENCE) as reference:
        expected = reference["97x161_to_32"][None]
    shifted = np.roll(image, 1, axis=1)
    transposed = np.ascontiguousarray(image.transpose(1, 0, 2))
    wrong = {
        "OpenCV's linear resize": opencv_linear(image, 32),
        "BGR instead of RGB": run(image[:, :, ::-1], 32),
        "one pixel to the right": run(shifted, 32),
        "transposed": run(transposed, 32),
        "8 bits between the steps": run(cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA), 32),
    }
    for mistake, result in wrong.items():
        assert np.abs(result - expected).max() > 100 * TOLERANCE, mistake


@pytest.mark.parametrize("size", [128, 1024])
def test_real_photos(bedroom: Path, size: int) -> None:
    pytest.importorskip("torch").set_num_threads(1)
    photo = decode_image(bedroom / "00000.jpg")
    views = (
        photo,
        photo[:531, 3:700],
        photo[::3, ::2],
        photo[100:101],
        photo[:, 7:8],
        photo[:200, :1],
        photo[:64, :48],
    )
    for view in views:
        expected = torch_reference(np.ascontiguousarray(view), size)
        assert np.abs(run(view, size) - expected).max() <= TOLERANCE, view.shape
    if size == 128:
        assert np.abs(opencv_linear(photo, size) - torch_reference(photo, size)).max() > 0.5


def test_strided_input_is_read_in_place() -> None:
    image = procedural_image(60, 90)
    assert np.array_equal(run(image[::2, ::-1], 32), run(np.ascontiguousarray(image[::2, ::-1]), 32))


def test_steady_state_allocates_nothing_of_tensor_size() -> None:
    constants, scratch = Sam2Constants(image_size=256), Scratch()
    image = procedural_image(500, 700)
    out = np.empty((1, 3, 256, 256), np.float32)
    preprocess(image, constants, out, scratch)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(3):
            preprocess(image, constants, out, scratch)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024  # the output alone has 786 KB


def test_bad_images_are_refused() -> None:
    out = np.empty((1, 3, 32, 32), np.float32)
    constants = Sam2Constants(image_size=32)
    bad = (
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
        [[1, 2, 3]],
    )
    for image in bad:
        with pytest.raises(ImageError):
            preprocess(image, constants, out)  # type: ignore[arg-type]


def test_wrong_output_is_refused() -> None:
    image, constants = procedural_image(4, 4), Sam2Constants(image_size=32)
    for out in (
        np.empty((3, 32, 32), np.float32),
        np.empty((1, 3, 32, 32), np.float64),
        np.empty((1, 3, 32, 64), np.float32)[..., ::2],
    ):
        with pytest.raises(ContractError):
            preprocess(image, constants, out)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("in_size", "out_size"), [(1, 1), (1, 7), (7, 1), (2, 256), (257, 256), (1333, 1024), (4000, 33)]
)
def test_taps_are_those_of_one_position_after_the_other(in_size: int, out_size: int) -> None:
    """To the last bit: as torch's loop computes them."""
    scale = in_size / out_size
    support = max(scale, 1.0)
    found = antialias_taps(in_size, out_size)
    assert len(found) == out_size
    for position, (first, weights) in enumerate(found):
        center = scale * (position + 0.5)
        assert first == max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), in_size)
        wanted = np.maximum(1.0 - np.abs((np.arange(first, last) - center + 0.5) / support), 0.0)
        assert np.array_equal(weights, wanted / wanted.sum())
