"""Prompts in all their forms."""

from __future__ import annotations

import pytest

from pixano_edge.engine.errors import PromptError
from pixano_edge.engine.models.text.messages import MAX_CHARACTERS, Message, Part, read_conversation

URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}


def test_text_with_images() -> None:
    found = read_conversation("What?", ["a.png", b"bytes"])
    assert found.messages == (Message("user", (Part(), Part(), Part("What?"))),)
    assert found.images == ("a.png", b"bytes")


@pytest.mark.parametrize("images", [None, [], ()])
def test_no_images(images: object) -> None:
    assert read_conversation("Hello", images) == read_conversation([{"role": "user", "content": "Hello"}])  # type: ignore[arg-type]
    assert read_conversation([{"role": "user", "content": [URL]}], images).images == ("data:image/png;base64,AA",)  # type: ignore[arg-type]


def test_images_beside_messages_win() -> None:
    prompt = [{"role": "user", "content": ["Look: ", URL, {"type": "text", "text": "?"}]}]
    assert read_conversation(prompt, ["mine.png"]).images == ("mine.png",)
    assert read_conversation(prompt, ["mine.png"]).messages == read_conversation(prompt).messages


def test_images_beside_messages_without_places_stand_first() -> None:
    prompt = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What?"}]
    found = read_conversation(prompt, ["a", "b"])
    assert found.messages[1].parts == (Part(), Part(), Part("What?"))
    assert found.images == ("a", "b")


def test_image_parts_may_name_their_image_in_several_ways() -> None:
    parts = [{"type": "image", key: key} for key in ("url", "path", "image", "data")]
    parts.append({"type": "image_url", "image_url": "plain"})
    assert read_conversation([{"role": "user", "content": parts}]).images == ("url", "path", "image", "data", "plain")


def test_system_text_comes_first() -> None:
    assert read_conversation("Hi", system="Be short.").messages[0] == Message("system", (Part("Be short."),))


@pytest.mark.parametrize(
    ("prompt", "images", "words"),
    [
        ("", None, "empty"),
        ("  ", [], "empty"),
        (3, None, "int"),
        ({"role": "user"}, None, "dict"),
        ([], None, "no messages"),
        (["Hi"], None, "Message 0 must be an object"),
        ([{"role": "robot", "content": "Hi"}], None, "'robot'"),
        ([{"role": "assistant", "content": "Hi"}], None, "role 'user'"),
        ([{"role": "user", "content": 3}], None, "int"),
        ([{"role": "user", "content": [{"type": "audio"}]}], None, "Part 0 of message 0 is of the type 'audio'"),
        ([{"role": "user", "content": [{"type": "text"}]}], None, "must be a text"),
        ([{"role": "user", "content": [{"type": "image"}]}], None, "Image 0 of the messages is not named"),
        ([{"role": "user", "content": [URL]}], ["a", "b"], "2 images were sent for 1 places"),
        ([{"role": "user", "content": "x"}] * 1001, None, "1001 messages"),
        ("Hi", "a.png", "images must be a list"),
        ("half \ud83d", None, "half a character at position 5"),
        (b"half \xc3", None, "not valid UTF-8"),
        ("x" * (MAX_CHARACTERS + 1), None, "1000001 characters"),
    ],
)  # fmt: skip
def test_malformed(prompt: object, images: object, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        read_conversation(prompt, images)  # type: ignore[arg-type]
