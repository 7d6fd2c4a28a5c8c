"""The page in real Chromium: clicks, keys and files on one side, the provider's own answers on the other.

No test passes when the page's console shows an error (a violated content policy is one) or when a request goes to
another origin. ``page.wait_for_function`` is not used: it evaluates text in the page, which the policy forbids.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from pixano_edge.engine.models.masks import mask_iou
from pixano_edge.engine.models.rle import decode_rle, encode_rle
from pixano_edge.engine.provider import EdgeProvider, ImageMaskGenerationInput, ImageZeroShotDetectionInput
from pixano_edge.engine.server import ServerSettings, create_app
from tests.conftest import ROOT
from tests.support.browser import Watch, chromium, served
from tests.support.page_user import User, answer_of, at_size, differs, tinted

pytestmark = pytest.mark.browser

DEMO = ROOT / "engine" / "assets" / "demo"
SCENE = (512, 512)
CLIP = (256, 256)
HEART = (114, 142)


class Recorder(EdgeProvider):
    """Remembers what was asked of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: list[Any] = []

    async def image_mask_generation(self, input_data: Any, timeout: float = 60.0) -> Any:
        self.asked.append(input_data)
        return await super().image_mask_generation(input_data, timeout)


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    provider = Recorder(store=tmp_path_factory.mktemp("store"), media_roots=[], threads=1)
    yield provider
    answer_of(provider.close)


@pytest.fixture(scope="module")
def url(provider: Recorder) -> Iterator[str]:
    with served(create_app(ServerSettings(demo=True), provider)) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def watched(browser: Any, url: str) -> Iterator[Any]:
    """Makes tabs; their contexts are closed and what they did is checked afterwards."""
    contexts: list[Any] = []
    watches: list[Watch] = []

    def tab(at: str = url, **options: Any) -> tuple[User, Watch]:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 820}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        watches.append(Watch(page, at))
        return User(page, at), watches[-1]

    yield tab
    for context in contexts:
        context.close()
    for watch in watches:
        watch.check()


@pytest.fixture
def user(watched: Any) -> User:
    return watched()[0]


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real photo, wider than high."""
    data = pytest.importorskip("skimage.data", reason="photos come with pixano-edge[benchmarks]")
    path = tmp_path_factory.mktemp("photo") / "chelsea.png"
    Image.fromarray(data.chelsea()).save(path)
    return path


def best_mask(provider: Recorder, content: bytes, **prompt: Any) -> Any:
    """The provider's own answer: of its masks the one with the best score, (H, W) bool."""
    given = ImageMaskGenerationInput(image=content, model="sam2-demo", **prompt)  # type: ignore[arg-type]
    data = answer_of(lambda: provider.image_mask_generation(given)).data
    chosen = int(np.argmax(data.scores.values))
    return decode_rle(data.masks[0][chosen].to_dict())


# Segmenting


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


# Detecting


def test_boxes_of_named_classes_and_the_mask_in_one(user: User, provider: Recorder) -> None:
    user.open("detect")
    user.scene(4)
    user.page.get_by_label("Classes, separated by commas").fill("yellow circle, striped ellipse")
    user.page.get_by_role("button", name="Find").click()
    user.settled("detect", "box")
    scene = (DEMO / "scene-4.png").read_bytes()
    given = ImageZeroShotDetectionInput(
        scene,
        "owlv2-demo",
        ["yellow circle", "striped ellipse"],
        0.05,
        0.05,  # type: ignore[arg-type]
    )
    found = answer_of(lambda: provider.detection(given)).data
    rows = user.page.locator(".found li")
    for least in (0.3, 0.5, 0.05):
        user.page.get_by_label("Least score").fill(str(least))
        assert rows.count() == min(200, sum(score >= least for score in found.scores)), least
    assert rows.count() > 2
    user.page.get_by_label("Least score").fill("0.5")
    first = rows.nth(0)
    assert first.locator(".name").inner_text() == found.classes[0]
    assert first.locator(".score").inner_text() == f"{found.scores[0]:.2f}"
    user.page.mouse.move(2, 2)
    before = user.drawn("image-stage")
    first.get_by_role("button").click()
    user.settled("detect", "Mask of")
    box = [*found.boxes[0][:2], *(min(511, side) for side in found.boxes[0][2:])]
    assert provider.asked[-1].boxes == [box]
    user.page.mouse.move(2, 2)
    user.page.locator("#tab-detect").focus()
    mask = best_mask(provider, scene, boxes=[box], multimask_output=False)
    shown = tinted(before, user.drawn("image-stage"))
    assert differs(shown, at_size(mask, shown.shape)) < 0.2  # boxes and names are drawn over it
    assert differs(shown, at_size(mask.T, shown.shape)) > 0.4
    user.click("image-stage", 122, 201, SCENE)  # a click into the box takes the mask back
    user.page.mouse.move(2, 2)
    assert not tinted(before, user.drawn("image-stage")).any()


# Tracking


def frames(folder: Path, count: int) -> list[Path]:
    """The first frames of the demo's clip as files, whose names sort as numbers only."""
    capture = cv2.VideoCapture(str(DEMO / "clip.mp4"))
    paths = []
    for index in range(count):
        _, image = capture.read()
        paths.append(folder / f"frame-{index + 7}.png")
        cv2.imwrite(str(paths[-1]), image)
    capture.release()
    return paths


def test_a_marked_object_is_tracked_and_scrubbed(user: User, tmp_path: Path) -> None:
    user.open("track")
    user.page.set_input_files("#frame-files", frames(tmp_path, 5))
    user.settled("track", "Click on an object")
    assert user.page.inner_text("#frame-number") == "1 / 5"
    user.click("clip-stage", *HEART, CLIP)
    user.settled("track", "press Track")
    user.page.get_by_role("button", name="Track", exact=True).click()
    user.settled("track", "5 frames in")
    slider = user.page.get_by_label("Frame", exact=True)
    slider.focus()
    for _ in range(3):
        slider.press("ArrowLeft")
    slider.press("End")
    assert user.page.inner_text("#frame-number") == "5 / 5"
    user.page.wait_for_timeout(200)
    after = user.drawn("clip-stage")
    user.page.get_by_role("button", name="Remove object 1").click()
    shown = tinted(user.drawn("clip-stage"), after)
    listing = json.loads((DEMO / "clip.json").read_text())
    heart = next(o for o in listing["objects"] if tuple(o["click"]) == HEART)
    truths = [decode_rle({"size": listing["size"], "counts": heart["truth"][i].encode()}) for i in (0, 4)]
    overlaps = [mask_iou(shown, at_size(truth, shown.shape)) for truth in truths]
    assert overlaps[1] > 0.8
    assert overlaps[1] > overlaps[0] + 0.05, "the fifth frame's mask, not the first one's"


def test_tracking_is_cancelled_and_a_job_from_the_list(user: User, provider: Recorder, url: str) -> None:
    user.open("track")
    user.page.get_by_role("button", name="Demo clip").click()
    user.settled("track", "Click on an object")
    user.click("clip-stage", *HEART, CLIP)
    user.settled("track", "press Track")
    user.page.get_by_role("button", name="Track", exact=True).click()
    user.page.locator("#panel-track .status", has_text=re.compile(r"Frame \d+ of 40")).wait_for()
    user.page.get_by_role("button", name="Cancel").click()
    user.settled("track", "Cancelled")

    def running() -> list[Any]:
        return answer_of(provider.get_server_info).jobs

    for _ in range(100):
        if not running():
            break
        user.page.wait_for_timeout(100)
    assert not running(), "the server stops when the page hangs up"

    user.page.get_by_label("As a job").check()
    user.page.get_by_role("button", name="Track", exact=True).click()
    user.page.locator("#panel-track .status", has_text=re.compile(r"Frame \d+ of 40")).wait_for()
    [job] = running()
    user.page.get_by_role("tab", name="This box").click()
    user.page.get_by_role("button", name=f"Cancel {job['job_id']}").click()
    user.page.locator(".jobs li", has_text="canceled").wait_for()
    assert answer_of(lambda: provider.get_video_mask_generation_job(job["job_id"])).status == "canceled"
    user.page.get_by_role("tab", name="Track").click()
    assert "cancel" in user.settled("track", "ancel").lower()


def test_frames_of_a_video_file(user: User, tmp_path: Path) -> None:
    path = tmp_path / "grey.webm"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"VP80"), 10, (96, 64))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no WebM")
    for index in range(8):
        writer.write(np.full((64, 96, 3), 30 * index + 10, np.uint8))
    writer.release()
    user.open("track")
    user.page.set_input_files("#video-file", path)
    user.settled("track", "Click on an object")
    assert "8 frames, 96 \u00d7 64" in user.page.inner_text("#clip-facts")
    slider = user.page.get_by_label("Frame", exact=True)
    for index in (0, 3, 7):
        slider.fill(str(index))
        user.page.wait_for_timeout(150)
        grey = float(np.median(user.drawn("clip-stage")))
        assert abs(grey - (30 * index + 10)) < 12, index


# Asking


def test_no_vlm_and_a_stream_of_one(user: User) -> None:
    user.open("ask")
    text = user.settled("ask", "no model")
    assert "pixano-edge export" in text
    assert user.page.get_by_role("button", name="Ask", exact=True).is_hidden()

    user.page.route(
        "**/v1/models", lambda route: route.fulfill(json=[{"name": "vlm", "capability": "vlm", "status": "RUNNING"}])
    )
    asked: list[Any] = []

    def stream(route: Any) -> None:
        asked.append(route.request.post_data_json)
        pieces = [
            {"text": "Two "},
            {"text": "<b>cats</b>."},
            {
                "usage": {"promptTokens": 70, "completionTokens": 3, "totalTokens": 73},
                "generatedText": "Two <b>cats</b>.",
            },
        ]
        body = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces)
        route.fulfill(body=body, content_type="text/event-stream")

    user.page.route("**/v1/inference/vlm/stream", stream)
    user.scene(1)
    user.page.get_by_label("Question").fill("How many cats?")
    user.page.get_by_role("button", name="Ask", exact=True).click()
    assert "3 tokens" in user.settled("ask", "tokens")
    assert user.page.inner_text("#panel-ask .answer") == "Two <b>cats</b>.", "an answer is text, never markup"
    [request] = asked
    assert request["prompt"] == "How many cats?"
    assert request["maxNewTokens"] == 128
    head, _, content = request["images"][0].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(content) == (DEMO / "scene-1.png").read_bytes()


# What everybody needs


def test_what_a_page_must_not_do_is_seen(watched: Any) -> None:
    user, watch = watched()
    user.open()
    assert watch.faults == []
    for forbidden in (
        "fetch('http://127.0.0.1:9/').catch(() => {})",
        "document.head.append(Object.assign(document.createElement('style'), { textContent: 'p { color: red }' }))",
        "document.body.append(Object.assign(new Image(), { src: 'data:image/gif;base64,R0lGODlhAQABAAAAACw=' }))",
        "try { document.body.innerHTML = '<p>' } catch {}",
    ):
        watch.faults.clear()
        user.page.evaluate(f"() => {{ {forbidden} }}")
        user.page.wait_for_timeout(100)
        assert watch.faults, forbidden
    watch.faults.clear()


def test_by_keys_alone(user: User, provider: Recorder) -> None:
    page = user.page
    user.open()

    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            style = page.evaluate(
                "s => { const e = document.activeElement; if (!e || e === document.body) return null;"
                "const shown = e.closest('.file') ?? (e.matches('.choice input') ? e.nextElementSibling : e);"
                "return [e.matches(s), getComputedStyle(shown).outlineStyle] }",
                selector,
            )
            if style is None:
                continue
            assert style[1] != "none", "the focus is seen"
            if style[0]:
                return
        raise AssertionError(f"{selector} is not reached")

    tab_to("#demo-scenes button:nth-child(3)")
    page.keyboard.press("Enter")
    user.settled("segment", "Ready")
    tab_to("#image-stage canvas")
    bare = user.drawn("image-stage")
    for key in ("ArrowRight",) * 11 + ("ArrowDown",) * 4 + ("Alt+ArrowDown",):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    user.settled("segment", "score")
    assert provider.asked[-1].points == [[[256 + 11 * 5, 256 + 4 * 5 + 1]]]
    spoken = page.locator("#announcer")
    spoken.get_by_text("score").wait_for(state="attached")
    assert tinted(bare, user.drawn("image-stage")).mean() > 0.03
    page.keyboard.press("3")
    user.settled("segment", "Mask 3 of 3")
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("Shift+Enter")
    user.settled("segment", "Mask:")
    assert provider.asked[-1].labels == [[1, 0]]
    page.keyboard.press("Backspace")
    page.keyboard.press("Delete")
    page.keyboard.press("b")
    for key in ("Shift+ArrowRight", "Shift+ArrowDown"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    user.settled("segment", "score")
    assert provider.asked[-1].boxes == [[261, 277, 311, 327]]

    tab_back = page.locator("#tab-segment")
    tab_back.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#tab-detect").get_attribute("aria-selected") == "true"
    tab_to(".panel:not([hidden]) textarea")
    page.keyboard.press("Control+a")
    page.keyboard.type("orange triangle")
    page.keyboard.press("Enter")
    user.settled("detect", "box")
    tab_to(".found button")
    page.keyboard.press("Enter")
    user.settled("detect", "Mask of orange triangle")


def luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in colour.partition("(")[2].rstrip(")").replace(",", " ").split()[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


COLOURS = """([selector, tab]) => {
  document.querySelector(`#tab-${tab}`).click();
  const e = document.querySelector(selector);
  if (!e) throw new Error(`there is no ${selector}`);
  let below = e;
  while (getComputedStyle(below).backgroundColor === 'rgba(0, 0, 0, 0)') below = below.parentElement;
  return [getComputedStyle(e).color, getComputedStyle(below).backgroundColor];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read(watched: Any, scheme: str) -> None:
    user, _ = watched(color_scheme=scheme)
    user.open()
    user.page.get_by_role("tab", name="This box").click()
    user.page.locator(".models td").first.wait_for()
    ground = luminance(user.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert ground > 0.8 if scheme == "light" else ground < 0.02
    for selector, tab in (
        ("h1", "segment"),
        ("h1 small", "segment"),
        ("#strip", "segment"),
        ("#tab-ask", "segment"),
        ("#tab-segment", "segment"),
        (".choice input:checked + span", "segment"),
        (".source .hint", "segment"),
        ("#panel-segment .status", "segment"),
        ("#panel-detect button.main", "detect"),
        ("#panel-ask .note strong", "ask"),
        (".stage .empty", "segment"),
        ("#key-button", "segment"),
        (".models td", "box"),
        (".facts-list dt", "box"),
    ):
        inks = sorted(luminance(colour) for colour in user.page.evaluate(COLOURS, [selector, tab]))
        contrast = (inks[1] + 0.05) / (inks[0] + 0.05)
        assert contrast >= 4.5, (selector, contrast)
    other = {"light": "dark", "dark": "light"}[scheme]
    while user.page.inner_text("#theme-name") != other:
        user.page.click("#theme")
    user.page.reload()
    user.page.locator("#version:not(:empty)").wait_for(state="attached")
    turned = luminance(user.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (turned > 0.8) == (other == "light"), "the choice is kept"


NAMELESS = """() => [...document.querySelectorAll('button, input, select, textarea, canvas, img, meter, progress, a')]
  .filter(e => !(e.tagName === 'IMG' && e.hasAttribute('alt')) && e.getAttribute('aria-hidden') !== 'true')
  .filter(e => !(e.getAttribute('aria-label') || e.labels?.length || (e.matches('button, a') && e.textContent.trim())))
  .map(e => e.outerHTML)"""


def test_narrow_windows_and_names(watched: Any) -> None:
    user, _ = watched(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    user.open()
    user.scene(2)
    user.settled("segment", "Ready")
    user.page.touchscreen.tap(*user.place("image-stage", 316, 318, SCENE))
    user.settled("segment", "score")
    for tab in ("segment", "detect", "ask", "track", "box"):
        user.page.click(f"#tab-{tab}")
        user.page.wait_for_timeout(50)
        assert user.page.evaluate("document.documentElement.scrollWidth") <= 360, tab
        assert user.page.evaluate("document.querySelector('.tabs').scrollWidth") <= 360, tab
        assert user.page.evaluate(NAMELESS) == []


def test_a_key_is_asked_for_and_kept_in_the_tab(watched: Any, provider: Recorder) -> None:
    with served(create_app(ServerSettings(demo=True, api_keys=("open sesame",)), provider)) as guarded:
        user, watch = watched(guarded)
        watch.allowed |= {"401", "403"}
        user.open()
        field = user.page.get_by_label("API key of this box")
        field.wait_for()
        assert "API key" in user.settled("segment", "key")
        field.fill("wrong")
        field.press("Enter")
        user.page.get_by_text("does not know this key").wait_for()
        field.fill("open sesame")
        field.press("Enter")
        field.wait_for(state="hidden")
        user.scene(1)
        user.settled("segment", "Ready")
        assert user.page.evaluate("sessionStorage.length") == 1
        assert user.page.evaluate("Object.values(localStorage).join()").find("sesame") == -1
        user.page.reload()
        user.page.locator("#version:not(:empty)").wait_for(state="attached")
        user.settled("segment", "Choose a picture")
        assert field.is_hidden()


def test_errors_say_what_to_do(watched: Any, tmp_path: Path) -> None:
    user, watch = watched()
    watch.allowed |= {"503", "ERR_FAILED", "net::"}
    user.open()
    (tmp_path / "note.png").write_text("no picture")
    user.page.set_input_files("#image-file", tmp_path / "note.png")
    user.page.get_by_text("Convert it to PNG, JPEG or WebP", exact=False).wait_for()
    user.scene(1)
    user.settled("segment", "Ready")
    envelope = {
        "error": {"code": "unavailable", "message": "The queue is full. Try again in a second.", "requestId": "r-17"}
    }
    user.page.route("**/v1/inference/segmentation/binary", lambda route: route.fulfill(status=503, json=envelope))
    user.click("image-stage", 100, 100, SCENE)
    text = user.settled("segment", "The queue is full")
    assert "Try again in a second." in text
    assert "r-17" in text
    assert user.page.get_by_role("button", name="Undo").is_disabled(), "a click that failed leaves nothing behind"
    user.page.unroute("**/v1/inference/segmentation/binary")
    user.page.route("**/v1/inference/segmentation/binary", lambda route: route.abort())
    user.click("image-stage", 100, 100, SCENE)
    assert "does not answer" in user.settled("segment", "does not answer")
    user.page.unroute("**/v1/inference/segmentation/binary")
    user.click("image-stage", 100, 100, SCENE)
    user.settled("segment", "score")


def test_what_the_box_is(user: User, provider: Recorder) -> None:
    user.open()
    user.scene(1)
    user.settled("segment", "Ready")
    for x in (330, 333, 166):
        user.click("image-stage", x, 70, SCENE)
        user.settled("segment", "score")
    user.page.get_by_role("tab", name="This box").click()
    row = user.page.locator(".models tbody tr", has=user.page.get_by_role("rowheader", name="sam2-demo", exact=True))
    row.get_by_text("in memory, cpu").wait_for()
    user.page.wait_for_timeout(2500)
    cells = row.locator("td").all_inner_texts()
    assert int(cells[2]) >= 4
    latency = user.page.request.get(f"{user.url}/v1/info").json()["latency"]
    [mine] = [one for one in latency if (one["model"], one["capability"]) == ("sam2-demo", "segmentation")]
    assert int(cells[2]) == mine["count"]
    assert all(cell.endswith("s") for cell in cells[3:6]), cells
    versions = user.page.locator("#panel-box section", has_text="Versions").inner_text()
    for name, version in answer_of(provider.get_server_info).versions.items():
        assert name in versions
        assert version in versions


# Modules


DECODE = """async ([base, rle, width, height]) => {
  const { Mask } = await import(`${base}/rle.js`);
  const mask = new Mask(rle);
  return [mask.area, mask.sample().join(""), mask.sample(width, height).join("")];
}"""


def page_base(user: User) -> str:
    address: str = user.page.get_attribute("script[type=module]", "src")
    return f"{user.url}/{address.rpartition('/')[0]}"


def test_run_lengths_as_pycocotools_writes_them(user: User) -> None:
    user.open()
    base = page_base(user)
    random = np.random.default_rng(5)
    masks = [np.zeros((7, 5), bool), np.ones((3, 9), bool), np.ones((1, 1), bool), np.zeros((1, 1), bool)]
    masks += [
        random.random((int(h), int(w))) < share
        for h, w, share in zip((1, 40, 97, 161), (60, 1, 161, 97), (0.5, 0.1, 0.5, 0.9))
    ]
    blob = np.zeros((300, 200), np.uint8)
    cv2.ellipse(blob, (90, 160), (70, 110), 20, 0, 360, 1, -1)
    masks.append(blob.astype(bool))
    for mask in masks:
        rle = encode_rle(mask)
        counts = rle["counts"].decode() if isinstance(rle["counts"], bytes) else rle["counts"]
        for height, width in ((13, 29), (mask.shape[0] * 2, mask.shape[1] * 3)):
            area, whole, sampled = user.page.evaluate(
                DECODE, [base, {"size": list(mask.shape), "counts": counts}, width, height]
            )
            assert area == mask.sum()
            assert np.array_equal(np.frombuffer(whole.encode(), np.uint8).reshape(mask.shape) == 49, mask)
            assert np.array_equal(
                np.frombuffer(sampled.encode(), np.uint8).reshape(height, width) == 49, at_size(mask, (height, width))
            )


def test_damaged_run_lengths_are_refused(user: User) -> None:
    user.open()
    base = page_base(user)
    for counts in ("", "0", "zzz", "oooooooooo", "\x10", [3, 5], "]"):
        with pytest.raises(Exception, match="runs"):
            user.page.evaluate(DECODE, [base, {"size": [4, 5], "counts": counts}, 4, 5])
    assert user.page.evaluate(DECODE, [base, {"size": [4, 5], "counts": [3, 5, 12]}, 5, 4])[0] == 5
