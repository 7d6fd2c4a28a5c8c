"""Who a request comes from: the holder of an API key, or without keys an address. Callers take turns at a model."""

from __future__ import annotations

import hashlib

from starlette.types import ASGIApp, Receive, Scope, Send

from ..provider.callers import asking
from .auth import given_key


class CallerMiddleware:
    """Says who asks, for everything that a request does.

    Args:
        app: What comes next.
        keyed: Whether the server has keys, so that that of a request was checked. Behind a proxy and without keys all
            have one address, and are one caller.
    """

    def __init__(self, app: ASGIApp, keyed: bool) -> None:
        self.app = app
        self._keyed = keyed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with asking(self._name(scope)):
            await self.app(scope, receive, send)

    def _name(self, scope: Scope) -> str:
        key = given_key(dict(scope["headers"])) if self._keyed else None
        if key is not None:
            return f"key {hashlib.sha256(key).hexdigest()[:16]}"
        client = scope.get("client")
        return f"address {client[0]}" if client else "address"
