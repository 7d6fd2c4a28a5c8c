"""A deadline for the head of a request: who opens connections and sends next to nothing does not keep them.

uvicorn closes a connection that idles after an answer; one that has not asked anything yet, or sends a byte now and
then, stays for ever. Here a connection has a few seconds to bring a whole head, and as long for what comes after an
answer without being the next request, such as the rest of a refused upload. The body has its own deadlines
(:mod:`.bodies`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

log = logging.getLogger("pixano_edge.server")


def with_head_deadline(seconds: float, base: type[asyncio.Protocol] = AutoHTTPProtocol) -> type[asyncio.Protocol]:
    """uvicorn's protocol, whose connections are closed `seconds` after they began to wait for a head in vain.

    Args:
        seconds: From the connection, or from the first byte after the last answer, to the end of the head.
        base: One of uvicorn's protocols for HTTP/1.1.
    """
    protocol: Any = base

    class DeadlineProtocol(protocol):  # type: ignore[misc]
        """One connection."""

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._deadline = self.loop.call_later(seconds, self._expired)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._settle()
            elif self._deadline is None:  # more bytes of the same head do not move it
                self._deadline = self.loop.call_later(seconds, self._expired)

        def connection_lost(self, exc: Exception | None) -> None:
            self._settle()
            super().connection_lost(exc)

        def _settle(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _expired(self) -> None:
            self._deadline = None
            if self.transport.is_closing():
                return
            log.info("%s sent no whole request in %g s: connection closed", (self.client or ("a client",))[0], seconds)
            self.transport.close()

    return DeadlineProtocol
