"""Responses that come piece by piece, whose work ends when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .state import ClientGone, until_gone

NDJSON = "application/x-ndjson"
SSE = "text/event-stream"


class Streamed(Response):
    """Sends what an iterator yields.

    Args:
        first: The first piece; None for an empty answer.
        rest: The others.
        kind: Content type.
    """

    def __init__(self, first: bytes | None, rest: AsyncIterator[bytes], kind: str) -> None:
        # A proxy that collects the answer would take away what it is for.
        super().__init__(None, 200, {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}, kind)
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ClientGone
            sending.result()
        finally:
            for task in (sending, leaving):
                if not task.done():
                    task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await _close(self._rest)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._first is not None:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for piece in self._rest:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def closing(pieces: AsyncIterator[Any]) -> AsyncIterator[None]:
    """Ends the work behind an iterator when the block ends: an asynchronous generator does so at its own pace."""
    try:
        yield
    finally:
        await _close(pieces)


async def _close(pieces: AsyncIterator[Any]) -> None:
    close = getattr(pieces, "aclose", None)
    if close is not None:
        await close()


async def begin(request: Request, pieces: AsyncIterator[bytes], kind: str) -> Streamed:
    """A streamed response, once its first piece is there, so that an error before it is an ordinary error answer.

    Raises:
        ClientGone: The client hung up before.
    """

    async def first() -> bytes | None:
        try:
            return await pieces.__anext__()
        except StopAsyncIteration:
            return None

    return Streamed(await until_gone(request, first()), pieces, kind)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
