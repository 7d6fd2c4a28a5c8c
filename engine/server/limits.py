"""The body limit: 413 by what the request says of its length, and by counting where it says nothing or lies.

And the limit over all requests: 503 to a body that has no room beside those under way. A body holds its room from its
first byte, or from its stated length, until its request is answered, since it is in memory as long.
"""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RETRY_AFTER_S, error_body, request_id

LINGER_S = 10.0
LINGER_BYTES = 512 << 20
"""How long, and how much of, a refused body is read and dropped: a client that is still sending does not look for an
answer, and closing the connection under it would take the answer away."""


class _TooLarge(Exception):
    """More arrived than is allowed."""


class _NoRoom(Exception):
    """More arrived, by all requests together, than is allowed."""


class BodyLimitMiddleware:
    """Refuses bodies of more than `limit` bytes, and those for which `total` leaves no room.

    Args:
        app: What reads the body.
        limit: Bytes of one body.
        total: Bytes of all bodies under way; None for no bound. One body of `limit` bytes always has room when it is
            alone.
    """

    def __init__(self, app: ASGIApp, limit: int, total: int | None = None) -> None:
        self.app = app
        self.limit = limit
        self._total = None if total is None else max(limit, total)
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = _length(scope)
        if length is not None and length > self.limit:
            await self._refuse(scope, receive, send, length)
            return
        if not self._has_room(length or 0):
            await self._refuse(scope, receive, send, length, full=True)
            return
        held = length or 0
        self._held += held
        seen, started = 0, False

        async def counted() -> Message:
            nonlocal seen, held
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self.limit:
                    raise _TooLarge
                if seen > held:
                    if not self._has_room(seen - held):
                        raise _NoRoom
                    self._held += seen - held
                    held = seen
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except _TooLarge:
            if started:
                raise
            await self._refuse(scope, receive, send, None)
        except _NoRoom:
            if started:
                raise
            await self._refuse(scope, receive, send, None, full=True)
        finally:
            self._held -= held

    def _has_room(self, nbytes: int) -> bool:
        return not nbytes or self._total is None or self._held + nbytes <= self._total

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, length: int | None, full: bool = False) -> None:
        headers = dict(scope["headers"])
        # A client that asks first has sent nothing, and will not.
        asks = headers.get(b"expect", b"").lower() == b"100-continue"
        drain = not asks and (length is None or length <= LINGER_BYTES)
        status, message = 413, f"The request body is larger than this server's limit of {self.limit} bytes."
        action = "Send less, or raise max_request_body_bytes."
        if full:
            status, message = 503, "The requests under way leave no room for this one's body."
            action = "Send it again in a moment."
        body = error_body(status, f"{message} {action}", request_id(scope))
        sent = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if not drain or length is None:
            sent.append((b"connection", b"close"))
        if full:
            sent.append((b"retry-after", str(RETRY_AFTER_S).encode()))
        await send({"type": "http.response.start", "status": status, "headers": sent})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        if drain:
            await _drain(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _length(scope: Scope) -> int | None:
    value = next((v for k, v in scope["headers"] if k == b"content-length"), None)
    return int(value) if value is not None and value.isdigit() else None


async def _drain(receive: Receive) -> None:
    end, left = time.monotonic() + LINGER_S, LINGER_BYTES
    while left > 0 and (rest := end - time.monotonic()) > 0:
        try:
            message = await asyncio.wait_for(receive(), rest)
        except asyncio.TimeoutError:
            return
        left -= len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
