"""Requests that a web page makes through somebody's browser: only pages of this server, or of allowed origins.

Without this any page that an annotator has open could send work to a server on the same machine, or, with a name that
resolves to 127.0.0.1, read its answers. Browsers name the page in ``Origin``; Pixano and other programs send none.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import error_response, request_id

_LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


class BrowserGuard:
    """Answers 403 to pages of other origins.

    Args:
        app: What it guards.
        origins: Origins that may call; ``*`` for all.
        loopback_only: Whether the server is for this machine alone and has no keys, so that a page under any other
            name than the machine's own is a trick.
    """

    def __init__(self, app: ASGIApp, origins: Iterable[str], loopback_only: bool) -> None:
        self.app = app
        self._origins = frozenset(origin.lower().rstrip("/") for origin in origins)
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            origin = headers.get(b"origin", b"").decode("latin-1").lower().rstrip("/")
            if origin and not self._allowed(origin, headers.get(b"host", b"").decode("latin-1").lower()):
                message = (
                    f"Pages of {origin[:100]!r} may not call this server. Add the origin to cors_allow_origins if they "
                    "should."
                )
                await error_response(403, message, request_id(scope))(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _allowed(self, origin: str, host: str) -> bool:
        if "*" in self._origins or origin in self._origins:
            return True
        try:
            page = urlsplit(origin)
            name = page.hostname
        except ValueError:
            return False
        return page.netloc == host and (not self._loopback_only or name in _LOOPBACK)
