"""Frozen dataclasses as plain data for JSON, and back, checked field by field by their types."""

from __future__ import annotations

import base64
import math
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

T = TypeVar("T")


def plain(value: Any) -> Any:
    """A dataclass, or what its fields may be, ready for JSON: bytes as base64, NaN and infinity as None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def build(kind: type[T], content: dict[str, Any]) -> T:
    """A dataclass from its plain form.

    Raises:
        TypeError, ValueError, KeyError, AttributeError: It is no such form: unknown or missing fields, other types.
    """
    hints = get_type_hints(kind)
    if unknown := set(content) - set(hints):
        raise ValueError(f"{kind.__name__} has no {sorted(unknown)}")
    return kind(**{name: _value(hints[name], value) for name, value in content.items()})


def _value(hint: Any, value: Any) -> Any:
    """One field's value from its plain form, by the field's type."""
    if get_origin(hint) is tuple:
        return tuple(_value(get_args(hint)[0], item) for item in value)
    choices = get_args(hint)
    if choices:  # `X | None`
        return None if value is None else _value(choices[0], value)
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value)
    if hint is bytes:
        return base64.b64decode(value, validate=True)
    if hint is float:
        return math.nan if value is None else float(value)
    if not isinstance(value, hint):
        raise TypeError(f"{value!r} is no {hint.__name__}")
    return value
