"""Pre-processing against transformers' image processors: frozen vectors and real photos."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pixano_edge.engine.contracts.owlv2 import OwlConstants
from pixano_edge.engine.errors import ContractError, ImageError
from pixano_edge.engine.models.images import decode_image
from pixano_edge.engine.models.owlv2.preprocess import SmoothedTaps, gaussian, mirror, preprocess
from pixano_edge.engine.models.resampling import Scratch
from tests.support.make_owl_reference import CASES, REFERENCE, SIZE, owl_reference
from tests.support.make_preprocess_reference import procedural_image

FAMILIES = ("owlv2", "owlvit")
TOLERANCE = {"owlv2": 1e-5, "owlvit": 0.0}
"""OWL-ViT goes through 8 bits on both sides: every value is the same float."""


def run(image: npt.NDArray[np.uint8], family: str, size: int = SIZE) -> npt.NDArray[np.float32]:
    out = np.full((1, 3, size, size), np.nan, np.float32)
    preprocess(image, OwlConstants(family=family, image_size=size), out)
    return out


def error(family: str, image: npt.NDArray[np.uint8], expected: npt.NDArray[np.float32]) -> float:
    return float(np.abs(run(image, family, expected.shape[-1]) - expected).max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width"), CASES)
def test_matches_the_frozen_vectors(family: str, height: int, width: int) -> None:
    with np.load(REFERENCE) as reference:
        expected = reference[f"{family}_{height}x{width}"][None]
    assert error(family, procedural_image(height, width), expected) <= TOLERANCE[family]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", [(540, 960), (540, 333), (61, 960), (540, 47), (7, 5)])
def test_matches_transformers_on_a_photo(family: str, part: tuple[int, int], bedroom: Path) -> None:
    pytest.importorskip("transformers", reason="the reference")
    image = decode_image(bedroom / "00000.jpg")[: part[0], : part[1]]
    assert error(family, image, owl_reference(family, image, 224)) <= TOLERANCE[family]


@pytest.mark.parametrize("mistake", ["gray", "centred", "BGR", "stretched", "not smoothed"])
def test_mistakes_are_seen(mistake: str) -> None:
    image = procedural_image(97, 161)
    with np.load(REFERENCE) as reference:
        expected = reference["owlv2_97x161"][None]
    padded = np.full((161, 161, 3), 127 if mistake == "gray" else 0, np.uint8)
    top = 32 if mistake == "centred" else 0
    padded[top : top + 97] = image[:, :, ::-1] if mistake == "BGR" else image
    wrong = image if mistake == "stretched" else padded
    if mistake == "stretched":
        assert np.abs(run(wrong, "owlvit") - expected).max() > 0.1
    elif mistake == "not smoothed":
        assert np.abs(run(padded[2::5, 2::5], "owlv2") - expected).max() > 0.1
    else:
        assert error("owlv2", wrong, expected) > 0.1


def test_padding_by_hand_changes_nothing() -> None:
    image = procedural_image(97, 161)
    padded = np.zeros((161, 161, 3), np.uint8)
    padded[:97] = image
    assert np.abs(run(padded, "owlv2") - run(image, "owlv2")).max() <= 1e-6


def test_any_strides() -> None:
    image = procedural_image(60, 80)
    for family in FAMILIES:
        assert np.array_equal(run(image[::2, ::-1], family), run(np.ascontiguousarray(image[::2, ::-1]), family))


def test_allocates_nothing_of_image_size() -> None:
    image = procedural_image(500, 700)
    constants = OwlConstants(image_size=256, patch_size=16)
    out, scratch = np.empty((1, 3, 256, 256), np.float32), Scratch()
    preprocess(image, constants, out, scratch)
    tracemalloc.start()
    preprocess(image, constants, out, scratch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64_000


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 3))])
def test_refuses_what_is_no_image(image: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(ImageError):
        run(image, "owlv2")


def test_refuses_a_wrong_buffer() -> None:
    with pytest.raises(ContractError, match="float32"):
        preprocess(procedural_image(8, 8), OwlConstants(image_size=32), np.empty((1, 3, 32, 32), np.float64))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("side", "in_size", "out_size"), [(1, 1, 5), (2, 1, 4), (97, 60, 960), (333, 250, 64), (2000, 7, 33)]
)
def test_taps_are_those_of_one_position_after_the_other(side: int, in_size: int, out_size: int) -> None:
    scale = side / out_size
    kernel = gaussian((scale - 1) / 2)
    around = np.arange(len(kernel)) - len(kernel) // 2
    found = SmoothedTaps(side)(in_size, out_size)
    assert len(found) == out_size
    for position, (first, weights) in enumerate(found):
        place = scale * (position + 0.5) - 0.5
        wanted = np.zeros(side)
        for i, share in ((0, 1 - place % 1), (1, place % 1)):
            centre = mirror(np.array([math.floor(place) + i]), side)
            np.add.at(wanted, mirror(centre + around, side), share * kernel)
        got = np.zeros(side)
        got[first : first + len(weights)] = weights
        np.testing.assert_allclose(got[:in_size], wanted[:in_size], atol=1e-15)
        assert not got[in_size:].any()
