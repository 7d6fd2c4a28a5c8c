"""Providers by name. A provider is known once the module that defines it was imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .base import InferenceProvider
from .errors import ProviderNotFoundError

ProviderClass = TypeVar("ProviderClass", bound=type[InferenceProvider])

_PROVIDERS: dict[str, type[InferenceProvider]] = {}


def register_provider(name: str) -> Callable[[ProviderClass], ProviderClass]:
    """Class decorator that makes a provider known as `name`; a later class with the same name replaces it.

    Raises:
        TypeError: What is decorated is not a subclass of `InferenceProvider`.
    """

    def register(cls: ProviderClass) -> ProviderClass:
        if not (isinstance(cls, type) and issubclass(cls, InferenceProvider)):
            raise TypeError(f"register_provider('{name}') needs a subclass of InferenceProvider, got {cls!r}")
        _PROVIDERS[name] = cls
        return cls

    return register


def get_provider(name: str, **arguments: Any) -> InferenceProvider:
    """Makes a provider; `arguments` go to its constructor.

    Raises:
        ProviderNotFoundError: With the known names.
    """
    if name not in _PROVIDERS:
        raise ProviderNotFoundError(
            f"There is no provider '{name}'.", f"Known: {', '.join(list_providers()) or 'none'}."
        )
    return _PROVIDERS[name](**arguments)


def list_providers() -> list[str]:
    """Known names in alphabetical order."""
    return sorted(_PROVIDERS)


def is_provider_registered(name: str) -> bool:
    """Whether `get_provider` knows this name."""
    return name in _PROVIDERS
