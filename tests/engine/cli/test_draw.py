"""Pictures: what is painted where, and what the files hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixano_edge.engine.cli.coco import CocoWriter, mask_bbox
from pixano_edge.engine.cli.draw import COLOURS, mask_index, overlay, write_masks
from pixano_edge.engine.cli.draw_text import NamedBox, drawable
from pixano_edge.engine.models.rle import decode_rle
from pixano_edge.engine.models.sam2.prompts import Prompt

SIZE = (60, 80)


def _rect(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize("level", [0, 128, 255])
def test_overlay_is_seen_on_any_background(level: int):
    image = np.full((*SIZE, 3), level, np.uint8)
    mask = _rect(20, 10, 60, 50)
    before = image.copy()
    picture = overlay(image, [mask], [Prompt(points=[(40, 30), (5, 5)], labels=[1, 0], box=(15, 5, 65, 55))])
    assert (image == before).all()
    difference = np.abs(picture.astype(int) - level).max(axis=2)
    assert difference[35, 25] > 40  # inside the mask
    assert difference[8:14, 30].max() > 90  # the contour
    assert difference[26:35, 36:45].max() > 90  # the foreground point
    assert difference[1:10, 1:10].max() > 90  # the background point
    assert difference[5, 40] > 90 or difference[4, 40] > 90  # the box
    assert (difference[58:, 70:] == 0).all()  # nothing far away


def test_points_of_the_two_labels_look_different():
    image = np.zeros((*SIZE, 3), np.uint8)
    yes = overlay(image, [], [Prompt(points=[(40, 30)], labels=[1])])
    no = overlay(image, [], [Prompt(points=[(40, 30)], labels=[0])])
    green, red = yes[26:35, 36:45].reshape(-1, 3).max(0), no[26:35, 36:45].reshape(-1, 3)
    assert (yes != no).any()
    assert green[1] > 150
    assert (red[:, 0].astype(int) - red[:, 1]).max() > 100


def test_smaller_mask_wins_in_the_index():
    index = mask_index([_rect(30, 20, 40, 30), _rect(10, 10, 60, 50)], SIZE)
    assert index.dtype == np.uint8
    assert index[25, 35] == 1
    assert index[45, 15] == 2
    assert index[0, 0] == 0
    many = [_rect(i % 80, i // 80, i % 80 + 1, i // 80 + 1) for i in range(300)]
    index = mask_index(many, SIZE)
    assert index.dtype == np.uint16
    assert index[299 // 80, 299 % 80] == 300


def test_what_is_known_of_masks_need_not_be_found_again(tmp_path: Path):
    image = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8)
    masks = [_rect(10, 10, 60, 50), _rect(30, 20, 40, 30), _rect(5, 5, 20, 20)]
    areas = [int(mask.sum()) for mask in masks]
    index = mask_index(masks, SIZE, areas)
    assert (index == mask_index(masks, SIZE)).all()
    assert (overlay(image, masks, index=index, areas=areas) == overlay(image, masks)).all()
    for count in (1, 3):
        known = mask_index(masks[:count], SIZE)
        (first,) = write_masks(tmp_path, "a", masks[:count], SIZE)
        (second,) = write_masks(tmp_path, "b", masks[:count], SIZE, index=known)
        assert first.read_bytes() == second.read_bytes()


def test_mask_files_read_back(tmp_path: Path):
    one = _rect(10, 10, 20, 20)
    (path,) = write_masks(tmp_path, "a", [one], SIZE)
    stored = np.asarray(Image.open(path))
    assert path.name == "a.mask.png"
    assert stored.dtype == np.uint8
    assert (stored == one * np.uint8(255)).all()

    two = [one, _rect(30, 30, 50, 50)]
    (path,) = write_masks(tmp_path, "b", two, SIZE)
    with Image.open(path) as picture:
        assert picture.mode == "P"
        assert (np.asarray(picture) == mask_index(two, SIZE)).all()
        assert picture.convert("RGB").getpixel((40, 40)) == COLOURS[1]

    paths = write_masks(tmp_path, "c", two, SIZE, separate=True)
    assert [p.name for p in paths] == ["c.mask-1.png", "c.mask-2.png"]
    assert (np.asarray(Image.open(paths[1])) == two[1] * np.uint8(255)).all()

    (path,) = write_masks(tmp_path, "d", [], SIZE)
    assert not np.asarray(Image.open(path)).any()
    assert not list(tmp_path.glob(".*"))  # no partial file stays


def test_coco_round_trip(tmp_path: Path):
    import json

    from pycocotools.coco import COCO

    writer = CocoWriter("test")
    image_id = writer.add_image("a.jpg", *SIZE)
    mask = _rect(10, 12, 20, 32)
    annotation = writer.add_mask(image_id, mask, 0.5)
    assert annotation["bbox"] == [10, 12, 10, 20]
    assert annotation["area"] == 200
    writer.add_mask(image_id, np.zeros(SIZE, bool), 0.1)
    writer.write(tmp_path / "annotations.json")
    content = json.loads((tmp_path / "annotations.json").read_text())
    assert content["categories"][0]["name"] == "object"
    segmentation = content["annotations"][0]["segmentation"]
    assert (decode_rle({**segmentation, "counts": segmentation["counts"].encode()}) == mask).all()
    coco = COCO(str(tmp_path / "annotations.json"))  # the reference reader takes it
    assert (coco.annToMask(coco.loadAnns([1])[0]) == mask).all()
    assert mask_bbox(np.zeros(SIZE, bool)) == [0, 0, 0, 0]


def _labelled(*boxes: NamedBox, size: tuple[int, int] = (200, 300), value: int = 128) -> np.ndarray:
    return overlay(np.full((*size, 3), value, np.uint8), [], boxes=boxes)


def test_a_label_is_readable_on_its_colour():
    for kind in range(len(COLOURS)):
        picture = _labelled(NamedBox((50, 60, 250, 150), kind, "remote control", 0.5))
        inside = picture[40:60, 50:100].reshape(-1, 3)
        filled = (inside == COLOURS[kind]).all(axis=1)
        text = np.array([255, 255, 255]) if (inside == 255).all(axis=1).any() else np.zeros(3)
        assert filled.sum() > 100
        assert (inside == text).all(axis=1).sum() > 20
        lights = [
            0.2126 * r + 0.7152 * g + 0.0722 * b
            for r, g, b in ((np.array(COLOURS[kind]) / 255) ** 2.2, (text / 255) ** 2.2)
        ]
        assert (max(lights) + 0.05) / (min(lights) + 0.05) >= 4.5  # WCAG's bar for text


def test_boxes_show_their_outline_and_leave_the_inside():
    picture = _labelled(NamedBox((50, 60, 250, 150), 1, "a", 0.5))
    assert (picture[60, 150] == COLOURS[1]).all()
    assert (picture[100, 100:200] == 128).all()


def test_labels_keep_clear_of_each_other_and_of_the_border():
    one = NamedBox((0, 0, 300, 200), 0, "whole picture", 0.9)
    alone = _labelled(one)
    assert (alone[2:12, 2:60] == COLOURS[0]).all(axis=2).any()  # no room above: inside the box
    both = _labelled(one, NamedBox((0, 0, 299, 199), 1, "whole picture", 0.8))
    first, second = ((both[:40, :150] == COLOURS[k]).all(axis=2).sum() for k in (0, 1))
    assert first > 300  # the better one keeps its place
    assert (both[160:] == COLOURS[1]).all(axis=2).sum() + second > 300  # the other one is somewhere else


def test_names_in_letters_that_can_be_drawn():
    assert [drawable(name, 6) for name in ("cat", "naïve  café", "猫", "Жук", "cat 🐈", "")] == [
        "cat", "naive cafe", "#7", "#7", "#7", "#7",
    ]  # fmt: skip
    assert drawable("x" * 100, 0) == "x" * 37 + "..."
    assert drawable("a\nb", 0) == "a b"


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (12, 12)])
def test_labels_on_tiny_pictures(size: tuple[int, int]):
    picture = _labelled(NamedBox((0, 0, size[1], size[0]), 0, "a long name", 0.5), size=size)
    assert picture.shape == (*size, 3)


def test_masks_of_one_kind_have_one_colour():
    masks = [np.zeros((60, 60), np.bool_) for _ in range(2)]
    masks[0][5:20, 5:20] = masks[1][30:50, 30:50] = True
    picture = overlay(np.zeros((60, 60, 3), np.uint8), masks, kinds=[4, 4])
    assert (picture[12, 12] == picture[40, 40]).all()
    own = overlay(np.zeros((60, 60, 3), np.uint8), masks)
    assert (own[12, 12] != own[40, 40]).any()
