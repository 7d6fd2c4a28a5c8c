"""Clicks, boxes and files on a picture: what is shown against the provider's own masks."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.support.page_user import DEMO, SCENE, Recorder, User, at_size, best_mask, differs, page_base, tinted

pytestmark = pytest.mark.browser


def test_a_click_on_a_photo_shows_the_providers_mask_there(user: User, provider: Recorder, photo: Path) -> None:
    size, point = (451, 300), (300, 90)
    user.open()
    user.choose(photo)
    user.settled("segment", "Ready")
    before = user.drawn("image-stage")
    user.click("image-stage", *point, size)
    text = user.settled("segment", "score")
    assert provider.asked[-1].points == [[list(point)]]
    after = user.drawn("image-stage")
    mask = best_mask(provider, photo.read_bytes(), points=[[list(point)]], labels=[[1]])
    assert mask[point[1], point[0]]
    free = user.outside(before.shape, [point], size)
    shown = tinted(before, after) & free
    assert differs(shown, at_size(mask, before.shape) & free) < 0.01
    # What a mask read row by row instead of down the columns, or one of a pixel beside, would have shown.
    wrong = mask.T.reshape(-1).reshape(mask.shape)
    assert differs(shown, at_size(wrong, before.shape) & free) > 0.1
    assert differs(shown, at_size(np.roll(mask, 2, axis=1), before.shape) & free) > 0.02
    assert f"{int(mask.sum()):,} pixels" in text


def test_candidates_undo_exclude_and_clear(user: User, provider: Recorder) -> None:
    user.open()
    user.scene(4)
    user.settled("segment", "Ready")
    bare = user.drawn("image-stage")
    user.click("image-stage", 122, 201, SCENE)
    user.settled("segment", "of 3")
    masks = user.page.get_by_role("radio", name="Mask ", exact=False)
    assert masks.count() == 3
    chosen = user.page.locator(".candidates [aria-checked=true]")
    scores = [float(masks.nth(i).inner_text()) for i in range(3)]
    assert float(chosen.inner_text()) == max(scores)
    masks.nth(0).click()
    user.settled("segment", "Mask 1 of 3")
    first = user.drawn("image-stage")
    user.click("image-stage", 67, 289, SCENE, button="right")
    user.settled("segment", "Mask:")
    asked = provider.asked[-1]
    assert (asked.points, asked.labels) == ([[[122, 201], [67, 289]]], [[1, 0]])
    assert asked.mask_input is not None, "the next click refines the mask that was chosen"
    assert not asked.multimask_output
    assert tinted(first, user.drawn("image-stage")).any()
    user.page.get_by_role("button", name="Undo").click()
    assert np.array_equal(user.drawn("image-stage"), first), "undo shows the mask that was chosen, without asking"
    assert provider.asked[-1] is asked
    user.page.get_by_role("button", name="Clear").click()
    assert np.array_equal(user.drawn("image-stage"), bare)
    assert user.page.get_by_role("button", name="Undo").is_disabled()


def test_a_box_is_dragged(user: User, provider: Recorder) -> None:
    user.open()
    user.scene(3)
    user.settled("segment", "Ready")
    before = user.drawn("image-stage")
    user.drag("image-stage", (440, 400), (160, 120), SCENE)  # from the lower right
    user.settled("segment", "score")
    assert provider.asked[-1].boxes == [[160, 120, 440, 400]]
    assert provider.asked[-1].points is None
    shown = tinted(before, user.drawn("image-stage"))
    scale = shown.shape[0] / 512
    lines = np.zeros(shown.shape, np.uint8)
    cv2.rectangle(lines, (int(160 * scale), int(120 * scale)), (int(440 * scale), int(400 * scale)), 1, 12)
    free = lines == 0
    mask = best_mask(
        provider, (DEMO / "scene-3.png").read_bytes(), boxes=[[160, 120, 440, 400]], multimask_output=False
    )
    assert differs(shown & free, at_size(mask, shown.shape) & free) < 0.01


def test_pixels_as_stored_whatever_exif_says(user: User, provider: Recorder, tmp_path: Path) -> None:
    stored = np.zeros((80, 120, 3), np.uint8)
    stored[:40, :60], stored[:40, 60:] = (220, 30, 30), (30, 200, 30)
    stored[40:, :60], stored[40:, 60:] = (30, 30, 220), (230, 230, 40)
    for orientation in (6, 3):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"turned-{orientation}.jpg"
        Image.fromarray(stored).save(path, quality=95, exif=exif)
        user.open()
        user.choose(path)
        assert "120 \u00d7 80" in user.page.inner_text("#image-facts")
        user.settled("segment", "Ready")
        drawn = user.drawn("image-stage")
        height, width = drawn.shape[:2]
        assert width / height == pytest.approx(1.5, rel=0.02)
        for x, y in ((20, 20), (100, 20), (20, 60), (100, 60)):
            seen = drawn[int((y + 0.5) * height / 80), int((x + 0.5) * width / 120)]
            assert np.abs(seen.astype(int) - stored[y, x]).max() < 25, (orientation, x, y)
        user.click("image-stage", 100, 20, (120, 80))
        user.settled("segment", "score")
        assert provider.asked[-1].points == [[[100, 20]]]


def test_a_very_large_picture_and_one_pixel(user: User, provider: Recorder, tmp_path: Path) -> None:
    large = np.full((1100, 4400, 3), 90, np.uint8)
    large[300:700, 3000:4100] = (200, 180, 40)
    Image.fromarray(large).save(tmp_path / "large.jpg", quality=80)
    Image.new("RGB", (1, 1), (200, 10, 10)).save(tmp_path / "dot.png")
    user.open()
    user.choose(tmp_path / "large.jpg")
    assert "4400 \u00d7 1100" in user.page.inner_text("#image-facts")
    user.settled("segment", "Ready")
    box = user.page.locator("#image-stage canvas").bounding_box()
    assert box["width"] <= 1280
    user.click("image-stage", 3600, 500, (4400, 1100))
    user.settled("segment", "score")
    [[[x, y]]] = provider.asked[-1].points
    step = 4400 / box["width"]
    assert abs(x - 3600) <= step
    assert abs(y - 500) <= step
    user.choose(tmp_path / "dot.png")
    user.settled("segment", "Ready")
    user.click("image-stage", 0, 0, (1, 1))
    user.settled("segment", "Mask")
    assert provider.asked[-1].points == [[[0, 0]]]
    assert user.drawn("image-stage").shape[0] > 100, "one pixel is shown large enough to be hit"


GIVE = """async ([kind, address, name]) => {
  const content = await (await fetch(address)).blob();
  const transfer = new DataTransfer();
  transfer.items.add(new File([content], name, { type: content.type }));
  const options = { bubbles: true, cancelable: true };
  const event = kind === 'drop'
    ? new DragEvent('drop', { ...options, dataTransfer: transfer })
    : new ClipboardEvent('paste', { ...options, clipboardData: transfer });
  document.body.dispatchEvent(event);
  return event.defaultPrevented;
}"""


def test_pictures_are_dropped_and_pasted(user: User) -> None:
    user.open()
    for kind in ("drop", "paste"):
        address = f"{page_base(user)}/demo/scene-2.png"
        taken = user.page.evaluate(GIVE, [kind, address, f"{kind}.png"])
        assert taken or kind == "paste", "the browser does not leave the page for a dropped file"
        user.page.locator("#image-facts", has_text=f"{kind}.png: 512").wait_for()
    user.page.get_by_role("tab", name="Track").click()
    user.page.evaluate(GIVE, ["drop", address, "frame.png"])
    user.page.locator("#clip-facts", has_text="1 frame,").wait_for()
