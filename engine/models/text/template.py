"""The chat template of a bundle: Jinja2 in a sandbox, with bounds of size and time.

A template is a program that came with the checkpoint, so it gets no file, no attribute that starts with an underscore
and no object that it could change, and it must end: every turn of a loop, every call and every operator that can make
something large passes a check of the clock and of the size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ...errors import BundleError, PromptError
from .messages import MAX_CHARACTERS, Message
from .tokenizer import require_text_libraries

MAX_TEMPLATE = 256 << 10
"""Bytes of a template; the longest of well-known models has 20 thousand."""
MAX_SECONDS = 2.0
MAX_RENDERED = 4 * MAX_CHARACTERS
"""Characters that a template may make."""

_LARGE_FILTERS = ("center", "format", "indent", "wordwrap", "batch", "slice", "xmlattr", "urlize", "pprint", "random")
"""Of Jinja2: what makes something large out of nothing, or depends on chance; no chat template needs them."""

_BROKEN = "Export the bundle again, or mend its chat template."


class ChatTemplate:
    """Turns messages into the text that the model was trained on. Thread-safe.

    Args:
        source: The template.
        variables: Names that it may use beside ``messages`` and ``add_generation_prompt``, such as ``bos_token``.

    Raises:
        MissingDependencyError: Jinja2 is not installed.
        BundleError: Too large, not UTF-8, or no template.
    """

    def __init__(self, source: str | bytes, variables: Mapping[str, str] | None = None) -> None:
        require_text_libraries()
        import jinja2

        if len(source) > MAX_TEMPLATE:
            raise BundleError(f"The chat template has {len(source)} bytes, more than {MAX_TEMPLATE}.", _BROKEN)
        self._variables = dict(variables or {})
        self._clock = _Clock()
        try:
            text = source.decode("utf-8") if isinstance(source, bytes) else source
            self._template = _compile(text, self._clock)
        except (jinja2.TemplateError, UnicodeDecodeError, RecursionError) as error:
            raise BundleError(f"The chat template cannot be read: {_short(error)}.", _BROKEN) from error

    def render(self, messages: Sequence[Message], *, generate: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: Turns. Their contents reach the template as lists of parts ``{"type": "text", "text": ...}`` and
                ``{"type": "image"}``, never as plain texts: templates of vision models index them.
            generate: Ask for the start of the assistant's turn.

        Raises:
            PromptError: The template refuses the conversation (``raise_exception``).
            BundleError: It fails, takes too long or makes too much.
        """
        import jinja2

        told = [
            {
                "role": message.role,
                "content": [
                    {"type": "image"} if part.is_image else {"type": "text", "text": part.text}
                    for part in message.parts
                ],
            }
            for message in messages
        ]
        pieces: list[str] = []
        size = 0
        try:
            with self._clock.running():
                for piece in self._template.generate(
                    messages=told, add_generation_prompt=generate, tools=None, documents=None, **self._variables
                ):
                    self._clock.tick()
                    pieces.append(piece)
                    size += len(piece)
                    self._clock.measure(size)
        except _Refused as error:
            raise PromptError(
                f"The model's chat template refuses this conversation: {error}", "Send another."
            ) from error
        except (jinja2.TemplateError, _Endless, RecursionError, ArithmeticError, LookupError, TypeError, ValueError,
                AttributeError) as error:  # fmt: skip
            raise BundleError(f"The chat template fails: {_short(error)}.", _BROKEN) from error
        return "".join(pieces)


class _Refused(Exception):
    """The template called ``raise_exception``."""


class _Endless(Exception):
    """The template went over its time or size."""


class _Clock:
    """When the rendering of each thread must be over."""

    def __init__(self) -> None:
        import threading

        self._local = threading.local()

    def running(self) -> _Clock:
        self._local.end = time.monotonic() + MAX_SECONDS
        return self

    def __enter__(self) -> _Clock:
        return self

    def __exit__(self, *_: object) -> None:
        self._local.end = None

    def tick(self) -> str:
        end = getattr(self._local, "end", None)
        if end is not None and time.monotonic() > end:
            raise _Endless(f"it takes longer than {MAX_SECONDS:g} s")
        return ""

    @staticmethod
    def measure(size: int) -> None:
        if size > MAX_RENDERED:
            raise _Endless(f"it makes more than {MAX_RENDERED} characters")


def _compile(source: str, clock: _Clock) -> Any:
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "+", "%"))

        def call(self, *args: Any, **kwargs: Any) -> Any:
            clock.tick()
            return super().call(*args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            clock.tick()
            if operator == "**":
                raise _Endless("it takes powers of numbers")
            if operator == "*":
                clock.measure(max(_length(left) * _number(right), _length(right) * _number(left)))
            elif operator == "+":
                clock.measure(_length(left) + _length(right))
            elif isinstance(left, str):
                raise _Endless("it formats with '%'")
            return super().call_binop(context, operator, left, right)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False
    )
    for name in _LARGE_FILTERS:
        environment.filters.pop(name, None)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=None if indent is None else min(indent, 8))

    def refuse(message: Any) -> None:
        raise _Refused(str(message)[:200])

    def join(*parts: Any) -> str:
        texts = [str(part) for part in parts]
        clock.measure(sum(map(len, texts)))
        return "".join(texts)

    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=refuse,
        strftime_now=lambda form: datetime.now().strftime(str(form)[:100]),
        pixano_edge_tick=clock.tick,
        pixano_edge_join=join,
    )
    environment.globals.pop("lipsum", None)
    tree = environment.parse(source)
    for loop in tree.find_all(nodes.For):
        tick = nodes.Call(nodes.Name("pixano_edge_tick", "load"), [], [], None, None, lineno=loop.lineno)
        loop.body.insert(0, nodes.ExprStmt(tick, lineno=loop.lineno))
    _replace_concatenations(tree)
    return environment.from_string(tree)


def _replace_concatenations(node: Any) -> None:
    """``a ~ b`` becomes a call that looks at the size: the sandbox intercepts other operators, not this one."""
    from jinja2 import nodes

    for field, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            _replace_concatenations(value)
            if isinstance(value, nodes.Concat):
                setattr(node, field, _joined(value))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _replace_concatenations(item)
                    if isinstance(item, nodes.Concat):
                        value[index] = _joined(item)


def _joined(node: Any) -> Any:
    from jinja2 import nodes

    name = nodes.Name("pixano_edge_join", "load", lineno=node.lineno)
    return nodes.Call(name, node.nodes, [], None, None, lineno=node.lineno)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200].rstrip(".")
