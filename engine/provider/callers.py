"""Who asks: set by a server for each request, read where requests of many wait for one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_CALLER: ContextVar[str] = ContextVar("pixano_edge_caller", default="")


def caller() -> str:
    """Whom the running request belongs to; empty where nobody said."""
    return _CALLER.get()


@contextmanager
def asking(name: str) -> Iterator[None]:
    """Runs what is within for one caller: an API key's digest, or an address. Tasks made there inherit it."""
    token = _CALLER.set(name)
    try:
        yield
    finally:
        _CALLER.reset(token)
