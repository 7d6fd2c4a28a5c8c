"""Crops of an image, grids of clicks, and boxes cut off by a crop."""

from __future__ import annotations

import numpy as np
import pytest

from pixano_edge.engine.models.sam2.crops import Crop, crop_image, point_grid, touches_inner_edge


def test_grid_is_centred_row_by_row() -> None:
    assert point_grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    assert point_grid(1).tolist() == [[0.5, 0.5]]


def test_no_layers_is_the_whole_image() -> None:
    assert crop_image((30, 50), 0, 0.3) == [Crop((0, 0, 50, 30), 0)]


def test_known_crops() -> None:
    # By hand for 900 high, 1500 wide, upstream's 512/1500: overlap int(512/1500 * 900) = 307,
    # width ceil((1500 + 307) / 2) = 904, height ceil((900 + 307) / 2) = 604.
    crops = crop_image((900, 1500), 1, 512 / 1500)
    assert [c.box for c in crops] == [
        (0, 0, 1500, 900),
        (0, 0, 904, 604),
        (0, 297, 904, 900),
        (597, 0, 1500, 604),
        (597, 297, 1500, 900),
    ]
    assert [c.layer for c in crops] == [0, 1, 1, 1, 1]
    assert crops[2].size == (603, 904)
    assert crops[2].area == 603 * 904


@pytest.mark.parametrize("size", [(480, 640), (97, 161), (1000, 30), (3, 5)])
@pytest.mark.parametrize("ratio", [0.0, 0.34, 1.0])
def test_every_layer_covers_the_image(size: tuple[int, int], ratio: float) -> None:
    crops = crop_image(size, 3, ratio)
    assert len({c.box for c in crops}) == len(crops)
    for layer in range(4):
        seen = np.zeros(size, bool)
        for crop in crops:
            x1, y1, x2, y2 = crop.box
            assert 0 <= x1 < x2 <= size[1]
            assert 0 <= y1 < y2 <= size[0]
            # What a layer leaves out was looked at by the layers above.
            if crop.layer <= layer:
                seen[y1:y2, x1:x2] = True
        assert seen.all()


def test_images_of_a_pixel_have_no_crops() -> None:
    assert [c.box for c in crop_image((1, 1), 4, 0.34)] == [(0, 0, 1, 1)]
    # A row is cut along its length alone.
    assert {c.box[1::2] for c in crop_image((1, 64), 2, 0.34)} == {(0, 1)}


@pytest.mark.parametrize(
    ("box", "cut"),
    [
        ((150, 150, 250, 250), False),  # inside
        ((120, 150, 250, 250), True),  # 20 px from the crop's left side
        ((121, 150, 250, 250), False),
        ((150, 150, 250, 280), True),  # and from its bottom
        ((150, 0, 250, 250), False),  # the top side is the image's
        ((150, 0, 279, 250), False),
        ((150, 0, 280, 250), True),
    ],
)
def test_boxes_at_inner_edges(box: tuple[int, int, int, int], cut: bool) -> None:
    crop = Crop((100, 0, 300, 300), 1)
    assert touches_inner_edge(box, crop, (500, 400)) is cut
    # The same sides of the whole image cut nothing off.
    assert not touches_inner_edge(box, Crop((0, 0, 400, 500), 0), (500, 400))


def test_an_inner_edge_near_the_images_edge_counts_as_one() -> None:
    assert not touches_inner_edge((10, 50, 60, 90), Crop((15, 0, 200, 200), 1), (300, 300))
