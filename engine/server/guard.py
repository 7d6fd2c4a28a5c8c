"""Requests that a web page makes through somebody's browser: only pages of this server, or of allowed origins.

Without this any page that an annotator has open could send work to a server on the same machine, or, with a name that
resolves to 127.0.0.1, read its answers. Browsers name the page in ``Origin``; Pixano and other programs send none. A
page that reads from where it came from names no origin either, so there the name that it used, ``Host``, must be one of
this machine.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import error_response, request_id


class BrowserGuard:
    """Answers 403 to pages of other origins.

    Args:
        app: What it guards.
        origins: Origins that may call; ``*`` for all. Their names are good in ``Host``, too: a proxy may keep them.
        loopback_only: Whether the server is for this machine alone and has no keys, so that a page under any other
            name than the machine's own is a trick. Not so with keys: such a page would need one.
    """

    def __init__(self, app: ASGIApp, origins: Iterable[str], loopback_only: bool) -> None:
        self.app = app
        self._origins = frozenset(origin.lower().rstrip("/") for origin in origins)
        self._hosts = frozenset(_name(origin.partition("://")[2]) for origin in self._origins)
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(dict(scope["headers"]))
            if refusal is not None:
                await error_response(403, refusal, request_id(scope))(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, headers: dict[bytes, bytes]) -> str | None:
        origin = headers.get(b"origin", b"").decode("latin-1").lower().rstrip("/")
        host = headers.get(b"host", b"").decode("latin-1").strip().lower()
        if "*" in self._origins:
            return None
        if origin and not (origin in self._origins or self._same(origin, host)):
            return (
                f"Pages of {origin[:100]!r} may not call this server. Add the origin to cors_allow_origins if they "
                "should."
            )
        # Browsers always send a host; what sends none is none.
        if self._loopback_only and host and not (_is_loopback(_name(host)) or _name(host) in self._hosts):
            return (
                f"This server goes by 127.0.0.1 or localhost, not by {host[:100]!r}. Set API keys, or add the origin "
                "to cors_allow_origins, to use it by another name."
            )
        return None

    def _same(self, origin: str, host: str) -> bool:
        try:
            page = urlsplit(origin)
            name = page.hostname or ""
        except ValueError:
            return False
        return page.netloc == host and (not self._loopback_only or _is_loopback(name))


def _name(host: str) -> str:
    """A host without its port; empty for a malformed one."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback  # no name server has a say in numbers
    except ValueError:
        return False
