"""Clips: marking, tracking, scrubbing, cancelling, jobs, videos."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pixano_edge.engine.models.masks import mask_iou
from pixano_edge.engine.models.rle import decode_rle
from tests.support.page_user import DEMO, Recorder, User, answer_of, at_size, tinted

pytestmark = pytest.mark.browser

CLIP = (256, 256)
HEART = (114, 142)


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
