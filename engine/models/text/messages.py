"""What a request says: one text, or chat messages as OpenAI's interface has them, and its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import PromptError

ROLES = ("system", "user", "assistant")
MAX_CHARACTERS = 1_000_000
"""Of all texts of a request together. More would not fit any model; refused before it is tokenised."""
MAX_MESSAGES = 1000

_LOCATIONS = ("url", "path", "image", "data")


@dataclass(frozen=True)
class Part:
    """A piece of a message: a text, or the place of an image (`text` is None)."""

    text: str | None = None

    @property
    def is_image(self) -> bool:
        return self.text is None


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and texts and images in order."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Conversation:
    """A request in one form.

    Attributes:
        messages: Turns, the oldest first.
        images: What the request named for each place of an image, in order: not read yet, of whatever kind it was.
    """

    messages: tuple[Message, ...]
    images: tuple[Any, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text in order."""
        return tuple(p.text for m in self.messages for p in m.parts if p.text is not None)


def read_conversation(prompt: Any, images: Sequence[Any] | None = None, system: str | None = None) -> Conversation:
    """Brings the forms of a prompt into one.

    Args:
        prompt: A text, or messages ``{"role": ..., "content": ...}`` whose content is a text or a list of parts:
            ``{"type": "text", "text": ...}``, ``{"type": "image_url", "image_url": {"url": ...}}`` or
            ``{"type": "image"}``, which may name its image as ``url``, ``path``, ``image`` or ``data``.
        images: Images beside the prompt; None and an empty list are none. They win over what messages name: each takes
            the next place that the messages have, or, where these have none, stands before the first text of the user.
        system: One more turn in front, the model's instructions.

    Raises:
        PromptError: Malformed, of another role or type, not valid Unicode, empty, or longer than `MAX_CHARACTERS`.
    """
    given = () if images is None else _listed(images)
    if isinstance(prompt, str | bytes | bytearray):
        text = read_text(prompt, "The prompt")
        if not text.strip() and not given:
            raise PromptError("The prompt is empty.", "Ask something, for example 'What is on this image?'.")
        parts = (*(Part() for _ in given), *((Part(text),) if text else ()))
        found = Conversation((Message("user", parts),), given)
    else:
        found = _read_messages(prompt, given)
    if system:
        first = Message("system", (Part(read_text(system, "The system text")),))
        found = Conversation((first, *found.messages), found.images)
    total = sum(map(len, found.texts))
    if total > MAX_CHARACTERS:
        raise PromptError(f"The prompt has {total} characters, more than {MAX_CHARACTERS}.", "Send a shorter one.")
    return found


def read_text(value: Any, what: str) -> str:
    """A text of a request; bytes are read as UTF-8.

    Raises:
        PromptError: No text, or one that is not valid Unicode, which no tokeniser takes.
    """
    if isinstance(value, bytes | bytearray):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError as error:
            raise PromptError(f"{what} is not valid UTF-8: {error.reason} at byte {error.start}.", _UTF8) from error
    if not isinstance(value, str):
        raise PromptError(f"{what} must be a text, got {type(value).__name__}.", "Send a string.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"{what} holds half a character at position {error.start}.", _UTF8) from error
    return value


_UTF8 = "Send the text as valid UTF-8."


def _listed(images: Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(images, str | bytes | bytearray | Mapping) or not isinstance(images, Sequence):
        raise PromptError(f"images must be a list, got {type(images).__name__}.", "Send for example ['photo.jpg'].")
    return tuple(images)


def _read_messages(prompt: Any, given: tuple[Any, ...]) -> Conversation:
    if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence):
        raise PromptError(
            f"prompt must be a text or a list of messages, got {type(prompt).__name__}.",
            "Send for example [{'role': 'user', 'content': 'What is on this image?'}].",
        )
    if not prompt:
        raise PromptError("There are no messages.", "Send at least one of the user.")
    if len(prompt) > MAX_MESSAGES:
        raise PromptError(f"{len(prompt)} messages are more than {MAX_MESSAGES}.", "Leave out the oldest ones.")
    named: list[Any] = []
    messages = [_read_message(message, index, named) for index, message in enumerate(prompt)]
    if not any(m.role == "user" for m in messages):
        raise PromptError("No message is of the role 'user'.", "Send at least one of the user.")
    if not given:
        for index, image in enumerate(named):
            if image is None:
                raise PromptError(
                    f"Image {index} of the messages is not named.", "Give its 'url', or send images=[...]."
                )
        return Conversation(tuple(messages), tuple(named))
    if not named:
        first = next(i for i, m in enumerate(messages) if m.role == "user")
        messages[first] = Message("user", (*(Part() for _ in given), *messages[first].parts))
    elif len(named) != len(given):
        raise PromptError(
            f"{len(given)} images were sent for {len(named)} places in the messages.",
            "Send one for each, or leave the places out of the messages.",
        )
    return Conversation(tuple(messages), given)


def _read_message(message: Any, index: int, named: list[Any]) -> Message:
    where = f"Message {index}"
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} must be an object, got {type(message).__name__}.", "Give it a role and content.")
    role = message.get("role")
    if role not in ROLES:
        raise PromptError(f"{where} has the role {role!r:.60}.", f"Roles: {', '.join(ROLES)}.")
    content = message.get("content")
    if content is None:
        content = []
    if isinstance(content, str | bytes | bytearray):
        content = [{"type": "text", "text": content}]
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise PromptError(f"{where} has content of type {type(content).__name__}.", "Send a text or a list of parts.")
    return Message(
        role, tuple(_read_part(part, f"Part {i} of message {index}", named) for i, part in enumerate(content))
    )


def _read_part(part: Any, where: str, named: list[Any]) -> Part:
    if isinstance(part, str | bytes | bytearray):
        return Part(read_text(part, where))
    if not isinstance(part, Mapping):
        raise PromptError(
            f"{where} must be an object, got {type(part).__name__}.", "Send {'type': 'text', 'text': ...}."
        )
    kind = part.get("type")
    if kind == "text":
        return Part(read_text(part.get("text"), where))
    if kind == "image_url":
        value = part.get("image_url")
        named.append(value.get("url") if isinstance(value, Mapping) else value)
        return Part()
    if kind == "image":
        named.append(next((part[key] for key in _LOCATIONS if part.get(key) is not None), None))
        return Part()
    raise PromptError(f"{where} is of the type {kind!r:.60}.", "Types: text, image_url, image.")
