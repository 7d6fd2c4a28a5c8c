"""Named classes, their boxes, the mask in one; questions and the stream of the answer."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from pixano_edge.engine.provider import ImageZeroShotDetectionInput
from tests.support.page_user import DEMO, SCENE, Recorder, User, answer_of, at_size, best_mask, differs, tinted

pytestmark = pytest.mark.browser


def test_boxes_of_named_classes_and_the_mask_in_one(user: User, provider: Recorder) -> None:
    user.open("detect")
    user.scene(4)
    user.page.get_by_label("Classes, separated by commas").fill("yellow circle, striped ellipse")
    user.page.get_by_role("button", name="Find").click()
    user.settled("detect", "box")
    scene = (DEMO / "scene-4.png").read_bytes()
    given = ImageZeroShotDetectionInput(
        scene,
        "grounding-dino-demo",
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


def test_no_vlm_and_a_stream_of_one(user: User) -> None:
    user.lacking("vlm")
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
    more = [{"name": name, "capability": "vlm", "status": "RUNNING"} for name in ("vlm", "other")]
    user.page.route("**/v1/models", lambda route: route.fulfill(json=more))
    user.page.locator("#panel-ask option", has_text="other").wait_for(state="attached")
    assert "3 tokens" in user.settled("ask"), "news about models do not wipe out what was answered"
    [request] = asked
    assert request["prompt"] == "How many cats?"
    assert request["maxNewTokens"] == 128
    head, _, content = request["images"][0].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(content) == (DEMO / "scene-1.png").read_bytes()


def test_the_demo_answers_about_its_own_picture(user: User) -> None:
    """The packaged model, end to end; another picture takes the questions away."""
    user.open("ask")
    user.page.get_by_role("button", name="Picture to ask about").first.click()
    user.page.locator("#image-facts", has_text="talk-1").wait_for()
    asked = json.loads((DEMO / "talk.json").read_text())["pictures"][0]["questions"]
    for pair in (asked[0], asked[-1]):  # a word, a caption
        user.page.get_by_role("button", name=pair["question"], exact=True).click()
        user.page.locator("#panel-ask .answer", has_text=pair["answer"]).wait_for()
        user.settled("ask", "tokens")
        assert user.page.inner_text("#panel-ask .answer").strip() == pair["answer"]
    user.scene(1)
    assert user.page.get_by_role("button", name=asked[0]["question"], exact=True).count() == 0
