"""From a conversation to token ids: the template's control tokens count, those that a user wrote do not.

The original processors render everything to one text and tokenise that, so a user who writes ``<end_of_utterance>`` or
``<image>`` ends the turn or asks for an image. Here such names in the texts of a request stay the characters they are;
a text without them gives exactly the original's tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from ...errors import BundleError, PromptError
from .messages import Conversation, Message, Part
from .template import ChatTemplate
from .tokenizer import TextTokenizer

_PRIVATE = [chr(code) for code in range(0xE000, 0xE100)]
"""Characters that Unicode leaves to private use; two that do not occur mark what must stay plain text."""


def encode_conversation(
    conversation: Conversation,
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    image_token: str,
    expand: Callable[[int], str],
) -> list[int]:
    """Token ids of a conversation up to where the answer starts.

    Args:
        conversation: What to say.
        template: The model's.
        tokenizer: The model's.
        image_token: What the template writes in the place of an image.
        expand: For the number of an image, what stands there instead: its markers and one `image_token` for each of
            its features.

    Raises:
        PromptError: The template refuses the conversation, or texts next to each other make a control token.
        BundleError: The template fails, or leaves out images or texts.
    """
    names = [*tokenizer.special, *([] if image_token in tokenizer.special else [image_token])]
    control = re.compile("|".join(sorted(map(re.escape, names), key=len, reverse=True))) if names else None
    joined = "".join(conversation.texts)
    start, end = (mark for mark, _ in zip((c for c in _PRIVATE if c not in joined), range(2)))
    literals: list[str] = []

    def guard(text: str) -> str:
        def note(found: re.Match[str]) -> str:
            literals.append(found.group())
            return f"{start}{len(literals) - 1}{end}"

        return control.sub(note, text) if control is not None else text

    rendered = template.render(_mapped(conversation.messages, guard))
    if control is not None:
        expected = control.findall(template.render(_mapped(conversation.messages, lambda text: "x" if text else "")))
        if control.findall(re.sub(f"{start}[0-9]+{end}", "", rendered)) != expected:
            raise PromptError(
                "Texts of the prompt that stand next to each other make a control token of the model.",
                "Put something between them, or send them as one text.",
            )
    count = 0

    def place(_: re.Match[str]) -> str:
        nonlocal count
        count += 1
        return expand(count - 1) if count <= len(conversation.images) else ""

    ids: list[int] = []
    for number, piece in enumerate(re.split(f"{start}([0-9]+){end}", rendered)):
        if number % 2:
            ids += _plain(literals[int(piece)], tokenizer)
        elif piece:
            ids += tokenizer.encode(re.sub(re.escape(image_token), place, piece))
    if count != len(conversation.images):
        raise BundleError(
            f"The chat template has {count} places for {len(conversation.images)} images.",
            "Export the bundle again, or mend its chat template.",
        )
    return ids


def _plain(text: str, tokenizer: TextTokenizer) -> list[int]:
    ids = tokenizer.encode_plain(text)
    controls = set(tokenizer.special.values())
    if controls.isdisjoint(ids):
        return ids
    return [i for part in (text[:1], text[1:]) for i in tokenizer.encode_plain(part)]


def _mapped(messages: tuple[Message, ...], change: Callable[[str], str]) -> list[Message]:
    return [replace(m, parts=tuple(p if p.text is None else Part(change(p.text)) for p in m.parts)) for m in messages]
