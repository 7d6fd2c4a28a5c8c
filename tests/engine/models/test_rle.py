"""Run-length encoding against pycocotools, and what a client may get wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from pixano_edge.engine.errors import PromptError
from pixano_edge.engine.models.rle import decode_rle, encode_rle, encode_rle_at


@pytest.mark.parametrize("size", [(161, 97), (1, 1), (1, 9), (9, 1), (64, 64), (300, 211)])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_round_trip_and_pycocotools(size: tuple[int, int], density: float) -> None:
    mask = np.random.default_rng(1).random(size) < density
    rle = encode_rle(mask)
    assert rle["size"] == list(size)
    assert isinstance(rle["counts"], bytes)
    assert np.array_equal(coco.decode(rle), mask)
    decoded = decode_rle(rle)
    assert decoded.dtype == np.bool_
    assert decoded.flags.c_contiguous
    assert np.array_equal(decoded, mask)
    assert np.array_equal(decode_rle({"size": size, "counts": rle["counts"].decode()}), mask)


def test_column_major_and_not_transposed() -> None:
    mask = np.zeros((161, 97), np.bool_)
    mask[5, :] = True  # one row: 97 short runs in column-major order
    mask[:, 90:] = True
    assert np.array_equal(coco.decode(encode_rle(mask)), mask)
    assert decode_rle({"size": [2, 3], "counts": [1, 2, 3]}).tolist() == [[False, True, False], [True, False, False]]


def test_uint8_and_strided_masks() -> None:
    mask = np.random.default_rng(2).integers(0, 3, (40, 30), dtype=np.uint8)
    assert np.array_equal(decode_rle(encode_rle(mask)), mask != 0)
    assert np.array_equal(decode_rle(encode_rle(mask[::2, ::-3])), mask[::2, ::-3] != 0)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
@settings(max_examples=300, deadline=None)
def test_a_part_is_encoded_like_the_whole(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros(rng.integers(1, 12, 2), np.bool_)
    top, left = (int(rng.integers(0, n)) for n in mask.shape)
    part = mask[top : top + rng.integers(1, 12), left : left + rng.integers(1, 12)]
    part[:] = rng.random(part.shape) < density
    assert encode_rle_at(part, (left, top), (mask.shape[0], mask.shape[1])) == encode_rle(mask)


def test_columns_that_touch_join_across_the_image() -> None:
    mask = np.ones((70, 50), np.bool_)
    mask[30, 20] = False
    assert encode_rle_at(mask, (0, 0), (70, 50)) == encode_rle(mask)


@given(st.binary(max_size=30) | st.text(alphabet=st.characters(min_codepoint=40, max_codepoint=120), max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_counts_decode_or_raise(counts: bytes | str) -> None:
    try:
        mask = decode_rle({"size": [4, 5], "counts": counts})
    except PromptError:
        return
    assert mask.shape == (4, 5)


@pytest.mark.parametrize(
    "rle",
    [
        {},
        {"size": [2, 3]},
        {"counts": b"06"},
        {"size": [2], "counts": [6]},
        {"size": [2, 0], "counts": [0]},
        {"size": [2, -3], "counts": [6]},
        {"size": [2.0, 3], "counts": [6]},
        {"size": "23", "counts": [6]},
        {"size": [True, 6], "counts": [6]},
        {"size": [2, 3], "counts": [5]},
        {"size": [2, 3], "counts": [7]},
        {"size": [2, 3], "counts": [7, -1]},
        {"size": [2, 3], "counts": [3.0, 3.0]},
        {"size": [2, 3], "counts": b""},
        {"size": [2, 3], "counts": b"P"},
        {"size": [2, 3], "counts": "é"},
        {"size": [2, 3], "counts": 6},
        {"size": [100_000, 100_000], "counts": [10_000_000_000]},
        {"size": [1 << 40, 1 << 40], "counts": [1 << 80]},
        [2, 3],
    ],
)
def test_malformed(rle: Any) -> None:
    with pytest.raises(PromptError, match="malformed"):
        decode_rle(rle)


@pytest.mark.parametrize("mask", [np.zeros((2, 3, 1), bool), np.zeros((0, 3), bool), np.zeros((2, 3), np.float32)])
def test_bad_masks_are_not_encoded(mask: Any) -> None:
    with pytest.raises(PromptError):
        encode_rle(mask)
