"""Pictures: what is painted where, and what the files hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixano_edge.engine.cli.coco import CocoWriter, mask_bbox
from pixano_edge.engine.cli.draw import COLOURS, mask_index, overlay, write_masks
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
