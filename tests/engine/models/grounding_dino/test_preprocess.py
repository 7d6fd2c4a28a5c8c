"""Model input against transformers' image processor, bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the reference is transformers")

from PIL import Image
from transformers import GroundingDinoImageProcessorPil
from transformers.image_transforms import get_size_with_aspect_ratio

from pixano_edge.engine.contracts.grounding_dino import GroundingDinoConstants
from pixano_edge.engine.errors import ContractError, ImageError
from pixano_edge.engine.models.grounding_dino.preprocess import preprocess, resized_size
from pixano_edge.export.photos import default_photos

FULL = GroundingDinoConstants()
SMALL = GroundingDinoConstants(shortest_edge=96, longest_edge=160, num_queries=60)


def model_input(image: np.ndarray, constants: GroundingDinoConstants) -> np.ndarray:
    out = np.full((1, 3, *resized_size(image.shape[0], image.shape[1], constants)), np.nan, np.float32)
    preprocess(image, constants, out)
    return out


def reference(image: np.ndarray, constants: GroundingDinoConstants) -> np.ndarray:
    size = {"shortest_edge": constants.shortest_edge, "longest_edge": constants.longest_edge}
    processor = GroundingDinoImageProcessorPil(size=size)
    # A picture: of an array of one row the processor cannot tell rows from channels.
    return processor(Image.fromarray(np.ascontiguousarray(image)), return_tensors="np")["pixel_values"]


def test_sizes_are_those_of_the_reference() -> None:
    rng = np.random.default_rng(0)
    sides = [(1, 1), (800, 800), (800, 1333), (1333, 800), (1334, 800), (480, 640), (37, 41), (3000, 2), (1, 30)]
    sides += [tuple(int(v) for v in rng.integers(1, 4000, 2)) for _ in range(2000)]
    narrow = 0
    for height, width in sides:
        expected = get_size_with_aspect_ratio((height, width), FULL.shortest_edge, FULL.longest_edge)
        if min(expected) < FULL.min_edge:
            narrow += 1
            with pytest.raises(ImageError, match="too narrow"):
                resized_size(height, width, FULL)
        else:
            assert resized_size(height, width, FULL) == expected, (height, width)
            assert max(expected) <= FULL.longest_edge
    assert narrow > 10


@pytest.mark.parametrize("constants", [FULL, SMALL], ids=["800", "96"])
def test_photos_give_the_same_tensor(constants: GroundingDinoConstants) -> None:
    for photo in default_photos():
        for pixels in (photo.pixels, photo.pixels.transpose(1, 0, 2), photo.pixels[:141, :], photo.pixels[:, :101]):
            np.testing.assert_array_equal(model_input(pixels, constants), reference(pixels, constants))


def test_frames_give_the_same_tensor(bedroom: Path) -> None:
    pixels = np.asarray(Image.open(bedroom / "00000.jpg").convert("RGB"))
    np.testing.assert_array_equal(model_input(pixels, FULL), reference(pixels, FULL))


def test_unusual_images() -> None:
    rng = np.random.default_rng(1)
    for shape in ((1, 1), (2, 3), (96, 96), (96, 160), (5, 8)):
        pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        np.testing.assert_array_equal(model_input(pixels, SMALL), reference(pixels, SMALL))


def test_mistakes_would_show() -> None:
    """Negative controls: order of channels, resize filter, deviation and size all change the tensor."""
    pixels = default_photos()[0].pixels
    expected = reference(pixels, SMALL)
    assert np.abs(model_input(np.ascontiguousarray(pixels[:, :, ::-1]), SMALL) - expected).max() > 0.1
    other = GroundingDinoConstants(**{**SMALL.to_dict(), "std": (0.5, 0.5, 0.5)})
    assert np.abs(model_input(pixels, other) - expected).max() > 0.1
    height, width = expected.shape[2:]
    nearest = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST))
    assert np.abs(model_input(nearest, SMALL) - expected).max() > 0.1


def test_a_wrong_buffer_is_refused() -> None:
    pixels = default_photos()[0].pixels
    with pytest.raises(ContractError, match="C-contiguous float32"):
        preprocess(pixels, SMALL, np.empty((1, 3, 96, 96), np.float32))
