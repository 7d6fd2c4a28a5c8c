"""API keys: ``X-API-Key: key`` or ``Authorization: Bearer key``. Everything is guarded but a short list of paths."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from ..provider.callers import asking
from .errors import error_response, request_id

OPEN_PATHS = frozenset(
    (
        *(f"{prefix}/{name}" for prefix in ("", "/v1") for name in ("health", "ready", "metrics", "info")),
        "/openapi.json",
    )
)
"""Answered without a key: what probes and monitoring read."""


class Keys:
    """A set of keys, compared in constant time: neither length nor content of a key shows in the time.

    Args:
        keys: Accepted keys.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, key: bytes) -> bool:
        """Whether a key is one of them; looks at all of them in any case."""
        digest = hashlib.sha256(key).digest()
        return any([hmac.compare_digest(digest, known) for known in self._digests])  # noqa: C419 (no early end)


def given_key(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The key of a request, None where there is none."""
    key = headers.get(b"x-api-key", b"").strip()
    if key:
        return key
    scheme, _, token = headers.get(b"authorization", b"").strip().partition(b" ")
    return token.strip() or None if scheme.lower() == b"bearer" else None


class AuthMiddleware:
    """Refuses before a byte of the body is read: 401 without a key, 403 with a wrong one.

    Args:
        app: What it guards.
        keys: Accepted keys; without any, nothing is guarded.
        open_paths: Exact paths without a key.
        open_prefixes: Beginnings of such paths, for static files.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, open_paths: Iterable[str] = OPEN_PATHS, open_prefixes: Iterable[str] = ()
    ) -> None:
        self.app = app
        self._keys = keys
        self._open = frozenset(open_paths)
        self._prefixes = tuple(open_prefixes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not self._keys or self._is_open(scope["path"]):
            # Without keys, whoever shares an address shares a turn at a busy model.
            with asking((scope.get("client") or ("",))[0]):
                await self.app(scope, receive, send)
            return
        key = given_key(dict(scope["headers"]))
        if key is None:
            message = "This server needs an API key: send it as 'X-API-Key' or 'Authorization: Bearer'."
            refused = error_response(401, message, request_id(scope), {"WWW-Authenticate": "Bearer"})
        elif not self._keys.accept(key):
            refused = error_response(403, "The API key is not one of this server's.", request_id(scope))
        else:
            with asking(hashlib.sha256(key).hexdigest()[:16]):
                await self.app(scope, receive, send)
            return
        await refused(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in self._open or path.startswith(self._prefixes)
