"""Draws ``docs/page.png``: the page in light and dark. Run ``python -m tests.support.make_page_png``."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from pixano_edge.engine.provider import EdgeProvider
from pixano_edge.engine.server import ServerSettings, create_app
from tests.conftest import ROOT
from tests.support.browser import chromium, served
from tests.support.page_user import User, answer_of

SIZE = {"width": 1240, "height": 740}
COLOURS = 200


def _detected(user: User) -> None:
    """The demo's fourth scene: named objects, and the masks in some of their boxes."""
    user.open("detect")
    user.scene(4)
    user.page.get_by_role("button", name="Find").click()
    user.settled("detect", "box")
    user.page.get_by_label("Least score").fill("0.4")
    for button in user.page.locator(".found button").all():
        button.click()
        user.page.locator(".found button:disabled").wait_for(state="detached")
    user.settled("detect", "Mask of")
    user.page.mouse.move(3, 3)
    user.page.locator("#tab-detect").focus()
    user.page.locator("#tab-detect").blur()
    user.frame()


def _picture(browser: Any, url: str, scheme: str) -> Image.Image:
    context = browser.new_context(viewport=SIZE, color_scheme=scheme)
    user = User(context.new_page(), url)
    _detected(user)
    content = user.page.screenshot()
    context.close()
    return Image.open(io.BytesIO(content)).convert("RGB")


def main() -> None:
    """Writes the picture: light above a slanted line, dark below it."""
    provider = EdgeProvider(media_roots=[])
    with served(create_app(ServerSettings(demo=True), provider)) as url, chromium() as browser:
        light, dark = (_picture(browser, url, scheme) for scheme in ("light", "dark"))
        answer_of(provider.close)
    rows, columns = np.mgrid[: light.height, : light.width]
    below = columns > light.width * 0.62 - (rows - light.height / 2) * 0.25
    both = Image.fromarray(np.where(below[..., None], np.asarray(dark), np.asarray(light)))
    both.quantize(COLOURS, dither=Image.Dither.NONE).save(ROOT / "docs" / "page.png", optimize=True)


if __name__ == "__main__":
    main()
