"""Small holes are filled and small islands removed, exactly as if the whole image were labelled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixano_edge.engine.models.masks import mask_box
from pixano_edge.engine.models.sam2 import regions
from pixano_edge.engine.models.sam2.regions import remove_small_regions


def clean(mask: np.ndarray, min_area: int) -> tuple[np.ndarray, bool]:
    result = mask.copy()
    box = mask_box(mask)
    assert box is not None
    return result, remove_small_regions(result, box, min_area)


def square(size: int = 40) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[10:30, 10:30] = True
    return mask


def test_a_hole_is_filled_and_an_island_removed() -> None:
    mask = square()
    mask[15:18, 15:18] = False
    mask[35:37, 2:4] = True
    result, changed = clean(mask, 10)
    assert changed
    assert (result == square()).all()


def test_regions_of_the_least_size_stay() -> None:
    mask = square()
    mask[15:18, 15:18] = False  # 9 pixels
    mask[34:37, 2:5] = True
    result, changed = clean(mask, 9)
    assert not changed
    assert (result == mask).all()


def test_diagonal_neighbours_are_one_region() -> None:
    mask = square()
    mask[30, 30] = True  # touches the square at its corner
    assert not clean(mask, 5)[1]
    mask[30, 30] = False
    mask[31, 31] = True
    assert (clean(mask, 5)[0] == square()).all()


def test_the_largest_island_stays_when_all_are_small() -> None:
    mask = np.zeros((20, 20), bool)
    mask[2:4, 2:4] = mask[10:13, 10:13] = True
    result, changed = clean(mask, 50)
    assert changed
    assert result.sum() == 9
    only = np.zeros((20, 20), bool)
    only[2:4, 2:4] = True
    result, changed = clean(only, 50)
    assert not changed
    assert (result == only).all()


def test_a_small_rest_of_the_background_is_filled() -> None:
    mask = np.ones((20, 20), bool)
    mask[:, :2] = False
    assert clean(mask, 41)[0].all()
    assert not clean(mask, 40)[1]


def whole_image(mask: np.ndarray, min_area: int) -> np.ndarray:
    """The rule of upstream on the whole image, by flooding."""
    torch = pytest.importorskip("torch")
    from tests.support.automatic_reference import tidy

    return tidy(torch.from_numpy(mask), min_area).numpy()


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.floats(0.02, 0.98))
def test_the_part_around_the_mask_is_enough(seed: int, min_area: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros(rng.integers(1, 14, 2), bool)
    y1, x1 = (rng.integers(0, n) for n in mask.shape)
    part = mask[y1 : y1 + rng.integers(1, 14), x1 : x1 + rng.integers(1, 14)]
    part[:] = rng.random(part.shape) < density
    part[0, 0] = True
    result, changed = clean(mask, min_area)
    want = whole_image(mask, min_area)
    # Of several largest islands either may stay.
    if (result != want).any():
        assert result.sum() == want.sum() < min_area
    assert changed == (result != mask).any()


def test_labels_cover_the_mask_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    label = regions._label
    monkeypatch.setattr(regions, "_label", lambda part: sizes.append(part.shape) or label(part))
    mask = np.zeros((2000, 3000), bool)
    mask[500:520, 900:940] = True
    mask[505, 905] = False
    result, changed = clean(mask, 100)
    assert changed
    assert result[505, 905]
    assert sizes == [(22, 42)] * 2
