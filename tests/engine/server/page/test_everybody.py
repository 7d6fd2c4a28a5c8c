"""Keys, themes, narrow windows, API keys, errors, what the box is, and what the page must not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.server import ServerSettings, create_app
from tests.support.browser import served
from tests.support.page_user import SCENE, Recorder, User, answer_of, tinted

pytestmark = pytest.mark.browser


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
    user.lacking("vlm")  # so that its note can be looked at
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
