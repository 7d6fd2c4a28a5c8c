"""Runs the application with uvicorn: binds first, says where, and drains at SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from ..errors import EdgeError
from .app import create_app
from .deadlines import with_head_deadline
from .heap import share_heap
from .logs import configure
from .settings import ServerSettings

log = logging.getLogger("pixano_edge.server")

KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that none sends a request into a connection being closed."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        EdgeError: The address is not this machine's, taken, or not allowed.
    """
    listening: socket.socket | None = None
    bound = False
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        # asyncio switches Nagle's algorithm off only where the protocol is named; with it, an answer in two writes
        # waits 40 ms for the client's acknowledgement of the first.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(2048)
        bound = True
        return listening
    except OSError as error:
        raise EdgeError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}.",
            "Choose another --port (0 takes a free one) or --host, or stop what listens there.",
        ) from error
    finally:
        if listening is not None and not bound:
            listening.close()


def url_of(listening: socket.socket) -> str:
    """Where clients reach a socket: ``http://host:port``."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def uvicorn_config(app: Any, settings: ServerSettings) -> uvicorn.Config:
    """How uvicorn runs the application; logging is configured apart."""
    return uvicorn.Config(
        app,
        http=with_head_deadline(settings.head_timeout_s),
        ws="none",  # there are no WebSockets, and a request to become one is an ordinary one
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout_s)),
    )


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which says that it ends before it closes its listener, and only then.

    Args:
        config: As of `uvicorn_config`.
        leaving: Called once, at the beginning of the end.
        delay: Seconds that the listener stays open then; a second signal ends them.
    """

    def __init__(self, config: uvicorn.Config, leaving: Callable[[], None], delay: float) -> None:
        super().__init__(config)
        self._leaving = leaving
        self._delay = delay

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, after the delay."""
        self._leaving()
        end = time.monotonic() + self._delay
        while not self.force_exit and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.1))
        await super().shutdown(sockets)


def serve(settings: ServerSettings, announce: Callable[[str], None] = lambda url: None) -> None:
    """Serves until SIGINT or SIGTERM: ``ready`` answers 503 then, after `shutdown_delay_s` there is no new connection,
    requests under way have `shutdown_timeout_s` to end, models are unloaded, and jobs that run are marked by their
    store.

    Args:
        settings: What to serve.
        announce: Gets the address once it is bound; requests that come from then on wait until the start is done.

    Raises:
        EdgeError: The address is refused or taken, or the provider cannot be made.
    """
    settings.check_bind()
    share_heap()
    configure(settings.log_level, settings.log_json)
    listening = bind(settings.host, settings.port)
    try:
        app = create_app(settings)
        announce(url_of(listening))
        DrainingServer(uvicorn_config(app, settings), app.state.server.leave, settings.shutdown_delay_s).run(
            sockets=[listening]
        )
    finally:
        listening.close()
