"""A user of the server's page in Chromium: what one does, and what one sees, in pixels of the picture."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from pixano_edge.engine.models.rle import decode_rle
from pixano_edge.engine.provider import EdgeProvider, ImageMaskGenerationInput
from tests.conftest import ROOT

T = TypeVar("T")

DEMO = ROOT / "engine" / "assets" / "demo"
SCENE = (512, 512)
"""Width and height of the demo's scenes."""

DISC = 12
"""CSS pixels around a point that its mark may cover."""


def answer_of(work: Callable[[], Awaitable[T]]) -> T:
    """Awaits on a thread of its own, since Playwright's loop runs on this one."""

    async def run() -> T:
        return await work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, run()).result()


class User:
    """One tab of the browser.

    Args:
        page: Playwright's page.
        url: Of the server, without a slash at its end.
    """

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.url = url

    def open(self, tab: str = "segment") -> None:
        """Opens the page and waits for the list of models."""
        self.page.goto(f"{self.url}/#{tab}")
        self.page.locator("#version:not(:empty)").wait_for(state="attached")

    def lacking(self, capability: str) -> None:
        """From now on the server's list has no model of a capability."""

        def answer(route: Any) -> None:
            response = route.fetch()
            route.fulfill(response=response, json=[m for m in response.json() if m["capability"] != capability])

        self.page.route("**/v1/models", answer)

    def choose(self, file: Path | dict[str, Any]) -> None:
        """Chooses a picture, and waits until it is drawn."""
        self.page.set_input_files("#image-file", file)
        self.page.locator("#image-stage canvas").wait_for()
        self.frame()

    def scene(self, number: int) -> None:
        """Opens a demo scene, counted from 1."""
        self.page.click(f"#demo-scenes button:nth-child({number})")
        self.page.locator("#image-facts", has_text=f"scene-{number}").wait_for()
        self.frame()

    def settled(self, tool: str, words: str = "", timeout: float = 60) -> str:
        """The status of a tool, once it waits for nothing and has `words` in it."""
        status = self.page.locator(f"#panel-{tool} .status").first
        end = time.monotonic() + timeout
        while True:
            text: str = status.inner_text()
            if "busy" not in (status.get_attribute("class") or "") and words in text:
                self.frame()
                return text
            assert time.monotonic() < end, f"still: {text!r}, waiting for {words!r}"
            self.page.wait_for_timeout(30)

    def frame(self) -> None:
        """Waits until the page is drawn anew."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def place(self, stage: str, x: float, y: float, size: tuple[int, int]) -> tuple[float, float]:
        """Where the centre of pixel (x, y) of a picture of `size` (width, height) is in the window."""
        box = self.page.locator(f"#{stage} canvas").bounding_box()
        return box["x"] + box["width"] * (x + 0.5) / size[0], box["y"] + box["height"] * (y + 0.5) / size[1]

    def click(self, stage: str, x: float, y: float, size: tuple[int, int], **options: Any) -> None:
        """A real click of the mouse on pixel (x, y)."""
        self.page.mouse.click(*self.place(stage, x, y, size), **options)

    def drag(self, stage: str, start: tuple[float, float], end: tuple[float, float], size: tuple[int, int]) -> None:
        """Presses at one pixel, moves and lets go at another."""
        self.page.mouse.move(*self.place(stage, *start, size))
        self.page.mouse.down()
        self.page.mouse.move(*self.place(stage, (start[0] + end[0]) / 2, end[1], size))
        self.page.mouse.move(*self.place(stage, *end, size))
        self.page.mouse.up()

    def drawn(self, stage: str) -> npt.NDArray[np.uint8]:
        """What the canvas of a stage shows, (H, W, 3)."""
        self.frame()
        uri: str = self.page.evaluate(f"document.querySelector('#{stage} canvas').toDataURL('image/png')")
        content = base64.b64decode(uri.partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    def outside(self, shape: tuple[int, ...], points: list[tuple[float, float]], size: tuple[int, int]) -> Any:
        """Where on a canvas of `shape` no mark of `points` lies, (H, W) bool."""
        rows, columns = np.mgrid[: shape[0], : shape[1]]
        free = np.ones(shape[:2], bool)
        for x, y in points:
            cx, cy = (x + 0.5) * shape[1] / size[0], (y + 0.5) * shape[0] / size[1]
            free &= (columns - cx) ** 2 + (rows - cy) ** 2 > DISC**2
        return free


def tinted(before: npt.NDArray[np.uint8], after: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which pixels another drawing changed, (H, W)."""
    return np.asarray(np.abs(before.astype(int) - after.astype(int)).max(-1) > 4)


def differs(shown: npt.NDArray[np.bool_], mask: npt.NDArray[np.bool_]) -> float:
    """Pixels that are shown but not in the mask, or the other way, as a share of the mask. The dark line of one pixel
    around a mask's rim does not count."""
    around = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    return float(((shown & ~around) | (mask & ~shown)).sum() / max(1, mask.sum()))


def at_size(mask: npt.NDArray[np.bool_], shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """A mask at another size, each pixel that of its centre."""
    rows = ((np.arange(shape[0]) + 0.5) * mask.shape[0] / shape[0]).astype(int)
    columns = ((np.arange(shape[1]) + 0.5) * mask.shape[1] / shape[1]).astype(int)
    return mask[rows][:, columns]


class Recorder(EdgeProvider):
    """Remembers what was asked of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: list[Any] = []

    async def image_mask_generation(self, input_data: Any, timeout: float = 60.0) -> Any:
        self.asked.append(input_data)
        return await super().image_mask_generation(input_data, timeout)


def best_mask(provider: Recorder, content: bytes, **prompt: Any) -> Any:
    """The provider's own answer: of its masks the one with the best score, (H, W) bool."""
    given = ImageMaskGenerationInput(image=content, model="sam2-demo", **prompt)  # type: ignore[arg-type]
    data = answer_of(lambda: provider.image_mask_generation(given)).data
    chosen = int(np.argmax(data.scores.values))
    return decode_rle(data.masks[0][chosen].to_dict())


def page_base(user: User) -> str:
    """Where the page's files are."""
    address: str = user.page.get_attribute("script[type=module]", "src")
    return f"{user.url}/{address.rpartition('/')[0]}"
